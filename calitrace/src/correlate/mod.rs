//! The heart: observations and facts in, packet traces out.
//!
//! Pure: no I/O, no runtime, no clock reads. Time is the observations' own.
//!
//! An observation passes [`order`] (oldest first), [`join`] (whose packet is it?), and the steps of [`Correlator`] that
//! say what it means for its trace; a deadline closes the trace, and [`close`] writes down what it was.

mod again;
mod answer;
mod answering;
mod blame;
mod clocks;
mod close;
mod equals;
mod firewall;
mod hops;
mod join;
mod key;
mod ledger;
mod nat;
mod node;
mod open;
mod order;
mod outer;
#[cfg(test)]
mod properties;
mod segments;
#[cfg(test)]
mod streams;
mod timers;
mod topology;
mod trace;
mod underlay;
mod verdict;
mod waypoint;

use thin_vec::ThinVec;

use again::{Again, Sent};
pub use clocks::{Crossings, Offset};
use join::Sight;
use key::Part;
use nat::Translations;
use open::{Id, Open, OpenTraces, Reached, Seen};
use order::Order;
use outer::Cut;
use timers::{Hold, Timers};
use topology::{NO_CLUSTER, Next, Topology};
pub use trace::{
    Answer, AnswerKind, Bypass, Certainty, DeadEnd, DropReport, Endpoint, FlowName, Hop, Joint, LogReport,
    LostReport, Name, NatKind, NatStep, PacketTrace, Segment, SightedEncap, Sighting, TooLarge, Verdict,
};

use crate::event::{Flow, Hook, Item, Observation, Transport};

/// Settings of a [`Correlator`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Nanoseconds by which observations may be out of order; the correlator's time lags the newest by this much.
    pub drain_period: u64,
    /// Packet traces that may be open at once. Beyond it the oldest is closed as unknown, and counted.
    pub max_open: usize,
}

impl Config {
    /// Room for what 100,000 packets a second leave open in two seconds.
    pub const MAX_OPEN: usize = 200_000;
}

impl Default for Config {
    /// In order of time, and with [`Self::MAX_OPEN`].
    fn default() -> Self {
        Self {
            drain_period: 0,
            max_open: Self::MAX_OPEN,
        }
    }
}

/// traceroute's default highest TTL is 30, ordinary systems send with 64 and more: what is first seen with less may be a
/// probe.
pub(crate) const LOWEST_ORDINARY_TTL: u8 = 32;

/// Joins observations into packet traces.
#[derive(Debug)]
pub struct Correlator {
    config: Config,
    topology: Topology,
    order: Order,
    open: OpenTraces,
    timers: Timers,
    translations: Translations,
    again: Again,
    cut: Cut,
    newest: u64,
    evicted: u64,
}

impl Correlator {
    /// A correlator that knows nothing yet.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            topology: Topology::default(),
            order: Order::default(),
            open: OpenTraces::default(),
            timers: Timers::default(),
            translations: Translations::default(),
            again: Again::default(),
            cut: Cut::default(),
            newest: 0,
            evicted: 0,
        }
    }

    /// Takes the next item; traces that close with it are appended to `closed`.
    pub fn push(&mut self, item: &Item, closed: &mut Vec<PacketTrace>) {
        match item {
            Item::Header(_) => {}
            Item::Fact(fact) => self.topology.learn(fact),
            Item::Ledger(ledger) => self.topology.ledgers.ledger(ledger),
            Item::Observation(observation) => {
                self.order.push(observation);
                self.advance(observation.time, closed);
            }
            Item::Tick { time } | Item::End { time } => self.advance(*time, closed),
        }
    }

    /// Observing ended: closes what is open, as unfinished where nothing better is known.
    pub fn finish(&mut self, closed: &mut Vec<PacketTrace>) {
        self.take(u64::MAX, closed);
        // Answers first: what they answer tells what became of them.
        let (mut all, from) = (self.open.all(), closed.len());
        all.sort_by_key(|index| self.open.get(*index).answers.is_none());
        for index in all {
            self.close(index, self.newest, true, closed);
        }
        closed[from..].sort_by_key(|trace| trace.start_monotonic);
    }

    /// Packet traces that were closed before their time because too many were open.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    fn advance(&mut self, time: u64, closed: &mut Vec<PacketTrace>) {
        self.newest = self.newest.max(time);
        let now = self.newest.saturating_sub(self.config.drain_period);
        self.take(now, closed);
        self.expire(now, closed);
    }

    /// Takes the observations up to `now`, in order.
    fn take(&mut self, now: u64, closed: &mut Vec<PacketTrace>) {
        let mut order = std::mem::take(&mut self.order);
        while let Some(observation) = order.pop(now) {
            self.expire(observation.time, closed);
            self.observe(observation, closed);
        }
        self.order = order;
    }

    /// Closes what is due.
    fn expire(&mut self, now: u64, closed: &mut Vec<PacketTrace>) {
        while let Some((deadline, id)) = self.timers.due(now) {
            let Some(trace) = self.open.find(id).filter(|trace| trace.close_at <= deadline) else {
                continue;
            };
            let longest = trace.first().time + open::WINDOW;
            if deadline < longest && verdict::may_wait(trace, &self.topology) {
                self.hold(id.index, Hold::Waiting, deadline);
            } else if blame::awaits_rules(trace, &self.topology, deadline) || self.awaits_end_of_answer(trace)
            {
                self.hold(id.index, Hold::Rules, deadline);
            } else {
                self.close(id.index, deadline, false, closed);
            }
        }
    }

    fn close(&mut self, index: u32, now: u64, ended: bool, closed: &mut Vec<PacketTrace>) {
        let id = self.open.id(index);
        let open = self.open.remove(index);
        let trace = close::trace(&open, &mut self.topology, now, ended);
        if let Some(asked) = open.answers.filter(|_| trace.verdict == Verdict::Dropped) {
            self.unheard(asked, id, trace.drop.as_ref());
        }
        closed.push(trace);
    }

    fn observe(&mut self, observation: &Observation, closed: &mut Vec<PacketTrace>) {
        let mut sight = Sight::new(observation, self.topology.place(observation.netns));
        if observation.hook.is_function() {
            return waypoint::take(&sight, &mut self.open, &mut self.translations);
        }
        if is_about_tunnel(observation) {
            self.swallowed(&sight);
            return;
        }
        if observation.drop.as_ref().is_some_and(verdict::is_of_a_whole) {
            return;
        }
        self.cut.note(&sight);
        if self.cut.is_rest(&sight) {
            return;
        }
        for index in equals::hand_on(&sight, &mut self.open) {
            let hold = match self.open.get(index) {
                trace if trace.drop.is_some() => Hold::Ended,
                trace => Hold::after(trace.reached),
            };
            self.hold(index, hold, observation.time);
        }
        let found = join::find(&mut sight, &self.open, &self.topology, &self.translations);
        if found.traces.is_empty() {
            // A drop of a packet that passed no hook: other people's traffic, what never left a pod, or the end of a
            // copy whose packet was told of already.
            let place = sight.place;
            let elsewhere = place.cluster == NO_CLUSTER || place.in_pod;
            let ordinary = |drop| verdict::is_ordinary(&sight.part, drop);
            if observation
                .drop
                .as_ref()
                .is_some_and(|drop| elsewhere || ordinary(drop))
            {
                return;
            }
            self.make_room(closed);
            let index = self.begin(&sight);
            self.settle(index, &sight);
            return;
        }
        if let Some(rival) = found.rival {
            self.open.get_mut(rival).alike = true;
        }
        for (index, joint) in found.traces {
            let trace = self.open.get_mut(index);
            trace.alike |= joint == Joint::Order;
            trace.numbered &= join::is_numbered_alike(&sight, trace);
            let mut seen = sight.seen();
            // Which of those that are alike it was, the order decided, this time or before.
            let decided = joint != Joint::Skb && trace.alike;
            seen.joined = Some(if decided { Joint::Order } else { joint });
            seen.flow = self.translate(index, &sight);
            if sight.place.cluster == NO_CLUSTER {
                self.adopt(index, &mut seen);
            }
            self.open.append(index, seen);
            self.settle(index, &sight);
        }
    }

    /// A drop whose place is not known was where its packet was last seen.
    fn adopt(&self, index: u32, seen: &mut Seen) {
        let trace = self.open.get(index);
        let last = trace.last_of(seen.interval);
        if seen.netns & u64::from(u32::MAX) == 0 {
            seen.node = last.node;
            seen.in_pod = trace.reached == Reached::Pod || last.hook == Hook::WorkloadEgress;
        }
    }

    fn make_room(&mut self, closed: &mut Vec<PacketTrace>) {
        while self.open.len() >= self.config.max_open {
            let Some(id) = self.timers.oldest() else { return };
            if let Some(trace) = self.open.find(id) {
                let now = trace.last().time;
                self.evicted += 1;
                self.close(id.index, now, false, closed);
            }
        }
    }

    /// A packet is seen for the first time.
    fn begin(&mut self, sight: &Sight<'_>) -> u32 {
        let observation = sight.observation;
        let cluster = sight.place.cluster;
        let answers = answer::find(&self.open, cluster, &observation.packet, &sight.flow);
        let pod_sends = observation.hook == Hook::WorkloadIngress;
        if !pod_sends && sight.part.datagrams() > 1 && sight.flow.src.is_ipv6() {
            self.open.may_be_merged(cluster, &sight.flow);
        }
        let sent = if pod_sends {
            let back = self.translations.back(cluster, &sight.flow);
            self.again.sent(cluster, &sight.flow, &back, &observation.packet)
        } else {
            Sent::Ordinary
        };
        let index = self.open.insert(Open {
            cluster,
            sent,
            packet: observation.packet.clone(),
            part: sight.part,
            flow: sight.flow,
            translated: ThinVec::new(),
            seen: Vec::with_capacity(6),
            waypoints: ThinVec::new(),
            translations: ThinVec::new(),
            reached: Reached::Nothing,
            covered: 0,
            drop: None,
            answered: None,
            swallowed: None,
            answers: answers.map(|found| self.open.id(found.index)),
            findable: false,
            alike: false,
            numbered: true,
            merged: false,
            close_at: u64::MAX,
        });
        self.open.append(index, sight.seen());
        self.hold(index, Hold::Begun, observation.time);
        if let Some(found) = answers {
            self.answered(found, self.open.id(index), observation);
        }
        index
    }

    /// The flow may have changed on the way. Says which of the trace's flows the sighting has.
    fn translate(&mut self, index: u32, sight: &Sight<'_>) -> u8 {
        let trace = self.open.get_mut(index);
        let last = trace.last_of(sight.interval);
        let (cluster, before) = (trace.cluster, *trace.flow_at(last));
        if before == sight.flow {
            return last.flow;
        }
        // Another piece of the same packet may have shown it already.
        let after = |flow: &Flow| *flow == sight.flow;
        if let Some(known) = trace.translated.iter().skip(last.flow.into()).position(after) {
            return last.flow + u8::try_from(known + 1).unwrap_or(u8::MAX);
        }
        trace.translations.extend(nat::steps(
            sight.place.node,
            trace.seen.len(),
            &before,
            &sight.flow,
        ));
        self.translations.remember(cluster, &before, &sight.flow);
        if let Part::Fragment { ip_id, offset: 0, .. } = sight.part {
            self.translations
                .begin(sight.place.node, ip_id, &before, &sight.flow);
        }
        self.open.translate(index, sight.flow);
        u8::try_from(self.open.get(index).translated.len()).unwrap_or(u8::MAX)
    }

    /// What the last sighting says about where the packet got to.
    fn settle(&mut self, index: u32, sight: &Sight<'_>) {
        self.report(index, sight.observation);
        let (topology, trace) = (&self.topology, self.open.get_mut(index));
        let at = trace.seen.len() - 1;
        let last = &trace.seen[at];
        let (time, node, destination) = (last.time, last.node, sight.flow.dst);
        let reached = match last.hook {
            Hook::KfreeSkb => {
                let Some(drop) = &sight.observation.drop else {
                    return;
                };
                let received = last.in_pod || matches!(trace.reached, Reached::Pod | Reached::Node);
                if received && verdict::is_ordinary(&trace.part, drop) {
                    return;
                }
                trace.drop = Some(Box::new((drop.clone(), at)));
                // Of a packet that was cut, the other segments may still be under way.
                let (start, len) = trace.part.interval();
                if !received {
                    trace.covered += key::overlap(start, len, last.interval.0, last.interval.1);
                }
                if trace.covered >= len {
                    self.open.conceal(index);
                    self.hold(index, Hold::Ended, time);
                }
                return;
            }
            Hook::WorkloadEgress if topology.is_delivery(trace.cluster, node, last.ifindex, destination) => {
                Reached::Pod
            }
            Hook::UplinkEgress
                if topology.next(node, last.encap.as_deref(), destination) == Next::Unobserved
                    || !topology.is_recorded(trace.cluster, &sight.flow) =>
            {
                Reached::Outside
            }
            // Encrypted, it is not seen at the uplink.
            Hook::TunnelEgress
                if topology.is_encrypted(node, last.ifindex)
                    && topology.next(node, None, destination) == Next::Unobserved =>
            {
                Reached::Outside
            }
            Hook::WorkloadIngress | Hook::TunnelIngress | Hook::UplinkIngress
                if last.encap.is_none() && topology.is_own(node, destination) =>
            {
                Reached::Node
            }
            _ => Reached::Nothing,
        };
        if reached == Reached::Nothing {
            // What looked taken in by the node was sent on: a service on the node's own address.
            if std::mem::replace(&mut trace.reached, reached) == Reached::Node {
                self.hold(index, Hold::Begun, time);
            }
            return;
        }
        // Segments get there one by one; the packet is there with the last.
        let (start, len) = trace.part.interval();
        trace.covered += key::overlap(start, len, last.interval.0, last.interval.1);
        if trace.covered >= len {
            trace.reached = reached;
            self.open.conceal(index);
            self.hold(index, Hold::after(reached), time);
        }
    }

    /// Moves the deadline of a trace. One that has reached its end is never held longer than that takes, and than an
    /// answer may take.
    fn hold(&mut self, index: u32, hold: Hold, time: u64) {
        let id: Id = self.open.id(index);
        let trace = self.open.get_mut(index);
        let hold = if !matches!(hold, Hold::Begun | Hold::Waiting | Hold::Rules) && answer::is_awaited(trace)
        {
            Hold::Awaiting
        } else {
            hold
        };
        trace.close_at = self.timers.set(id, hold, time);
    }
}

/// Whether it is an ICMP error about the outer header of a packet.
fn is_about_tunnel(observation: &Observation) -> bool {
    matches!(&observation.packet.transport, Transport::IcmpError { quoted, .. } if quoted.encap.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Packet, sample};

    fn sent(number: u32) -> Item {
        let transport = Transport::Udp {
            src_port: 5000,
            dst_port: 53,
            payload: 20,
        };
        let packet = Packet {
            ip_id: number,
            digest: number.into(),
            ..sample::packet(17, 48, transport)
        };
        Item::Observation(sample::sent(1_000 + u64::from(number), packet))
    }

    #[test]
    fn too_many_open_traces_close_the_oldest_as_unknown_and_count_it() {
        let max_open = 100;
        let mut correlator = Correlator::new(Config {
            max_open,
            ..Config::default()
        });
        let mut closed = Vec::new();
        for number in 0..103 {
            correlator.push(&sent(number), &mut closed);
        }
        assert_eq!(correlator.evicted(), 3);
        assert_eq!(correlator.open.len(), max_open);
        let oldest: Vec<_> = closed
            .iter()
            .map(|trace| (trace.packet.ip_id, trace.verdict))
            .collect();
        assert_eq!(oldest, [0, 1, 2].map(|number| (number, Verdict::Unknown)));
    }

    #[test]
    fn an_open_trace_of_six_sightings_takes_less_than_a_kibibyte() {
        let size = size_of::<Open>() + 6 * size_of::<Seen>();
        assert!(size <= 1024, "{size} bytes");
    }
}
