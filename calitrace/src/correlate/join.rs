//! Whether an observation is of a packet that has been seen before: the rules of identity (design: "Joining and hops").
//!
//! Two packets must never become one trace. So each rule says when a join is allowed, and without one the observation
//! begins a trace of its own.

use smallvec::SmallVec;

use super::{
    key::{self, Part},
    nat::Translations,
    open::{Open, OpenTraces, Seen, WINDOW},
    timers::MILLISECOND,
    topology::{NO_CLUSTER, Place, Topology},
};
use crate::event::{Flow, Hook, Netns, Observation, machine_of};

/// An `sk_buff`'s address says nothing any more after this long without a sighting.
pub(super) const LIFE: u64 = 1000 * MILLISECOND;
/// A drop belongs to a packet that passed its last hook if it comes within this time.
const LATE_DROP: u64 = 50 * MILLISECOND;

/// An observation with what is looked up once for all rules.
#[derive(Debug)]
pub(super) struct Sight<'a> {
    pub(super) observation: &'a Observation,
    pub(super) place: Place,
    pub(super) flow: Flow,
    pub(super) part: Part,
}

impl<'a> Sight<'a> {
    pub(super) fn new(observation: &'a Observation, place: Place) -> Self {
        let packet = &observation.packet;
        Self {
            observation,
            place,
            flow: packet.flow(),
            part: Part::of(packet),
        }
    }

    /// The sighting to keep.
    pub(super) fn seen(&self) -> Seen {
        let observation = self.observation;
        Seen {
            time: observation.time,
            skb: observation.skb,
            netns: observation.netns,
            node: self.place.node,
            ifindex: observation.ifindex,
            length: observation.packet.length,
            interval: self.part.interval(),
            hook: observation.hook,
            ttl: observation.packet.ttl,
            in_pod: self.place.in_pod,
            flow: 0,
            encap: observation.encap,
        }
    }
}

/// The traces that an observation belongs to: one, or for merged TCP segments several.
pub(super) type Joined = SmallVec<[u32; 8]>;

/// Finds them. When the flow of the last sighting was another one, the observation shows a translation.
pub(super) fn find(
    sight: &Sight<'_>,
    open: &OpenTraces,
    topology: &Topology,
    translations: &Translations,
) -> Joined {
    let mut joined = Joined::new();
    // What a pod sends has been nowhere before.
    if sight.observation.hook == Hook::WorkloadIngress {
        return joined;
    }
    let mut flow = sight.flow;
    if let Some(index) = open.by_skb(sight.place.node, sight.observation.skb)
        && by_skb(sight, open.get(index), topology, translations)
    {
        let trace = open.get(index);
        flow = *trace.flow_at(trace.last_of(sight.part.interval()));
        joined.push(index);
    }
    if sight.part.is_stream() {
        by_interval(sight, open, sight.place.cluster, &flow, &mut joined);
    } else if joined.is_empty() {
        joined.extend(by_content(sight, open, sight.place.cluster));
    }
    if joined.is_empty() && sight.place.cluster == NO_CLUSTER {
        elsewhere(sight, open, topology, &mut joined);
    }
    joined
}

/// Within a node: the same `sk_buff`, checked by content.
fn by_skb(sight: &Sight<'_>, trace: &Open, topology: &Topology, translations: &Translations) -> bool {
    let last = trace.last_of(sight.part.interval());
    if sight.observation.time > last.time + LIFE
        || last.node != sight.place.node
        || !follows(last, sight)
        || trace.cluster != sight.place.cluster
    {
        return false;
    }
    let before = trace.flow_at(last);
    if *before == sight.flow {
        return trace.part.matches(&sight.part, false);
    }
    // Translated between ingress and egress, or dropped in between.
    last.is_ingress()
        && last.interval == sight.part.interval()
        && trace.part.matches(&sight.part, true)
        && translations.is_one(topology, trace.cluster, sight.place.node, before, &sight.flow)
}

/// The same content, the oldest first: packets of a flow keep their order. One that was seen to leave comes before one
/// whose leaving must have been missed.
fn by_content(sight: &Sight<'_>, open: &OpenTraces, cluster: u32) -> Option<u32> {
    let mut missed = None;
    for index in open.by_content(cluster, &sight.flow, &sight.part) {
        let trace = open.get(*index);
        if *trace.current() != sight.flow || !trace.part.matches(&sight.part, false) || !may_be(sight, trace)
        {
            continue;
        }
        if trace.last().is_egress() {
            return Some(*index);
        }
        missed = missed.or(Some(*index));
    }
    missed
}

/// TCP data: bytes in common, each byte once.
fn by_interval(sight: &Sight<'_>, open: &OpenTraces, cluster: u32, flow: &Flow, joined: &mut Joined) {
    let (seq, len) = sight.part.interval();
    let mut taken: SmallVec<[(u32, u32); 8]> = joined
        .iter()
        .map(|index| open.get(*index).part.interval())
        .collect();
    let common: u32 = taken
        .iter()
        .map(|other| key::overlap(seq, len, other.0, other.1))
        .sum();
    if common >= len {
        return;
    }
    for index in open.by_interval(cluster, flow, &sight.part) {
        let trace = open.get(index);
        let (start, length) = trace.part.interval();
        let free = taken
            .iter()
            .all(|other| key::overlap(start, length, other.0, other.1) == 0);
        let same_flow = trace.flow_at(trace.last_of(sight.part.interval())) == flow;
        if free && same_flow && trace.part.matches(&sight.part, false) && may_be(sight, trace) {
            taken.push((start, length));
            joined.push(index);
        }
    }
}

/// Drops in a namespace that is no node's (a pod that is not known yet, the bridge between nodes), or whose device is
/// already forgotten (TCP and UDP do that on receipt). A packet that could be of two clusters is of none.
///
/// `kfree_skb` sees the whole machine. What left the nodes that are observed may be dropped on one that is not, but on
/// this machine, too; that is not looked at, so that a node watched alone shows the same wherever the others are.
fn elsewhere(sight: &Sight<'_>, open: &OpenTraces, topology: &Topology, joined: &mut Joined) {
    let skb = sight.observation.skb;
    let same = |node| {
        open.by_skb(node, skb)
            .filter(|index| is_dropped(sight, open.get(*index), node))
    };
    let machine = machine_of(sight.observation.netns);
    let nodes = topology.nodes().filter(|node| machine_of(*node) == machine);
    joined.extend(nodes.filter_map(same));
    if joined.is_empty() {
        for cluster in topology.clusters() {
            if sight.part.is_stream() {
                by_interval(sight, open, *cluster, &sight.flow, joined);
            } else {
                joined.extend(by_content(sight, open, *cluster));
            }
        }
    }
    let cluster = joined.first().map(|index| open.get(*index).cluster);
    if joined
        .iter()
        .any(|index| Some(open.get(*index).cluster) != cluster)
    {
        joined.clear();
    }
}

/// Whether the drop of an `sk_buff` that was last seen on `node` is a drop of the trace's packet.
fn is_dropped(sight: &Sight<'_>, trace: &Open, node: Netns) -> bool {
    let observation = sight.observation;
    let last = trace.last_of(sight.part.interval());
    let life = match last.hook {
        Hook::WorkloadEgress => LATE_DROP,
        Hook::TunnelEgress | Hook::UplinkEgress | Hook::KfreeSkb => return false,
        _ => LIFE,
    };
    last.node == node
        && observation.hook == Hook::KfreeSkb
        && observation.time <= last.time + life
        && observation.packet.ttl <= last.ttl
        && *trace.flow_at(last) == sight.flow
        && trace.part.matches(&sight.part, false)
}

/// Whether what has the same content can be the same packet.
fn may_be(sight: &Sight<'_>, trace: &Open) -> bool {
    let last = trace.last_of(sight.part.interval());
    if sight.observation.time > trace.first().time + WINDOW || !follows(last, sight) {
        return false;
    }
    // On one node a packet keeps its `sk_buff`, except where segments are cut and merged, or a fragment is made whole.
    last.node != sight.place.node
        || last.skb == 0
        || sight.observation.skb == 0
        || matches!(sight.part, Part::TcpData { .. } | Part::Fragment { .. })
}

/// Whether a packet last seen at `last` can be next where `sight` is.
fn follows(last: &Seen, sight: &Sight<'_>) -> bool {
    let observation = sight.observation;
    if observation.packet.ttl > last.ttl || last.hook == Hook::KfreeSkb {
        return false;
    }
    if last.node == sight.place.node {
        follows_within(last, sight)
    } else {
        follows_between(last, sight)
    }
}

fn follows_within(last: &Seen, sight: &Sight<'_>) -> bool {
    use Hook::{
        KfreeSkb, TunnelEgress, TunnelIngress, UplinkEgress, UplinkIngress, WorkloadEgress, WorkloadIngress,
    };
    let observation = sight.observation;
    match (last.hook, observation.hook) {
        (WorkloadEgress, KfreeSkb) => observation.time <= last.time + LATE_DROP,
        // In a pod's own namespace only what was delivered to it is dropped; the rest are copies at the sender.
        (_, KfreeSkb) if sight.place.in_pod => false,
        (UplinkEgress, KfreeSkb) => observation.time <= last.time + LATE_DROP,
        (WorkloadIngress | TunnelIngress | UplinkIngress, WorkloadEgress | TunnelEgress | UplinkEgress)
        | (TunnelEgress, UplinkEgress)
        | (WorkloadIngress | TunnelIngress | UplinkIngress | TunnelEgress, KfreeSkb) => true,
        (UplinkIngress, TunnelIngress) => last.encap.is_some() && observation.packet.ttl == last.ttl,
        // An uplink on top of another one: a bond, a VLAN, a bridge.
        (UplinkEgress, UplinkEgress) | (UplinkIngress, UplinkIngress) => {
            last.ifindex != observation.ifindex
                && last.skb == observation.skb
                && observation.packet.ttl == last.ttl
        }
        _ => false,
    }
}

fn follows_between(last: &Seen, sight: &Sight<'_>) -> bool {
    use Hook::{KfreeSkb, TunnelEgress, TunnelIngress, UplinkEgress, UplinkIngress, WorkloadEgress};
    let observation = sight.observation;
    let carried = match (&last.encap, &observation.encap) {
        (Some(one), Some(two)) => {
            (one.kind, one.src, one.dst, one.vni) == (two.kind, two.src, two.dst, two.vni)
        }
        _ => true,
    };
    // A sighting in between may be missing; then forwarding must show in the TTL.
    let left = match last.hook {
        UplinkEgress | TunnelEgress => true,
        WorkloadEgress | KfreeSkb => false,
        _ => observation.packet.ttl < last.ttl,
    };
    let enters = match observation.hook {
        UplinkIngress | TunnelIngress => true,
        WorkloadEgress => observation.packet.ttl < last.ttl,
        KfreeSkb => !sight.place.in_pod,
        _ => false,
    };
    carried && left && enters
}
