//! Probe runs: a traceroute at work, told by the TTLs of its packets.
//!
//! A run is packets from one sender to one destination and protocol whose first-seen TTL is below 32 and starts at 1,
//! with no gap above 5 s (traceroute's wait for an answer), whatever their ports or sequence numbers. A TTL of 1 after the receiver has answered begins
//! the next run: traceroute called twice in a row, or the next round of a program that repeats.

use std::{net::IpAddr, sync::Arc};

use rustc_hash::FxHashMap;

use super::{
    SECOND,
    block::{self, Block, Counts, Kind, Line},
    flows::Flows,
    way,
};
use crate::{
    correlate::{AnswerKind, LOWEST_ORDINARY_TTL, PacketTrace, Verdict},
    event::Flow,
};

/// A longer gap ends a run. traceroute waits up to 5 s for an answer and sends the next probe a little after that.
const GAP: u64 = 5 * SECOND + SECOND / 2;
/// Every packet trace has closed this long after the packet's first observation: an answer is awaited for 2 s from where
/// the packet ended, and then its way back, and the drain adds its period.
const ALL_CLOSED: u64 = 2 * SECOND + 300_000_000;
/// Probes of a run: 31 TTLs with 10 each, the most that traceroute sends for a TTL, and as many to the receiver.
const MOST: usize = 620;
/// Runs that were over are remembered for this long, for answers that close late.
const MEMORY: u64 = 2 * SECOND;

/// One sender, destination and protocol within a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    cluster: u32,
    src: IpAddr,
    dst: IpAddr,
    proto: u8,
}

/// Every run under way.
#[derive(Debug, Default)]
pub(super) struct Runs {
    open: FxHashMap<Key, Run>,
    /// Ended runs and when they ended.
    ended: FxHashMap<Key, u64>,
}

/// Packets that are a run if the first of them was sent with TTL 1.
#[derive(Debug, Default)]
struct Run {
    /// In the order they were sent.
    probes: Vec<Arc<PacketTrace>>,
}

impl Runs {
    /// Takes a packet if it may be a probe.
    pub(super) fn push(&mut self, trace: &Arc<PacketTrace>) -> bool {
        if trace.ttl >= LOWEST_ORDINARY_TTL {
            return false;
        }
        let flow = &trace.flow.flow;
        let key = Key {
            cluster: trace.cluster,
            src: flow.src,
            dst: flow.dst,
            proto: flow.proto,
        };
        let run = self.open.entry(key).or_default();
        let place = run
            .probes
            .partition_point(|other| other.start_monotonic <= trace.start_monotonic);
        run.probes.insert(place, Arc::clone(trace));
        true
    }

    /// Whether a flow of answers belongs to a run: it goes back to the run's sender, or it is the resets by which a TCP
    /// traceroute's kernel answers a handshake that it knows nothing of.
    pub(super) fn explain(&self, cluster: u32, flow: &Flow) -> bool {
        const TCP: u8 = 6;
        let known = |key: Key| self.open.contains_key(&key) || self.ended.contains_key(&key);
        let Flow { proto, src, dst, .. } = *flow;
        known(Key {
            cluster,
            src: dst,
            dst: src,
            proto,
        }) || (proto == TCP
            && known(Key {
                cluster,
                src,
                dst,
                proto,
            }))
    }

    /// Appends the blocks of the runs that are over at `now`; what was no run becomes flows.
    pub(super) fn due(&mut self, now: u64, blocks: &mut Vec<Block>, flows: &mut Flows) {
        self.ended.retain(|_, at| now < at.saturating_add(MEMORY));
        let mut over: Vec<(Key, Vec<Arc<PacketTrace>>)> = Vec::new();
        self.open.retain(|key, run| {
            while let Some(probes) = run.take_ended(now) {
                over.push((*key, probes));
            }
            !run.probes.is_empty()
        });
        over.sort_by_key(|(key, probes)| (probes[0].start_monotonic, *key));
        for (key, probes) in over {
            if probes[0].ttl == 1 {
                self.ended.insert(key, now);
                blocks.push(block(&probes));
            } else {
                for trace in &probes {
                    flows.push(trace);
                }
            }
        }
    }
}

impl Run {
    /// Takes out the probes of a run that is over.
    fn take_ended(&mut self, now: u64) -> Option<Vec<Arc<PacketTrace>>> {
        if self.probes.is_empty() {
            return None;
        }
        let next = self.next_begins();
        let end = next.unwrap_or(self.probes.len());
        let all_closed = next.is_some_and(|next| now >= self.probes[next].start_monotonic + ALL_CLOSED);
        let over = all_closed || is_over(&self.probes[..end], now) || self.probes.len() > MOST;
        over.then(|| self.probes.drain(..end).collect())
    }

    /// Where the next run begins: with a gap, or with TTL 1 after the receiver has answered.
    fn next_begins(&self) -> Option<usize> {
        (1..self.probes.len()).find(|&index| {
            let (before, probe) = (&self.probes[index - 1], &self.probes[index]);
            let gap = probe.start_monotonic - before.start_monotonic > GAP;
            gap || (probe.ttl == 1 && before.ttl > 1 && receiver(&self.probes[..index]).is_some())
        })
    }
}

/// A probe that nobody answers closes long after those sent with it, so an answered run is over when none can be open any
/// more. With a probe less on one line than on another, more of them may come until the gap is too long.
fn is_over(probes: &[Arc<PacketTrace>], now: u64) -> bool {
    let last = probes.last().map_or(0, |probe| probe.start_monotonic);
    let answered = || receiver(probes).is_some_and(|ttl| is_even(probes, ttl));
    now >= last + GAP || (now >= last + ALL_CLOSED && answered())
}

/// Whether each line has as many probes as the first.
fn is_even(probes: &[Arc<PacketTrace>], lines: u8) -> bool {
    let count = |ttl| probes.iter().filter(|probe| probe.ttl == ttl).count();
    let first = count(1);
    (2..=lines).all(|ttl| count(ttl) == first)
}

/// The lowest TTL that the receiver answered, or somebody in its place: traceroute sends no further.
fn receiver(probes: &[Arc<PacketTrace>]) -> Option<u8> {
    probes
        .iter()
        .filter(|probe| is_final(probe))
        .map(|probe| probe.ttl)
        .min()
}

fn is_final(probe: &PacketTrace) -> bool {
    probe
        .answer
        .as_ref()
        .is_some_and(|answer| answer.kind != AnswerKind::TimeExceeded)
}

fn block(probes: &[Arc<PacketTrace>]) -> Block {
    let highest = probes.iter().map(|probe| probe.ttl).max().unwrap_or(1);
    let last = receiver(probes).unwrap_or(highest);
    let mut counts = Counts::default();
    for probe in probes {
        counts.add(probe);
    }
    let first = &probes[0];
    let latest = worst(probes);
    Block {
        kind: Kind::ProbeRun,
        flow: first.flow.clone(),
        counts,
        round_trip: None,
        hops_max: highest,
        length: first.length,
        lines: lines(probes, last),
        stray: way::of(latest).into_stray(),
        latest: Arc::clone(latest),
        later_probes: probes.iter().filter(|probe| probe.ttl > last).count(),
    }
}

fn lines(probes: &[Arc<PacketTrace>], last: u8) -> Vec<Line> {
    // The probe that came furthest knows every hop.
    let furthest = probes.iter().max_by_key(|probe| probe.hops.len());
    let ways = furthest.map(|probe| way::of(probe));
    (1..=last)
        .map(|ttl| {
            let sent = probes.iter().filter(|probe| probe.ttl == ttl);
            let reason = sent
                .clone()
                .find_map(|probe| block::hop(probe, ttl)?.reason.clone());
            let readings = sent
                .map(|probe| probe.answer.as_ref().and_then(block::round_trip))
                .collect();
            let hop = furthest.and_then(|probe| block::hop(probe, ttl));
            let way = ways.as_ref().map(|ways| ways.of_hop(ttl)).unwrap_or_default();
            Line {
                reason,
                ..block::line(ttl, readings, hop, way)
            }
        })
        .collect()
}

/// The probe that tells how the run ended: the last one that was dropped or lost, else the last that was answered by the
/// receiver, else the last.
fn worst(probes: &[Arc<PacketTrace>]) -> &Arc<PacketTrace> {
    let in_trouble = |probe: &&Arc<PacketTrace>| matches!(probe.verdict, Verdict::Dropped | Verdict::Lost);
    let answered = |probe: &&Arc<PacketTrace>| is_final(probe);
    let last = |wanted: &dyn Fn(&&Arc<PacketTrace>) -> bool| probes.iter().rev().find(wanted);
    last(&in_trouble)
        .or_else(|| last(&answered))
        .unwrap_or(&probes[probes.len() - 1])
}
