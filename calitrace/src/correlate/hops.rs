//! The hops of a packet: routers by the TTL they lowered, the receiver last. What was not seen follows from routes and
//! is marked inferred, or stays unknown.
//!
//! `ip_forward` lowers the TTL once on each node, before the FORWARD hook (`net/ipv4/ip_forward.c`, 6.1); tunnels do not
//! touch the inner one. So a sighting with the TTL lowered k times lies behind the k-th router: on the way into a node
//! it belongs to router k + 1, on the way out to router k.

use std::net::IpAddr;

use super::{
    AnswerKind, Certainty, Hop, Name, NatKind, Verdict, answer,
    open::{Open, Reached, Seen, Translation},
    topology::Topology,
    underlay,
};
use crate::event::{EncapKind, Hook, Netns};

/// The highest TTL that traceroute sends with, unless told otherwise.
const TRACEROUTE_TTL: u8 = 30;

/// Routers and receiver of a trace, and the TTL at its sender.
pub(super) fn of(trace: &Open, topology: &Topology, verdict: Verdict) -> (Vec<Hop>, u8) {
    let mut way = Way::new(trace, topology);
    for (index, seen) in trace.seen.iter().enumerate() {
        way.pass(index, seen);
    }
    if let Some(end) = underlay::end(trace, topology) {
        way.end_between_nodes(end);
    } else if !way.answered_on_the_way() {
        match trace.reached {
            Reached::Pod | Reached::Node => way.receive(verdict),
            Reached::Outside => way.go_on(verdict),
            Reached::Nothing => way.hand_on(),
        }
    }
    way.answer();
    (way.hops, way.ttl)
}

/// The last sighting at an interface, if the packet came in there beside TC programs of others, which may have handed it on
/// past all further hooks.
pub(super) fn handed_on_from<'a>(trace: &'a Open, topology: &Topology) -> Option<&'a Seen> {
    let last = trace
        .seen
        .iter()
        .rfind(|seen| seen.is_ingress() || seen.is_egress())?;
    let others = topology.ledgers.others(last.netns, last.ifindex, last.hook);
    (last.is_ingress() && !others.is_empty() && trace.drop.is_none()).then_some(last)
}

/// The TTL that an ordinary packet began with: systems send with 64, 128 or 255. What comes with less than probes have is
/// taken for one.
fn ttl_at_sender(ttl: u8) -> u8 {
    if ttl <= TRACEROUTE_TTL {
        return ttl;
    }
    match ttl {
        ..=64 => 64,
        65..=128 => 128,
        129.. => 255,
    }
}

struct Way<'a> {
    trace: &'a Open,
    topology: &'a Topology,
    /// At the sender.
    ttl: u8,
    hops: Vec<Hop>,
    /// It leads out of the cluster: how many routers follow the last is not known.
    open_ended: bool,
    /// The node that it left last, and which hop that is.
    left: Option<(Netns, u8)>,
}

impl<'a> Way<'a> {
    /// The way up to the first sighting: what came before it was not seen.
    fn new(trace: &'a Open, topology: &'a Topology) -> Self {
        let first = trace.first();
        let mut way = Self {
            trace,
            topology,
            ttl: first.ttl,
            hops: Vec::new(),
            open_ended: false,
            left: None,
        };
        let source = trace.flow.src;
        // Translated before it was first seen: a service's answer, or a pod's packet that goes out under the node's address,
        // which forwarding shows. Who sent it, and what it passed, is not known; only how many routers those were.
        let masqueraded =
            first.is_egress() && topology.is_own(first.node, source) && first.ttl != ttl_at_sender(first.ttl);
        if topology.is_service(source) || masqueraded {
            way.ttl = ttl_at_sender(first.ttl);
            return way;
        }
        if way.is_sender(first, source) {
            return way;
        }
        let remote = way.router_before(first, source);
        let forwarded = u8::from(first.is_egress());
        way.ttl = first.ttl.saturating_add(u8::from(remote.is_some()) + forwarded);
        if let Some((address, node)) = remote {
            let hop = way.hop(1);
            hop.address = address;
            hop.node = Some(node);
        }
        way
    }

    /// Whether the node (or the pod) of the first sighting is itself the sender.
    fn is_sender(&self, first: &Seen, source: IpAddr) -> bool {
        match first.hook {
            Hook::WorkloadIngress => true,
            Hook::KfreeSkb => first.in_pod || self.topology.is_own(first.node, source),
            _ if first.is_egress() => self.topology.is_own(first.node, source),
            _ => false,
        }
    }

    /// The node that the packet was sent on by before it came to the first one observed: its address, if it is known
    /// what it shows to the sender, and its name.
    fn router_before(&self, first: &Seen, source: IpAddr) -> Option<(Option<IpAddr>, Name)> {
        let (topology, cluster) = (self.topology, self.trace.cluster);
        // Pods do not forward, so an error about a TTL comes from the router itself.
        let by_router =
            answer::of_icmp(&self.trace.packet).is_some_and(|(kind, ..)| kind == AnswerKind::TimeExceeded);
        if by_router
            || first.hook == Hook::KfreeSkb
            || topology
                .owner(cluster, source)
                .is_some_and(|owner| owner.node == first.node)
        {
            return None;
        }
        let beyond = topology.beyond(first.node, source)?;
        let remote = beyond.remote_node?;
        // WireGuard finds its peer by the address, without a gateway.
        let gateway = beyond.gateway.or(beyond.encap.and(Some(remote)))?;
        if source == gateway || topology.shown(first.node, remote) == Some(source) {
            return None;
        }
        let remote = first.encap.as_ref().map_or(remote, |encap| encap.src);
        let Some(node) = topology.node_of(cluster, remote) else {
            return Some((None, remote.to_string().into()));
        };
        if topology.is_own(node, source) {
            return None;
        }
        let name = topology
            .name(node)
            .cloned()
            .unwrap_or_else(|| remote.to_string().into());
        Some((topology.hop_address(node, source, first.time), name))
    }

    /// The hop with this number (from 1), made if it is missing; those before it that nobody saw, too.
    fn hop(&mut self, number: u8) -> &mut Hop {
        while self.hops.len() < usize::from(number) {
            let ttl = u8::try_from(self.hops.len() + 1).unwrap_or(u8::MAX);
            self.hops.push(Hop {
                ttl,
                address: None,
                node: None,
                pod: None,
                arrived_ns: None,
                left_ns: None,
                rtt_ns: None,
                clock_bound_ns: None,
                certainty: Certainty::Inferred,
                reason: None,
            });
        }
        &mut self.hops[usize::from(number) - 1]
    }

    /// The number of the next hop after all that are known.
    fn next(&self) -> u8 {
        u8::try_from(self.hops.len() + 1).unwrap_or(u8::MAX)
    }

    fn elapsed(&self, seen: &Seen) -> u64 {
        seen.time.saturating_sub(self.trace.first().time)
    }

    /// Routers by a sighting.
    fn pass(&mut self, index: usize, seen: &Seen) {
        let lowered = self.ttl.saturating_sub(seen.ttl);
        let elapsed = self.elapsed(seen);
        if seen.is_egress() {
            if lowered > 0 {
                let address = self.address(index, seen);
                let hop = self.observed(lowered, address, seen.node);
                hop.left_ns = Some(hop.left_ns.map_or(elapsed, |left| left.min(elapsed)));
                self.left = Some((seen.node, lowered));
            }
        } else if seen.is_ingress() && !self.is_receiver(seen) {
            let address = self.address(index, seen);
            self.cross_routers(seen, lowered);
            let hop = self.observed(lowered.saturating_add(1), address, seen.node);
            hop.arrived_ns = Some(hop.arrived_ns.map_or(elapsed, |arrived| arrived.min(elapsed)));
        }
    }

    /// Between two nodes the TTL was lowered, so there are routers that are no nodes. The first of them is the former
    /// node's gateway.
    fn cross_routers(&mut self, seen: &Seen, lowered: u8) {
        let Some((node, number)) = self
            .left
            .filter(|(node, number)| *node != seen.node && lowered > *number)
        else {
            return;
        };
        let beyond = self.topology.beyond(node, self.trace.current().dst);
        let gateway = beyond
            .filter(|beyond| beyond.encap.is_none())
            .and_then(|beyond| beyond.gateway);
        let hop = self.hop(number + 1);
        hop.address = hop.address.or(gateway);
    }

    fn observed(&mut self, number: u8, address: Option<IpAddr>, node: Netns) -> &mut Hop {
        let bound = self.topology.clock_bound(self.trace.first().node, node);
        let name = self.topology.name(node).cloned();
        let hop = self.hop(number);
        hop.address = address.or(hop.address);
        hop.node = name.or(hop.node.take());
        hop.clock_bound_ns = bound;
        hop.certainty = Certainty::Observed;
        hop
    }

    /// Whether the packet was on its way in at the node that it is for.
    fn is_receiver(&self, seen: &Seen) -> bool {
        self.trace.reached == Reached::Node && self.topology.is_own(seen.node, self.trace.current().dst)
    }

    /// What the node's ICMP errors to the sender carry: the sender as this node sees it, which is before the node
    /// translates the source on the way out.
    fn address(&self, index: usize, seen: &Seen) -> Option<IpAddr> {
        let earlier =
            |step: &&Translation| step.at <= index && step.node != seen.node && step.kind == NatKind::Snat;
        let translated = self
            .trace
            .translations
            .iter()
            .rev()
            .find(earlier)
            .map(|step| step.to.address);
        let source = translated.unwrap_or(self.trace.flow.src);
        self.topology.hop_address(seen.node, source, seen.time)
    }

    /// The packet reached its destination.
    fn receive(&mut self, verdict: Verdict) {
        let trace = self.trace;
        let to_node = trace.reached == Reached::Node;
        let here = |seen: &&Seen| {
            if to_node {
                seen.is_ingress() && self.is_receiver(seen)
            } else {
                seen.hook == Hook::WorkloadEgress
            }
        };
        let mut sightings = trace.seen.iter().filter(here);
        let Some(first) = sightings.next() else {
            // Its answer says that it got there; seen last on its way out of another node.
            if trace.last().is_egress() {
                return self.go_on(verdict);
            }
            let owner = || self.topology.owner(trace.cluster, trace.current().dst);
            let node = self.topology.node_of(trace.cluster, trace.current().dst);
            let node = node.or_else(|| owner().map(|owner| owner.node));
            return self.receiver_inferred(node.and_then(|node| self.topology.name(node).cloned()));
        };
        let last = sightings.next_back().unwrap_or(first);
        let number = self.ttl.saturating_sub(last.ttl).saturating_add(1);
        let (arrived, left) = (self.elapsed(first), self.elapsed(last));
        let node = self.topology.name(last.node).cloned();
        let pod = self.pod();
        let address = trace.flow.dst;
        let bound = self.topology.clock_bound(trace.first().node, last.node);
        let hop = self.hop(number);
        hop.address = Some(address);
        hop.node = node;
        hop.pod = pod;
        hop.clock_bound_ns = bound;
        hop.arrived_ns = Some(arrived);
        hop.left_ns = Some(left);
        hop.certainty = if to_node {
            Certainty::Inferred
        } else {
            Certainty::Observed
        };
    }

    /// A packet for a pod of the node that it was last seen coming in at, where somebody else's program may have handed it
    /// to the pod.
    fn hand_on(&mut self) {
        let Some(last) = handed_on_from(self.trace, self.topology) else {
            return;
        };
        let owner = self.topology.owner(self.trace.cluster, self.trace.current().dst);
        if owner.is_some_and(|owner| owner.node == last.node) {
            self.receiver_inferred(self.topology.name(last.node).cloned());
        }
    }

    fn pod(&self) -> Option<Name> {
        let owner = self
            .topology
            .owner(self.trace.cluster, self.trace.current().dst)?;
        owner.name
    }

    /// The way beyond the last node observed, as far as its routes tell.
    fn go_on(&mut self, verdict: Verdict) {
        let last = self.trace.last();
        let destination = self.trace.current().dst;
        let Some(beyond) = self.topology.beyond(last.node, destination) else {
            return;
        };
        let Some(gateway) = beyond.gateway.or(beyond.encap.and(beyond.remote_node)) else {
            return self.receiver_inferred(None);
        };
        let Some(remote) = beyond.remote_node.or_else(|| beyond.encap.and(Some(gateway))) else {
            self.open_ended = true;
            return self.inferred(Some(gateway), None);
        };
        let shown = self.topology.shown(last.node, remote);
        let address = match beyond.encap {
            Some(EncapKind::Ipip | EncapKind::Wireguard) => shown,
            Some(EncapKind::Vxlan) | None => Some(gateway),
        };
        let node = self.node_name(remote);
        if destination != gateway && destination != remote && Some(destination) != address {
            self.inferred(address, Some(Name::clone(&node)));
        }
        if verdict != Verdict::Expired {
            self.receiver_inferred(Some(node));
        }
    }

    /// It got no further than the routers between two nodes, and nobody told the sender.
    fn end_between_nodes(&mut self, end: underlay::End) {
        // The TTL counts the routers, but for one that went in circles.
        let number = if end.verdict == Verdict::Expired && self.ttl <= TRACEROUTE_TTL {
            self.ttl.max(1)
        } else {
            self.next()
        };
        let hop = self.hop(number);
        hop.reason = Some(end.reason);
        if end.told {
            hop.certainty = Certainty::Observed;
        }
    }

    fn node_name(&self, address: IpAddr) -> Name {
        let node: Option<Netns> = self.topology.node_of(self.trace.cluster, address);
        node.and_then(|node| self.topology.name(node).cloned())
            .unwrap_or_else(|| address.to_string().into())
    }

    fn inferred(&mut self, address: Option<IpAddr>, node: Option<Name>) {
        let number = self.next();
        let hop = self.hop(number);
        hop.address = address;
        hop.node = node;
    }

    fn receiver_inferred(&mut self, node: Option<Name>) {
        let (address, pod) = (self.trace.flow.dst, self.pod());
        let number = self.next();
        let hop = self.hop(number);
        hop.address = Some(address);
        hop.node = node;
        hop.pod = pod;
    }

    /// Whether a router answered that is among the hops already: the way ends there.
    fn answered_on_the_way(&self) -> bool {
        let Some(answered) = &self.trace.answered else {
            return false;
        };
        self.trace.drop.is_some()
            && self.trace.reached == Reached::Nothing
            && answered.kind == AnswerKind::TimeExceeded
    }

    /// The hop that answered.
    fn answer(&mut self) {
        let Some(answered) = &self.trace.answered else {
            return;
        };
        let by_receiver =
            answered.address == self.trace.flow.dst || answered.address == self.trace.current().dst;
        let known = self.hops.iter().find(|hop| hop.address == Some(answered.address));
        let number = match (answered.kind, known) {
            // The TTL says which router it ran out at.
            (AnswerKind::TimeExceeded, _) => self.ttl.max(1),
            (_, Some(hop)) if !by_receiver => hop.ttl,
            _ if self.open_ended => return,
            _ if by_receiver => self.receiver_number(),
            _ => u8::try_from(self.hops.len()).unwrap_or(u8::MAX).max(1),
        };
        if answered.kind == AnswerKind::TimeExceeded {
            self.hops.truncate(usize::from(number));
        }
        let router = answered.kind == AnswerKind::TimeExceeded || answered.address != self.trace.flow.dst;
        let ends_here = matches!(answered.kind, AnswerKind::TimeExceeded | AnswerKind::Unreachable);
        let node = self.topology.node_of(self.trace.cluster, answered.address);
        let name = node.and_then(|node| self.topology.name(node).cloned());
        let hop = self.hop(number);
        hop.rtt_ns = answered.rtt;
        if router && ends_here {
            hop.address = Some(answered.address);
            hop.node = hop.node.take().or(name);
            hop.certainty = Certainty::Observed;
        } else if matches!(answered.kind, AnswerKind::Unreachable | AnswerKind::Reset) {
            hop.certainty = Certainty::Observed;
        }
    }

    /// The receiver's line, made if it is missing.
    fn receiver_number(&mut self) -> u8 {
        let address = self.trace.flow.dst;
        let last = self
            .hops
            .last()
            .filter(|hop| hop.address == Some(address))
            .map(|hop| hop.ttl);
        last.unwrap_or_else(|| {
            self.receiver_inferred(None);
            u8::try_from(self.hops.len()).unwrap_or(u8::MAX)
        })
    }
}
