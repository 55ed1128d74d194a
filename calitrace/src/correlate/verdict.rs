//! How a packet ended: each verdict by what was seen (design: "Vocabulary"), the strongest first.

use super::{
    AnswerKind, Verdict, hops,
    key::Part,
    open::{Open, Reached},
    topology::{Next, Topology},
    underlay, waypoint,
};
use crate::event::{Drop, Hook};

/// The verdict on a trace that closes at `now`; with `ended` because observing ended.
pub(super) fn of(trace: &Open, topology: &Topology, now: u64, ended: bool) -> Verdict {
    let answer = trace.answered.as_ref().map(|answered| answered.kind);
    if answer == Some(AnswerKind::TimeExceeded) || is_expiry(trace) || waypoint::expired(trace) {
        return Verdict::Expired;
    }
    if matches!(answer, Some(AnswerKind::Unreachable | AnswerKind::Reset)) {
        return Verdict::Rejected;
    }
    if let Some(end) = underlay::end(trace, topology) {
        return end.verdict;
    }
    if trace.drop.is_some() {
        return Verdict::Dropped;
    }
    match trace.reached {
        Reached::Pod | Reached::Node => Verdict::Delivered,
        Reached::Outside => Verdict::Left,
        Reached::Nothing if ended => Verdict::Unfinished,
        Reached::Nothing if is_lost(trace, topology, now) => Verdict::Lost,
        Reached::Nothing => Verdict::Unknown,
    }
}

/// Whether the kernel dropped it because its TTL ran out: `ip_forward` (`net/ipv4/ip_forward.c`) and `ip6_forward`
/// (`net/ipv6/ip6_output.c`) free what comes with a TTL of 1, in 6.18 still for the reason of a bad header.
fn is_expiry(trace: &Open) -> bool {
    let Some((drop, index)) = trace.drop.as_deref() else {
        return false;
    };
    let forward = |location: &String| matches!(location.as_str(), "ip_forward" | "ip6_forward");
    // Where the kernel hides its symbols, the reason has to do.
    let vague = matches!(drop.reason.as_deref(), None | Some("NOT_SPECIFIED" | "IP_INHDR"));
    trace.seen[*index].ttl <= 1 && drop.location.as_ref().map_or(vague, forward)
}

/// It left a node for another one that has been observed all the time, and nothing was lost.
fn is_lost(trace: &Open, topology: &Topology, now: u64) -> bool {
    let last = trace.last();
    let arrives = match last.hook {
        Hook::UplinkEgress => Hook::UplinkIngress,
        // What is encrypted is not seen at the uplinks.
        Hook::TunnelEgress if topology.is_encrypted(last.node, last.ifindex) => Hook::TunnelIngress,
        _ => return false,
    };
    if trace.merged || underlay::may_have_expired(trace, topology) {
        return false;
    }
    match topology.next(last.node, last.encap.as_deref(), trace.current().dst) {
        Next::Node(next) => {
            topology.ledgers.observed_since(next, arrives, trace.first().time)
                && topology.ledgers.reaches(last.time)
                && !topology.ledgers.lost(trace.first().time, now)
        }
        Next::Unobserved => false,
    }
}

/// Whether it came into a node and was not seen since: the node may hold it until it knows its neighbour's address.
pub(super) fn may_wait(trace: &Open, topology: &Topology) -> bool {
    let last = trace.last();
    let inside = match last.hook {
        // Encapsulated, it waits for the neighbour at the uplink.
        Hook::TunnelEgress => !topology.is_encrypted(last.node, last.ifindex),
        _ => last.is_ingress(),
    };
    inside
        && trace.reached == Reached::Nothing
        && trace.drop.is_none()
        && trace.answered.is_none()
        && hops::handed_on_from(trace, topology).is_none()
}

/// Whether a `kfree_skb` tells nothing: packets that were merged on receipt hang on the first one, and are freed with it
/// (`skb_release_data`, `net/core/skbuff.c`, 6.1 and 6.18). A drop of the whole has a record of its own.
pub(super) fn is_of_a_whole(drop: &Drop) -> bool {
    drop.location.as_deref() == Some("skb_release_data")
}

/// Whether a `kfree_skb` after receipt is the ordinary end of a packet, or of a copy of it.
///
/// * A socket that is closed frees what still lies in its queues: each FIN that was not read, and the copies that raw
///   sockets (ping, traceroute) were given (`inet_sock_destruct`, `net/ipv4/af_inet.c`; `sk_stream_kill_queues`,
///   `net/core/stream.c`; 6.1 and 6.18; the reason has a name since 6.6).
/// * Echo replies: raw sockets get their copies before `icmp_rcv` hands the packet to `ping_rcv`, which frees it for
///   want of a ping socket (`ip_protocol_deliver_rcu`, `net/ipv4/ip_input.c`; `net/ipv4/ping.c`; 6.1 and 6.18). So
///   every reply to a ping or traceroute with a raw socket ends that way. Before 5.17 there are no reasons, and the
///   caller frees it (`icmp_rcv`, `net/ipv4/icmp.c`, and `icmpv6_rcv`, `net/ipv6/icmp.c`; 5.10).
/// * Everything of ICMPv6 that has been dealt with: `icmpv6_rcv` frees echo requests, errors and what belongs to neighbour
///   discovery without a reason (`net/ipv6/icmp.c`, 5.10 and 6.1: "until the v6 path can be better sorted").
/// * TCP in `TIME_WAIT` or half open: `tcp_v4_rcv` frees what it has dealt with, without a reason (labels `discard_it`
///   and `discard_and_relse`, `net/ipv4/tcp_ipv4.c`). So the last FIN of a connection may end, and the RST that ends a
///   half-open one does.
pub(super) fn is_ordinary(part: &Part, drop: &Drop) -> bool {
    const CLOSING: [&str; 4] = [
        "inet_sock_destruct",
        "sk_stream_kill_queues",
        "skb_queue_purge",
        "skb_queue_purge_reason",
    ];
    let reason = drop.reason.as_deref();
    let at = |names: &[&str]| {
        drop.location
            .as_deref()
            .is_some_and(|location| names.contains(&location))
    };
    if reason == Some("QUEUE_PURGE") || at(&CLOSING) {
        return true;
    }
    // Where the kernel hides its symbols, and gives no reason either: nothing says that what was received was dropped.
    let without_reason = matches!(reason, None | Some("NOT_SPECIFIED"));
    if drop.location.is_none() && without_reason {
        return true;
    }
    match part {
        Part::Echo { .. } | Part::Icmp { .. } | Part::IcmpError { .. }
            if without_reason && at(&["icmpv6_rcv"]) =>
        {
            true
        }
        Part::Echo { reply: true, .. } => {
            reason == Some("NO_SOCKET") || (reason.is_none() && at(&["icmp_rcv"]))
        }
        Part::Tcp { .. } | Part::TcpData { .. } => without_reason && at(&["tcp_v4_rcv", "tcp_v6_rcv"]),
        _ => false,
    }
}
