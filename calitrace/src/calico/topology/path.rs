//! The way that a packet is expected to take, node by node, as traceroute would print it. Each node's own kernel is asked
//! for the route and for the address of its errors; beyond the nodes that are looked at, routes tell what they can.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::{Masquerade, Passage, Service};
use crate::{
    calico::view::NodeView,
    event::{self, EncapKind, Role, RouteKind},
    netns::{self, Found},
    route::{Decision, Link, Type},
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
    /// The longest IP packet that passes whole through all devices on the way, in bytes, as far as they are looked at.
    pub mtu: u32,
    /// The longest one whose outer packets are not fragmented either.
    pub unfragmented: u32,
    /// Encapsulation between the nodes; null without, or within one node.
    pub encap: Option<EncapKind>,
    /// The lines that traceroute would print: the routers, then the receiver.
    pub hops: Vec<Step>,
    /// The devices on the way, in order, as far as they are looked at.
    pub devices: Vec<Passage>,
    /// How it ends.
    pub outcome: Outcome,
    /// The service's address that the packet is sent to, where that stands for `to`; null without. The last hop has it then,
    /// and the others their own, where traceroute prints the service's in every line.
    pub service: Option<Service>,
    /// What becomes of the packet's source address; null where it is not known, or was not asked for.
    pub masquerade: Option<Masquerade>,
    /// What calitrace would not see of such a packet, each a sentence; only where two ends were asked for.
    pub not_seen: Vec<String>,
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
    Walker::new(nodes)?.path(start, pod, from, to)
}

/// Follows packets through nodes.
pub(super) struct Walker<'a> {
    nodes: &'a [NodeView],
    /// The namespaces of this host, pods' among them.
    all: Vec<Found>,
}

impl<'a> Walker<'a> {
    pub(super) fn new(nodes: &'a [NodeView]) -> Result<Self> {
        Ok(Self {
            nodes,
            all: netns::list()?,
        })
    }

    /// The way of a packet from a pod of the node `start`.
    pub(super) fn path(
        &self,
        start: &'a NodeView,
        pod: &event::Pod,
        from: IpAddr,
        to: IpAddr,
    ) -> Result<Path> {
        let mut walk = Walk {
            nodes: self.nodes,
            all: &self.all,
            from,
            to,
            route_mtu: u32::MAX,
            encap: None,
            hops: Vec::new(),
            devices: Vec::new(),
        };
        walk.devices.extend(Passage::in_pod(start, 0, pod, &self.all)?);
        walk.passes(start, Some(pod.ifindex), None);
        let outcome = walk.follow(start, Some(pod.ifindex))?;
        let receiver = walk.hops.last().filter(|_| outcome == Outcome::Delivered);
        let room = |all: bool| {
            let limits = walk.devices.iter().filter(|device| all || !device.fragments);
            let room = limits.filter_map(Passage::room).min();
            room.unwrap_or(u32::MAX).min(walk.route_mtu)
        };
        let (mtu, unfragmented) = (room(false), room(true));
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
            mtu,
            unfragmented,
            encap: walk.encap,
            hops: walk.hops,
            devices: walk.devices,
            outcome,
            service: None,
            masquerade: None,
            not_seen: Vec::new(),
        })
    }
}

/// A few paths that stand for all: in each address family between the first pods of all pairs of nodes of a cluster, within
/// each node, and to blocks of nodes that are not looked at.
pub(super) fn representative(nodes: &[NodeView]) -> Result<Vec<Path>> {
    let walker = Walker::new(nodes)?;
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
                paths.push(walker.path(node, pod, from, to)?);
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

struct Walk<'a> {
    nodes: &'a [NodeView],
    all: &'a [Found],
    from: IpAddr,
    to: IpAddr,
    /// The smallest MTU of a route.
    route_mtu: u32,
    encap: Option<EncapKind>,
    hops: Vec<Step>,
    devices: Vec<Passage>,
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
            self.route_mtu = self
                .route_mtu
                .min(set_mtu(node, self.to, &decision).unwrap_or(u32::MAX));
            let owner = node.pods.iter().find(|pod| Some(pod.ifindex) == decision.oif);
            if let Some(pod) = owner {
                self.passes(node, decision.oif, None);
                self.step(Some(self.to), name, pod.name.clone(), Certainty::Known);
                let last = self.ttl();
                self.devices.extend(Passage::in_pod(node, last, pod, self.all)?);
                return Ok(Outcome::Delivered);
            }
            let route = best_route(node, self.to, &decision);
            let encap = route.and_then(|route| route.encap);
            self.encap = self.encap.or(encap);
            let remote = route.and_then(|route| route.remote_node);
            self.leaves(node, &decision, encap, remote)?;
            let beyond = remote.or(decision.gateway).unwrap_or(self.to);
            let to_block = route.is_some_and(|route| node.remote_blocks.contains(&route.prefix));
            let Some(next) = self.next(node, beyond, encap, to_block, &decision) else {
                self.infer(node, route, &decision);
                return Ok(Outcome::Left);
            };
            // What its answers would be sent to: the address that this node has on the way there.
            let back = decision.source.filter(|_| encap.is_none()).unwrap_or(self.from);
            inbound = self.enters(node, next, encap, back)?;
            node = next;
        }
        Ok(Outcome::Loop)
    }

    /// The node that a packet comes to next, over a router perhaps.
    fn next(
        &mut self,
        node: &NodeView,
        beyond: IpAddr,
        encap: Option<EncapKind>,
        to_block: bool,
        decision: &Decision,
    ) -> Option<&'a NodeView> {
        let next = owner_beyond(self.nodes, node, beyond);
        if next.is_some() || encap.is_some() {
            return next;
        }
        let router = decision.gateway?;
        let next = behind_router(self.nodes, node, self.to, to_block)?;
        self.step(Some(router), None, None, Certainty::Inferred);
        Some(next)
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

    /// The devices by which a packet leaves a node: the route's, and below a tunnel the one that carries it.
    fn leaves(
        &mut self,
        node: &NodeView,
        decision: &Decision,
        encap: Option<EncapKind>,
        remote: Option<IpAddr>,
    ) -> Result<()> {
        let hop = self.ttl();
        let Some(link) = decision.oif.and_then(|oif| node.snapshot.link(oif)) else {
            return Ok(());
        };
        let Some(device) = Passage::of(node, hop, link.ifindex) else {
            return Ok(());
        };
        let Some(kind) = encap else {
            self.devices.push(device);
            return Ok(());
        };
        self.devices.push(device.wrapping(node, link, kind, remote)?);
        if let Some(remote) = remote {
            let below = node.lookup.route_to(remote)?.and_then(|decision| decision.oif);
            self.passes(node, below.filter(|below| *below != link.ifindex), Some(link));
        }
        Ok(())
    }

    /// The devices by which it enters the next node. The device that it comes from there.
    fn enters(
        &mut self,
        last: &NodeView,
        next: &NodeView,
        encap: Option<EncapKind>,
        back: IpAddr,
    ) -> Result<Option<u32>> {
        let inbound = inbound_device(next, encap, back)?;
        let hop = self.ttl() + 1;
        let tunnel = inbound
            .filter(|_| encap.is_some())
            .and_then(|ifindex| next.snapshot.link(ifindex));
        if let Some(tunnel) = tunnel {
            let outer = self.devices.iter().rev().find_map(|device| device.encap?.src);
            let outer = outer.or_else(|| last.node.addresses.first().copied());
            let below = match outer {
                Some(outer) => next.lookup.route_to(outer)?.and_then(|decision| decision.oif),
                None => None,
            };
            let below = below.filter(|below| *below != tunnel.ifindex);
            let carrier = below.and_then(|below| Passage::of(next, hop, below));
            let sent = self.devices.last().filter(|device| device.overhead > 0);
            let sent = sent.map(|device| device.mtu);
            self.devices
                .extend(carrier.map(|carrier| carrier.carrying(tunnel, sent)));
        }
        let device = inbound.and_then(|inbound| Passage::of(next, hop, inbound));
        self.devices.extend(device);
        Ok(inbound)
    }

    /// A device of the router that is at work; below a tunnel what carries its outer packets.
    fn passes(&mut self, node: &NodeView, device: Option<u32>, tunnel: Option<&Link>) {
        let hop = self.ttl().max(1);
        let device = device.and_then(|ifindex| Passage::of(node, hop, ifindex));
        self.devices.extend(device.map(|device| match tunnel {
            Some(tunnel) => device.carrying(tunnel, None),
            None => device,
        }));
    }

    /// Of the last line so far.
    fn ttl(&self) -> u8 {
        u8::try_from(self.hops.len()).unwrap_or(u8::MAX)
    }
}

fn pod_with(node: &NodeView, address: IpAddr) -> Option<&event::Pod> {
    node.pods.iter().find(|pod| pod.addresses.contains(&address))
}

/// The node of the same cluster behind a gateway, if it is another one.
fn owner_beyond<'a>(nodes: &'a [NodeView], node: &NodeView, address: IpAddr) -> Option<&'a NodeView> {
    owner(nodes, node.node.cluster, address).filter(|next| next.netns() != node.netns())
}

/// The other node of the cluster that has an address, where the gateway on the way there is no node. Pods' addresses only
/// where the route is to a block: the default route's gateway knows none.
fn behind_router<'a>(
    nodes: &'a [NodeView],
    node: &NodeView,
    to: IpAddr,
    to_block: bool,
) -> Option<&'a NodeView> {
    let mut others = nodes
        .iter()
        .filter(|other| other.node.cluster == node.node.cluster && other.netns() != node.netns());
    others.find(|other| {
        let in_block =
            || pod_with(other, to).is_some() || other.local_blocks.iter().any(|block| block.contains(&to));
        other.node.addresses.contains(&to) || to_block && in_block()
    })
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

/// The MTU that was set for the route. What the kernel has learned for a destination, which its answer would tell, too,
/// does not hold for what it forwards (`ip_dst_mtu_maybe_forward`, `include/net/ip.h`, Linux 6.18; unless
/// `net.ipv4.ip_forward_use_pmtu` is 1).
fn set_mtu(node: &NodeView, to: IpAddr, decision: &Decision) -> Option<u32> {
    let routes = node.snapshot.routes.iter().filter(|entry| {
        entry.destination.contains(&to) && entry.oif == decision.oif && entry.gateway == decision.gateway
    });
    let best = routes.max_by_key(|entry| entry.destination.prefix_len())?;
    best.mtu.filter(|mtu| *mtu > 0)
}

/// The device by which a packet comes in: the tunnel of that kind, else the one that leads back.
fn inbound_device(node: &NodeView, encap: Option<EncapKind>, back: IpAddr) -> Result<Option<u32>> {
    let tunnel = node.interfaces.iter().find(|interface| {
        let link = node.snapshot.link(interface.ifindex);
        interface.role == Role::Tunnel
            && encap.is_some()
            && link.and_then(crate::calico::anatomy::encap_of) == encap
    });
    match tunnel {
        Some(tunnel) => Ok(Some(tunnel.ifindex)),
        None => Ok(node.lookup.route_to(back)?.and_then(|decision| decision.oif)),
    }
}
