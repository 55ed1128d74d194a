//! Tunnels and what they need to know of the other nodes.

use super::Findings;
use crate::{
    calico::anatomy,
    event::{EncapKind, Role},
    route::Type,
};

pub(super) fn check(findings: &mut Findings<'_>) {
    devices(findings);
    neighbours(findings);
    nodes(findings);
}

fn devices(findings: &mut Findings<'_>) {
    let tunnels: Vec<_> = findings.node.with(Role::Tunnel).collect();
    for interface in tunnels {
        let Some(link) = findings.node.snapshot.link(interface.ifindex) else {
            continue;
        };
        if !link.up() {
            findings.problem(
                format!(
                    "The tunnel {} is down: no packet reaches other nodes through it.",
                    link.name
                ),
                format!(
                    "Restart calico-node, or set it up (ip link set {} up).",
                    link.name
                ),
            );
        }
        if !interface
            .addresses
            .iter()
            .any(|&address| anatomy::global(address))
        {
            findings.note(
                format!(
                    "The tunnel {} has no address: the node's own packets to remote pods have another source.",
                    link.name
                ),
                "Restart calico-node, unless bpfOverlayHostSourceIP is HostAddress, where it is meant so.",
            );
        }
    }
}

fn neighbours(findings: &mut Findings<'_>) {
    let routes: Vec<_> = findings.node.to_blocks().collect();
    for route in routes {
        // With `external` set, the destination comes with each packet (Calico's eBPF dataplane).
        let external = route
            .ifindex
            .and_then(|ifindex| findings.node.snapshot.link(ifindex)?.vxlan);
        let external = external.is_some_and(|vxlan| vxlan.collect_metadata);
        if route.encap == Some(EncapKind::Vxlan) && route.remote_node.is_none() && !external {
            let gateway = route
                .gateway
                .map_or_else(String::new, |gateway| format!(" {gateway}"));
            findings.problem(
                format!(
                    "VXLAN does not know which node has the gateway{gateway}: packets to {} are lost.",
                    route.prefix
                ),
                "Restart calico-node, whose Felix writes the neighbour and forwarding entries.",
            );
        }
    }
}

fn nodes(findings: &mut Findings<'_>) {
    let remote = findings.node.routes.iter().filter_map(|route| route.remote_node);
    for remote in anatomy::sorted(remote.collect()) {
        let reachable = findings
            .node
            .snapshot
            .routes
            .iter()
            .any(|entry| entry.kind == Type::Unicast && entry.destination.contains(&remote));
        if !reachable {
            findings.problem(
                format!("There is no route to the node {remote}: packets to its pods are lost."),
                "Restore the route to the nodes' network.",
            );
        }
    }
}
