//! What becomes of packets between the nodes, where only their outer header is looked at.
//!
//! `tunl0` gives the outer header the TTL of the inner one (`ip_tunnel_xmit`, `net/ipv4/ip_tunnel.c`, 6.1), so that routers
//! between the nodes may find it run out. What they say of it is for the node, and ipip keeps it to itself: its fallback
//! device has no remote end (`ipip_err`, `net/ipv4/ipip.c`). So nobody answers the sender, and traceroute shows `*`.

use std::net::IpAddr;

use super::{
    AnswerKind, LOWEST_ORDINARY_TTL, Verdict,
    open::{Open, Reached},
    topology::{Next, Topology},
};
use crate::event::{EncapKind, Hook};

/// What a router between the nodes said of the packet's outer header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Swallowed {
    pub(super) router: IpAddr,
    pub(super) kind: AnswerKind,
    pub(super) icmp: (u8, u8),
}

/// How a packet ended between two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) verdict: Verdict,
    /// A router said so; else it follows from other packets between the two nodes.
    pub(super) told: bool,
    /// In words.
    pub(super) reason: String,
}

/// Whether and how the packet ended there.
pub(super) fn end(trace: &Open, topology: &Topology) -> Option<End> {
    if trace.answered.is_some() {
        return None;
    }
    if let Some(swallowed) = trace.swallowed.as_deref() {
        let router = swallowed.router;
        let (verdict, what) = match (swallowed.kind, swallowed.icmp) {
            (AnswerKind::TimeExceeded, _) => (
                Verdict::Expired,
                format!("the TTL ran out at underlay router {router}"),
            ),
            (_, (_, 4)) => (
                Verdict::Rejected,
                format!("underlay router {router} found it too large for the next link"),
            ),
            (_, (icmp_type, code)) => (
                Verdict::Rejected,
                format!("underlay router {router} could not send it on (ICMP type {icmp_type}, code {code})"),
            ),
        };
        return Some(End {
            verdict,
            told: true,
            reason: format!("{what}; IPIP swallows that ICMP error"),
        });
    }
    let last = trace.last();
    let encap = last
        .encap
        .as_deref()
        .filter(|encap| encap.kind == EncapKind::Ipip)?;
    if trace.drop.is_some() || trace.reached != Reached::Nothing || last.hook != Hook::UplinkEgress {
        return None;
    }
    let Next::Node(next) = topology.next(last.node, Some(encap), trace.current().dst) else {
        return None;
    };
    let routers = topology.routers_between(last.node, next)?;
    let name = topology
        .name(next)
        .cloned()
        .unwrap_or_else(|| encap.dst.to_string().into());
    (encap.ttl <= routers).then(|| End {
        verdict: Verdict::Expired,
        told: false,
        reason: format!(
            "the outer TTL of {} ran out before node {name}, the way to which takes {routers}; IPIP swallows the ICMP error",
            encap.ttl
        ),
    })
}

/// Whether the packet may have ended for want of TTL, and nothing tells: how many routers there are is not known.
pub(super) fn may_have_expired(trace: &Open, topology: &Topology) -> bool {
    let last = trace.last();
    let Some(encap) = last
        .encap
        .as_deref()
        .filter(|encap| encap.kind == EncapKind::Ipip)
    else {
        return false;
    };
    let Next::Node(next) = topology.next(last.node, Some(encap), trace.current().dst) else {
        return false;
    };
    encap.ttl < LOWEST_ORDINARY_TTL && topology.routers_between(last.node, next).is_none()
}

/// A packet that came through tells how many routers there are between the two nodes.
pub(super) fn learn(trace: &Open, topology: &mut Topology) {
    for pair in trace.seen.windows(2) {
        let (left, came) = (&pair[0], &pair[1]);
        let ends =
            (left.hook, came.hook) == (Hook::UplinkEgress, Hook::UplinkIngress) && left.node != came.node;
        if let (Some(one), Some(other)) = (&left.encap, &came.encap)
            && ends
            && one.kind == EncapKind::Ipip
            && (one.src, one.dst) == (other.src, other.dst)
        {
            topology.count_routers(left.node, came.node, one.ttl.saturating_sub(other.ttl));
        }
    }
}
