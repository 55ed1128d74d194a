//! How a capture hands the observations on: late, out of order within its promise, without those of a blind hook. And what a
//! trace is of in truth.

use std::fmt::Write as _;

use proptest::{collection::vec, prelude::*};

use super::{
    facts::{facts, netns},
    path::{BEGIN, Walked},
};
use crate::{
    correlate::{Config, Correlator, Crossings, Offset, PacketTrace},
    event::{EncapKind, Fact, Hook, Item, Ledger, LedgerRow, Netns},
};

/// Nanoseconds by which observations are late at most.
pub(in crate::correlate) const DRAIN: u64 = 40_000;

/// All TC hooks.
pub(super) const HOOKS: [Hook; 6] = [
    Hook::WorkloadIngress,
    Hook::WorkloadEgress,
    Hook::TunnelIngress,
    Hook::TunnelEgress,
    Hook::UplinkIngress,
    Hook::UplinkEgress,
];

/// What a capture does to the observations.
#[derive(Clone, Debug)]
pub(super) struct Capture {
    /// By how much each is late, in nanoseconds.
    pub(super) late: Vec<u64>,
    /// A hook that is not attached.
    pub(super) blind: Option<(Netns, Hook)>,
}

impl Capture {
    pub(super) fn any() -> impl Strategy<Value = Self> {
        vec(prop_oneof![Just(0), 0..DRAIN], 64).prop_map(|late| Self { late, blind: None })
    }
}

/// Takes the second node's observations by another clock and with other addresses, as a machine of its own would, and moves
/// them back by what the packets tell, if any do.
pub(super) fn skew(walked: &mut [Walked], ahead: u64, ppm: u64) -> bool {
    let there = netns(1);
    let (mut one, mut other) = (Crossings::default(), Crossings::default());
    for walked in &mut *walked {
        let observation = &mut walked.observation;
        if observation.netns == there {
            observation.time += ahead + (observation.time - BEGIN) * ppm / 1_000_000;
            if observation.skb != 0 {
                observation.skb ^= 0x7_0000;
            }
            other.note(observation);
        } else {
            one.note(observation);
        }
    }
    // Of one direction alone nothing tells how long it takes.
    let bounded = |offset: &Offset| offset.bound().is_some();
    let Some(offset) = Offset::between(&one, &other).filter(bounded) else {
        return false;
    };
    for walked in &mut *walked {
        if walked.observation.netns == there {
            walked.observation.time = offset.to_here(walked.observation.time);
        }
    }
    walked.sort_by_key(|walked| walked.observation.time);
    let mut last = 0;
    for walked in walked {
        last = walked.observation.time.max(last + 1);
        walked.observation.time = last;
    }
    true
}

/// Correlates; `lost` is what the ledger counts at the end.
pub(super) fn correlate(
    walked: &[Walked],
    encap: Option<EncapKind>,
    capture: &Capture,
    lost: u64,
) -> Vec<PacketTrace> {
    let late = capture.late.iter().cycle();
    let mut items: Vec<_> = walked
        .iter()
        .map(|walked| &walked.observation)
        .zip(late)
        .collect();
    items.sort_by_key(|(observation, late)| observation.time + *late);
    let mut correlator = Correlator::new(Config {
        drain_period: DRAIN,
        ..Config::default()
    });
    let mut closed = Vec::new();
    for fact in facts(encap) {
        let blind = matches!(&fact, Fact::Attachment(it) if Some((it.netns, it.hook)) == capture.blind);
        if !blind {
            correlator.push(&Item::Fact(fact), &mut closed);
        }
    }
    correlator.push(&ledger(0, 0), &mut closed);
    for (observation, _) in items {
        correlator.push(&Item::Observation(observation.clone()), &mut closed);
    }
    let end = BEGIN + 10_000_000_000;
    correlator.push(&ledger(end - 1, lost), &mut closed);
    correlator.push(&Item::Tick { time: end }, &mut closed);
    assert_eq!(correlator.open.len(), 0, "everything closes");
    assert!(correlator.open.is_clean(), "nothing is left in an index");
    closed
}

fn ledger(time: u64, lost: u64) -> Item {
    let row = LedgerRow {
        ring_refused: lost,
        ..LedgerRow::default()
    };
    Item::Ledger(Ledger {
        time,
        exact: false,
        rows: vec![row],
        evicted: 0,
    })
}

/// A trace in short: what it claims, and of which packets each of its observations is in truth.
pub(super) fn tell(trace: &PacketTrace, walked: &[Walked]) -> String {
    let flow = trace.flow.flow;
    let hops: Vec<_> = trace.hops.iter().map(|hop| hop.address).collect();
    let mut text = format!("{:?} {:?} {flow:?} hops {hops:?}", trace.verdict, trace.certainty);
    for seen in &trace.observations {
        let time = trace.start_monotonic + seen.elapsed_ns;
        let of = walked.iter().find(|walked| walked.observation.time == time);
        let _infallible = write!(
            text,
            "\n  {} {:?} {} of {:?}",
            time - BEGIN,
            seen.node,
            seen.hook,
            of.map(|of| &of.numbers)
        );
    }
    text
}

/// The packets that all of a trace's observations are of: one, or, if it was seen merged only, several. None: it is mixed.
pub(super) fn packets(trace: &PacketTrace, walked: &[Walked]) -> Vec<usize> {
    let mut all: Option<Vec<usize>> = None;
    for seen in &trace.observations {
        let time = trace.start_monotonic + seen.elapsed_ns;
        let index = walked
            .binary_search_by_key(&time, |walked| walked.observation.time)
            .expect("it was given");
        let numbers = &walked[index].numbers;
        match &mut all {
            Some(all) => all.retain(|number| numbers.contains(number)),
            None => all = Some(numbers.to_vec()),
        }
    }
    all.unwrap_or_default()
}
