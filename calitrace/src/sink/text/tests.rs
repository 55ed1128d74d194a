//! What blocks look like.

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
    correlate::{
        Answer, AnswerKind, Certainty, DeadEnd, Endpoint, LostReport, NatKind, NatStep, PacketTrace, Segment,
        Verdict,
    },
    event::{EncapKind, Ledger, LedgerRow, RouteKind, Transport},
    netfilter::{self, Cause, Culprit},
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
fn sentence(trace: PacketTrace) -> String {
    let text = printed([trace]);
    text.trim_end().lines().last().unwrap_or_default().to_owned()
}

#[test]
fn a_lost_packet_ends_with_where_when_and_why_perhaps() {
    let mut trace = sample::ping(0, 1);
    trace.verdict = Verdict::Lost;
    trace.answer = None;
    trace.hops.truncate(1);
    trace.observations.truncate(3);
    trace.lost = Some(LostReport {
        node: Some("minikube".into()),
        interface: Some("eth0".into()),
        next_node: Some("minikube-m02".into()),
        elapsed_ns: 5_000,
        encap: Some(EncapKind::Ipip),
        xdp: None,
    });
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ lost between minikube eth0 (sent 13:20:00.000005 UTC) and minikube-m02 (nothing lost in the ledgers): IPIP (protocol 4) is filtered on the way, or the node is down");
    trace.lost.as_mut().unwrap().xdp = Some("eth0".into());
    insta::assert_snapshot!(sentence(trace), @"✗ lost between minikube eth0 (sent 13:20:00.000005 UTC) and minikube-m02 (nothing lost in the ledgers): IPIP (protocol 4) is dropped by the XDP program at its eth0, filtered on the way, or the node is down");
}

#[test]
fn a_packet_that_is_too_large_ends_with_where_and_who_told() {
    let mut trace = sample::denied(0);
    trace.verdict = Verdict::Rejected;
    trace.length = 1500;
    trace.answer = Some(Answer {
        kind: AnswerKind::Unreachable,
        address: "10.244.120.64".parse().unwrap(),
        rtt_ns: None,
        icmp: Some((3, 4)),
        mtu: Some(1480),
        dropped: None,
    });
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ rejected on node minikube before tunl0: 1500 bytes with DF exceed the MTU of 1480; 10.244.120.64 sent ICMP fragmentation needed to 10.244.120.67");
    trace.drop = None;
    insta::assert_snapshot!(sentence(trace), @"✗ rejected by 10.244.120.64: 1500 bytes with DF exceed the MTU of 1480; 10.244.120.64 sent ICMP fragmentation needed to 10.244.120.67");
}

#[test]
fn a_rule_that_rejects_is_named_with_who_answers() {
    let mut trace = sample::denied(0);
    trace.verdict = Verdict::Rejected;
    trace.answer = Some(Answer {
        kind: AnswerKind::Unreachable,
        address: "10.244.120.64".parse().unwrap(),
        rtt_ns: None,
        icmp: Some((3, 3)),
        mtu: None,
        dropped: None,
    });
    trace.drop.as_mut().unwrap().culprits = vec![Culprit {
        cause: Cause::NoProfile {
            direction: Some(netfilter::Direction::Egress),
        },
        table: "filter".into(),
        chain: "cali-fw-cali8d02ed71817".into(),
        rejects: true,
    }];
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ rejected on node minikube at cali8d02ed71817, before tunl0: no profile (egress) allows the packet · netfilter FORWARD, NETFILTER_DROP at nft_do_chain; 10.244.120.64 sent ICMP port unreachable to 10.244.120.67");
    let answer = trace.answer.as_mut().unwrap();
    (answer.kind, answer.icmp, answer.address) = (AnswerKind::Reset, None, "10.244.205.193".parse().unwrap());
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ rejected on node minikube at cali8d02ed71817, before tunl0: no profile (egress) allows the packet · netfilter FORWARD, NETFILTER_DROP at nft_do_chain; the node sent a TCP reset in the name of 10.244.205.193");
    // The rules are not known.
    trace.drop.as_mut().unwrap().culprits.clear();
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ rejected on node minikube at cali8d02ed71817, before tunl0: netfilter FORWARD (a policy or firewall rule), NETFILTER_DROP at nft_do_chain; 10.244.205.193 sent TCP reset to 10.244.120.67");
    // It came to its receiver.
    trace.drop = None;
    insta::assert_snapshot!(sentence(trace), @"✗ rejected by 10.244.205.193: TCP reset");
}

#[test]
fn a_route_that_leads_nowhere_is_told() {
    let mut trace = sample::denied(0);
    let report = trace.drop.as_mut().unwrap();
    (report.reason, report.location) = (Some("NOT_SPECIFIED".into()), Some("ip_error".into()));
    report.before = None;
    report.route = Some(DeadEnd {
        kind: RouteKind::Blackhole,
        prefix: "10.244.120.64/26".parse().unwrap(),
    });
    insta::assert_snapshot!(sentence(trace), @"✗ dropped on node minikube at cali8d02ed71817: no pod here has the address (blackhole route 10.244.120.64/26), NOT_SPECIFIED at ip_error");
}

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
fn what_the_receiver_was_past_is_not_lost() {
    let mut trace = sample::denied(0);
    let report = trace.drop.as_mut().unwrap();
    (report.before, report.netfilter) = (None, None);
    report.location = Some("tcp_data_queue".into());
    for (reason, harmless) in [
        ("TCP_OLD_DATA", true),
        ("TCP_OFOMERGE", true),
        ("TCP_OLD_SEQUENCE", true),
        ("TCP_OLD_ACK", true),
        ("TCP_TOO_OLD_ACK", true),
        ("TCP_RFC7323_PAWS_ACK", true),
        ("TCP_RFC7323_PAWS", false),
        ("TCP_ZEROWINDOW", false),
        ("SOCKET_BACKLOG", false),
    ] {
        trace.drop.as_mut().unwrap().reason = Some(reason.into());
        let text = printed([trace.clone()]);
        assert_eq!(text.contains("nothing is lost"), harmless, "{text}");
        let counted = if harmless {
            "1 packet, 0 lost, 1 superfluous"
        } else {
            "1 packet, 1 lost\n"
        };
        assert!(text.contains(counted), "{text}");
    }
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
    → left node minikube by eth0; nobody beyond it is observed
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
