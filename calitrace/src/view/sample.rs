//! Packet traces for tests: the seed's two pods, their nodes and their tunnel.

use std::sync::Arc;

use super::SECOND;
use crate::{
    correlate::{
        Answer, AnswerKind, Certainty, DropReport, FlowName, Hop, Joint, LogReport, PacketTrace,
        SightedEncap, Sighting, Verdict,
    },
    event::{EncapKind, Packet, Transport, sample},
    netfilter::Logged,
};

pub(crate) const POD_1: &str = "default/busybox-f5945bfb5-mw26t";
pub(crate) const POD_2: &str = "default/busybox-f5945bfb5-mwgr6";
const MILLISECOND: u64 = 1_000_000;

/// A packet from pod 1 to pod 2, `start` nanoseconds after the beginning, delivered over the seed's tunnel.
pub(crate) fn delivered(start: u64, transport: Transport) -> PacketTrace {
    let (src, dst) = ("10.244.120.67", "10.244.205.193");
    let proto = match transport {
        Transport::Tcp { .. } => 6,
        Transport::Udp { .. } => 17,
        _ => 1,
    };
    let packet = Packet {
        src: src.parse().unwrap(),
        dst: dst.parse().unwrap(),
        ip_id: 7,
        dont_fragment: true,
        ..sample::packet(proto, 84, transport)
    };
    PacketTrace {
        version: 1,
        id: u128::from(start) + 1,
        flow: FlowName {
            flow: packet.flow(),
            src_pod: Some(POD_1.into()),
            dst_pod: Some(POD_2.into()),
        },
        start: 1_668_000_000 * SECOND + start,
        length: 84,
        verdict: Verdict::Delivered,
        certainty: Joint::Content,
        retransmit: None,
        segment: None,
        dup_ack: None,
        drop: None,
        answer: None,
        nat: Vec::new(),
        hops: vec![
            router(1, "10.244.120.64", "minikube", 5_000),
            router(2, "10.244.205.192", "minikube-m02", 8_000),
            receiver(3, 8_000),
        ],
        observations: vec![
            sighting("minikube", "cali8d02ed71817", "workload_ingress", 0, 64, false),
            sighting("minikube", "tunl0", "tunnel_egress", 4_000, 63, false),
            sighting("minikube", "eth0", "uplink_egress", 5_000, 63, true),
            sighting("minikube-m02", "eth0", "uplink_ingress", 6_000, 63, true),
            sighting("minikube-m02", "tunl0", "tunnel_ingress", 7_000, 63, false),
            sighting(
                "minikube-m02",
                "cali79f33e4263e",
                "workload_egress",
                8_000,
                62,
                false,
            ),
        ],
        lost: None,
        bypass: None,
        ttl: 64,
        netns: 1,
        cluster: 0,
        start_monotonic: SECOND + start,
        closed_monotonic: SECOND + start + 50 * MILLISECOND,
        packet,
    }
}

/// A ping from pod 1 to pod 2.
pub(crate) fn ping(start: u64, seq: u16) -> PacketTrace {
    let mut trace = delivered(
        start,
        Transport::Echo {
            reply: false,
            id: 42,
            seq,
        },
    );
    let address = trace.flow.flow.dst;
    trace.answer = Some(Answer {
        kind: AnswerKind::EchoReply,
        address,
        rtt_ns: Some(31_000),
        icmp: None,
        mtu: None,
        dropped: None,
    });
    trace
}

/// The answer to it.
pub(crate) fn pong(start: u64, seq: u16) -> PacketTrace {
    let mut trace = delivered(
        start,
        Transport::Echo {
            reply: true,
            id: 42,
            seq,
        },
    );
    std::mem::swap(&mut trace.flow.flow.src, &mut trace.flow.flow.dst);
    std::mem::swap(&mut trace.flow.src_pod, &mut trace.flow.dst_pod);
    trace
}

/// A UDP traceroute's probe from pod 1 to pod 2 with this TTL, answered as the seed's path answers, in `rtt_ns`.
pub(crate) fn probe(start: u64, ttl: u8, rtt_ns: u64) -> PacketTrace {
    let port = 33_434 + u16::try_from(start / MILLISECOND).unwrap();
    let transport = Transport::Udp {
        src_port: 50_000,
        dst_port: port,
        payload: 18,
    };
    let mut trace = delivered(start, transport);
    (trace.ttl, trace.length) = (ttl, 46);
    trace.hops.truncate(usize::from(ttl));
    let reached = usize::from(ttl) >= 3;
    let address = if reached {
        trace.flow.flow.dst
    } else {
        trace.hops.last().unwrap().address.unwrap()
    };
    let (kind, icmp, verdict) = if reached {
        (AnswerKind::Unreachable, (3, 3), Verdict::Rejected)
    } else {
        (AnswerKind::TimeExceeded, (11, 0), Verdict::Expired)
    };
    trace
        .observations
        .truncate([1, 5, 6][usize::from(ttl.min(3)) - 1]);
    trace.answer = Some(Answer {
        kind,
        address,
        rtt_ns: Some(rtt_ns),
        icmp: Some(icmp),
        mtu: None,
        dropped: None,
    });
    trace.verdict = verdict;
    trace
}

/// The seed's traceroute: three probes for each of the three lines, one after another, from `start` on.
pub(crate) fn traceroute(start: u64) -> Vec<Arc<PacketTrace>> {
    let times = [17_000, 7_000, 5_000, 8_000, 8_000, 4_000, 8_000, 6_000, 3_000];
    let ttls = [1, 1, 1, 2, 2, 2, 3, 3, 3];
    let starts = (0..).map(|number| start + number * MILLISECOND);
    starts
        .zip(ttls)
        .zip(times)
        .map(|((start, ttl), time)| Arc::new(probe(start, ttl, time)))
        .collect()
}

/// A packet that a policy of pod 1's node drops.
pub(crate) fn denied(start: u64) -> PacketTrace {
    let mut trace = ping(start, 1);
    trace.verdict = Verdict::Dropped;
    trace.answer = None;
    trace.drop = Some(DropReport {
        reason: Some("NETFILTER_DROP".into()),
        location: Some("nft_do_chain".into()),
        node: Some("minikube".into()),
        interface: Some("cali8d02ed71817".into()),
        before: Some("tunl0".into()),
        mtu: None,
        route: None,
        netfilter: Some("FORWARD"),
        policy: None,
        culprits: Vec::new(),
    });
    trace.hops.truncate(1);
    trace.observations.truncate(1);
    trace
}

fn router(ttl: u8, address: &str, node: &str, left_ns: u64) -> Hop {
    Hop {
        ttl,
        address: Some(address.parse().unwrap()),
        node: Some(node.into()),
        pod: None,
        arrived_ns: Some(left_ns - 1_000),
        left_ns: Some(left_ns),
        rtt_ns: None,
        clock_bound_ns: Some(0),
        certainty: Certainty::Observed,
        reason: None,
    }
}

fn receiver(ttl: u8, left_ns: u64) -> Hop {
    Hop {
        pod: Some(POD_2.into()),
        ..router(ttl, "10.244.205.193", "minikube-m02", left_ns)
    }
}

/// As `packet`, with what a rule logged of it before it was seen for the last time.
pub(crate) fn logged(mut packet: PacketTrace, prefix: &str) -> PacketTrace {
    let last = packet.observations.last().unwrap().clone();
    let logged = Logged::parse(prefix);
    let seen = Sighting {
        hook: "nft_log_eval",
        direction: None,
        joined: Some(Joint::Skb),
        detail: logged.as_ref().map(ToString::to_string),
        logged: Some(Box::new(LogReport {
            prefix: prefix.into(),
            logged,
        })),
        ..last
    };
    let place = packet.observations.len() - 1;
    packet.observations.insert(place, seen);
    packet
}

fn sighting(
    node: &str,
    interface: &str,
    hook: &'static str,
    elapsed_ns: u64,
    ttl: u8,
    encapsulated: bool,
) -> Sighting {
    let [src, dst] = ["192.168.49.2", "192.168.49.3"].map(|address| address.parse().unwrap());
    Sighting {
        node: Some(node.into()),
        netns: if node == "minikube" { 1 } else { 2 },
        interface: Some(interface.into()),
        hook,
        joined: (elapsed_ns > 0).then_some(Joint::Content),
        direction: hook.rsplit_once('_').map(|(_, direction)| direction),
        elapsed_ns,
        ttl,
        length: 84,
        segments: None,
        mtu: Some(if interface == "tunl0" { 1480 } else { 1500 }),
        encap: encapsulated.then_some(SightedEncap {
            kind: EncapKind::Ipip,
            src,
            dst,
            ttl: 63,
            id: Some(7),
            length: Some(104),
            vni: None,
        }),
        detail: None,
        logged: None,
    }
}
