package main

import "github.com/projectcalico/calico/felix/rules"

// Felix' static chains by hand, from `felix/rules/static.go`, `nat.go` and `dispatch.go`. The ports of the failsafe chains
// are left out: packets come to them from host endpoints only, and here are none.

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

func vxlan() when { return any().protocol(udp).toPorts("udp", ports(vxlanPort)) }

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
			{name: rules.ChainDispatchFromHostEndpoint},
			{name: rules.ChainDispatchToHostEndpoint},
			{name: rules.ChainFailsafeIn},
			{name: rules.ChainFailsafeOut},
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
			{name: rules.ChainDispatchFromHostEndpoint},
			{name: rules.ChainDispatchToHostEndpoint},
			{name: rules.ChainFailsafeIn},
			{name: rules.ChainFailsafeOut},
		},
	}
}

func natLayer() layer {
	tunnel := func(device string) rule {
		away := any().output(device).and("-m addrtype ! --src-type LOCAL --limit-iface-out", "fib saddr . oif type != local")
		return away.fromLocal().do(masquerade())
	}
	outgoing := any().from("cali40masq-ipam-pools").and("-m set ! --match-set cali40all-ipam-pools dst", "ip daddr != @cali40all-ipam-pools")
	return layer{
		name:   "nat",
		insert: map[string]string{"PREROUTING": rules.ChainNATPrerouting, "OUTPUT": rules.ChainNATOutput, "POSTROUTING": rules.ChainNATPostrouting},
		chains: []chain{
			{rules.ChainNATPrerouting, []rule{do(jump(rules.ChainFIPDnat))}},
			{rules.ChainNATOutput, []rule{do(jump(rules.ChainFIPDnat))}},
			{rules.ChainNATPostrouting, []rule{
				do(jump(rules.ChainFIPSnat)),
				do(jump(rules.ChainNATOutgoing)),
				tunnel("tunl0"),
				tunnel("vxlan.calico"),
			}},
			{rules.ChainNATOutgoing, []rule{outgoing.do(masquerade())}},
			{name: rules.ChainFIPDnat},
			{name: rules.ChainFIPSnat},
		},
	}
}

func filterLayer() layer {
	return layer{
		name:   "filter",
		insert: map[string]string{"INPUT": rules.ChainFilterInput, "FORWARD": rules.ChainFilterForward, "OUTPUT": rules.ChainFilterOutput},
		chains: []chain{
			{rules.ChainFilterInput, []rule{
				any().protocol(ipip).from("cali40all-hosts-net").toLocal().do(accept(), "Allow IPIP packets from Calico hosts"),
				any().protocol(ipip).do(drop(), "Drop IPIP packets from non-Calico hosts"),
				vxlan().from("cali40all-vxlan-net").toLocal().do(accept(), "Allow IPv4 VXLAN packets from allowed hosts"),
				vxlan().toLocal().do(drop(), "Drop IPv4 VXLAN packets from non-allowed hosts"),
				any().input("cali+").do(goTo(rules.ChainWorkloadToHost)),
				set(acceptBit).do(accept()),
				do(unmark(allBits)),
				do(jump(rules.ChainDispatchFromHostEndpoint)),
				set(acceptBit).do(accept(), "Host endpoint policy accepted packet."),
			}},
			{rules.ChainWorkloadToHost, []rule{
				do(jump(rules.ChainFromWorkloadDispatch)),
				do(drop(), "Configured DefaultEndpointToHostAction"),
			}},
			{rules.ChainFilterForward, []rule{
				do(unmark(allBits &^ acceptBit)),
				clear(acceptBit).do(jump(rules.ChainDispatchFromHostEndPointForward)),
				any().input("cali+").do(jump(rules.ChainFromWorkloadDispatch)),
				any().output("cali+").do(jump(rules.ChainToWorkloadDispatch)),
				do(jump(rules.ChainDispatchToHostEndpointForward)),
				do(jump(rules.ChainCIDRBlock)),
			}},
			{rules.ChainFilterOutput, []rule{
				set(acceptBit).do(accept()),
				any().output("cali+").do(back()),
				any().protocol(ipip).to("cali40all-hosts-net").fromLocal().do(accept(), "Allow IPIP packets to other Calico hosts"),
				vxlan().fromLocal().to("cali40all-vxlan-net").do(accept(), "Allow IPv4 VXLAN packets to other allowed hosts"),
				do(unmark(allBits)),
				any().and("-m conntrack ! --ctstate DNAT", "ct status != dnat").do(jump(rules.ChainDispatchToHostEndpoint)),
				set(acceptBit).do(accept(), "Host endpoint policy accepted packet."),
			}},
			{rules.ChainCIDRBlock, []rule{any().and("--destination "+serviceAddresses, "ip daddr "+serviceAddresses).do(drop())}},
			{name: rules.ChainDispatchFromHostEndpoint},
			{name: rules.ChainDispatchToHostEndpoint},
			{name: rules.ChainDispatchFromHostEndPointForward},
			{name: rules.ChainDispatchToHostEndpointForward},
			{name: rules.ChainFailsafeIn},
			{name: rules.ChainFailsafeOut},
		},
	}
}

// Rules at the end of the kernel's own chain, after those of others.
func forwardEnd() []rule {
	return []rule{
		set(acceptBit).do(accept(), "Policy explicitly accepted packet."),
		do(mark(acceptBit)),
	}
}
