//! MTUs that do not fit together: of the pod's end and the node's end of its interface, of the tunnel, and of the devices
//! that carry it.

use super::{Findings, some};
use crate::{calico::anatomy, event::Role};

pub(super) fn check(findings: &mut Findings<'_>) {
    tunnels_and_uplinks(findings);
    pods_and_tunnel(findings);
    pods_and_uplinks(findings);
    ends(findings);
}

fn tunnels_and_uplinks(findings: &mut Findings<'_>) {
    let tunnels: Vec<_> = findings.node.with(Role::Tunnel).collect();
    let uplinks: Vec<_> = findings.node.with(Role::Uplink).collect();
    for tunnel in tunnels {
        let Some(link) = findings.node.snapshot.link(tunnel.ifindex) else {
            continue;
        };
        for uplink in &uplinks {
            let Some(overhead) = anatomy::overhead(link).filter(|overhead| link.mtu + overhead > uplink.mtu)
            else {
                continue;
            };
            findings.problem(
                format!(
                    "The tunnel {} has MTU {} and adds {overhead} bytes, but {} carries only {}: long packets are lost \
                     or fragmented.",
                    link.name, link.mtu, uplink.name, uplink.mtu
                ),
                format!("Set Calico's MTU to {} or less.", uplink.mtu.saturating_sub(overhead)),
            );
        }
    }
}

fn pods_and_tunnel(findings: &mut Findings<'_>) {
    let Some(tunnel) = findings.node.with(Role::Tunnel).min_by_key(|tunnel| tunnel.mtu) else {
        return;
    };
    let larger = findings.node.workload_names(|pod| pod.mtu > tunnel.mtu);
    if !larger.is_empty() {
        findings.note(
            format!(
                "{} of {} workload interfaces have a larger MTU than the tunnel {} ({}): long packets depend on path MTU \
                 discovery.",
                larger.len(),
                findings.node.pods.len(),
                tunnel.name,
                tunnel.mtu
            ),
            "Make these pods anew after the MTU was changed.",
        );
    }
}

/// To nodes that are reached without tunnel.
fn pods_and_uplinks(findings: &mut Findings<'_>) {
    let uplinks: Vec<_> = findings.node.with(Role::Uplink).collect();
    for uplink in uplinks {
        let plain = findings
            .node
            .to_blocks()
            .any(|route| route.encap.is_none() && route.ifindex == Some(uplink.ifindex));
        let larger = findings.node.workload_names(|pod| plain && pod.mtu > uplink.mtu);
        if !larger.is_empty() {
            findings.note(
                format!(
                    "{} of {} workload interfaces have a larger MTU than {} ({}), by which other nodes' pods are reached \
                     without tunnel: long packets depend on path MTU discovery.",
                    larger.len(),
                    findings.node.pods.len(),
                    uplink.name,
                    uplink.mtu
                ),
                format!(
                    "Set Calico's MTU to {} or less, and make these pods anew, or raise that of {}.",
                    uplink.mtu, uplink.name
                ),
            );
        }
    }
}

/// A veth hands on nothing that is longer than its receiving end takes, and answers nothing (`__is_skb_forwardable`,
/// `include/linux/netdevice.h`, Linux 6.18).
fn ends(findings: &mut Findings<'_>) {
    let mut shorter = |is_shorter: fn(u32, u32) -> bool, what: &str| {
        let names: Vec<String> = findings
            .node
            .with(Role::Workload)
            .filter_map(|pod| {
                let own = *findings.evidence.pod_mtus.get(&pod.ifindex)?;
                is_shorter(own, pod.mtu).then(|| format!("{} ({}, in the pod {own})", pod.name, pod.mtu))
            })
            .collect();
        if !names.is_empty() {
            findings.problem(
                format!(
                    "The two ends of an interface have different MTUs: {}. Longer packets {what} are lost without an answer.",
                    some(&names)
                ),
                "Make these pods anew, or set both ends alike (ip link set mtu).",
            );
        }
    };
    shorter(|own, nodes| own > nodes, "that the pod sends");
    shorter(|own, nodes| own < nodes, "to the pod");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calico::doctor::{Evidence, Severity, testing::Node};

    fn told(node: &mut Node, severity: Severity) -> Vec<String> {
        node.told(check, &Evidence::default(), severity)
    }

    #[test]
    fn what_fits_is_no_finding() {
        for node in [&mut Node::new(), &mut Node::new().without_tunnel()] {
            assert_eq!(told(node, Severity::Problem), [""; 0]);
            assert_eq!(told(node, Severity::Note), [""; 0]);
        }
    }

    #[test]
    fn the_tunnel_and_its_overhead_fit_into_the_uplink() {
        let found = told(&mut Node::new().with_mtu("tunl0", 1481), Severity::Problem);
        assert!(
            found[0].contains("has MTU 1481 and adds 20 bytes, but eth0 carries only 1500"),
            "{found:?}"
        );
    }

    #[test]
    fn pods_are_compared_with_what_carries_their_packets() {
        let pod = "cali8d02ed71817";
        let found = told(&mut Node::new().with_mtu(pod, 1500), Severity::Note);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("1 of 1 workload interfaces have a larger MTU than the tunnel tunl0 (1480)"),
            "{found:?}"
        );
        let found = told(
            &mut Node::new().without_tunnel().with_mtu(pod, 9000),
            Severity::Note,
        );
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("1 of 1 workload interfaces have a larger MTU than eth0 (1500)"),
            "{found:?}"
        );
    }

    #[test]
    fn both_ends_of_an_interface_are_alike() {
        for (own, what) in [
            (1480, None),
            (1500, Some("that the pod sends")),
            (1400, Some("to the pod")),
        ] {
            let evidence = Evidence {
                pod_mtus: [(4, own)].into(),
                ..Evidence::default()
            };
            let found = Node::new().told(check, &evidence, Severity::Problem);
            let Some(what) = what else {
                assert_eq!(found, [""; 0]);
                continue;
            };
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(what), "{found:?}");
            assert!(
                found[0].contains(&format!("cali8d02ed71817 (1480, in the pod {own})")),
                "{found:?}"
            );
        }
    }
}
