package main

import (
	"fmt"
	"strings"

	"github.com/projectcalico/calico/felix/environment"
	"github.com/projectcalico/calico/felix/iptables"
	"github.com/projectcalico/calico/felix/proto"
)

// Chains in both languages at once, for the releases whose packages cannot be had as Go modules: conditions and actions as
// `felix/iptables/{match_builder,actions}.go` and `felix/nftables/{match_builder,actions}.go` write them.

// A chain of one of iptables' tables, and of the same layer in nftables' one table.
type chain struct {
	name  string
	rules []rule
}

type rule struct {
	when     when
	then     *action
	comments []string
}

// What a packet must be: words for iptables, and for nftables.
type when struct {
	iptables iptables.MatchCriteria
	nftables []string
}

func (w when) and(iptables, nftables string) when {
	return when{append(w.iptables[:len(w.iptables):len(w.iptables)], iptables), append(w.nftables[:len(w.nftables):len(w.nftables)], nftables)}
}

func (w when) both(other when) when {
	for index := range other.iptables {
		w = w.and(other.iptables[index], other.nftables[index])
	}
	return w
}

func any() when { return when{} }

func set(bit uint32) when {
	return any().and(fmt.Sprintf("-m mark --mark %#x/%#x", bit, bit), fmt.Sprintf("meta mark & %#x == %#x", bit, bit))
}

func clear(bits uint32) when {
	return any().and(fmt.Sprintf("-m mark --mark 0/%#x", bits), fmt.Sprintf("meta mark & %#x == 0", bits))
}

func state(names string) when {
	return any().and("-m conntrack --ctstate "+names, "ct state "+strings.ToLower(names))
}

func (w when) input(name string) when {
	return w.and("--in-interface "+name, "iifname "+strings.Replace(name, "+", "*", 1))
}

func (w when) output(name string) when {
	return w.and("--out-interface "+name, "oifname "+strings.Replace(name, "+", "*", 1))
}

func (w when) protocol(name string) when {
	return w.and("-p "+name, "meta l4proto "+name)
}

func (w when) from(set string) when {
	return w.and("-m set --match-set "+set+" src", "<IPV> saddr @"+legal(set))
}

func (w when) to(set string) when {
	return w.and("-m set --match-set "+set+" dst", "<IPV> daddr @"+legal(set))
}

func (w when) toLocal() when {
	return w.and("-m addrtype --dst-type LOCAL", "fib daddr type local")
}

func (w when) fromLocal() when {
	return w.and("-m addrtype --src-type LOCAL", "fib saddr type local")
}

type portRange = *proto.PortRange

// toPorts needs the protocol's name for nftables.
func (w when) toPorts(protocol string, ranges ...portRange) when {
	return w.ports("--destination-ports ", protocol+" dport ", ranges)
}

func (w when) fromPorts(protocol string, ranges ...portRange) when {
	return w.ports("--source-ports ", protocol+" sport ", ranges)
}

func (w when) ports(iptablesWord, nftablesWord string, ranges []portRange) when {
	var several []string
	for _, of := range ranges {
		if of.First == of.Last {
			several = append(several, fmt.Sprint(of.First))
		} else {
			several = append(several, fmt.Sprintf("%d-%d", of.First, of.Last))
		}
	}
	return w.and("-m multiport "+iptablesWord+iptables.PortRangesToMultiport(ranges),
		nftablesWord+"{ "+strings.Join(several, ", ")+" }")
}

// legal is a set's name as nftables takes it (`felix/nftables/ipsets.go`).
func legal(set string) string { return strings.ReplaceAll(set, ":", "-") }

// What becomes of it. Chains that it leads to are of the same layer.
type action struct {
	iptables string
	nftables string
	chain    string
}

// ToFragment makes it an action of Calico's own package for iptables.
func (a action) ToFragment(*environment.Features) string {
	return strings.TrimSpace(a.iptables + " " + a.chain)
}

func (a action) String() string { return a.ToFragment(nil) }

func accept() *action { return &action{iptables: "--jump ACCEPT", nftables: "accept"} }
func drop() *action   { return &action{iptables: "--jump DROP", nftables: "drop"} }
func reject() *action { return &action{iptables: "--jump REJECT", nftables: "reject"} }
func back() *action   { return &action{iptables: "--jump RETURN", nftables: "return"} }

func notrack() *action { return &action{iptables: "--jump NOTRACK", nftables: "notrack"} }

func masquerade() *action {
	return &action{iptables: "--jump MASQUERADE --random-fully", nftables: "masquerade fully-random"}
}

func jump(to string) *action { return &action{iptables: "--jump", nftables: "jump", chain: to} }
func goTo(to string) *action { return &action{iptables: "--goto", nftables: "goto", chain: to} }

func mark(bits uint32) *action {
	return &action{iptables: fmt.Sprintf("--jump MARK --set-mark %#x/%#x", bits, bits), nftables: fmt.Sprintf("meta mark set mark or %#x", bits)}
}

func unmark(bits uint32) *action {
	return &action{iptables: fmt.Sprintf("--jump MARK --set-mark 0/%#x", bits), nftables: fmt.Sprintf("meta mark set mark & %#x", ^bits)}
}

func remark(bits, mask uint32) *action {
	return &action{
		iptables: fmt.Sprintf("--jump MARK --set-mark %#x/%#x", bits, mask),
		nftables: fmt.Sprintf("meta mark set mark & %#x ^ %#x", ^mask, bits),
	}
}

func logged(prefix string) *action {
	return &action{
		iptables: fmt.Sprintf(`--jump LOG --log-prefix "%s: " --log-level 5`, prefix),
		nftables: fmt.Sprintf(`log prefix "%s: " level info`, prefix),
	}
}

func nflog(group int, prefix string) *action {
	return &action{
		iptables: fmt.Sprintf("--jump NFLOG --nflog-group %d --nflog-prefix %s --nflog-size 80", group, prefix),
		nftables: fmt.Sprintf(`log prefix "%s" snaplen 80 group %d`, prefix, group),
	}
}
