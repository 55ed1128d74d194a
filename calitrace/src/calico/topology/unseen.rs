//! What calitrace would not see of a packet at a node or on a path, as far as the nodes' devices and routes tell.

use super::{Outcome, Path, dataplane::has_ebpf};
use crate::{
    calico::view::NodeView,
    event::{EncapKind, Role},
};

/// Of all packets of a node: each a thing, and why.
pub(super) fn at(node: &NodeView) -> Vec<String> {
    let mut told = of_nodes(&[node]);
    for kind in node.routes.iter().filter_map(|route| route.encap) {
        let what = hidden_by(kind).to_owned();
        if !told.contains(&what) {
            told.push(what);
        }
    }
    told
}

/// The same on a path.
pub(super) fn told(nodes: &[NodeView], path: &Path) -> Vec<String> {
    let on_path = |name: &str| path.hops.iter().any(|hop| hop.node.as_deref() == Some(name));
    let observed: Vec<&NodeView> = nodes.iter().filter(|node| on_path(&node.node.name)).collect();
    let mut told = of_nodes(&observed);
    told.extend(path.encap.map(|kind| hidden_by(kind).to_owned()));
    let router = path
        .hops
        .iter()
        .find(|hop| hop.node.is_none() && hop.address.is_some());
    if let Some(router) = router
        .filter(|_| path.outcome != Outcome::Left)
        .and_then(|hop| hop.address)
    {
        told.push(format!(
            "Routers between the nodes: {router} is the first one, more may come behind it, and their MTUs are not known here."
        ));
    }
    if path.outcome == Outcome::Left {
        let last = observed
            .last()
            .map_or("the last node", |node| node.node.name.as_str());
        told.push(format!(
            "What becomes of the packet beyond {last}: that is inferred from its routes, and its MTUs are not known here."
        ));
    }
    told
}

fn of_nodes(nodes: &[&NodeView]) -> Vec<String> {
    let mut told = Vec::new();
    let ebpf: Vec<&str> = nodes
        .iter()
        .filter(|node| has_ebpf(&node.snapshot.links))
        .map(|node| node.node.name.as_str())
        .collect();
    if !ebpf.is_empty() {
        told.push(format!(
            "What Calico's eBPF dataplane on {} hands on past the hooks: netfilter, and for many packets the node's end of the \
             receiver's interface; such a hop is inferred.",
            ebpf.join(", ")
        ));
    }
    let shielded: Vec<String> = nodes.iter().filter_map(|node| shielded(node)).collect();
    if !shielded.is_empty() {
        told.push(format!(
            "What XDP programs do in the drivers of {}: such packets reach no hook, and one that is dropped there is called lost.",
            shielded.join(", ")
        ));
    }
    told
}

fn hidden_by(kind: EncapKind) -> &'static str {
    match kind {
        EncapKind::Wireguard => {
            "What is in WireGuard's outer packets: between the nodes they are encrypted, and the packet is seen at the tunnel \
             device and not at the uplink."
        }
        EncapKind::Ipip => {
            "Routers between the nodes: IPIP's outer header hides them. It has the packet's own TTL, so that a probe of \
             traceroute may end at one, and its line is *."
        }
        EncapKind::Vxlan => "Routers between the nodes: VXLAN's outer header hides them.",
    }
}

/// The node's uplinks with XDP programs.
fn shielded(node: &NodeView) -> Option<String> {
    let uplinks = node
        .interfaces
        .iter()
        .filter(|interface| interface.xdp && interface.role == Role::Uplink);
    let names: Vec<&str> = uplinks.map(|uplink| uplink.name.as_str()).collect();
    (!names.is_empty()).then(|| format!("{} of {}", names.join(" and "), node.node.name))
}
