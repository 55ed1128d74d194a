package main

import (
	"crypto/sha3"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"

	"maps"

	"github.com/projectcalico/calico/felix/hashutils"
	"github.com/projectcalico/calico/felix/iptables"
	"github.com/projectcalico/calico/felix/proto"
	"github.com/projectcalico/calico/felix/rules"
)

// Chains of endpoints, policies and profiles by hand, from `felix/rules/{endpoints,policy,dispatch,nflogprefix}.go`.

// A release after v3.28, as far as its rules differ from those of others.
type release struct {
	settings
	// Policies are told by their kinds, which they are from v3.32 on.
	kinds bool
	// Log rules stand before rules that allow, deny or pass.
	flowLogs bool
	// The rules are for nftables, where names may be long and interfaces are looked up in maps.
	nftables bool
}

// deny is what becomes of packets that are denied; some rules drop whatever is configured.
func (r release) deny() *action {
	if r.rejects {
		return reject()
	}
	return drop()
}

// denied is the word for it in comments.
func (r release) denied() string {
	if r.rejects {
		return "Reject"
	}
	return "Drop"
}

type direction struct {
	word         string
	letter       string
	logGroup     int
	policies     string
	profiles     string
	groups       string
	endpoint     string
	dispatch     string
	device       func(when, string) when
	iifOrOif     string
	encapsulates bool
}

var (
	ingress = direction{
		"ingress", "I", 1, string(rules.PolicyInboundPfx), string(rules.ProfileInboundPfx), rules.PolicyGroupInboundPrefix,
		rules.WorkloadToEndpointPfx, rules.ChainToWorkloadDispatch, when.output, "oifname", false,
	}
	egress = direction{
		"egress", "E", 2, string(rules.PolicyOutboundPfx), string(rules.ProfileOutboundPfx), rules.PolicyGroupOutboundPrefix,
		rules.WorkloadFromEndpointPfx, rules.ChainFromWorkloadDispatch, when.input, "iifname", true,
	}
)

func (d direction) of(endpoint tier) []group {
	if d.letter == "I" {
		return endpoint.ingress
	}
	return endpoint.egress
}

var shortKinds = map[string]string{
	"NetworkPolicy":           "np",
	"GlobalNetworkPolicy":     "gnp",
	"KubernetesNetworkPolicy": "knp",

	"StagedNetworkPolicy":           "snp",
	"StagedGlobalNetworkPolicy":     "sgnp",
	"StagedKubernetesNetworkPolicy": "sknp",
}

var allEndpoints = slices.Concat(endpoints, tieredEndpoints)

// id is what logs and chains call a policy.
func (r release) id(of *policy) string {
	if !r.kinds {
		return of.tiered()
	}
	return shortKinds[of.kind] + "/" + strings.TrimPrefix(of.namespace+"/"+of.name, "/")
}

// title is what the comment of its first rule calls it.
func (r release) title(of *policy) string {
	if !r.kinds {
		return "Policy " + of.tiered()
	}
	return of.kind + " " + strings.TrimPrefix(of.namespace+"/"+of.name, "/")
}

func (r release) limited(prefix, name string) string {
	most := iptables.MaxChainNameLength
	if r.nftables {
		most = 256
	}
	return hashutils.GetLengthLimitedID(prefix, name, most)
}

func (r release) policyChain(prefix string, of *policy) string {
	id := r.id(of)
	if !r.kinds {
		id = of.tier + "/" + id
	}
	return r.limited(prefix, id)
}

// prefix is a log's, cut where it is too long.
func prefix(text string) string {
	const most = 63
	if len(text) < most {
		return text
	}
	return text[:10] + hashutils.GetLengthLimitedID("", text, most-21) + "_" + text[len(text)-10:]
}

func (r release) workloads() (chains []chain) {
	for _, direction := range []direction{ingress, egress} {
		groups := map[string]bool{}
		for _, of := range allEndpoints {
			chains = append(chains, r.endpoint(of, direction))
			for _, in := range of.tiers {
				for _, group := range direction.of(in) {
					name := group.chain(r, in.name, direction)
					if len(group.enforced()) > 1 && !groups[name] {
						groups[name] = true
						chains = append(chains, r.group(name, group, direction))
					}
				}
			}
		}
		for _, of := range append(policies[:len(policies):len(policies)], base) {
			chains = append(chains, r.policy(of, direction))
		}
		for _, of := range profiles {
			protoRules := of.inbound
			if direction.letter == "E" {
				protoRules = of.outbound
			}
			id := of.name
			if r.kinds {
				id = "pro/" + id
			}
			body := r.rules(protoRules, "R"+direction.letter, id, direction.logGroup, "Profile "+of.name+" "+direction.word)
			chains = append(chains, chain{r.limited(direction.profiles, of.name), body})
		}
		chains = append(chains, r.dispatch(direction)...)
	}
	return chains
}

func (r release) policy(of *policy, direction direction) chain {
	protoRules := of.inbound
	if direction.letter == "E" {
		protoRules = of.outbound
	}
	body := r.rules(protoRules, "P"+direction.letter, r.id(of), direction.logGroup, r.title(of)+" "+direction.word)
	return chain{r.policyChain(direction.policies, of), body}
}

// dispatch leads from an interface to its chain: by a map in nftables; else by rules, and by a further chain for names that
// are the same up to one letter after what all have in common.
func (r release) dispatch(direction direction) (chains []chain) {
	unknown := do(r.deny(), "Unknown interface")
	if r.nftables {
		lookup := rule{when: when{nftables: []string{direction.iifOrOif + " vmap @<LAYER>-" + direction.dispatch}, iptables: iptables.MatchCriteria{""}}}
		return []chain{{direction.dispatch, []rule{lookup, unknown}}}
	}
	var beginnings []string
	alike := map[string][]rule{}
	for _, of := range allEndpoints {
		beginning := of.iface[:len(common)+1]
		if len(alike[beginning]) == 0 {
			beginnings = append(beginnings, beginning)
		}
		alike[beginning] = append(alike[beginning], direction.device(any(), of.iface).do(goTo(direction.endpoint+of.iface)))
	}
	var root []rule
	for _, beginning := range beginnings {
		body := alike[beginning]
		if len(body) == 1 {
			root = append(root, body...)
			continue
		}
		// Nothing comes back from it.
		name := direction.dispatch + "-" + beginning[len(common):]
		root = append(root, direction.device(any(), beginning+"+").do(goTo(name)))
		chains = append(chains, chain{name, append(body, unknown)})
	}
	return append(chains, chain{direction.dispatch, append(root, unknown)})
}

// What the names of all interfaces of the scenario begin with.
const common = "cali"

func (r release) endpoint(of endpoint, direction direction) chain {
	name := direction.endpoint + of.iface
	if of.down {
		return chain{name, []rule{do(r.deny(), "Endpoint admin disabled")}}
	}
	var body []rule
	if of.limited {
		body = r.packetLimit(direction)
	}
	body = append(body,
		state("RELATED,ESTABLISHED").do(accept()),
		state("INVALID").do(r.deny()),
	)
	if of.limited {
		body = append(body, do(connectionLimit(), "Reject connections over "+direction.word+" connection limit"))
	}
	body = append(body, do(unmark(acceptBit|passBit)))
	if direction.encapsulates {
		body = append(body,
			vxlan().do(r.deny(), r.denied()+" VXLAN encapped packets originating in workloads"),
			any().protocol(ipip).do(r.deny(), r.denied()+" IPinIP encapped packets originating in workloads"),
		)
	}
	body = append(body, r.tiers(of.tiers, direction, normal)...)
	return chain{name, append(body, r.profiles(of.profiles, direction)...)}
}

// tiers are the rules of each that has policies of this direction. Those before connections are tracked or addresses
// translated drop nothing at their end.
func (r release) tiers(tiers []tier, direction direction, of purpose) (body []rule) {
	for _, in := range tiers {
		groups := direction.of(in)
		if len(groups) == 0 {
			continue
		}
		body = append(body, do(unmark(passBit), "Start of tier "+in.name))
		passes := true
		for _, group := range groups {
			enforced := group.enforced()
			if len(enforced) == 0 {
				continue
			}
			passes = in.passes
			to := r.policyChain(direction.policies, enforced[0])
			if len(enforced) > 1 {
				to = group.chain(r, in.name, direction)
			}
			body = append(body, clear(passBit).do(jump(to)))
			if of == beforeTracking {
				body = append(body, set(acceptBit).do(notrack()))
			}
			body = append(body, set(acceptBit).do(back(), "Return if policy accepted"))
		}
		if of == beforeTracking || of == beforeTranslation {
			continue
		}
		if passes {
			if r.flowLogs {
				body = append(body, clear(passBit).do(nflog(direction.logGroup, prefix("PP"+direction.letter+"|"+in.name))))
			}
			continue
		}
		if r.flowLogs {
			body = append(body, clear(passBit).do(nflog(direction.logGroup, prefix("DP"+direction.letter+"|"+in.name))))
		}
		body = append(body, clear(passBit).do(r.deny(), "End of tier "+in.name+". "+r.denied()+" if no policies passed packet"))
	}
	return body
}

// profiles are asked last; what none of them allows is dropped.
func (r release) profiles(names []string, direction direction) (body []rule) {
	for _, name := range names {
		body = append(body, do(jump(r.limited(direction.profiles, name))), set(acceptBit).do(back(), "Return if profile accepted"))
	}
	if r.flowLogs {
		body = append(body, do(nflog(direction.logGroup, "DR"+direction.letter)))
	}
	return append(body, do(r.deny(), r.denied()+" if no profiles matched"))
}

// packetLimit drops what is more than some packets a second. Iptables marks those that are not, since its limit holds for
// them only.
func (r release) packetLimit(direction direction) []rule {
	over := "Drop packets over " + direction.word + " packet rate limit"
	if r.nftables {
		return []rule{do(&action{nftables: "limit rate over 10/second burst 5 packets drop"}, over)}
	}
	unmarked := do(unmark(scratch0Bit), "Clear "+direction.word+" packet rate limit mark")
	limit := fmt.Sprintf("-m limit --limit 10/sec --limit-burst 5 --jump MARK --set-mark %#x/%#x", scratch0Bit, scratch0Bit)
	others := fmt.Sprintf("-m mark ! --mark %#x/%#x", scratch0Bit, scratch0Bit)
	return []rule{
		unmarked,
		do(&action{iptables: limit}, "Mark packets within "+direction.word+" packet rate limit"),
		any().and(others, "").do(drop(), over),
		unmarked,
	}
}

func connectionLimit() *action {
	return &action{
		iptables: "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m connlimit --connlimit-above 3 --connlimit-mask 0 --jump REJECT --reject-with tcp-reset",
		nftables: "ct count over 3 reject with tcp reset",
	}
}

// chain is the name of a group's own chain, a digest of all that makes it.
func (g group) chain(r release, tier string, direction direction) string {
	hash := sha3.New224()
	words := []string{tier, g.selector, map[string]string{"I": "inbound", "E": "outbound"}[direction.letter], fmt.Sprint(len(g.policies))}
	for _, of := range g.policies {
		words = append(words, r.id(of))
	}
	for _, word := range words {
		hash.Write([]byte(word + "\n"))
	}
	return direction.groups + base64.RawURLEncoding.EncodeToString(hash.Sum(nil))[:rules.MaxPolicyGroupUIDLength]
}

func (r release) group(name string, of group, direction direction) chain {
	var body []rule
	for index, policy := range of.enforced() {
		unless := any()
		if index > 0 {
			unless = clear(passBit | acceptBit)
		}
		body = append(body, unless.do(jump(r.policyChain(direction.policies, policy))))
	}
	return chain{name, body}
}

// rules are those of a policy or profile, the first of them with its title in the comment.
func (r release) rules(of []*proto.Rule, owner, id string, logGroup int, title string) (body []rule) {
	for index, protoRule := range of {
		protoRule := rules.FilterRuleToIPVersion(r.version(), protoRule)
		if protoRule == nil {
			continue
		}
		blocks, match := r.conditions(protoRule)
		made := blocks
		ends := func(letter string, bit uint32, then *action) {
			made = append(made, match.do(mark(bit)))
			if r.flowLogs {
				made = append(made, set(bit).do(nflog(logGroup, prefix(fmt.Sprintf("%s%s%d|%s", letter, owner, index, id)))))
			}
			made = append(made, set(bit).do(then))
		}
		switch protoRule.Action {
		case "allow":
			ends("A", acceptBit, back())
		case "pass":
			ends("P", passBit, back())
		case "deny":
			ends("D", dropBit, r.deny())
		case "log":
			made = append(made, match.do(logged("calico-packet")))
		}
		annotations := protoRule.GetMetadata().GetAnnotations()
		for _, key := range slices.Sorted(maps.Keys(annotations)) {
			for index := range made {
				made[index].comments = append(made[index].comments, key+"="+annotations[key])
			}
		}
		body = append(body, made...)
	}
	for len(body) > 0 && body[len(body)-1].then.nftables == "return" {
		body = body[:len(body)-1]
	}
	if len(body) == 0 {
		body = []rule{{}}
	}
	body[0].comments = append(body[0].comments, title)
	return body
}

// conditions are what a rule asks for, and before it those rules that find out with marks what one rule cannot ask: whether
// one of several networks is the packet's.
func (r release) conditions(of *proto.Rule) (blocks []rule, match when) {
	net := func(net string) when { return any().and("--source "+net, "<IPV> saddr "+net) }
	protocol := of.GetProtocol().GetName()
	if protocol != "" {
		match = match.protocol(protocol)
	}
	if len(of.SrcNet) == 1 {
		match = match.both(net(of.SrcNet[0]))
	}
	for _, id := range of.SrcIpSetIds {
		match = match.from(r.set(id))
	}
	if len(of.DstNet) == 1 {
		match = match.and("--destination "+of.DstNet[0], "<IPV> daddr "+of.DstNet[0])
	}
	if len(of.DstPorts) > 0 {
		match = match.toPorts(protocol, of.DstPorts...)
	}
	if icmp, is := of.Icmp.(*proto.Rule_IcmpType); is {
		match = r.icmp(match, icmp.IcmpType)
	}
	if len(of.SrcNet) > 1 {
		blocks = append(blocks, do(remark(0, scratch0Bit|scratch1Bit)))
		for _, one := range of.SrcNet {
			blocks = append(blocks, net(one).do(mark(scratch0Bit)))
		}
		// They are looked at one by one only where there is more than one of them.
		if len(of.NotSrcNet) == 1 {
			match = match.and("! --source "+of.NotSrcNet[0], "<IPV> saddr != "+of.NotSrcNet[0])
		}
		match = match.both(set(scratch0Bit))
	}
	return blocks, match
}

func (r release) icmp(match when, kind int32) when {
	if r.ipv6 {
		return match.and(fmt.Sprintf("-m icmp6 --icmpv6-type %d", kind), fmt.Sprintf("icmpv6 type %d", kind))
	}
	return match.and(fmt.Sprintf("-m icmp --icmp-type %d", kind), fmt.Sprintf("icmp type %d", kind))
}
