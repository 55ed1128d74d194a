//! Devices of other network plugins beside Calico's: left over, or still at work.

use ipnet::IpNet;

use super::Findings;
use crate::{
    event::Role,
    route::{Link, Type},
};

/// Devices by their names, and whose they are. The bridge is that of the CNI project's `bridge` plugin, which Flannel and
/// others use.
const DEVICES: [(&str, &str); 9] = [
    ("cni0", "the bridge plugin"),
    (FLANNEL, "Flannel"),
    ("weave", "Weave Net"),
    ("cilium_host", "Cilium"),
    ("cilium_net", "Cilium"),
    ("cilium_vxlan", "Cilium"),
    ("kube-bridge", "kube-router"),
    ("antrea-gw0", "Antrea"),
    ("ovn-k8s-mp0", "OVN-Kubernetes"),
];

/// Canal is Calico's policies over Flannel's network: this device belongs there.
const FLANNEL: &str = "flannel.1";

pub(super) fn check(findings: &mut Findings<'_>) {
    let links = findings.node.snapshot.links.iter();
    let foreign: Vec<(&Link, &str)> = links
        .filter_map(|link| {
            let (_, plugin) = DEVICES.iter().find(|(name, _)| *name == link.name)?;
            Some((link, *plugin))
        })
        .filter(|(link, _)| link.name != FLANNEL || !is_canal(findings))
        .collect();
    if foreign.is_empty() {
        return;
    }
    for (link, _) in &foreign {
        for (prefix, block) in taken(findings, link) {
            findings.problem(
                format!(
                    "The route to {prefix} leads to {}, which is not Calico's, and lies in the block {block}: packets to its \
                     pods go astray.",
                    link.name
                ),
                format!("Remove the other plugin, and the device (ip link delete {}).", link.name),
            );
        }
    }
    let names: Vec<String> = foreign
        .iter()
        .map(|(link, plugin)| format!("{} ({plugin})", link.name))
        .collect();
    findings.note(
        format!(
            "There are devices of another network plugin: {}. What it connects has no workload interface, so no policy of \
             Calico's holds for it, and calitrace does not see it.",
            names.join(", ")
        ),
        "Remove what it left in /etc/cni/net.d (the first file by name decides which plugin makes new pods), make its pods \
         anew, and delete the devices.",
    );
}

/// Flannel carries the packets: there is no tunnel but its own, and no other way to a block.
fn is_canal(findings: &Findings<'_>) -> bool {
    let name = |ifindex| {
        findings
            .node
            .snapshot
            .link(ifindex)
            .map(|link| link.name.as_str())
    };
    let others_tunnel = findings
        .node
        .with(Role::Tunnel)
        .any(|tunnel| tunnel.name != FLANNEL);
    let others_way = findings
        .node
        .to_blocks()
        .any(|route| route.ifindex.and_then(name) != Some(FLANNEL));
    !others_tunnel && !others_way
}

/// Routes through a device that take addresses out of a block of Calico's.
fn taken(findings: &Findings<'_>, link: &Link) -> Vec<(IpNet, IpNet)> {
    let node = &findings.node;
    let through = node
        .snapshot
        .routes
        .iter()
        .filter(|entry| entry.oif == Some(link.ifindex) && entry.kind == Type::Unicast);
    let blocks = || {
        let others = node
            .to_blocks()
            .filter(|route| route.ifindex != Some(link.ifindex));
        node.local_blocks
            .iter()
            .copied()
            .chain(others.map(|route| route.prefix))
    };
    let mut taken: Vec<(IpNet, IpNet)> = through
        .filter_map(|entry| {
            Some((
                entry.destination,
                blocks().find(|block| block.contains(&entry.destination))?,
            ))
        })
        .collect();
    taken.dedup();
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calico::doctor::{Evidence, Severity, testing::Node};

    fn told(node: &mut Node, severity: Severity) -> Vec<String> {
        node.told(check, &Evidence::default(), severity)
    }

    #[test]
    fn devices_of_others_are_named() {
        assert_eq!(told(&mut Node::new(), Severity::Note), [""; 0]);
        let mut node = Node::new().with_device(8, "cni0").with_device(9, FLANNEL);
        let found = told(&mut node, Severity::Note);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("cni0 (the bridge plugin), flannel.1 (Flannel)"),
            "{found:?}"
        );
        assert_eq!(told(&mut node, Severity::Problem), [""; 0]);
    }

    #[test]
    fn canal_has_flannels_device_and_no_tunnel_of_calicos() {
        let mut canal = Node::new()
            .without_tunnel()
            .without_blocks()
            .with_device(9, FLANNEL);
        assert_eq!(told(&mut canal, Severity::Note), [""; 0]);
        let mut both = Node::new().without_tunnel().with_device(9, FLANNEL);
        assert_eq!(
            told(&mut both, Severity::Note).len(),
            1,
            "blocks are reached by eth0"
        );
    }

    #[test]
    fn a_route_into_a_block_is_a_problem() {
        let mut node = Node::new()
            .with_device(9, FLANNEL)
            .with_route("10.244.205.192/27", 9)
            .with_route("10.42.0.0/16", 9)
            .with_route("10.244.0.0/16", 9);
        let found = told(&mut node, Severity::Problem);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("to 10.244.205.192/27 leads to flannel.1")
                && found[0].contains("block 10.244.205.192/26"),
            "{found:?}"
        );
    }
}
