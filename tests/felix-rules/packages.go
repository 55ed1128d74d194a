package main

import (
	"net"

	"github.com/projectcalico/calico/felix/config"
	"github.com/projectcalico/calico/felix/ipsets"
	"github.com/projectcalico/calico/felix/iptables"
	"github.com/projectcalico/calico/felix/proto"
	"github.com/projectcalico/calico/felix/rules"
)

// Mark bits as Felix takes them from its default mask 0xffff0000 (`felix/dataplane/driver.go` of v3.28).
var defaults = rules.Config{
	IPSetConfigV4: ipsets.NewIPVersionConfig(ipsets.IPFamilyV4, rules.IPSetNamePrefix, rules.AllHistoricIPSetNamePrefixes, rules.LegacyV4IPSetNames),
	IPSetConfigV6: ipsets.NewIPVersionConfig(ipsets.IPFamilyV6, rules.IPSetNamePrefix, rules.AllHistoricIPSetNamePrefixes, nil),

	WorkloadIfacePrefixes: []string{"cali"},

	IptablesMarkAccept:   0x1_0000,
	IptablesMarkPass:     0x2_0000,
	IptablesMarkScratch0: 0x4_0000,
	IptablesMarkScratch1: 0x8_0000,
	IptablesMarkEndpoint: 0xfff0_0000,

	IPIPEnabled:       true,
	IPIPTunnelAddress: net.IPv4(10, 244, 120, 64),
	VXLANEnabled:      true,
	VXLANEnabledV6:    true,
	VXLANPort:         4789,
	VXLANVNI:          4096,
	// Felix' static chains name them whether WireGuard is on or not.
	WireguardInterfaceName:   "wireguard.cali",
	WireguardInterfaceNameV6: "wg-v6.cali",

	VXLANTunnelAddress:   net.IPv4(10, 244, 120, 65),
	VXLANTunnelAddressV6: net.ParseIP("fd00:10:244:120::65"),

	IptablesLogPrefix:         "calico-packet",
	EndpointToHostAction:      "DROP",
	IptablesFilterAllowAction: "ACCEPT",
	IptablesMangleAllowAction: "ACCEPT",
	IptablesFilterDenyAction:  "DROP",
	ServiceLoopPrevention:     "Drop",

	FailsafeInboundHostPorts:  failsafe("tcp:22", "udp:68", "tcp:179", "tcp:2379", "tcp:2380", "tcp:5473", "tcp:6443", "tcp:6666", "tcp:6667"),
	FailsafeOutboundHostPorts: failsafe("udp:53", "udp:67", "tcp:179", "tcp:2379", "tcp:2380", "tcp:5473", "tcp:6443", "tcp:6666", "tcp:6667"),
}

// failsafe reads ports as Felix' configuration writes them.
func failsafe(ports ...string) (parsed []config.ProtoPort) {
	parameter := config.PortListParam{Metadata: config.Metadata{Name: "FailsafePorts"}}
	for _, port := range ports {
		value, err := parameter.Parse(port)
		if err != nil {
			panic(err)
		}
		parsed = append(parsed, value.([]config.ProtoPort)...)
	}
	return parsed
}

// How Felix is configured.
type settings struct {
	// What is denied is answered (`iptablesFilterDenyAction: Reject`).
	rejects bool
	// The rules are those for IPv6.
	ipv6 bool
}

func (s settings) version() uint8 {
	if s.ipv6 {
		return 6
	}
	return 4
}

// set is what a set of addresses is called, by its id.
func (s settings) set(id string) string {
	if s.ipv6 {
		return defaults.IPSetConfigV6.NameForMainIPSet(id)
	}
	return defaults.IPSetConfigV4.NameForMainIPSet(id)
}

func (s settings) config() rules.Config {
	config := defaults
	if s.rejects {
		config.IptablesFilterDenyAction = "REJECT"
	}
	return config
}

// rendered is what Calico's own packages make of the scenario: the chains of each table, and the rules that Felix puts into
// the chains of the kernel (`setUpIptablesNormal`, `felix/dataplane/linux/int_dataplane.go`).
func rendered(as settings) []table {
	renderer := rules.NewRenderer(as.config())
	version := as.version()
	filter := renderer.StaticFilterTableChains(version)
	workloads := map[proto.WorkloadEndpointID]*proto.WorkloadEndpoint{}
	groups := map[string]bool{}
	for _, of := range endpoints {
		id := proto.WorkloadEndpointID{OrchestratorId: "k8s", WorkloadId: "default/" + of.iface, EndpointId: "eth0"}
		workloads[id] = &proto.WorkloadEndpoint{Name: of.iface}
		var ingress, egress []*rules.PolicyGroup
		// It has the default tier only: policies of others stand before those of that.
		for _, in := range of.tiers {
			ingress = append(ingress, policyGroups(in.ingress, rules.PolicyDirectionInbound)...)
			egress = append(egress, policyGroups(in.egress, rules.PolicyDirectionOutbound)...)
		}
		filter = append(filter, renderer.WorkloadEndpointToIptablesChains(of.iface, nil, !of.down, ingress, egress, of.profiles)...)
		for _, group := range append(ingress, egress...) {
			if !group.ShouldBeInlined() && !groups[group.ChainName()] {
				groups[group.ChainName()] = true
				filter = append(filter, renderer.PolicyGroupToIptablesChains(group)...)
			}
		}
	}
	policyChains := func(of *policy) []*iptables.Chain {
		id := proto.PolicyID{Tier: "default", Name: of.tiered()}
		return renderer.PolicyToIptablesChains(&id, &proto.Policy{InboundRules: of.inbound, OutboundRules: of.outbound}, version)
	}
	for _, of := range policies {
		filter = append(filter, policyChains(of)...)
	}
	for _, of := range profiles {
		inbound, outbound := renderer.ProfileToIptablesChains(&proto.ProfileID{Name: of.name}, &proto.Profile{InboundRules: of.inbound, OutboundRules: of.outbound}, version)
		filter = append(filter, inbound, outbound)
	}
	filter = append(filter, renderer.WorkloadDispatchChains(workloads)...)
	onHosts := map[string]proto.HostEndpointID{hostEndpoint: {EndpointId: hostEndpoint}}
	filter = append(filter, renderer.HostDispatchChains(onHosts, "", true)...)
	onHost := policyGroups(alone(first), rules.PolicyDirectionInbound)
	filter = append(filter, renderer.HostEndpointToFilterChains(hostEndpoint, nil, onHost, nil, onHost, nil, nil)...)
	filter = append(filter, renderer.BlockedCIDRsToIptablesChains(serviceAddresses, version)...)

	nat := renderer.StaticNATTableChains(version)
	nat = append(nat, renderer.NATOutgoingChain(true, version))
	nat = append(nat, renderer.DNATsToIptablesChains(nil)...)
	nat = append(nat, renderer.SNATsToIptablesChains(nil)...)
	mangle := append(renderer.StaticMangleTableChains(version), renderer.FromHostDispatchChains(onHosts, "")...)
	mangle = append(mangle, renderer.ToHostDispatchChains(onHosts, "")...)
	mangle = append(mangle, renderer.HostEndpointToMangleIngressChains(hostEndpoint, policyGroups(alone(preDNAT), rules.PolicyDirectionInbound))...)
	mangle = append(mangle, renderer.HostEndpointToMangleEgressChains(hostEndpoint, nil, nil)...)
	mangle = append(mangle, policyChains(preDNAT)...)
	raw := append(renderer.StaticRawTableChains(version), renderer.HostDispatchChains(onHosts, "", false)...)
	raw = append(raw, renderer.HostEndpointToRawChains(
		hostEndpoint,
		policyGroups(alone(untracked), rules.PolicyDirectionInbound),
		policyGroups(alone(untracked), rules.PolicyDirectionOutbound),
	)...)
	raw = append(raw, policyChains(untracked)...)
	raw = append(raw, &iptables.Chain{Name: rules.ChainRpfSkip})

	return []table{
		{name: "raw", chains: raw, insert: jumps(map[string]string{"PREROUTING": rules.ChainRawPrerouting, "OUTPUT": rules.ChainRawOutput})},
		{name: "mangle", chains: mangle, insert: jumps(map[string]string{"PREROUTING": rules.ChainManglePrerouting, "POSTROUTING": rules.ChainManglePostrouting})},
		{name: "nat", chains: nat, insert: jumps(map[string]string{"PREROUTING": rules.ChainNATPrerouting, "OUTPUT": rules.ChainNATOutput, "POSTROUTING": rules.ChainNATPostrouting})},
		{
			name: "filter", chains: filter,
			insert: jumps(map[string]string{"INPUT": rules.ChainFilterInput, "FORWARD": rules.ChainFilterForward, "OUTPUT": rules.ChainFilterOutput}),
			then:   map[string][]iptables.Rule{"FORWARD": renderer.StaticFilterForwardAppendRules()},
		},
	}
}

func policyGroups(groups []group, direction rules.PolicyDirection) (of []*rules.PolicyGroup) {
	for _, group := range groups {
		made := &rules.PolicyGroup{Tier: "default", Direction: direction, Selector: group.selector}
		for _, policy := range group.policies {
			made.PolicyNames = append(made.PolicyNames, policy.tiered())
		}
		of = append(of, made)
	}
	return of
}

func jumps(to map[string]string) map[string][]iptables.Rule {
	rules := map[string][]iptables.Rule{}
	for chain, target := range to {
		rules[chain] = []iptables.Rule{{Action: iptables.JumpAction{Target: target}}}
	}
	return rules
}
