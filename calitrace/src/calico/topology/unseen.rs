//! What calitrace would not see of a packet on a path, as far as the nodes' devices and routes tell.

use super::{Outcome, Path};
use crate::{
    calico::view::NodeView,
    event::{EncapKind, Role},
    route::Link,
};

/// The devices of Calico's eBPF dataplane in a node (`felix/dataplane/linux/dataplanedefs/dataplane_defs.go`, Calico 3.34).
const EBPF_DEVICES: [&str; 2] = ["bpfin.cali", "bpfout.cali"];

/// Each a thing, and why.
pub(super) fn told(nodes: &[NodeView], path: &Path) -> Vec<String> {
    let on_path = |name: &str| path.hops.iter().any(|hop| hop.node.as_deref() == Some(name));
    let observed: Vec<&NodeView> = nodes.iter().filter(|node| on_path(&node.node.name)).collect();
    let mut told = Vec::new();
    let ebpf: Vec<&str> = observed
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
    let shielded: Vec<String> = observed.iter().filter_map(|node| shielded(node)).collect();
    if !shielded.is_empty() {
        told.push(format!(
            "What XDP programs do in the drivers of {}: such packets reach no hook, and one that is dropped there is called lost.",
            shielded.join(", ")
        ));
    }
    let hidden = match path.encap {
        Some(EncapKind::Wireguard) => Some(
            "What is in WireGuard's outer packets: between the nodes they are encrypted, and the packet is seen at the tunnel \
             device and not at the uplink.",
        ),
        Some(EncapKind::Ipip) => Some(
            "Routers between the nodes: IPIP's outer header hides them. It has the packet's own TTL, so that a probe of \
             traceroute may end at one, and its line is *.",
        ),
        Some(EncapKind::Vxlan) => Some("Routers between the nodes: VXLAN's outer header hides them."),
        None => None,
    };
    told.extend(hidden.map(str::to_owned));
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

/// The node's uplinks with XDP programs.
fn shielded(node: &NodeView) -> Option<String> {
    let uplinks = node
        .interfaces
        .iter()
        .filter(|interface| interface.xdp && interface.role == Role::Uplink);
    let names: Vec<&str> = uplinks.map(|uplink| uplink.name.as_str()).collect();
    (!names.is_empty()).then(|| format!("{} of {}", names.join(" and "), node.node.name))
}

/// Felix's own pair of devices, or its tunnel as it makes it for eBPF programs.
fn has_ebpf(links: &[Link]) -> bool {
    links.iter().any(|link| {
        let external = link.vxlan.is_some_and(|vxlan| vxlan.collect_metadata);
        EBPF_DEVICES.contains(&link.name.as_str()) || (external && link.name.ends_with(".calico"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::Vxlan;

    fn link(name: &str, external: bool) -> Link {
        Link {
            ifindex: 2,
            name: name.to_owned(),
            mtu: 1450,
            flags: 1,
            vxlan: Some(Vxlan {
                collect_metadata: external,
                ..Vxlan::default()
            }),
            ..Link::default()
        }
    }

    #[test]
    fn the_ebpf_dataplane_is_known_by_its_devices() {
        assert!(has_ebpf(&[link("eth0", false), link("bpfin.cali", false)]));
        assert!(has_ebpf(&[link("vxlan.calico", true)]));
        assert!(!has_ebpf(&[
            link("vxlan.calico", false),
            link("cilium_vxlan", true)
        ]));
    }
}
