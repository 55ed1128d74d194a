//! How packets end, in one sentence.

use super::printed;
use crate::{
    correlate::{Answer, AnswerKind, DeadEnd, LostReport, PacketTrace, TooLarge, Verdict},
    event::{EncapKind, RouteKind},
    netfilter::{self, Cause, Culprit},
    view::sample,
};

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
        too_large: None,
    });
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ lost between minikube eth0 (sent 13:20:00.000005 UTC) and minikube-m02 (nothing lost in the ledgers): IPIP (protocol 4) is filtered on the way, or the node is down");
    trace.lost.as_mut().unwrap().too_large = Some(TooLarge {
        interface: "eth0".into(),
        mtu: 1_400,
        length: 1_500,
    });
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ lost between minikube eth0 (sent 13:20:00.000005 UTC) and minikube-m02 (nothing lost in the ledgers): IPIP (protocol 4) is larger (1500 bytes) than the MTU of 1400 of its eth0, filtered on the way, or the node is down");
    let lost = trace.lost.as_mut().unwrap();
    (lost.too_large, lost.xdp) = (None, Some("eth0".into()));
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
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ dropped on node minikube at cali8d02ed71817: no pod's route here leads to the address (blackhole route 10.244.120.64/26), NOT_SPECIFIED at ip_error");
    for (kind, words) in [
        (RouteKind::Blackhole, "blackhole"),
        (RouteKind::Unreachable, "unreachable"),
        (RouteKind::Prohibit, "prohibit"),
    ] {
        trace.drop.as_mut().unwrap().route = Some(DeadEnd {
            kind,
            prefix: "10.9.1.1/32".parse().unwrap(),
        });
        let said = sentence(trace.clone());
        assert!(
            said.contains(&format!(": the {words} route 10.9.1.1/32, ")),
            "{said}"
        );
    }
}

#[test]
fn an_outer_packet_that_no_tunnel_takes_is_told() {
    let mut trace = sample::denied(0);
    let report = trace.drop.as_mut().unwrap();
    (report.reason, report.location) = (Some("NO_SOCKET".into()), Some("__udp4_lib_rcv".into()));
    (report.before, report.netfilter) = (None, None);
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ dropped on node minikube at cali8d02ed71817: nobody listens, NO_SOCKET at __udp4_lib_rcv");
    trace.observations[0].encap = sample::ping(0, 3).observations.iter().find_map(|seen| seen.encap);
    insta::assert_snapshot!(sentence(trace), @"✗ dropped on node minikube at cali8d02ed71817: no tunnel device here takes it out of its outer packet (is one down?), NO_SOCKET at __udp4_lib_rcv");
}

#[test]
fn what_an_icmp_error_answers_keeps_its_place_and_reason() {
    let mut trace = sample::denied(0);
    trace.verdict = Verdict::Rejected;
    let report = trace.drop.as_mut().unwrap();
    (report.reason, report.location) = (Some("NEIGH_FAILED".into()), Some("arp_error_report".into()));
    (report.before, report.netfilter) = (None, None);
    trace.answer = Some(Answer {
        kind: AnswerKind::Unreachable,
        address: "10.244.120.64".parse().unwrap(),
        rtt_ns: None,
        icmp: Some((3, 1)),
        mtu: None,
        dropped: None,
    });
    insta::assert_snapshot!(sentence(trace.clone()), @"✗ rejected on node minikube at cali8d02ed71817: the next hop does not answer ARP, NEIGH_FAILED at arp_error_report; 10.244.120.64 sent ICMP host unreachable to 10.244.120.67");
    // Nobody listens at the port.
    trace.drop.as_mut().unwrap().reason = Some("NO_SOCKET".into());
    insta::assert_snapshot!(sentence(trace), @"✗ rejected by 10.244.120.64: ICMP host unreachable");
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
