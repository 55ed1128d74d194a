//! Properties of joining, on packets sent through a model of two nodes: each walks its way step by step beside the others, is
//! translated, wrapped, cut into segments and merged, on `sk_buff` addresses that are reused as soon as they are free, by
//! others with the same bytes, too. Whatever happens, no trace mixes two packets, and what a trace claims is true.
//!
//! `PROPTEST_CASES` sets how many cases each property is tried with. The seed of a failure is printed, and kept in
//! `calitrace/proptest-regressions`.

mod capture;
pub(super) mod facts;
mod model;
mod path;

use proptest::{collection::vec, prelude::*};

pub(super) use capture::DRAIN;
use capture::{Capture, correlate, packets, tell};
use model::{Fate, Kind, Sent, Way, ends, sent};
pub(super) use path::BEGIN;
use path::{Offloads, Walk, Walked, walk};

use super::{Joint, PacketTrace, Verdict};
use crate::event::EncapKind;

/// How often a property is tried unless the environment says otherwise.
pub(super) fn cases(default: u32) -> ProptestConfig {
    let told = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: told.unwrap_or(default),
        ..ProptestConfig::default()
    }
}

fn encap() -> impl Strategy<Value = Option<EncapKind>> {
    prop_oneof![
        Just(None),
        Just(Some(EncapKind::Ipip)),
        Just(Some(EncapKind::Vxlan))
    ]
}

fn offloads() -> impl Strategy<Value = Offloads> {
    (vec(any::<bool>(), 16), vec(any::<bool>(), 32)).prop_map(|(cut, merge)| Offloads { cut, merge })
}

/// The verdict that is a packet's due.
fn due(sent: &Sent) -> Verdict {
    match (sent.fate, sent.spec.way) {
        (Fate::Dropped(_), _) => Verdict::Dropped,
        (Fate::Vanishes, Way::Across(_)) => Verdict::Lost,
        (_, Way::Out(_)) => Verdict::Left,
        _ => Verdict::Delivered,
    }
}

/// Whether the hops of a trace are those of its packet, as far as they are told.
fn hops_are_true(trace: &PacketTrace, sent: &Sent) -> Result<(), TestCaseError> {
    let (spec, v6) = (&sent.spec, sent.spec.v6);
    let first = facts::hop_address(spec.way.begins(), v6);
    let written = ends(spec).written.1;
    let way = match spec.way {
        Way::Same(_) | Way::Hairpin(_) => vec![first, written],
        Way::Across(node) => vec![first, facts::hop_address(1 - node, v6), written],
        Way::Out(_) => vec![first, facts::gateway(v6)],
    };
    // What was translated before it was first seen goes by its translated address.
    let seen = trace.flow.flow.dst;
    prop_assert!(trace.hops.len() <= way.len(), "{:?} is not {way:?}", trace.hops);
    for (hop, address) in trace.hops.iter().zip(&way) {
        let told = hop
            .address
            .is_none_or(|told| told == *address || (*address == written && told == seen));
        prop_assert!(told, "hop {} is {address}: {:?}", hop.ttl, trace.hops);
    }
    Ok(())
}

/// The packets on their way, a doubled one and its copy as one.
fn walk_united(sent: &[Sent], encap: Option<EncapKind>, offloads: &Offloads) -> Walk {
    let mut walk = walk(sent, encap, offloads, false);
    walk.unite_copies();
    walk
}

/// Takes away what is not `kept`, again and again in that pattern; how many that were.
fn lose(walked: &mut Vec<Walked>, kept: &[bool]) -> u64 {
    let before = walked.len();
    let mut kept = kept.iter().cycle();
    walked.retain(|_| kept.next().is_none_or(|kept| *kept));
    (before - walked.len()) as u64
}

/// The packet that all of a trace is of, and that the trace has all of.
fn whole(trace: &PacketTrace, walked: &[Walked]) -> Result<usize, TestCaseError> {
    let of = packets(trace, walked);
    prop_assert_eq!(of.len(), 1, "mixed: {}", tell(trace, walked));
    let number = of[0];
    let is_of = |walked: &&Walked| walked.numbers.contains(&number) && walked.observation.skb != 0;
    let observed = walked.iter().filter(is_of).count();
    prop_assert_eq!(
        trace.observations.len(),
        observed,
        "not whole: {}",
        tell(trace, walked)
    );
    Ok(number)
}

proptest! {
    #![proptest_config(cases(10_000))]

    /// With nothing lost each packet has its whole trace, and the verdict and the hops that are its due.
    #[test]
    fn every_packet_is_one_whole_trace(
        sent in sent(30),
        encap in encap(),
        offloads in offloads(),
        capture in Capture::any(),
    ) {
        let Walk { walked, packets: all } = walk(&sent, encap, &offloads, true);
        let traces = correlate(&walked, encap, &capture, 0);
        prop_assert_eq!(traces.len(), all.len());
        for trace in &traces {
            let number = whole(trace, &walked)?;
            // Only where there are others alike does the order decide.
            let alike = all.iter().any(|(other, _)| other.again && other.spec == all[number].0.spec);
            prop_assert!(trace.certainty < Joint::Order || alike, "{}", tell(trace, &walked));
            let (sent, copy) = &all[number];
            prop_assert_eq!(trace.verdict, due(sent), "{}", tell(trace, &walked));
            if copy.is_none() {
                hops_are_true(trace, sent)?;
                let receiver = trace.hops.last().and_then(|hop| hop.address);
                let arrives = matches!(trace.verdict, Verdict::Delivered);
                prop_assert!(!arrives || receiver == Some(ends(&sent.spec).written.1), "{}", tell(trace, &walked));
            }
        }
    }

    /// When records are lost, still no trace mixes packets that can be told apart, and no claim is false.
    #[test]
    fn loss_makes_no_claim_false(
        mut sent in sent(30),
        encap in encap(),
        offloads in offloads(),
        capture in Capture::any(),
        kept in vec(prop::bool::weighted(0.7), 240),
    ) {
        for packet in &mut sent {
            packet.again = false;
        }
        let Walk { mut walked, packets: all } = walk_united(&sent, encap, &offloads);
        let lost = lose(&mut walked, &kept);
        for trace in correlate(&walked, encap, &capture, lost) {
            let of = packets(&trace, &walked);
            prop_assert!(!of.is_empty(), "mixed: {}", tell(&trace, &walked));
            let (sent, _) = &all[of[0]];
            match trace.verdict {
                Verdict::Unknown => {}
                Verdict::Lost => prop_assert_eq!(lost, 0),
                told => prop_assert_eq!(told, due(sent), "{}", tell(&trace, &walked)),
            }
            if of.len() == 1 {
                hops_are_true(&trace, sent)?;
            }
        }
    }

    /// Where packets are alike and records are lost, traces may mix them; but none says that it is sure.
    #[test]
    fn what_order_decides_is_said(
        mut sent in sent(30),
        encap in encap(),
        offloads in offloads(),
        capture in Capture::any(),
        kept in vec(prop::bool::weighted(0.8), 240),
    ) {
        for packet in &mut sent {
            packet.again &= packet.spec.kind == Kind::Data || !packet.spec.is_numbered();
        }
        let Walk { mut walked, packets: all } = walk_united(&sent, encap, &offloads);
        let lost = lose(&mut walked, &kept);
        for trace in correlate(&walked, encap, &capture, lost) {
            let of = packets(&trace, &walked);
            if trace.certainty == Joint::Order {
                continue;
            }
            prop_assert!(!of.is_empty(), "mixed: {}", tell(&trace, &walked));
            let told = trace.verdict;
            prop_assert!(told == Verdict::Unknown || told == due(&all[of[0]].0), "{}", tell(&trace, &walked));
        }
    }

    /// A hook that observes nothing, and whose attachment is not told of, is missing from every trace, and that is all.
    #[test]
    fn a_blind_hook_makes_no_claim_false(
        mut sent in sent(20),
        encap in encap(),
        offloads in offloads(),
        capture in Capture::any(),
        node in 0..2_usize,
        hook in 1..6_usize,
    ) {
        for packet in &mut sent {
            packet.again = false;
        }
        let Walk { mut walked, packets: all } = walk_united(&sent, encap, &offloads);
        let blind = (facts::netns(node), capture::HOOKS[hook]);
        walked.retain(|walked| (walked.observation.netns, walked.observation.hook) != blind);
        let capture = Capture { blind: Some(blind), ..capture };
        for trace in correlate(&walked, encap, &capture, 0) {
            let of = packets(&trace, &walked);
            prop_assert!(!of.is_empty(), "mixed: {}", tell(&trace, &walked));
            let (sent, _) = &all[of[0]];
            match trace.verdict {
                Verdict::Unknown => {}
                told => prop_assert_eq!(told, due(sent), "{}", tell(&trace, &walked)),
            }
        }
    }

    /// Seen by two machines, whose clocks and addresses have nothing to do with each other, each packet is as whole as on one.
    #[test]
    fn two_machines_see_what_one_sees(
        mut sent in sent(20),
        encap in encap(),
        offloads in offloads(),
        capture in Capture::any(),
        ahead in 0..10_000_000_000_u64,
        ppm in 0..100_u64,
    ) {
        sent.extend([Way::Across(0), Way::Across(1)].map(Sent::ping));
        let mut walk = walk(&sent, encap, &offloads, true);
        let skewed = capture::skew(&mut walk.walked, ahead, ppm);
        let Walk { walked, packets: all } = walk;
        // Without packets of both directions nothing tells how far the clocks are apart.
        if !skewed {
            return Ok(());
        }
        let traces = correlate(&walked, encap, &capture, 0);
        let told = || traces.iter().map(|trace| tell(trace, &walked)).collect::<Vec<_>>().join("\n");
        prop_assert_eq!(traces.len(), all.len(), "{}", told());
        for trace in &traces {
            let number = whole(trace, &walked)?;
            prop_assert_eq!(trace.verdict, due(&all[number].0), "{}", tell(trace, &walked));
        }
    }
}
