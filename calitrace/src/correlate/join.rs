//! Whether an observation is of a packet that has been seen before: the rules of identity (design: "Joining and hops").
//!
//! Two packets must never become one trace. So each rule says when a join is allowed, and without one the observation
//! begins a trace of its own.

use smallvec::SmallVec;

use super::{
    Joint,
    key::{self, Part},
    nat::Translations,
    open::{Open, OpenTraces, Seen, WINDOW},
    outer, segments,
    timers::MILLISECOND,
    topology::{NO_CLUSTER, Place, Topology},
};
use crate::event::{Flow, Hook, Netns, Observation, machine_of};

/// An `sk_buff`'s address says nothing any more after this long without a sighting: no node holds a packet longer.
pub(super) const LIFE: u64 = WINDOW;
/// A drop belongs to a packet that passed its last hook if it comes within this time.
const LATE_DROP: u64 = 50 * MILLISECOND;

/// An observation with what is looked up once for all rules.
#[derive(Debug)]
pub(super) struct Sight<'a> {
    pub(super) observation: &'a Observation,
    pub(super) place: Place,
    pub(super) flow: Flow,
    pub(super) part: Part,
    /// Which part of its packet it is: what the part says, or, where that does not, what it was found to be.
    pub(super) interval: (u32, u32),
}

impl<'a> Sight<'a> {
    pub(super) fn new(observation: &'a Observation, place: Place) -> Self {
        let packet = &observation.packet;
        let part = Part::of(packet);
        Self {
            observation,
            place,
            flow: packet.flow(),
            part,
            interval: part.interval(),
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
            segments: observation.packet.gso_segs,
            interval: self.interval,
            hook: observation.hook,
            ttl: observation.packet.ttl,
            in_pod: self.place.in_pod,
            flow: 0,
            joined: None,
            encap: observation.encap.map(Box::new),
        }
    }
}

/// What an observation belongs to.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The traces: one, or for merged TCP segments several; and why.
    pub(super) traces: SmallVec<[(u32, Joint); 4]>,
    /// One that it may as well belong to.
    pub(super) rival: Option<u32>,
}

impl Found {
    fn by_content(chosen: Option<u32>, rival: Option<u32>) -> Self {
        let joint = if rival.is_some() {
            Joint::Order
        } else {
            Joint::Content
        };
        Self {
            traces: chosen.map(|index| (index, joint)).into_iter().collect(),
            rival,
        }
    }
}

/// Finds it. When the flow of the last sighting was another one, the observation shows a translation.
pub(super) fn find(
    sight: &mut Sight<'_>,
    open: &OpenTraces,
    topology: &Topology,
    translations: &Translations,
) -> Found {
    let mut found = Found::default();
    // What a pod sends has been nowhere before.
    if sight.observation.hook == Hook::WorkloadIngress {
        return found;
    }
    let mut flow = sight.flow;
    if let Some((index, interval, joint)) = segments::unnumbered(sight, open, sight.place.cluster) {
        sight.interval = interval;
        found.traces.push((index, joint));
        return found;
    }
    found.traces = segments::merged(sight, open, topology, translations);
    if !found.traces.is_empty() {
        return found;
    }
    if let Some(index) = open.by_skb(sight.place.node, sight.observation.skb)
        && by_skb(sight, open.get(index), topology, translations)
    {
        let trace = open.get(index);
        flow = *trace.flow_at(trace.last_of(sight.interval));
        found.traces.push((index, Joint::Skb));
    }
    by_packet(sight, open, sight.place.cluster, &flow, &mut found);
    if found.traces.is_empty() && sight.place.cluster == NO_CLUSTER {
        found = elsewhere(sight, open, topology);
    }
    found
}

/// Within a node: the same `sk_buff`, checked by content.
fn by_skb(sight: &Sight<'_>, trace: &Open, topology: &Topology, translations: &Translations) -> bool {
    let last = trace.last_of(sight.interval);
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
        && last.interval == sight.interval
        && trace.part.matches(&sight.part, true)
        && (translations.is_one(topology, trace.cluster, sight.place.node, before, &sight.flow)
            || matches!(sight.part, Part::Fragment { ip_id, offset, .. } if offset > 0
                && translations.goes_on(sight.place.node, ip_id, before, &sight.flow)))
}

/// Without an `sk_buff` that tells, or where that tells of a part only.
fn by_packet(sight: &Sight<'_>, open: &OpenTraces, cluster: u32, flow: &Flow, found: &mut Found) {
    if sight.part.is_stream() {
        return by_interval(sight, open, cluster, flow, found);
    }
    if found.traces.is_empty() {
        *found = by_content(sight, open, cluster);
    }
    if segments::are_numbered(sight) && (found.traces.is_empty() || sight.part.datagrams() > 1) {
        by_interval(sight, open, cluster, flow, found);
    }
}

/// The same content, the oldest first: packets of a flow keep their order. One that was seen to leave comes before one
/// whose leaving must have been missed.
fn by_content(sight: &Sight<'_>, open: &OpenTraces, cluster: u32) -> Found {
    let candidates = open.by_content(cluster, &sight.flow, &sight.part).iter().copied();
    let candidates = candidates.filter(|index| {
        let trace = open.get(*index);
        *trace.current() == sight.flow && trace.part.matches(&sight.part, false) && may_be(sight, trace)
    });
    let (mut left, mut missed, mut rival) = (None, None, None);
    for index in candidates {
        let first = if open.get(index).last().is_egress() {
            &mut left
        } else {
            &mut missed
        };
        match first {
            None => *first = Some(index),
            Some(_) => rival = rival.or(Some(index)),
        }
        if left.is_some() && (rival.is_some() || missed.is_some()) {
            break;
        }
    }
    Found::by_content(left.or(missed), rival.or(left.and(missed)))
}

/// TCP data: bytes in common, each byte once. Of packets with the same bytes the one whose IP id it has, else the oldest. UDP:
/// datagrams in common, by their IP ids.
fn by_interval(sight: &Sight<'_>, open: &OpenTraces, cluster: u32, flow: &Flow, found: &mut Found) {
    let (seq, len) = sight.interval;
    let interval = |index: u32| open.get(index).part.interval();
    let mut taken: SmallVec<[(u32, u32); 8]> =
        found.traces.iter().map(|(index, _)| interval(*index)).collect();
    let common: u32 = taken
        .iter()
        .map(|other| key::overlap(seq, len, other.0, other.1))
        .sum();
    if common >= len {
        return;
    }
    let mut candidates = if sight.part.is_stream() {
        open.by_interval(cluster, flow, &sight.part)
    } else {
        open.by_datagrams(cluster, flow, &sight.part)
    };
    candidates.retain(|index| {
        if found.traces.iter().any(|(known, _)| known == index) {
            return false;
        }
        let trace = open.get(*index);
        let same_flow = trace.flow_at(trace.last_of(sight.interval)) == flow;
        same_flow && trace.part.matches(&sight.part, false) && may_be(sight, trace)
    });
    let fits = |index: &u32| has_id(sight, open.get(*index));
    if candidates.iter().any(fits) {
        candidates.sort_by_key(|index| !fits(index));
    }
    let first = found.traces.len();
    for index in candidates {
        let (start, length) = interval(index);
        let shares = |other: &(u32, u32)| key::overlap(start, length, other.0, other.1) > 0;
        if !taken.iter().any(shares) {
            taken.push((start, length));
            found.traces.push((index, Joint::Content));
        } else if !found.traces.iter().any(|(chosen, _)| fits(chosen)) {
            found.rival = Some(index);
        }
    }
    if found.rival.is_some() {
        found.traces[first..]
            .iter_mut()
            .for_each(|(_, joint)| *joint = Joint::Order);
    }
}

/// Whether what has the trace's content has its number, too.
pub(super) fn is_numbered_alike(sight: &Sight<'_>, trace: &Open) -> bool {
    let is_cut = sight.part.datagrams().max(trace.part.datagrams()) > 1;
    !(sight.part.is_stream() || is_cut) || has_id(sight, trace)
}

/// Whether a segment has the IP id that it would have as a piece of the trace's packet: segments are numbered from the id of
/// what they were cut from (`inet_gso_segment`, `net/ipv4/af_inet.c`, 6.1), and of merged ones the first one's stays.
fn has_id(sight: &Sight<'_>, trace: &Open) -> bool {
    let (packet, whole) = (&sight.observation.packet, &trace.packet);
    if !sight.part.is_stream() {
        // They were found by it. Segments of a super-packet without one are numbered from 0 on.
        return whole.ip_id != 0;
    }
    let offset = sight.interval.0.wrapping_sub(trace.part.interval().0);
    let segment = match (offset, u32::from(whole.gso_size)) {
        (0, _) => 0,
        (offset, size) if size > 0 && offset < trace.part.interval().1 => offset / size,
        _ => return false,
    };
    packet.ip_id != 0 && packet.ip_id == (whole.ip_id + segment) & 0xffff
}

/// Drops in a namespace that is no node's (a pod that is not known yet, the bridge between nodes), or whose device is
/// already forgotten (TCP and UDP do that on receipt). A packet that could be of two clusters is of none.
///
/// `kfree_skb` sees the whole machine. What left the nodes that are observed may be dropped on one that is not, but on
/// this machine, too; that is not looked at, so that a node watched alone shows the same wherever the others are.
fn elsewhere(sight: &Sight<'_>, open: &OpenTraces, topology: &Topology) -> Found {
    let skb = sight.observation.skb;
    let same = |node| {
        open.by_skb(node, skb)
            .filter(|index| is_dropped(sight, open.get(*index), node))
    };
    let machine = machine_of(sight.observation.netns);
    let nodes = topology.nodes().filter(|node| machine_of(*node) == machine);
    let mut found = Found::default();
    found
        .traces
        .extend(nodes.filter_map(same).map(|index| (index, Joint::Skb)));
    if found.traces.is_empty() {
        for cluster in topology.clusters() {
            let mut own = Found::default();
            by_packet(sight, open, *cluster, &sight.flow, &mut own);
            found.traces.extend(own.traces);
            found.rival = found.rival.or(own.rival);
        }
    }
    let mut clusters = found.traces.iter().map(|(index, _)| open.get(*index).cluster);
    let first = clusters.next();
    if clusters.any(|cluster| Some(cluster) != first) {
        found = Found::default();
    }
    found
}

/// Whether the drop of an `sk_buff` that was last seen on `node` is a drop of the trace's packet.
fn is_dropped(sight: &Sight<'_>, trace: &Open, node: Netns) -> bool {
    let observation = sight.observation;
    let last = trace.last_of(sight.interval);
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
pub(super) fn may_be(sight: &Sight<'_>, trace: &Open) -> bool {
    let last = trace.last_of(sight.interval);
    if sight.observation.time > trace.first().time + WINDOW || !follows(last, sight) {
        return false;
    }
    // On one node a packet keeps its `sk_buff`, except where segments are cut and merged, or a fragment is made whole, be it
    // of the packet or of the one around it.
    last.node != sight.place.node
        || last.skb == 0
        || sight.observation.skb == 0
        || matches!(sight.part, Part::TcpData { .. } | Part::Fragment { .. })
        || sight.part.datagrams().max(trace.part.datagrams()) > 1
        || outer::changes_skb(last, sight)
}

/// Whether a packet last seen at `last` can be next where `sight` is.
pub(super) fn follows(last: &Seen, sight: &Sight<'_>) -> bool {
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
