//! What blocks look like.

mod sentences;

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use super::{
    super::Sink,
    Live, Terminal, Text,
    render::{Look, row},
};
use crate::{
    correlate::{Certainty, Endpoint, NatKind, NatStep, PacketTrace, Segment, Verdict},
    event::{Ledger, LedgerRow, Transport},
    view::sample,
};

/// Bytes that are still there after the sink is.
#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn printed(traces: impl IntoIterator<Item = PacketTrace>) -> String {
    let output = Shared::default();
    let mut sink = Text::new(output.clone(), false, false);
    for trace in traces {
        sink.trace(&Arc::new(trace)).unwrap();
    }
    sink.finish().unwrap();
    output.text()
}

fn three_pings() -> Vec<PacketTrace> {
    let left = [
        [17_000, 18_000, 18_000],
        [7_000, 8_000, 8_000],
        [5_000, 6_000, 6_000],
    ];
    let pings = left.iter().zip(0..).map(|(left, seq)| {
        let mut ping = sample::ping(u64::from(seq) * 1_000_000, seq);
        for (hop, left) in ping.hops.iter_mut().zip(left) {
            hop.left_ns = Some(*left);
        }
        ping
    });
    pings.collect()
}

#[test]
fn a_ping_over_the_tunnel() {
    insta::assert_snapshot!(printed(three_pings()), @r#"
    default/busybox-f5945bfb5-mw26t → default/busybox-f5945bfb5-mwgr6   ICMP echo   3 packets, 0 lost   round trip 0.031 ms
    traceroute to 10.244.205.193 (10.244.205.193), 3 hops max, 84 byte packets
     1  10.244.120.64 (10.244.120.64)  0.017 ms  0.007 ms  0.005 ms
          minikube: cali8d02ed71817 → tunl0 IPIP 192.168.49.2 → 192.168.49.3 → eth0
     2  10.244.205.192 (10.244.205.192)  0.018 ms  0.008 ms  0.006 ms
          minikube-m02: eth0 → tunl0 → cali79f33e4263e
     3  10.244.205.193 (10.244.205.193)  0.018 ms  0.008 ms  0.006 ms
    "#);
}

#[test]
fn a_traceroute() {
    let probes = sample::traceroute(0)
        .iter()
        .map(|probe| (**probe).clone())
        .collect::<Vec<_>>();
    insta::assert_snapshot!(printed(probes), @r#"
    default/busybox-f5945bfb5-mw26t → default/busybox-f5945bfb5-mwgr6   traceroute by UDP   9 probes
    traceroute to 10.244.205.193 (10.244.205.193), 3 hops max, 46 byte packets
     1  10.244.120.64 (10.244.120.64)  0.017 ms  0.007 ms  0.005 ms
          minikube: cali8d02ed71817 → tunl0 IPIP 192.168.49.2 → 192.168.49.3 → eth0
     2  10.244.205.192 (10.244.205.192)  0.008 ms  0.008 ms  0.004 ms
          minikube-m02: eth0 → tunl0 → cali79f33e4263e
     3  10.244.205.193 (10.244.205.193)  0.008 ms  0.006 ms  0.003 ms
    "#);
}

/// The last line that is printed of a packet.
#[test]
fn a_dropped_packet_ends_with_where_and_why() {
    insta::assert_snapshot!(printed([sample::denied(0)]), @r#"
    default/busybox-f5945bfb5-mw26t → default/busybox-f5945bfb5-mwgr6   ICMP echo   1 packet, 1 lost
    traceroute to 10.244.205.193 (10.244.205.193), 1 hops max, 84 byte packets
     1  10.244.120.64 (10.244.120.64)  0.005 ms
          minikube: cali8d02ed71817
    ✗ dropped on node minikube at cali8d02ed71817, before tunl0: netfilter FORWARD (a policy or firewall rule), NETFILTER_DROP at nft_do_chain
    "#);
}

#[test]
fn packets_that_fail_after_their_flow_was_shown_are_counted_at_the_end() {
    let output = Shared::default();
    let mut sink = Text::new(output.clone(), false, false);
    for packet in 0..40 {
        sink.trace(&Arc::new(sample::denied(packet * 200_000_000)))
            .unwrap();
        sink.tick((packet + 1) * 200_000_000).unwrap();
    }
    sink.finish().unwrap();
    let text = output.text();
    assert!(text.contains("   3 packets, 3 lost\n"), "{text}");
    assert!(
        text.ends_with(
            "\n\nin all: default/busybox-f5945bfb5-mw26t → default/busybox-f5945bfb5-mwgr6   ICMP echo   40 packets, 40 lost\n"
        ),
        "{text}"
    );
    // Those that were shown with all of theirs are not.
    assert!(!printed([sample::denied(0)]).contains("in all:"));
}

#[test]
fn policies_that_log_are_named_where_they_allow() {
    let allowed = sample::logged(sample::ping(0, 1), "API0|np/default/allow-frontend");
    insta::assert_snapshot!(printed([allowed]), @r#"
    default/busybox-f5945bfb5-mw26t → default/busybox-f5945bfb5-mwgr6   ICMP echo   1 packet, 0 lost   round trip 0.031 ms
    traceroute to 10.244.205.193 (10.244.205.193), 3 hops max, 84 byte packets
     1  10.244.120.64 (10.244.120.64)  0.005 ms
          minikube: cali8d02ed71817 → tunl0 IPIP 192.168.49.2 → 192.168.49.3 → eth0
     2  10.244.205.192 (10.244.205.192)  0.008 ms
          minikube-m02: eth0 → tunl0 → cali79f33e4263e
          policy default/allow-frontend (ingress), rule 0 allows
     3  10.244.205.193 (10.244.205.193)  0.008 ms
    "#);
    // By what it was dropped is said at the end.
    let denied = printed([sample::logged(sample::denied(0), "DPE0|np/default/deny-all")]);
    assert_eq!(denied, printed([sample::denied(0)]));
}

fn segment(payload: u32) -> Transport {
    Transport::Tcp {
        src_port: 40_000,
        dst_port: 80,
        seq: 1,
        ack: 1,
        flags: 16,
        window: 500,
        tsval: None,
        payload,
    }
}

#[test]
fn a_retransmission_is_called_one() {
    let mut again = sample::delivered(0, segment(100));
    again.retransmit = Some(2);
    let text = printed([again]);
    assert!(text.contains("   TCP retransmit 2   1 packet"), "{text}");
}

#[test]
fn a_segment_without_data_is_called_what_it_is() {
    for (kind, dup_ack, title) in [
        (Segment::KeepAlive, None, "TCP keep-alive"),
        (Segment::KeepAliveAck, None, "TCP keep-alive ack"),
        (Segment::DupAck, Some(3), "TCP dup ack 3"),
        (Segment::Ack, None, "TCP ack"),
    ] {
        let mut trace = sample::delivered(0, segment(0));
        (trace.segment, trace.dup_ack) = (Some(kind), dup_ack);
        let text = printed([trace]);
        assert!(text.contains(&format!("   {title}   1 packet")), "{text}");
    }
}

#[test]
fn times_of_several_clocks_have_their_bound() {
    let mut ping = sample::ping(0, 1);
    for hop in &mut ping.hops[1..] {
        hop.clock_bound_ns = Some(20_400);
    }
    let text = printed([ping.clone()]);
    assert!(
        text.contains("\n      times between the nodes' clocks: ± 0.020 ms\n"),
        "{text}"
    );
    ping.hops[1].clock_bound_ns = None;
    let text = printed([ping]);
    assert!(
        text.contains("\n      times between the nodes' clocks: not known how exact\n"),
        "{text}"
    );
}

#[test]
fn one_node_alone_over_ipip() {
    let mut ping = sample::ping(0, 1);
    ping.verdict = Verdict::Left;
    ping.answer = None;
    ping.flow.dst_pod = None;
    ping.observations.truncate(3);
    for hop in &mut ping.hops[1..] {
        (hop.node, hop.pod) = (Some("192.168.49.3".into()), None);
        (hop.arrived_ns, hop.left_ns, hop.certainty) = (None, None, Certainty::Inferred);
    }
    ping.hops[1].address = None;
    insta::assert_snapshot!(printed([ping]), @r#"
    default/busybox-f5945bfb5-mw26t → 10.244.205.193 (on node 192.168.49.3)   ICMP echo   1 packet, 0 lost
    traceroute to 10.244.205.193 (10.244.205.193), 3 hops max, 84 byte packets
     1  10.244.120.64 (10.244.120.64)  0.005 ms
          minikube: cali8d02ed71817 → tunl0 IPIP 192.168.49.2 → 192.168.49.3 → eth0
     2  *  (inferred)
          on node 192.168.49.3, its address is not known here
     3  10.244.205.193 (10.244.205.193) *  (inferred)
    → left node minikube by eth0, and is not followed beyond it
    "#);
}

#[test]
fn a_service_is_named_with_the_pod_behind_it() {
    let transport = Transport::Tcp {
        src_port: 40_000,
        dst_port: 80,
        seq: 1,
        ack: 0,
        flags: 2,
        window: 64_240,
        tsval: None,
        payload: 0,
    };
    let mut packet = sample::delivered(0, transport);
    packet.flow.flow.dst = "10.96.0.20".parse().unwrap();
    let to = Endpoint {
        address: "10.244.205.193".parse().unwrap(),
        port: Some(8080),
    };
    let from = Endpoint {
        address: packet.flow.flow.dst,
        port: Some(80),
    };
    packet.nat.push(NatStep {
        kind: NatKind::Dnat,
        node: Some("minikube".into()),
        from,
        to,
    });
    insta::assert_snapshot!(printed([packet]), @r#"
    default/busybox-f5945bfb5-mw26t:40000 → 10.96.0.20:80 (default/busybox-f5945bfb5-mwgr6)   TCP   1 packet, 0 lost
    traceroute to 10.96.0.20 (10.96.0.20), 3 hops max, 84 byte packets
     1  10.244.120.64 (10.244.120.64)  0.005 ms
          minikube: cali8d02ed71817 → tunl0 IPIP 192.168.49.2 → 192.168.49.3 → eth0
          destination translated from 10.96.0.20:80 to 10.244.205.193:8080
     2  10.244.205.192 (10.244.205.192)  0.008 ms
          minikube-m02: eth0 → tunl0 → cali79f33e4263e
     3  10.244.205.193 (10.244.205.193)  0.008 ms
    "#);
}

#[test]
fn names_cannot_command_the_terminal() {
    let mut ping = sample::ping(0, 1);
    ping.flow.src_pod = Some("default/\x1b[2Jevil\r\n".into());
    let text = printed([ping]);
    assert!(!text.contains('\x1b') && !text.contains('\r'), "{text:?}");
    assert!(
        text.starts_with("default/\u{fffd}[2Jevil\u{fffd}\u{fffd} → "),
        "{text:?}"
    );
}

#[test]
fn losses_are_told_when_they_grow() {
    let row = |refused| LedgerRow {
        recorded: 90,
        ring_refused: refused,
        ..LedgerRow::default()
    };
    let output = Shared::default();
    let mut sink = Text::new(output.clone(), false, false);
    for refused in [0, 10, 10, 15] {
        sink.ledger(&Ledger {
            time: 0,
            exact: false,
            rows: vec![row(refused)],
            evicted: 0,
        })
        .unwrap();
    }
    insta::assert_snapshot!(output.text(), @r#"
    ! 10 of 100 records were lost: traces may have gaps (try a larger --ring-size)
    ! 15 of 105 records were lost: traces may have gaps (try a larger --ring-size)
    "#);
}

fn drawn(
    traces: impl IntoIterator<Item = PacketTrace>,
    size: fn() -> Option<(u16, u16)>,
    colours: bool,
) -> String {
    let output = Shared::default();
    let mut sink = Live::new(
        output.clone(),
        Terminal {
            colours,
            redraw: true,
            size,
        },
        false,
    );
    for trace in traces {
        sink.trace(&Arc::new(trace)).unwrap();
    }
    sink.finish().unwrap();
    output.text()
}

#[test]
fn a_small_terminal_shows_the_troubled_flow_and_counts_the_rest() {
    let mut traces = vec![sample::denied(0)];
    traces.extend((1..=20).map(|number: u16| {
        let mut ping = sample::ping(u64::from(number) * 1_000_000, 1);
        ping.flow.flow.src_port = number;
        ping
    }));
    insta::assert_snapshot!(drawn(traces, || Some((60, 14)), false), @r#"
    default/busybox-f5945bfb5-mw26t →
            default/busybox-f5945bfb5-mwgr6   ICMP echo   1
            packet, 1 lost
    traceroute to 10.244.205.193 (10.244.205.193), 1 hops max,
            84 byte packets
     1  10.244.120.64 (10.244.120.64)  0.005 ms
          minikube: cali8d02ed71817
    ✗ dropped on node minikube at cali8d02ed71817, before tunl0:
            netfilter FORWARD (a policy or firewall rule),
            NETFILTER_DROP at nft_do_chain
    and 20 more flows
    "#);
}

#[test]
fn a_frame_replaces_the_one_before_it() {
    let output = Shared::default();
    let mut sink = Live::new(
        output.clone(),
        Terminal {
            colours: true,
            redraw: true,
            size: || Some((100, 30)),
        },
        false,
    );
    for trace in three_pings() {
        sink.trace(&Arc::new(trace)).unwrap();
    }
    sink.tick(2_000_000_000).unwrap();
    let first = output.text();
    assert!(first.starts_with("\x1b[1mdefault/"), "{first:?}");
    sink.trace(&Arc::new(sample::ping(1_500_000_000, 4))).unwrap();
    // Too soon for another frame.
    sink.tick(2_100_000_000).unwrap();
    assert_eq!(output.text(), first);
    sink.tick(2_300_000_000).unwrap();
    let rows = first.lines().count();
    let second = output.text()[first.len()..].to_owned();
    assert!(second.starts_with(&format!("\x1b[{rows}A\r\x1b[J")), "{second:?}");
    assert!(second.contains("4 packets, 0 lost"), "{second:?}");
}

#[test]
fn long_rows_break_between_words() {
    let long = row(
        Look::Alarm,
        "✗ dropped on node minikube at tunl0: NETFILTER_DROP at nft_do_chain".into(),
    );
    let texts = |columns| {
        long.wrapped(columns)
            .into_iter()
            .map(|row| row.text)
            .collect::<Vec<_>>()
    };
    assert_eq!(texts(100).concat(), long.text);
    assert_eq!(
        texts(40),
        [
            "✗ dropped on node minikube at tunl0:",
            "        NETFILTER_DROP at nft_do_chain"
        ]
    );
    assert!(texts(12).iter().all(|text| text.chars().count() <= 12));
}
