package main

import (
	"strings"

	"github.com/projectcalico/calico/felix/rules"
)

// Felix' static chains by hand, from `felix/rules/static.go` and `nat.go`.

// Mark bits, from the default mask 0xffff0000: those of v3.28 and, after the second, one for denied packets, which is not
// among those that are cleared (`felix/dataplane/driver.go`, `allCalicoMarkBits`).
const (
	acceptBit   = 0x1_0000
	passBit     = 0x2_0000
	dropBit     = 0x4_0000
	scratch0Bit = 0x8_0000
	scratch1Bit = 0x10_0000
	allBits     = acceptBit | passBit | scratch0Bit | scratch1Bit
)

const (
	vxlanPort = 4789
	ipip      = "4"
	udp       = "17"
	icmpv6    = "58"
)

// layers are iptables' tables, with what is in them.
type layer struct {
	name   string
	insert map[string]string
	chains []chain
}

func do(then *action, comments ...string) rule { return rule{then: then, comments: comments} }

func (w when) do(then *action, comments ...string) rule {
	return rule{when: w, then: then, comments: comments}
}

func vxlan() when { return any().protocol(udp).toPorts("udp", ports(vxlanPort)...) }

func rawLayer() layer {
	untracked := any().protocol("udp").and("-m udp --destination-port 4789", "udp dport 4789").do(notrack())
	return layer{
		name:   "raw",
		insert: map[string]string{"PREROUTING": rules.ChainRawPrerouting, "OUTPUT": rules.ChainRawOutput},
		chains: []chain{
			{rules.ChainRawPrerouting, []rule{
				do(unmark(allBits)),
				untracked,
				any().input("cali+").do(mark(scratch0Bit)),
				set(scratch0Bit).do(jump(rules.ChainRpfSkip)),
				// Whatever is configured: `REJECT` is of the table filter only (`felix/rules/deny_action_test.go`).
				set(scratch0Bit).and("-m rpfilter --invert --validmark", "fib saddr . mark . iif oif 0").do(drop()),
				clear(scratch0Bit).do(jump(rules.ChainDispatchFromHostEndpoint)),
				set(acceptBit).do(accept()),
			}},
			{rules.ChainRawOutput, []rule{
				do(unmark(allBits)),
				do(jump(rules.ChainDispatchToHostEndpoint)),
				untracked,
				set(acceptBit).do(accept()),
			}},
			{name: rules.ChainRpfSkip},
			{name: rules.ChainSetWireguardIncomingMark},
		},
	}
}

func mangleLayer() layer {
	return layer{
		name:   "mangle",
		insert: map[string]string{"PREROUTING": rules.ChainManglePrerouting, "POSTROUTING": rules.ChainManglePostrouting},
		chains: []chain{
			{rules.ChainManglePrerouting, []rule{
				state("RELATED,ESTABLISHED").do(accept()),
				set(acceptBit).do(accept()),
				do(jump(rules.ChainDispatchFromHostEndpoint)),
				set(acceptBit).do(accept(), "Host endpoint policy accepted packet."),
			}},
			{rules.ChainManglePostrouting, []rule{
				set(acceptBit).do(back()),
				do(unmark(allBits)),
				any().and("-m conntrack --ctstate DNAT", "ct status dnat").do(jump(rules.ChainDispatchToHostEndpoint)),
				set(acceptBit).do(back(), "Host endpoint policy accepted packet."),
			}},
		},
	}
}

func (r release) natLayer() layer {
	tunnel := func(device string) rule {
		away := any().output(device).and("-m addrtype ! --src-type LOCAL --limit-iface-out", "fib saddr . oif type != local")
		return away.fromLocal().do(masquerade())
	}
	all := r.set(rules.IPSetIDNATOutgoingAllPools)
	outgoing := any().from(r.set(rules.IPSetIDNATOutgoingMasqPools)).and("-m set ! --match-set "+all+" dst", "<IPV> daddr != @"+legal(all))
	tunnels := []rule{tunnel("tunl0"), tunnel("vxlan.calico")}
	if r.ipv6 {
		tunnels = []rule{tunnel("vxlan-v6.calico")}
	}
	return layer{
		name:   "nat",
		insert: map[string]string{"PREROUTING": rules.ChainNATPrerouting, "OUTPUT": rules.ChainNATOutput, "POSTROUTING": rules.ChainNATPostrouting},
		chains: []chain{
			{rules.ChainNATPrerouting, []rule{do(jump(rules.ChainFIPDnat))}},
			{rules.ChainNATOutput, []rule{do(jump(rules.ChainFIPDnat))}},
			{rules.ChainNATPostrouting, append([]rule{
				do(jump(rules.ChainFIPSnat)),
				do(jump(rules.ChainNATOutgoing)),
			}, tunnels...)},
			{rules.ChainNATOutgoing, []rule{outgoing.do(masquerade())}},
			{name: rules.ChainFIPDnat},
			{name: rules.ChainFIPSnat},
		},
	}
}

func (r release) filterLayer() layer {
	return layer{
		name:   "filter",
		insert: map[string]string{"INPUT": rules.ChainFilterInput, "FORWARD": rules.ChainFilterForward, "OUTPUT": rules.ChainFilterOutput},
		chains: []chain{
			{rules.ChainFilterInput, append(r.encapsulatedHere(),
				any().input("cali+").do(goTo(rules.ChainWorkloadToHost)),
				set(acceptBit).do(accept()),
				do(unmark(allBits)),
				do(jump(rules.ChainDispatchFromHostEndpoint)),
				set(acceptBit).do(accept(), "Host endpoint policy accepted packet."),
			)},
			{rules.ChainWorkloadToHost, append(r.neighbours(),
				do(jump(rules.ChainFromWorkloadDispatch)),
				do(drop(), "Configured DefaultEndpointToHostAction"),
			)},
			{rules.ChainFilterForward, []rule{
				do(unmark(allBits &^ acceptBit)),
				clear(acceptBit).do(jump(rules.ChainDispatchFromHostEndPointForward)),
				any().input("cali+").do(jump(rules.ChainFromWorkloadDispatch)),
				any().output("cali+").do(jump(rules.ChainToWorkloadDispatch)),
				do(jump(rules.ChainDispatchToHostEndpointForward)),
				do(jump(rules.ChainCIDRBlock)),
			}},
			{rules.ChainFilterOutput, append(r.encapsulatedForOthers(),
				do(unmark(allBits)),
				any().and("-m conntrack ! --ctstate DNAT", "ct status != dnat").do(jump(rules.ChainDispatchToHostEndpoint)),
				set(acceptBit).do(accept(), "Host endpoint policy accepted packet."),
			)},
			{rules.ChainCIDRBlock, r.blocked()},
		},
	}
}

// encapsulatedHere are the rules for what other nodes encapsulate. Those for VXLAN over IPv4 drop whatever is configured.
func (r release) encapsulatedHere() []rule {
	of := r.set(rules.IPSetIDAllVXLANSourceNets)
	if r.ipv6 {
		return []rule{
			vxlan().from(of).toLocal().do(accept(), "Allow IPv6 VXLAN packets from allowed hosts"),
			vxlan().toLocal().do(r.deny(), r.denied()+" IPv6 VXLAN packets from non-allowed hosts"),
		}
	}
	return []rule{
		any().protocol(ipip).from(r.set(rules.IPSetIDAllHostNets)).toLocal().do(accept(), "Allow IPIP packets from Calico hosts"),
		any().protocol(ipip).do(r.deny(), r.denied()+" IPIP packets from non-Calico hosts"),
		vxlan().from(of).toLocal().do(accept(), "Allow IPv4 VXLAN packets from allowed hosts"),
		vxlan().toLocal().do(drop(), "Drop IPv4 VXLAN packets from non-allowed hosts"),
	}
}

func (r release) encapsulatedForOthers() []rule {
	first := []rule{
		set(acceptBit).do(accept()),
		any().output("cali+").do(back()),
	}
	to := r.set(rules.IPSetIDAllVXLANSourceNets)
	if r.ipv6 {
		return append(first, vxlan().fromLocal().to(to).do(accept(), "Allow IPv6 VXLAN packets to other allowed hosts"))
	}
	return append(first,
		any().protocol(ipip).to(r.set(rules.IPSetIDAllHostNets)).fromLocal().do(accept(), "Allow IPIP packets to other Calico hosts"),
		vxlan().fromLocal().to(to).do(accept(), "Allow IPv4 VXLAN packets to other allowed hosts"),
	)
}

// neighbours are the rules for what pods say to a router of IPv6: who listens to which groups, and who is whose neighbour.
func (r release) neighbours() (accepted []rule) {
	if !r.ipv6 {
		return nil
	}
	for _, kind := range []int32{130, 131, 132, 133, 135, 136} {
		accepted = append(accepted, r.icmp(any().protocol(icmpv6), kind).do(accept()))
	}
	return accepted
}

// blocked are the addresses of services that nothing handles. What becomes of them has a setting of its own.
func (r release) blocked() (dropped []rule) {
	for _, net := range serviceAddresses {
		if strings.Contains(net, ":") == r.ipv6 {
			dropped = append(dropped, any().and("--destination "+net, "<IPV> daddr "+net).do(drop()))
		}
	}
	return dropped
}

// Rules at the end of the kernel's own chain, after those of others.
func forwardEnd() []rule {
	return []rule{
		set(acceptBit).do(accept(), "Policy explicitly accepted packet."),
		do(mark(acceptBit)),
	}
}
