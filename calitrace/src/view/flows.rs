//! Flow traces: of each flow the latest packets, counts, and when it is to be shown.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use rustc_hash::FxHashMap;

use super::{
    SECOND,
    block::{self, Block, Counts, Kind},
    probe::Runs,
    way,
};
use crate::{
    correlate::{AnswerKind, PacketTrace, Verdict},
    event::Flow,
};

/// How many of the latest packets a block shows: as many probes as traceroute sends for a line.
const SHOWN: usize = 3;
/// No more flows are kept than this; those that closed a packet longest ago go first.
const MOST: usize = 4_096;
/// A flow that is only answers waits this long for the probes it answers, nanoseconds: a probe's trace may close a hold
/// later than its answer's.
const ANSWER_WAIT: u64 = 300_000_000;
/// Nothing is due more precisely than this, nanoseconds.
const STEP: u64 = 20_000_000;

/// A flow as its sender wrote it, within its cluster.
type Key = (u32, Flow);

/// A flow's place among others: when the packet that closed first was sent, and a number that tells flows apart.
type Place = (u64, u64);

/// Every flow.
#[derive(Debug, Default)]
pub(super) struct Flows {
    known: FxHashMap<Key, FlowTrace>,
    /// Flows that have something to show once it is due, in the order of their first packets.
    pending: BTreeMap<Place, Key>,
    made: u64,
    checked: u64,
}

#[derive(Debug)]
struct FlowTrace {
    place: Place,
    latest: VecDeque<Arc<PacketTrace>>,
    counts: Counts,
    round_trip: Option<u64>,
    /// Every packet so far answers another.
    only_answers: bool,
    first_closed: u64,
    last_closed: u64,
    shown: Option<Shown>,
}

/// What was shown last.
#[derive(Debug)]
struct Shown {
    at: u64,
    packet: Arc<PacketTrace>,
    counts: Counts,
}

impl Flows {
    pub(super) fn push(&mut self, trace: &Arc<PacketTrace>) {
        let key = (trace.cluster, trace.flow.flow);
        if self.known.len() >= MOST && !self.known.contains_key(&key) {
            self.forget_oldest();
        }
        let made = &mut self.made;
        let flow = self.known.entry(key).or_insert_with(|| {
            *made += 1;
            FlowTrace::new((trace.start_monotonic, *made), trace.closed_monotonic)
        });
        flow.push(trace);
        if flow.changed() {
            self.pending.insert(flow.place, key);
        }
    }

    pub(super) fn due(&mut self, now: u64, runs: &Runs, blocks: &mut Vec<Block>) {
        if now.saturating_sub(self.checked) < STEP {
            return;
        }
        self.checked = now;
        self.show(now, runs, blocks, |flow| flow.is_due(now));
    }

    pub(super) fn finish(&mut self, runs: &Runs, blocks: &mut Vec<Block>) {
        self.show(self.checked, runs, blocks, |_| true);
    }

    /// Shows those of the pending flows that are due, and forgets such as only answer a probe run.
    fn show(&mut self, now: u64, runs: &Runs, blocks: &mut Vec<Block>, is_due: impl Fn(&FlowTrace) -> bool) {
        let flows = &mut self.known;
        self.pending.retain(|_, key| {
            let Some(flow) = flows.get_mut(key) else {
                return false;
            };
            if !flow.changed() {
                return false;
            }
            if !is_due(flow) {
                return true;
            }
            if flow.only_answers && runs.explain(key.0, &key.1) {
                flows.remove(key);
                return false;
            }
            blocks.extend(flow.block());
            flow.shown = flow.latest.back().map(|packet| Shown {
                at: now,
                packet: Arc::clone(packet),
                counts: flow.counts,
            });
            false
        });
    }

    pub(super) fn latest(&self, limit: usize) -> (Vec<Block>, usize) {
        let mut flows: Vec<&FlowTrace> = self.known.values().filter(|flow| flow.shown.is_some()).collect();
        flows.sort_by_key(|flow| Reverse((flow.troubled(), flow.last_closed, flow.place)));
        (
            flows.iter().take(limit).filter_map(|flow| flow.block()).collect(),
            flows.len(),
        )
    }

    /// The flows of which more packets failed after they were shown, in the order they began.
    pub(super) fn grown(&self) -> Vec<Block> {
        let mut flows: Vec<&FlowTrace> = self.known.values().filter(|flow| flow.fails_on()).collect();
        flows.sort_by_key(|flow| flow.place);
        flows.into_iter().filter_map(FlowTrace::block).collect()
    }

    /// Makes room by a quarter, so that it need not be made for every packet.
    fn forget_oldest(&mut self) {
        let mut times: Vec<u64> = self.known.values().map(|flow| flow.last_closed).collect();
        let quarter = times.len() / 4;
        let (_, &mut limit, _) = times.select_nth_unstable(quarter);
        self.known.retain(|_, flow| flow.last_closed > limit);
    }
}

impl FlowTrace {
    fn new(place: Place, first_closed: u64) -> Self {
        Self {
            place,
            latest: VecDeque::with_capacity(SHOWN),
            counts: Counts::default(),
            round_trip: None,
            only_answers: true,
            first_closed,
            last_closed: first_closed,
            shown: None,
        }
    }

    fn push(&mut self, trace: &Arc<PacketTrace>) {
        self.counts.add(trace);
        self.only_answers &= block::is_answer(&trace.packet);
        self.last_closed = self.last_closed.max(trace.closed_monotonic);
        if let Some(answer) = &trace.answer
            && matches!(answer.kind, AnswerKind::EchoReply | AnswerKind::SynAck)
        {
            self.round_trip = answer.rtt_ns.or(self.round_trip);
        }
        // Packets may close in another order than they were sent in.
        let place = self
            .latest
            .partition_point(|other| other.start_monotonic <= trace.start_monotonic);
        self.latest.insert(place, Arc::clone(trace));
        if self.latest.len() > SHOWN {
            self.latest.pop_front();
        }
    }

    /// Whether there is something to show: nothing was yet, or the path or verdict is another.
    fn changed(&self) -> bool {
        match (&self.shown, self.latest.back()) {
            (None, _) => true,
            (Some(shown), Some(latest)) => !same_end(&shown.packet, latest),
            (Some(_), None) => false,
        }
    }

    /// Whether more of its packets failed than were shown.
    fn fails_on(&self) -> bool {
        let shown = self.shown.as_ref();
        shown.is_some_and(|shown| shown.counts.failed() < self.counts.failed())
    }

    fn is_due(&self, now: u64) -> bool {
        if let Some(shown) = &self.shown {
            return now >= shown.at + SECOND;
        }
        let waits = self.only_answers && now < self.first_closed + ANSWER_WAIT;
        !waits && (self.counts.packets >= SHOWN as u64 || now >= self.last_closed + SECOND)
    }

    fn troubled(&self) -> bool {
        self.latest.back().is_some_and(|latest| block::troubled(latest))
    }

    fn block(&self) -> Option<Block> {
        let latest = self.latest.back()?;
        let lines = block::flow_lines(&self.latest.iter());
        Some(Block {
            kind: Kind::Flow,
            flow: latest.flow.clone(),
            counts: self.counts,
            round_trip: self.round_trip,
            hops_max: lines.last().map_or(1, |line| line.ttl),
            length: latest.length,
            lines,
            stray: way::of(latest).into_stray(),
            latest: Arc::clone(latest),
            later_probes: 0,
        })
    }
}

/// Whether two packets of a flow took the same path to the same end. One that was still under way when observing ended
/// says nothing of either.
fn same_end(one: &PacketTrace, other: &PacketTrace) -> bool {
    other.verdict == Verdict::Unfinished
        || (one.verdict == other.verdict
            && one.drop == other.drop
            && one.hops.len() == other.hops.len()
            && one.hops.iter().zip(&other.hops).all(|(one, other)| {
                (one.address, &one.node, &one.pod) == (other.address, &other.node, &other.pod)
            })
            && one
                .nat
                .iter()
                .map(|step| step.to)
                .eq(other.nat.iter().map(|step| step.to)))
}
