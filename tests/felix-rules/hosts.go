package main

import (
	"github.com/projectcalico/calico/felix/config"
	"github.com/projectcalico/calico/felix/rules"
)

// The host endpoint's chains by hand, from `felix/rules/{endpoints,dispatch,static}.go`: those of three tables.

// What an endpoint's chain is for (`endpointChainType`, `felix/rules/endpoints.go`).
type purpose int

const (
	// Packets to the endpoint or from it.
	normal purpose = iota
	// Those that it forwards.
	forwarded
	// Packets before connections are tracked.
	beforeTracking
	// Packets before addresses are translated.
	beforeTranslation
)

// A host endpoint, with a policy for what comes from it, to the node and forwarded, and those of the tables raw and mangle.
const hostEndpoint = "eth9"

// Of forwarded packets, and of those to the node.
var hostTiers = []tier{{name: "default", ingress: alone(first)}}

// What dispatch chains of host endpoints lead to.
var hostDispatch = []struct {
	chain, to string
	device    func(when, string) when
	isForward bool
}{
	{rules.ChainDispatchFromHostEndpoint, rules.HostFromEndpointPfx, when.input, false},
	{rules.ChainDispatchToHostEndpoint, rules.HostToEndpointPfx, when.output, false},
	{rules.ChainDispatchFromHostEndPointForward, rules.HostFromEndpointForwardPfx, when.input, true},
	{rules.ChainDispatchToHostEndpointForward, rules.HostToEndpointForwardPfx, when.output, true},
}

func hostDispatchChains(forward bool) (chains []chain) {
	for _, of := range hostDispatch {
		if forward || !of.isForward {
			chains = append(chains, chain{of.chain, []rule{of.device(any(), hostEndpoint).do(goTo(of.to + hostEndpoint))}})
		}
	}
	return chains
}

// elsewhere is the release as its rules are outside of the table filter, the only one where packets can be rejected
// (`felix/rules/deny_action_test.go`).
func (r release) elsewhere() release {
	r.rejects = false
	return r
}

func (r release) hostsInFilter() []chain {
	in, out := failsafes(false)
	return append(hostDispatchChains(true), in, out,
		r.hostChain(rules.HostToEndpointPfx, egress, normal, hostTiers, accept()),
		r.hostChain(rules.HostFromEndpointPfx, ingress, normal, hostTiers, accept()),
		r.hostChain(rules.HostToEndpointForwardPfx, egress, forwarded, hostTiers, accept()),
		r.hostChain(rules.HostFromEndpointForwardPfx, ingress, forwarded, hostTiers, accept()),
	)
}

func (r release) hostsInMangle() []chain {
	r = r.elsewhere()
	in, out := failsafes(false)
	tiers := []tier{{name: "default", ingress: alone(preDNAT)}}
	return append(hostDispatchChains(false), in, out,
		r.hostChain(rules.HostFromEndpointPfx, ingress, beforeTranslation, tiers, accept()),
		r.hostChain(rules.HostToEndpointPfx, egress, normal, hostTiers, back()),
		r.policy(preDNAT, ingress),
	)
}

func (r release) hostsInRaw() []chain {
	r = r.elsewhere()
	in, out := failsafes(true)
	tiers := []tier{{name: "default", ingress: alone(untracked), egress: alone(untracked)}}
	chains := append(hostDispatchChains(false), in, out,
		r.hostChain(rules.HostToEndpointPfx, egress, beforeTracking, tiers, nil),
		r.hostChain(rules.HostFromEndpointPfx, ingress, beforeTracking, tiers, nil),
	)
	// What they allow and deny is not logged.
	r.flowLogs = false
	return append(chains, r.policy(untracked, ingress), r.policy(untracked, egress))
}

// hostChain is one of the endpoint's chains; what becomes of established connections is of each table.
func (r release) hostChain(name string, direction direction, of purpose, tiers []tier, established *action) chain {
	var body []rule
	if of != beforeTracking {
		known := state("RELATED,ESTABLISHED")
		if established.nftables != "accept" {
			body = append(body, known.do(mark(acceptBit)))
		}
		body = append(body, known.do(established), state("INVALID").do(r.deny()))
	}
	if of != forwarded {
		to := rules.ChainFailsafeOut
		if direction.letter == "I" {
			to = rules.ChainFailsafeIn
		}
		body = append(body, do(jump(to)))
	}
	body = append(body, do(unmark(acceptBit|passBit)))
	body = append(body, r.tiers(tiers, direction, of)...)
	if of == normal {
		body = append(body, r.profiles(nil, direction)...)
	}
	return chain{name + hostEndpoint, body}
}

// failsafes are the ports that host endpoints always let in and out; in the table raw, answers from them, too.
func failsafes(answers bool) (in, out chain) {
	inbound, outbound := defaults.FailsafeInboundHostPorts, defaults.FailsafeOutboundHostPorts
	in = chain{rules.ChainFailsafeIn, failsafeRules(when.toPorts, inbound)}
	out = chain{rules.ChainFailsafeOut, failsafeRules(when.toPorts, outbound)}
	if answers {
		in.rules = append(in.rules, failsafeRules(when.fromPorts, outbound)...)
		out.rules = append(out.rules, failsafeRules(when.fromPorts, inbound)...)
	}
	return in, out
}

func failsafeRules(match func(when, string, ...portRange) when, of []config.ProtoPort) (body []rule) {
	for _, port := range of {
		body = append(body, match(any().protocol(port.Protocol), port.Protocol, ports(int32(port.Port))...).do(accept()))
	}
	return body
}
