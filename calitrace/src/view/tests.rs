//! When blocks are due, and what makes a probe run.

use std::sync::Arc;

use super::{Block, Kind, SECOND, Views, sample};
use crate::{
    correlate::{AnswerKind, PacketTrace, Verdict},
    event::Transport,
};

/// Feeds traces as they close, ticks every 10 ms, and returns the blocks with the time they were due.
fn play(mut traces: Vec<Arc<PacketTrace>>, until: u64) -> Vec<(u64, Block)> {
    traces.sort_by_key(|trace| trace.closed_monotonic);
    let mut traces = traces.into_iter().peekable();
    let mut views = Views::default();
    let mut shown = Vec::new();
    for now in (SECOND..until).step_by(10_000_000) {
        while let Some(trace) = traces.next_if(|trace| trace.closed_monotonic <= now) {
            views.push(&trace);
        }
        let mut due = Vec::new();
        views.due(now, &mut due);
        shown.extend(due.into_iter().map(|block| (now, block)));
    }
    let mut due = Vec::new();
    views.finish(&mut due);
    shown.extend(due.into_iter().map(|block| (until, block)));
    shown
}

fn pings(count: u16, gap: u64) -> Vec<Arc<PacketTrace>> {
    (0..count)
        .map(|seq| Arc::new(sample::ping(u64::from(seq) * gap, seq)))
        .collect()
}

fn addresses(block: &Block) -> Vec<Vec<String>> {
    let address = |reading: &Option<super::Reading>| {
        reading
            .as_ref()
            .map_or("*".to_owned(), |reading| reading.address.to_string())
    };
    block
        .lines
        .iter()
        .map(|line| line.readings.iter().map(address).collect())
        .collect()
}

#[test]
fn a_flow_is_shown_once_with_its_third_packet() {
    let shown = play(pings(100, SECOND / 10), 30 * SECOND);
    let [(at, block)] = shown.as_slice() else {
        panic!("{} blocks", shown.len())
    };
    // The third packet is sent 200 ms after the first and closes 50 ms later.
    assert_eq!((*at - SECOND) / 10_000_000, 26);
    assert_eq!((block.counts.packets, block.round_trip), (3, Some(31_000)));
    assert_eq!(block.lines.len(), 3);
}

#[test]
fn a_flow_that_falls_silent_is_shown_after_a_second() {
    let shown = play(pings(1, SECOND), 30 * SECOND);
    let [(at, block)] = shown.as_slice() else {
        panic!("{} blocks", shown.len())
    };
    assert_eq!((*at - SECOND) / 10_000_000, 106);
    assert_eq!(block.lines[0].readings.len(), 1);
}

#[test]
fn a_flow_is_shown_again_when_its_end_changes_and_at_most_once_a_second() {
    let mut traces = pings(10, SECOND / 10);
    // From 1 s to 3 s every second packet is denied.
    traces.extend((10..30).map(|number: u16| {
        let start = u64::from(number) * SECOND / 10;
        Arc::new(if number.is_multiple_of(2) {
            sample::denied(start)
        } else {
            sample::ping(start, number)
        })
    }));
    let shown = play(traces, 10 * SECOND);
    assert!((2..=4).contains(&shown.len()), "{} blocks", shown.len());
    assert!(shown.windows(2).all(|pair| pair[1].0 - pair[0].0 >= SECOND));
    assert_eq!(shown[1].1.latest.verdict, Verdict::Dropped);
    assert_eq!(shown[1].1.lines.len(), 3, "the packets before it came further");
}

#[test]
fn what_was_under_way_at_the_end_shows_no_flow_again() {
    let mut traces = pings(3, 1_000_000);
    let mut last = sample::ping(SECOND, 4);
    last.verdict = Verdict::Unfinished;
    last.hops.clear();
    traces.push(Arc::new(last));
    assert_eq!(play(traces, 10 * SECOND).len(), 1);
}

#[test]
fn a_traceroute_is_one_block_of_round_trips() {
    let shown = play(sample::traceroute(0), 10 * SECOND);
    let [(at, block)] = shown.as_slice() else {
        panic!("{} blocks", shown.len())
    };
    assert!((*at - SECOND) < 5 * SECOND / 2, "when no probe is open any more");
    assert_eq!(block.kind, Kind::ProbeRun);
    assert_eq!(
        addresses(block),
        [["10.244.120.64"; 3], ["10.244.205.192"; 3], ["10.244.205.193"; 3]]
    );
    let times: Vec<_> = block.lines[0]
        .readings
        .iter()
        .flatten()
        .map(|reading| reading.time)
        .collect();
    assert_eq!(times, [Some(17_000), Some(7_000), Some(5_000)]);
}

#[test]
fn probes_that_close_in_another_order_are_the_same_run() {
    let mut traces = sample::traceroute(0);
    // The first probes close last.
    for (number, trace) in traces.iter_mut().enumerate() {
        Arc::make_mut(trace).closed_monotonic = SECOND + SECOND / 10 - number as u64 * 1_000_000;
    }
    let shown = play(traces, 10 * SECOND);
    assert_eq!(shown.len(), 1);
    assert_eq!(
        addresses(&shown[0].1),
        [["10.244.120.64"; 3], ["10.244.205.192"; 3], ["10.244.205.193"; 3]]
    );
}

#[test]
fn probes_beyond_the_receiver_are_counted() {
    let mut traces = sample::traceroute(0);
    traces.extend((4..=6).map(|ttl| Arc::new(sample::probe(u64::from(ttl) * 5_000_000, ttl, 9_000))));
    let shown = play(traces, 10 * SECOND);
    let [(_, block)] = shown.as_slice() else {
        panic!("{} blocks", shown.len())
    };
    assert_eq!((block.lines.len(), block.later_probes, block.hops_max), (3, 3, 6));
}

#[test]
fn an_unanswered_hop_is_a_line_of_stars_and_a_late_close_is_waited_for() {
    let mut traces = sample::traceroute(0);
    for trace in &mut traces[3..6] {
        let trace = Arc::make_mut(trace);
        (trace.answer, trace.verdict) = (None, Verdict::Lost);
        trace.closed_monotonic = trace.start_monotonic + 2 * SECOND;
    }
    let shown = play(traces, 10 * SECOND);
    let [(at, block)] = shown.as_slice() else {
        panic!("{} blocks", shown.len())
    };
    assert_eq!(
        addresses(block),
        [["10.244.120.64"; 3], ["*"; 3], ["10.244.205.193"; 3]]
    );
    assert!(*at < 5 * SECOND);
}

#[test]
fn a_probe_unanswered_on_every_line_is_waited_for() {
    let mut traces = sample::traceroute(0);
    for trace in traces.iter_mut().step_by(3) {
        let trace = Arc::make_mut(trace);
        trace.answer = None;
        trace.closed_monotonic = trace.start_monotonic + 2 * SECOND;
    }
    let shown = play(traces, 10 * SECOND);
    let [(_, block)] = shown.as_slice() else {
        panic!("{} blocks", shown.len())
    };
    assert_eq!(
        addresses(block),
        [
            ["*", "10.244.120.64", "10.244.120.64"],
            ["*", "10.244.205.192", "10.244.205.192"],
            ["*", "10.244.205.193", "10.244.205.193"]
        ]
    );
}

#[test]
fn a_run_without_a_receiver_ends_with_a_gap() {
    let traces = sample::traceroute(0)[..6].to_vec();
    let shown = play(traces, 20 * SECOND);
    let [(at, block)] = shown.as_slice() else {
        panic!("{} blocks", shown.len())
    };
    assert!(*at >= 6 * SECOND + SECOND / 2, "{at}");
    assert_eq!(block.lines.len(), 2);
}

#[test]
fn two_traceroutes_in_a_row_are_two_blocks() {
    let mut traces = sample::traceroute(0);
    traces.extend(sample::traceroute(300_000_000));
    let shown = play(traces, 20 * SECOND);
    assert_eq!(shown.len(), 2);
    assert!(
        shown
            .iter()
            .all(|(_, block)| block.lines.len() == 3 && block.counts.packets == 9)
    );
}

#[test]
fn a_run_is_shown_when_it_is_over_although_the_next_has_begun() {
    let mut traces = sample::traceroute(0);
    traces.extend(sample::traceroute(2 * SECOND));
    let shown = play(traces, 20 * SECOND);
    assert_eq!(shown.len(), 2);
    assert!((shown[0].0 - SECOND) < 5 * SECOND / 2, "{}", shown[0].0);
}

#[test]
fn low_ttls_that_do_not_start_at_one_are_a_flow() {
    let traces = (0..3)
        .map(|number| {
            let mut trace = sample::ping(number * 1_000_000, 1);
            trace.ttl = 31;
            Arc::new(trace)
        })
        .collect();
    let shown = play(traces, 10 * SECOND);
    assert_eq!(shown.len(), 1);
    assert_eq!(shown[0].1.kind, Kind::Flow);
}

#[test]
fn replies_to_probes_are_no_flow_of_their_own() {
    let mut traces: Vec<Arc<PacketTrace>> = sample::traceroute(0);
    for trace in &mut traces {
        let trace = Arc::make_mut(trace);
        trace.flow.flow.proto = 1;
        if let Some(answer) = trace
            .answer
            .as_mut()
            .filter(|answer| answer.kind == AnswerKind::Unreachable)
        {
            (answer.kind, answer.icmp) = (AnswerKind::EchoReply, None);
        }
    }
    traces.extend((0..3).map(|seq| {
        let mut pong = sample::pong(6_000_000 + u64::from(seq) * 1_000_000, seq);
        // The answer closes before the probe that it answers.
        pong.closed_monotonic -= 20_000_000;
        Arc::new(pong)
    }));
    let shown = play(traces, 10 * SECOND);
    assert_eq!(
        shown.iter().map(|(_, block)| block.kind).collect::<Vec<_>>(),
        [Kind::ProbeRun]
    );
}

#[test]
fn resets_of_handshakes_that_a_traceroute_began_are_no_flow() {
    let tcp = |seq, flags| Transport::Tcp {
        src_port: 40_000,
        dst_port: 80,
        seq,
        ack: 0,
        flags,
        window: 1024,
        tsval: None,
        payload: 0,
    };
    let mut traces = sample::traceroute(0);
    for trace in &mut traces {
        let trace = Arc::make_mut(trace);
        (trace.flow.flow.proto, trace.packet.transport) = (6, tcp(1, 2));
    }
    let reset = |number: u64| Arc::new(sample::delivered(20_000_000 + number, tcp(2, 4)));
    traces.extend((0..3).map(reset));
    let shown = play(traces, 10 * SECOND);
    assert_eq!(
        shown.iter().map(|(_, block)| block.kind).collect::<Vec<_>>(),
        [Kind::ProbeRun]
    );
    // Without a traceroute they are.
    assert_eq!(play((0..3).map(reset).collect(), 10 * SECOND).len(), 1);
}

#[test]
fn replies_to_pings_are_a_flow() {
    let mut traces = pings(3, 1_000_000);
    traces.extend((0..3).map(|seq| Arc::new(sample::pong(u64::from(seq) * 1_000_000, seq))));
    assert_eq!(play(traces, 10 * SECOND).len(), 2);
}
