//! Nodes that are taken for strangers: Felix drops encapsulated packets of hosts that are not in its set of allowed ones
//! (the chain `cali-INPUT`, `felix/rules/static.go`; who is in it, `felix/dataplane/linux/{ipip_mgr,vxlan_mgr}.go`; Calico
//! 3.34). Calico's nftables mode has the same sets in its own table.

use std::net::IpAddr;

use super::{Findings, tunnels};
use crate::{calico::anatomy, event::EncapKind};

pub(super) fn check(findings: &mut Findings<'_>) {
    let Some(firewall) = &findings.evidence.firewall else {
        return;
    };
    let carriers = findings.node.to_blocks().filter_map(|route| {
        let node = route.remote_node?;
        Some((allowed(route.encap?, node)?, node))
    });
    for ((set, kind), node) in anatomy::sorted(carriers.collect()) {
        let mut known = firewall.sources(set, node.is_ipv6());
        if known.any(|known| known.holds(node) == Some(false)) {
            findings.problem(
                format!(
                    "The IP set {set} lacks the node {node}, which routes know: {kind} packets from it are dropped here as a \
                     stranger's (cali-INPUT)."
                ),
                "Restart calico-node on this node; if it stays so, see whether the other's Node resource has this address \
                 (calicoctl get node -o wide).",
            );
        }
    }
}

/// The set of hosts from which such packets are taken, and what they are called. `WireGuard` has keys instead.
fn allowed(encap: EncapKind, node: IpAddr) -> Option<(&'static str, &'static str)> {
    match (encap, node) {
        (EncapKind::Ipip, IpAddr::V4(_)) => Some((tunnels::ALL_HOSTS, "IPIP")),
        (EncapKind::Vxlan, IpAddr::V4(_)) => Some(("cali40all-vxlan-net", "VXLAN")),
        (EncapKind::Vxlan, IpAddr::V6(_)) => Some(("cali60all-vxlan-net", "VXLAN")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        calico::doctor::{Evidence, Firewall, Severity, testing::Node},
        netfilter::{Sets, compact_nft_with_nat},
    };

    const RULE: &str = "*filter\n-A cali-INPUT -p ipencap -m set --match-set cali40all-hosts-net src -m addrtype --dst-type LOCAL \
                        -j ACCEPT\n-A cali-INPUT -p udp -m udp --dport 4789 -m set --match-set cali40all-vxlan-net src -j \
                        ACCEPT\nCOMMIT\n";

    fn told(rules: &str, sets: &str) -> Vec<String> {
        told_by(Firewall {
            v4: rules.to_owned(),
            sets: Some(Sets::parse(sets)),
            ..Firewall::default()
        })
    }

    fn told_by(firewall: Firewall) -> Vec<String> {
        let evidence = Evidence {
            firewall: Some(firewall),
            ..Evidence::default()
        };
        Node::new().told(check, &evidence, Severity::Problem)
    }

    /// The table of Felix' own in which the other node is a member, and without it.
    #[test]
    fn nftables_sets_are_looked_into() {
        let listed = include_str!("../../netfilter/felix-native.json");
        let told = |list: &str| {
            told_by(Firewall {
                native_v4: compact_nft_with_nat(list).unwrap(),
                ..Firewall::default()
            })
        };
        assert_eq!(told(listed), [""; 0]);
        let found = told(&listed.replace("\"192.168.49.3\"", "\"192.168.49.4\""));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("cali40all-hosts-net lacks the node 192.168.49.3"),
            "{found:?}"
        );
    }

    #[test]
    fn a_node_that_the_set_lacks_is_a_stranger() {
        let told = told(
            RULE,
            "create cali40all-hosts-net hash:net family inet\nadd cali40all-hosts-net 192.168.49.2\n",
        );
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].contains("cali40all-hosts-net lacks the node 192.168.49.3")
                && told[0].contains("IPIP packets"),
            "{told:?}"
        );
    }

    #[test]
    fn a_member_and_a_set_without_rule_or_without_content_are_no_finding() {
        let member =
            "create cali40all-hosts-net hash:net family inet\nadd cali40all-hosts-net 192.168.49.0/24\n";
        assert_eq!(told(RULE, member), [""; 0]);
        let lacking = "create cali40all-hosts-net hash:net family inet\n";
        assert_eq!(told("*filter\nCOMMIT\n", lacking), [""; 0]);
        assert_eq!(
            told(RULE, "create cali40all-hosts-net bitmap:ip range 10.0.0.0/24\n"),
            [""; 0]
        );
        assert_eq!(told(RULE, ""), [""; 0]);
    }
}
