//! What is known about the two nodes of the model: names, addresses, routes, pods, services, hooks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::event::{
    Attachment, AttachmentState, EncapKind, Fact, Hook, HopAddress, Interface, Netns, Node, Pod, Role, Route,
    RouteKind,
};

pub(in crate::correlate) const TUNNEL: u32 = 2;
pub(in crate::correlate) const UPLINK: u32 = 3;
/// The tunnel device for IPv6.
pub(super) const TUNNEL6: u32 = 4;
pub(in crate::correlate) const POD: u32 = 10;

pub(in crate::correlate) fn netns(node: usize) -> Netns {
    4_026_532_000 + node as Netns
}

fn octet(number: usize) -> u8 {
    u8::try_from(number).expect("small")
}

/// An address of either family: the same numbers, `10.a.b.c` and `fd00:a:b::c`.
fn address(v6: bool, [a, b, c]: [u8; 3]) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, a.into(), b.into(), 0, 0, 0, 0, c.into()).into()
    } else {
        Ipv4Addr::new(10, a, b, c).into()
    }
}

pub(super) fn node_address(node: usize, v6: bool) -> IpAddr {
    address(v6, [49, 0, 2 + octet(node)])
}

pub(super) fn pod_of(node: usize, pod: usize, v6: bool) -> IpAddr {
    address(v6, [244, octet(node), 67 + octet(pod)])
}

pub(in crate::correlate) fn pod_address(node: usize, pod: usize) -> IpAddr {
    pod_of(node, pod, false)
}

fn tunnel_address(node: usize, v6: bool) -> IpAddr {
    address(v6, [244, octet(node), 64])
}

/// The service before any pod.
pub(super) fn service(v6: bool) -> IpAddr {
    address(v6, [96, 0, 10])
}

/// An address that nothing tells to be a service's, and that is translated all the same.
pub(super) fn floating(v6: bool) -> IpAddr {
    address(v6, [77, 0, 1])
}

/// Somebody out of the cluster.
pub(super) fn outside(v6: bool) -> IpAddr {
    address(v6, [200, 1, 1])
}

/// The router between the cluster and the outside.
pub(super) fn gateway(v6: bool) -> IpAddr {
    address(v6, [49, 0, 1])
}

/// What a node's time exceeded comes from.
pub(super) fn hop_address(node: usize, v6: bool) -> IpAddr {
    tunnel_address(node, v6)
}

/// How packets between the nodes are carried. IPIP carries no IPv6: that goes without.
pub(super) fn carrier(encap: Option<EncapKind>, v6: bool) -> Option<EncapKind> {
    encap.filter(|kind| !(v6 && *kind == EncapKind::Ipip))
}

/// The tunnel device of a family.
pub(super) fn tunnel_device(v6: bool) -> u32 {
    if v6 { TUNNEL6 } else { TUNNEL }
}

/// What is known about the two nodes.
pub(in crate::correlate) fn facts(encap: Option<EncapKind>) -> Vec<Fact> {
    let mut facts = Vec::new();
    for node in 0..2 {
        let (netns, other) = (netns(node), 1 - node);
        let own = |v6| [node_address(node, v6), tunnel_address(node, v6)];
        facts.push(Fact::Node(Node {
            time: 0,
            netns,
            name: format!("node{node}"),
            cluster: 1,
            addresses: own(false).into_iter().chain(own(true)).collect(),
        }));
        let routes = [false, true]
            .iter()
            .flat_map(|v6| routes(other, carrier(encap, *v6), *v6));
        facts.push(Fact::Routes {
            time: 0,
            netns,
            routes: routes.collect(),
        });
        interfaces(netns, &mut facts);
        for pod in 0..2 {
            facts.push(Fact::Pod(Pod {
                time: 0,
                netns,
                ifindex: POD + u32::from(octet(pod)),
                addresses: vec![pod_of(node, pod, false), pod_of(node, pod, true)],
                name: Some(format!("ns/pod{node}{pod}")),
                pod_netns: None,
                gone: false,
            }));
        }
        // Towards every sender: pods, and the nodes as which they may appear.
        for v6 in [false, true] {
            let pods = (0..4).map(|pod| pod_of(pod / 2, pod % 2, v6));
            for towards in pods.chain([node_address(0, v6), node_address(1, v6)]) {
                facts.push(Fact::HopAddress(HopAddress {
                    time: 0,
                    netns,
                    towards,
                    address: Some(hop_address(node, v6)),
                }));
            }
        }
    }
    let prefixes = ["10.96.0.0/16", "fd00:60::/32"].map(|prefix| prefix.parse().expect("a prefix"));
    facts.push(Fact::Services {
        time: 0,
        prefixes: prefixes.to_vec(),
    });
    facts
}

fn routes(other: usize, encap: Option<EncapKind>, v6: bool) -> [Route; 2] {
    let (block, all) = if v6 {
        (format!("fd00:f4:{other}::/64"), "::/0")
    } else {
        (format!("10.244.{other}.64/26"), "0.0.0.0/0")
    };
    let remote = node_address(other, v6);
    let within = Route {
        prefix: block.parse().expect("a prefix"),
        kind: RouteKind::Unicast,
        gateway: Some(match encap {
            Some(EncapKind::Vxlan) => tunnel_address(other, v6),
            _ => remote,
        }),
        ifindex: Some(if encap.is_some() {
            tunnel_device(v6)
        } else {
            UPLINK
        }),
        encap,
        remote_node: Some(remote),
    };
    let out = Route {
        prefix: all.parse().expect("a prefix"),
        kind: RouteKind::Unicast,
        gateway: Some(gateway(v6)),
        ifindex: Some(UPLINK),
        encap: None,
        remote_node: None,
    };
    [within, out]
}

/// Interfaces with the hooks on both sides.
fn interfaces(netns: Netns, facts: &mut Vec<Fact>) {
    use Hook::{TunnelEgress, TunnelIngress, UplinkEgress, UplinkIngress, WorkloadEgress, WorkloadIngress};
    let interfaces = [
        (TUNNEL, Role::Tunnel, [TunnelIngress, TunnelEgress]),
        (TUNNEL6, Role::Tunnel, [TunnelIngress, TunnelEgress]),
        (UPLINK, Role::Uplink, [UplinkIngress, UplinkEgress]),
        (POD, Role::Workload, [WorkloadIngress, WorkloadEgress]),
        (POD + 1, Role::Workload, [WorkloadIngress, WorkloadEgress]),
    ];
    for (ifindex, role, hooks) in interfaces {
        facts.push(Fact::Interface(Interface {
            time: 0,
            netns,
            ifindex,
            name: format!("if{ifindex}"),
            role,
            mtu: 1450,
            addresses: Vec::new(),
            xdp: false,
            gone: false,
        }));
        for hook in hooks {
            facts.push(Fact::Attachment(Attachment {
                time: 0,
                netns,
                ifindex,
                hook,
                state: AttachmentState::Attached,
                since: None,
                others: Vec::new(),
            }));
        }
    }
}
