//! Tunnels and what they need to know of the other nodes.

use std::net::IpAddr;

use super::{Findings, Firewall, fallback, some};
use crate::{
    calico::anatomy,
    event::{EncapKind, Interface, Role},
    route::{Link, Snapshot, Type},
};

/// The nodes from which IPIP is taken; rules look into it only where a pool has IPIP (`felix/rules/static.go`, Calico 3.34).
pub(super) const ALL_HOSTS: &str = "cali40all-hosts-net";

pub(super) fn check(findings: &mut Findings<'_>) {
    devices(findings);
    ipip(findings);
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

/// Without `tunl0` nobody can make a route for it, so that it is the rules that tell that IPIP is meant, and the nodes without
/// any route that it is missed. Felix tries each second to make the device: newer ones by netlink (`felix/dataplane/linux/
/// route_mgr.go`, Calico 3.34), which works wherever the kernel has IPIP; older ones with `ip tunnel add` (`ipip_mgr.go`, still
/// in 3.28), which asks an existing `tunl0` for it (`dev_ifsioc`, `net/core/dev_ioctl.c`) and so relies on the kernel's own.
fn ipip(findings: &mut Findings<'_>) {
    let Some(firewall) = &findings.evidence.firewall else {
        return;
    };
    let snapshot = findings.node.snapshot;
    let is_used = |tunnel: &Interface| snapshot.link(tunnel.ifindex).is_some_and(is_ipip);
    if findings.node.with(Role::Tunnel).any(is_used) {
        return;
    }
    let without_route = without_route(findings, firewall);
    if without_route.is_empty() {
        return;
    }
    let lost = format!(
        "though rules expect IPIP (cali-INPUT looks into {ALL_HOSTS}): no route leads to pods of {}, and packets to them \
         are lost.",
        some(&without_route)
    );
    if let Some(link) = snapshot.links.iter().find(|link| is_calicos(link)) {
        let down = if link.up() { "" } else { ", and is down" };
        findings.problem(
            format!("{} has neither address nor routes{down}, {lost}", link.name),
            "Restart calico-node, and see its log for why Felix does not set it up; the node's tunnel address is in its Node \
             resource (calicoctl get node -o yaml).",
        );
        return;
    }
    let what = format!("There is no tunl0, {lost}");
    match findings.evidence.fallback_tunnels.filter(|kernel| !kernel.gives()) {
        Some(kernel) => {
            let setting = format!("net.{}", fallback::SETTING.replace('/', "."));
            let (place, lasting) = if kernel.initial {
                ("", format!("{setting}=1 before the module ipip is loaded (at boot)"))
            } else {
                (
                    ", and the node is in a container",
                    format!("{setting}=0 on the host before the node is made"),
                )
            };
            findings.problem(
                format!(
                    "{what} The kernel gives the node none ({setting}={}{place}), and older Felix cannot make one.",
                    kernel.setting
                ),
                format!(
                    "Add it in the node (ip link add tunl0 type ipip), and Felix sets it up; to last, set {lasting}, or update \
                     Calico."
                ),
            );
        }
        None => findings.problem(
            what,
            "See above whether the kernel has ipip, and in calico-node's log why Felix does not make the device; newer ones wait \
             for the tunnel address in the Node resource (calicoctl get node -o yaml).",
        ),
    }
}

fn is_ipip(link: &Link) -> bool {
    anatomy::encap_of(link) == Some(EncapKind::Ipip)
}

/// Others may have devices of this kind, too.
fn is_calicos(link: &Link) -> bool {
    link.name == "tunl0" && is_ipip(link)
}

/// Whether IPIP is meant, and there is no device for it.
pub(super) fn lacks_ipip(snapshot: &Snapshot, firewall: &Firewall) -> bool {
    firewall.sources(ALL_HOSTS, false).next().is_some() && !snapshot.links.iter().any(is_calicos)
}

/// Other nodes from which IPIP is taken, and to whose pods no route leads. With pools of several kinds, or of which IPIP's is
/// not used any more, there may be others' routes. Single hosts that are no nodes (`externalNodeCIDRs`) are among them.
fn without_route(findings: &Findings<'_>, firewall: &Firewall) -> Vec<String> {
    let node = &findings.node;
    let is_own = |one: &IpAddr| node.snapshot.addresses.iter().any(|own| own.address == *one);
    let is_reached = |one: &IpAddr| node.routes.iter().any(|route| route.remote_node == Some(*one));
    let known = firewall.sources(ALL_HOSTS, false);
    let mut nodes: Vec<IpAddr> = known.flat_map(|known| known.addresses()).collect();
    nodes.retain(|one| !is_own(one) && !is_reached(one));
    let nodes = anatomy::sorted(nodes);
    nodes.iter().map(IpAddr::to_string).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        calico::doctor::{Evidence, FallbackTunnels, Severity, testing::Node},
        netfilter::Sets,
    };

    const RULE: &str = "*filter\n-A cali-INPUT -p ipencap -m set --match-set cali40all-hosts-net src -m addrtype --dst-type LOCAL \
                        -j ACCEPT\nCOMMIT\n";
    const HOSTS: &str = "create cali40all-hosts-net hash:net family inet\nadd cali40all-hosts-net 192.168.49.2\n\
                         add cali40all-hosts-net 192.168.49.3\nadd cali40all-hosts-net 192.0.2.0/24\n";

    fn told(mut node: Node, rules: &str, kernel: Option<(u32, bool)>) -> Vec<String> {
        let fallback_tunnels = kernel.map(|(setting, initial)| FallbackTunnels { setting, initial });
        let evidence = Evidence {
            firewall: Some(Firewall {
                v4: rules.to_owned(),
                sets: Some(Sets::parse(HOSTS)),
                ..Firewall::default()
            }),
            fallback_tunnels,
            ..Evidence::default()
        };
        node.told(ipip, &evidence, Severity::Problem)
    }

    /// The node that is told of is the second one of the set.
    fn ill() -> Node {
        Node::new()
            .without_tunnel()
            .without_blocks()
            .with_address(3, "192.168.49.2")
    }

    #[test]
    fn a_node_that_the_kernel_gives_no_tunnel_is_told_the_setting() {
        for (setting, initial, place) in [
            (1, false, "=1, and the node is in a container)"),
            (2, false, "=2, and the node is in a container)"),
            (2, true, "=2)"),
        ] {
            let told = told(ill(), RULE, Some((setting, initial)));
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(
                told[0].starts_with("There is no tunl0, ")
                    && told[0].contains("to pods of 192.168.49.3, and")
                    && told[0].contains(&format!("net.core.fb_tunnels_only_for_init_net{place}")),
                "{told:?}"
            );
        }
    }

    #[test]
    fn where_it_gives_one_or_is_not_seen_the_setting_is_not_blamed() {
        for kernel in [Some((0, false)), Some((1, true)), None] {
            let told = told(ill(), RULE, kernel);
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(
                told[0].starts_with("There is no tunl0, ") && !told[0].contains("fb_tunnels"),
                "{told:?}"
            );
        }
    }

    #[test]
    fn a_tunnel_that_nothing_uses_is_a_problem() {
        let told = told(ill().with_unused("tunl0", "ipip"), RULE, None);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with("tunl0 has neither address nor routes, though"),
            "{told:?}"
        );
    }

    #[test]
    fn somebody_else_s_tunnel_is_not_calico_s() {
        let told = told(ill().with_unused("ipip0", "ipip"), RULE, Some((2, true)));
        assert!(
            told.len() == 1 && told[0].starts_with("There is no tunl0, "),
            "{told:?}"
        );
    }

    #[test]
    fn without_need_no_tunnel_is_missed() {
        let kernel = Some((1, false));
        assert_eq!(told(Node::new(), RULE, kernel), [""; 0], "it is there");
        assert_eq!(
            told(ill(), "*filter\nCOMMIT\n", kernel),
            [""; 0],
            "no pool has IPIP"
        );
        let plain = Node::new().without_tunnel().with_address(3, "192.168.49.2");
        assert_eq!(
            told(plain, RULE, kernel),
            [""; 0],
            "all nodes are reached without"
        );
        let alone = ill().with_address(3, "192.168.49.3");
        assert_eq!(told(alone, RULE, kernel), [""; 0], "there are no others");
    }
}
