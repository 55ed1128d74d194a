package main

import (
	"strings"

	"github.com/projectcalico/calico/felix/proto"
)

// What all releases render: the policies, profiles and endpoints of one node. The tests that read the fixtures
// (`calitrace/src/netfilter/felix`) know them by these names. Of rules for both IPv4 and IPv6 Felix renders what is of either;
// what has the address 10.244.7.1 has fd00:10:244:7::1, too.

// A policy, with the kind, tier and names that its resource has.
type policy struct {
	kind      string
	tier      string
	namespace string
	name      string
	inbound   []*proto.Rule
	outbound  []*proto.Rule
}

// tiered is the policy's name as Felix had it up to v3.31: with its namespace, and with the tier or `knp.default` before
// its own name.
func (p *policy) tiered() string {
	name := p.name
	switch {
	case strings.HasSuffix(p.kind, "KubernetesNetworkPolicy"):
		name = "knp.default." + name
	case p.tier == "default":
		name = "default." + name
	}
	if p.staged() {
		name = "staged:" + name
	}
	if p.namespace != "" {
		name = p.namespace + "/" + name
	}
	return name
}

// staged policies are only tried out.
func (p *policy) staged() bool { return strings.HasPrefix(p.kind, "Staged") }

// A group is what Felix makes of policies with the same selector that follow each other.
type group struct {
	selector string
	policies []*policy
}

// enforced are those that Felix programs: none that are staged (`PolicyToIptablesChains`, `felix/rules/policy.go`).
func (g group) enforced() (policies []*policy) {
	for _, of := range g.policies {
		if !of.staged() {
			policies = append(policies, of)
		}
	}
	return policies
}

type tier struct {
	name string
	// What none of its policies takes goes on (`defaultAction: Pass`).
	passes  bool
	ingress []group
	egress  []group
}

type profile struct {
	name     string
	inbound  []*proto.Rule
	outbound []*proto.Rule
}

type endpoint struct {
	iface string
	down  bool
	// Packets a second and connections are limited, which v3.28 cannot do.
	limited  bool
	tiers    []tier
	profiles []string
}

var (
	denyAll = &policy{
		kind: "NetworkPolicy", tier: "default", namespace: "default", name: "deny-all",
		inbound: []*proto.Rule{{Action: "deny"}},
	}
	blockedOut = &policy{
		kind: "NetworkPolicy", tier: "default", namespace: "default", name: "blocked-out",
		outbound: []*proto.Rule{
			{Action: "deny", Protocol: named("tcp"), DstPorts: ports(25)},
			{Action: "allow"},
		},
	}
	// One that has something of everything: several ports, a log, a set of addresses, several networks.
	web = &policy{
		kind: "NetworkPolicy", tier: "default", namespace: "default", name: "web",
		inbound: []*proto.Rule{
			{Action: "allow", Protocol: named("tcp"), SrcNet: []string{"10.244.0.0/16", "fd00:10:244::/48"}, DstPorts: append(ports(80, 443), span(8000, 8080))},
			{Action: "log", Protocol: named("tcp"), DstPorts: ports(22)},
			{Action: "deny", Protocol: named("tcp"), DstPorts: ports(22)},
			{Action: "allow", Protocol: named("udp"), SrcIpSetIds: []string{"s:frontend"}, DstPorts: ports(5353)},
			{Action: "deny", Protocol: named("udp"), SrcNet: []string{"10.244.0.0/16", "203.0.113.0/24", "fd00:10:244::/48", "fd00:203:0:113::/64"}, NotSrcNet: []string{"10.244.7.0/24", "fd00:10:244:7::/64"}, DstPorts: ports(5353)},
		},
	}
	allowDNS = &policy{
		kind: "KubernetesNetworkPolicy", tier: "default", namespace: "default", name: "allow-dns",
		inbound: []*proto.Rule{{Action: "allow", Protocol: named("udp"), DstPorts: ports(53)}},
	}
	onlyDNS = &policy{
		kind: "KubernetesNetworkPolicy", tier: "default", namespace: "default", name: "only-dns",
		outbound: []*proto.Rule{{Action: "allow", Protocol: named("udp"), DstNet: []string{"10.96.0.10/32", "fd00:10:96::10/128"}, DstPorts: ports(53)}},
	}
	guard = &policy{
		kind: "GlobalNetworkPolicy", tier: "security", name: "security.guard",
		inbound: []*proto.Rule{
			{Action: "pass", SrcNet: []string{"10.244.0.0/16", "fd00:10:244::/48"}},
			{Action: "deny", SrcNet: []string{"198.51.100.0/24", "fd00:198:51:100::/64"}},
			{Action: "allow", IpVersion: 4, Protocol: named("icmp"), Icmp: &proto.Rule_IcmpType{IcmpType: 8}},
			{Action: "allow", IpVersion: 6, Protocol: named("icmpv6"), Icmp: &proto.Rule_IcmpType{IcmpType: 128}},
		},
	}
	audit = &policy{
		kind: "GlobalNetworkPolicy", tier: "security", name: "security.audit",
		inbound: []*proto.Rule{{Action: "allow", Protocol: named("tcp"), DstPorts: ports(8080)}},
	}
	first = &policy{
		kind: "NetworkPolicy", tier: "default", namespace: "default", name: "first",
		inbound: []*proto.Rule{{Action: "allow", Protocol: named("tcp"), DstPorts: ports(1111)}},
	}
	second = &policy{
		kind: "NetworkPolicy", tier: "default", namespace: "default", name: "second",
		inbound: []*proto.Rule{{Action: "deny", Protocol: named("tcp"), DstPorts: ports(2222)}},
	}
	third = &policy{
		kind: "NetworkPolicy", tier: "default", namespace: "default", name: "third",
		inbound: []*proto.Rule{{Action: "pass", Protocol: named("tcp"), DstPorts: ports(3333)}},
	}
	// Too long for a chain of iptables, and for a log's prefix; with annotations it is too long for a comment of nftables.
	long = &policy{
		kind: "NetworkPolicy", tier: "default", namespace: "default", name: "a-policy-with-a-name-that-is-too-long-for-its-chain",
		inbound: []*proto.Rule{
			{Action: "deny", Protocol: named("udp"), DstPorts: ports(53), Metadata: &proto.RuleMetadata{
				Annotations: map[string]string{"reason": "nobody asks here"},
			}},
			{Action: "allow"},
		},
	}

	policies = []*policy{denyAll, blockedOut, web, allowDNS, onlyDNS, guard, audit, first, second, third, long}

	// Those of the host endpoint before connections are tracked, and before addresses are translated.
	untracked = &policy{
		kind: "GlobalNetworkPolicy", tier: "default", name: "untracked",
		inbound: []*proto.Rule{
			{Action: "deny", Protocol: named("tcp"), DstPorts: ports(23)},
			{Action: "allow", Protocol: named("tcp"), DstPorts: ports(30001)},
		},
		outbound: []*proto.Rule{{Action: "deny", Protocol: named("tcp"), DstPorts: ports(23)}},
	}
	preDNAT = &policy{
		kind: "GlobalNetworkPolicy", tier: "default", name: "before-nat",
		inbound: []*proto.Rule{{Action: "deny", Protocol: named("tcp"), DstPorts: []*proto.PortRange{span(30000, 32767)}}},
	}

	// In a tier that passes on what its policies do not take.
	base = &policy{
		kind: "GlobalNetworkPolicy", tier: "platform", name: "platform.base",
		inbound: []*proto.Rule{
			{Action: "allow", Protocol: named("tcp"), DstPorts: ports(9100)},
			{Action: "deny", Protocol: named("tcp"), DstPorts: ports(9101)},
		},
	}
	// Of each kind one that would deny.
	draft = &policy{
		kind: "StagedNetworkPolicy", tier: "default", namespace: "default", name: "draft",
		inbound: []*proto.Rule{{Action: "deny"}},
	}
	draftForAll = &policy{
		kind: "StagedGlobalNetworkPolicy", tier: "trial", name: "trial.draft-for-all",
		inbound: []*proto.Rule{{Action: "deny"}},
	}
	draftOfKubernetes = &policy{
		kind: "StagedKubernetesNetworkPolicy", tier: "default", namespace: "default", name: "draft-of-kubernetes",
	}
)

var profiles = []profile{
	{name: "kns.default", inbound: []*proto.Rule{{Action: "allow"}}, outbound: []*proto.Rule{{Action: "allow"}}},
	{name: "ksa.default.default"},
	{name: "kns.empty"},
	{
		name:     "no-udp",
		inbound:  []*proto.Rule{{Action: "allow", Protocol: named("tcp")}, {Action: "deny", Protocol: named("udp")}},
		outbound: []*proto.Rule{{Action: "deny", Protocol: named("udp")}, {Action: "allow"}},
	},
}

var usual = []string{"kns.default", "ksa.default.default"}

var endpoints = []endpoint{
	{
		iface: "cali11111111111", profiles: usual,
		tiers: []tier{{name: "default", ingress: alone(denyAll), egress: alone(blockedOut)}},
	},
	// Its name begins as the one before, so both have a dispatch chain of their own.
	{iface: "cali1eeeeeeeeee", profiles: usual},
	{
		iface: "cali22222222222", profiles: usual,
		tiers: []tier{
			{name: "security", ingress: alone(guard)},
			{name: "default", ingress: alone(allowDNS), egress: alone(onlyDNS)},
		},
	},
	{
		iface: "cali33333333333", profiles: usual,
		tiers: []tier{{name: "security", ingress: alone(audit)}},
	},
	{iface: "cali44444444444", profiles: usual},
	{iface: "cali55555555555", profiles: []string{"kns.empty"}},
	{iface: "cali66666666666", profiles: usual, down: true},
	{
		iface: "cali77777777777", profiles: usual,
		tiers: []tier{{name: "default", ingress: []group{{selector: "app == 'group'", policies: []*policy{first, second, third}}}}},
	},
	{
		iface: "cali88888888888", profiles: usual,
		tiers: []tier{{name: "default", ingress: alone(long)}},
	},
	{iface: "cali99999999999", profiles: []string{"no-udp"}},
	{
		iface: "caliaaaaaaaaaaa", profiles: usual,
		tiers: []tier{{name: "default", ingress: alone(web)}},
	},
	{iface: "caliccccccccccc", profiles: usual, limited: true},
}

// Endpoints for what v3.28 has not: tiers and what they do at their end, staged policies.
var tieredEndpoints = []endpoint{
	{
		iface: "caliddddddddddd", profiles: usual,
		tiers: []tier{
			{name: "trial", ingress: alone(draftForAll)},
			{name: "default", ingress: []group{{selector: "app == 'draft'", policies: []*policy{draftOfKubernetes, first, draft}}}},
		},
	},
	{
		iface: "calieeeeeeeeeee", profiles: usual,
		tiers: []tier{
			{name: "platform", passes: true, ingress: alone(base)},
			{name: "default", ingress: alone(second)},
		},
	},
	{
		iface: "califffffffffff", profiles: usual,
		tiers: []tier{
			{name: "platform", passes: true, ingress: alone(base)},
			{name: "default", ingress: alone(draftOfKubernetes, draft)},
		},
	},
	{
		iface: "caliggggggggggg",
		tiers: []tier{{name: "platform", passes: true, ingress: alone(base)}},
	},
}

type addresses struct {
	name    string
	members []string
}

// The sets of addresses, with the names that Felix gives them, and who is in them.
var sets = []addresses{
	{"cali40all-hosts-net", []string{"192.168.49.2", "192.168.49.3"}},
	{"cali40all-vxlan-net", []string{"192.168.49.3"}},
	{"cali40all-ipam-pools", []string{"10.244.0.0/16"}},
	{"cali40masq-ipam-pools", []string{"10.244.0.0/16"}},
	{"cali40s:frontend", []string{"10.244.205.194", "10.244.205.195"}},
}

var setsV6 = []addresses{
	{"cali60all-vxlan-net", []string{"fd00:192:168:49::3"}},
	{"cali60all-ipam-pools", []string{"fd00:10:244::/48"}},
	{"cali60masq-ipam-pools", []string{"fd00:10:244::/48"}},
	{"cali60s:frontend", []string{"fd00:10:244:205::194", "fd00:10:244:205::195"}},
}

func setsOf(ipv6 bool) []addresses {
	if ipv6 {
		return setsV6
	}
	return sets
}

// The addresses of services, which Felix lets nothing but their own rules have.
var serviceAddresses = []string{"10.96.0.0/12", "fd00:10:96::/108"}

func alone(policies ...*policy) (groups []group) {
	for _, p := range policies {
		groups = append(groups, group{selector: "app == '" + p.name + "'", policies: []*policy{p}})
	}
	return groups
}

func named(protocol string) *proto.Protocol {
	return &proto.Protocol{NumberOrName: &proto.Protocol_Name{Name: protocol}}
}

func ports(numbers ...int32) (ranges []*proto.PortRange) {
	for _, number := range numbers {
		ranges = append(ranges, span(number, number))
	}
	return ranges
}

func span(first, last int32) *proto.PortRange {
	return &proto.PortRange{First: first, Last: last}
}
