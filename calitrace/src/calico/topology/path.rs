//! The way that a packet is expected to take, node by node, as traceroute would print it. Each node's own kernel is asked
//! for the route and for the address of its errors; beyond the nodes that are looked at, routes tell what they can.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use crate::{
    calico::view::NodeView,
    event::{self, EncapKind, Role, RouteKind},
    route::{Decision, Type},
};

/// A packet is forwarded at most so many times.
const TTL_MAX: u8 = 64;

/// The expected way of a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Path {
    /// Where it begins.
    pub from: End,
    /// Where it is to go.
    pub to: End,
    /// The longest IP packet that passes all devices on the way, in bytes, as far as they are looked at.
    pub mtu: u32,
    /// Encapsulation between the nodes; null without, or within one node.
    pub encap: Option<EncapKind>,
    /// The lines that traceroute would print: the routers, then the receiver.
    pub hops: Vec<Step>,
    /// How it ends.
    pub outcome: Outcome,
}

/// An end of a path.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct End {
    /// The address.
    pub address: IpAddr,
    /// The pod that has it; null where it is none or not known.
    pub pod: Option<String>,
    /// The node that it is on, by name, or by address where it is not looked at; null where it is not known.
    pub node: Option<String>,
}

/// One line of a traceroute.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// The TTL of the probe that would show it.
    pub ttl: u8,
    /// What traceroute would print; null: not known here.
    pub address: Option<IpAddr>,
    /// The node, by name, or by address where it is not looked at; null where it is not known.
    pub node: Option<String>,
    /// The pod, for a receiver that is one.
    pub pod: Option<String>,
    /// Where the address comes from.
    pub certainty: Certainty,
}

/// Where an expected address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Certainty {
    /// That node's own kernel or tables say it.
    Known,
    /// Another node's routes suggest it.
    Inferred,
}

/// How an expected way ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// At its receiver.
    Delivered,
    /// Beyond the nodes that are looked at.
    Left,
    /// In a blackhole: an address of a block that no pod has.
    Blackhole,
    /// Without a route.
    Unreachable,
    /// Nowhere: the nodes send it around in circles.
    Loop,
}

/// The expected way of a packet from a pod of one of the nodes to any address.
pub fn expected_path(nodes: &[NodeView], from: IpAddr, to: IpAddr) -> Result<Path> {
    let Some((start, pod)) = nodes.iter().find_map(|node| Some((node, pod_with(node, from)?))) else {
        bail!("no pod of these nodes has the address {from}");
    };
    walk(nodes, start, pod, from, to)
}

/// A few paths that stand for all: in each address family between the first pods of all pairs of nodes of a cluster, within
/// each node, and to blocks of nodes that are not looked at.
pub(super) fn representative(nodes: &[NodeView]) -> Result<Vec<Path>> {
    let mut paths = Vec::new();
    for node in nodes {
        for v6 in [false, true] {
            let ends = |node: &'_ NodeView| -> Vec<(u32, IpAddr)> {
                let pods = node.pods.iter();
                pods.filter_map(|pod| Some((pod.ifindex, *pod.addresses.iter().find(|a| a.is_ipv6() == v6)?)))
                    .collect()
            };
            let own = ends(node);
            let Some(&(device, from)) = own.first() else {
                continue;
            };
            let Some(pod) = node.pods.iter().find(|pod| pod.ifindex == device) else {
                continue;
            };
            let cluster = node.node.cluster;
            let others = nodes
                .iter()
                .filter(|other| other.netns() != node.netns() && other.node.cluster == cluster);
            let remote = others.filter_map(|other| ends(other).first().map(|(_, address)| *address));
            let unseen = node.routes.iter().filter(|route| {
                let seen = route
                    .remote_node
                    .is_some_and(|address| owner(nodes, cluster, address).is_some());
                node.remote_blocks.contains(&route.prefix) && !seen && route.prefix.addr().is_ipv6() == v6
            });
            let neighbour = own.get(1).map(|(_, address)| *address);
            for to in neighbour
                .into_iter()
                .chain(remote)
                .chain(unseen.map(|route| route.prefix.addr()))
            {
                paths.push(walk(nodes, node, pod, from, to)?);
            }
        }
    }
    Ok(paths)
}

/// The node of a cluster that has an address.
pub(super) fn owner(nodes: &[NodeView], cluster: u32, address: IpAddr) -> Option<&NodeView> {
    nodes
        .iter()
        .find(|node| node.node.cluster == cluster && node.node.addresses.contains(&address))
}

fn walk(nodes: &[NodeView], start: &NodeView, pod: &event::Pod, from: IpAddr, to: IpAddr) -> Result<Path> {
    let mut walk = Walk {
        nodes,
        from,
        to,
        mtu: u32::MAX,
        encap: None,
        hops: Vec::new(),
    };
    walk.passes(start, Some(pod.ifindex));
    let outcome = walk.follow(start, Some(pod.ifindex))?;
    let receiver = walk.hops.last().filter(|_| outcome == Outcome::Delivered);
    Ok(Path {
        from: End {
            address: from,
            pod: pod.name.clone(),
            node: Some(start.node.name.clone()),
        },
        to: End {
            address: to,
            pod: receiver.and_then(|receiver| receiver.pod.clone()),
            node: walk
                .hops
                .last()
                .filter(|last| last.address == Some(to))
                .and_then(|last| last.node.clone()),
        },
        mtu: walk.mtu,
        encap: walk.encap,
        hops: walk.hops,
        outcome,
    })
}

struct Walk<'a> {
    nodes: &'a [NodeView],
    from: IpAddr,
    to: IpAddr,
    mtu: u32,
    encap: Option<EncapKind>,
    hops: Vec<Step>,
}

impl<'a> Walk<'a> {
    fn follow(&mut self, start: &'a NodeView, inbound: Option<u32>) -> Result<Outcome> {
        let (mut node, mut inbound) = (start, inbound);
        for _ in 0..TTL_MAX {
            let name = Some(node.node.name.clone());
            if node.node.addresses.contains(&self.to) {
                self.step(Some(self.to), name, None, Certainty::Known);
                return Ok(Outcome::Delivered);
            }
            let ask = || format!("ask {} for its hop address", node.node.name);
            let address = node.lookup.hop_address(self.from, inbound).with_context(ask)?;
            self.step(address, name.clone(), None, Certainty::Known);
            let Some(decision) = node.lookup.route_to(self.to)? else {
                return Ok(Outcome::Unreachable);
            };
            match decision.kind {
                Type::Unicast | Type::Local => {}
                Type::Blackhole => return Ok(Outcome::Blackhole),
                Type::Unreachable | Type::Prohibit | Type::Other => return Ok(Outcome::Unreachable),
            }
            self.passes(node, decision.oif);
            self.mtu = self
                .mtu
                .min(decision.mtu.filter(|mtu| *mtu > 0).unwrap_or(u32::MAX));
            let owner = node.pods.iter().find(|pod| Some(pod.ifindex) == decision.oif);
            if let Some(pod) = owner {
                self.step(Some(self.to), name, pod.name.clone(), Certainty::Known);
                return Ok(Outcome::Delivered);
            }
            let route = best_route(node, self.to, &decision);
            self.encap = self.encap.or(route.and_then(|route| route.encap));
            let beyond = route
                .and_then(|route| route.remote_node)
                .or(decision.gateway)
                .unwrap_or(self.to);
            let Some(next) = owner_beyond(self.nodes, node, beyond) else {
                self.infer(node, route, &decision);
                return Ok(Outcome::Left);
            };
            inbound = inbound_device(next, route.and_then(|route| route.encap), self.from)?;
            self.passes(next, inbound);
            node = next;
        }
        Ok(Outcome::Loop)
    }

    /// What lies beyond the last node that is looked at.
    fn infer(&mut self, node: &NodeView, route: Option<&event::Route>, decision: &Decision) {
        let block = route.filter(|route| node.remote_blocks.contains(&route.prefix));
        let remote = block
            .and_then(|route| route.remote_node)
            .map(|address| address.to_string());
        // An IPIP gateway is the node, not its tunnel's address, and a WireGuard device has none: unknown here. A VXLAN
        // gateway is the remote tunnel's own address.
        let router = match block.and_then(|route| route.encap) {
            Some(EncapKind::Ipip | EncapKind::Wireguard) => None,
            Some(EncapKind::Vxlan) | None => decision.gateway,
        };
        if (decision.gateway.is_some() || block.is_some()) && decision.gateway != Some(self.to) {
            self.step(router, remote.clone(), None, Certainty::Inferred);
        }
        // Beyond another gateway there may be any number of routers.
        if block.is_some() || decision.gateway.is_none() || decision.gateway == Some(self.to) {
            self.step(Some(self.to), remote, None, Certainty::Inferred);
        }
    }

    fn step(
        &mut self,
        address: Option<IpAddr>,
        node: Option<String>,
        pod: Option<String>,
        certainty: Certainty,
    ) {
        let ttl = u8::try_from(self.hops.len() + 1).unwrap_or(u8::MAX);
        self.hops.push(Step {
            ttl,
            address,
            node,
            pod,
            certainty,
        });
    }

    fn passes(&mut self, node: &NodeView, device: Option<u32>) {
        let mtu = device
            .and_then(|ifindex| node.snapshot.link(ifindex))
            .map(|link| link.mtu);
        self.mtu = self.mtu.min(mtu.filter(|mtu| *mtu > 0).unwrap_or(u32::MAX));
    }
}

fn pod_with(node: &NodeView, address: IpAddr) -> Option<&event::Pod> {
    node.pods.iter().find(|pod| pod.addresses.contains(&address))
}

/// The node of the same cluster behind a gateway, if it is another one.
fn owner_beyond<'a>(nodes: &'a [NodeView], node: &NodeView, address: IpAddr) -> Option<&'a NodeView> {
    owner(nodes, node.node.cluster, address).filter(|next| next.netns() != node.netns())
}

/// The route that the kernel's decision came from.
fn best_route<'a>(node: &'a NodeView, to: IpAddr, decision: &Decision) -> Option<&'a event::Route> {
    node.routes.iter().find(|route| {
        route.prefix.contains(&to)
            && route.kind == RouteKind::Unicast
            && route.ifindex == decision.oif
            && route.gateway == decision.gateway
    })
}

/// The device by which a packet comes in: the tunnel of that kind, else the one that leads back.
fn inbound_device(node: &NodeView, encap: Option<EncapKind>, from: IpAddr) -> Result<Option<u32>> {
    let tunnel = node.interfaces.iter().find(|interface| {
        let link = node.snapshot.link(interface.ifindex);
        interface.role == Role::Tunnel
            && encap.is_some()
            && link.and_then(crate::calico::anatomy::encap_of) == encap
    });
    match tunnel {
        Some(tunnel) => Ok(Some(tunnel.ifindex)),
        None => Ok(node.lookup.route_to(from)?.and_then(|decision| decision.oif)),
    }
}
