//! Writes down a trace that closes: names in place of numbers, times from its beginning.

use super::{
    Answer, AnswerKind, Bypass, DeadEnd, DropReport, FlowName, Joint, LogReport, LostReport, Name, NatStep,
    PacketTrace, Segment, SightedEncap, Sighting, TooLarge, Verdict,
    again::Sent,
    blame, hops, key,
    node::Device,
    open::{Open, Reached, Seen},
    topology::{Next, Topology},
    underlay, verdict, waypoint,
};
use crate::{
    event::{Detail, Direction, EncapKind, Hook},
    kernel::hooks,
    netfilter::{Cause, Culprit},
};

/// Version of the form of packet traces.
const VERSION: u32 = 1;

/// The trace as it is given out.
pub(super) fn trace(open: &Open, topology: &mut Topology, now: u64, ended: bool) -> PacketTrace {
    learn(open, topology);
    underlay::learn(open, topology);
    let verdict = verdict::of(open, topology, now, ended);
    let (hops, ttl) = hops::of(open, topology, verdict);
    let first = open.first();
    let pod = |address| topology.owner(open.cluster, address).and_then(|owner| owner.name);
    PacketTrace {
        version: VERSION,
        id: key::identity(&open.flow, &open.part, first.time),
        flow: FlowName {
            flow: open.flow,
            src_pod: pod(open.flow.src),
            dst_pod: pod(open.current().dst),
        },
        start: topology.realtime(first.time),
        length: open.packet.length,
        verdict,
        certainty: certainty(open, topology, now),
        retransmit: match open.sent {
            Sent::Again(times) => Some(times),
            _ => None,
        },
        segment: match open.sent {
            Sent::Ordinary | Sent::Again(_) => None,
            Sent::KeepAlive => Some(Segment::KeepAlive),
            Sent::KeepAliveAck => Some(Segment::KeepAliveAck),
            Sent::DuplicateAck(_) => Some(Segment::DupAck),
            Sent::Ack => Some(Segment::Ack),
        },
        dup_ack: match open.sent {
            Sent::DuplicateAck(times) => Some(times),
            _ => None,
        },
        drop: drop_report(open, topology),
        lost: (verdict == Verdict::Lost).then(|| lost_report(open, topology)),
        answer: open.answered.as_ref().map(|answered| Answer {
            kind: answered.kind,
            address: answered.address,
            rtt_ns: answered.rtt,
            icmp: answered.icmp,
            mtu: answered.mtu,
            dropped: answered.dropped.clone(),
        }),
        nat: open
            .translations
            .iter()
            .map(|step| NatStep {
                kind: step.kind,
                node: topology.name(step.node).cloned(),
                from: step.from,
                to: step.to,
            })
            .collect(),
        hops,
        observations: sightings(open, topology),
        bypass: bypass(open, topology, verdict),
        ttl,
        netns: first.netns,
        cluster: open.cluster,
        start_monotonic: first.time,
        closed_monotonic: now,
        packet: open.packet.clone(),
    }
}

/// As the least sure of its sightings.
fn certainty(open: &Open, topology: &Topology, now: u64) -> Joint {
    let numbered = open.numbered && open.part.is_numbered(&open.packet);
    let others_missing = open.seen.len() > 1 && !numbered && topology.ledgers.lost(open.first().time, now);
    let joints = open.seen.iter().filter_map(|seen| seen.joined);
    let least = joints.max().unwrap_or(Joint::Skb);
    if others_missing { Joint::Order } else { least }
}

/// Where it may have been handed on past all hooks, if none saw it go on.
fn bypass(open: &Open, topology: &Topology, verdict: Verdict) -> Option<Bypass> {
    let out_of_sight = match open.reached {
        Reached::Nothing => verdict == Verdict::Unknown,
        Reached::Pod => verdict == Verdict::Delivered,
        Reached::Node | Reached::Outside => false,
    };
    let last = hops::handed_on_from(open, topology).filter(|_| out_of_sight)?;
    Some(Bypass {
        node: topology.name(last.node).cloned(),
        interface: topology.interface_name(last.netns, last.ifindex).cloned(),
        programs: topology
            .ledgers
            .others(last.netns, last.ifindex, last.hook)
            .to_vec(),
    })
}

/// A probe that expired right behind the last observed node shows that router's address to later packets.
fn learn(open: &Open, topology: &mut Topology) {
    let last = open.last();
    let Some(answered) = open
        .answered
        .as_ref()
        .filter(|answered| answered.kind == AnswerKind::TimeExceeded)
    else {
        return;
    };
    if open.reached == Reached::Outside
        && last.ttl == 1
        && let Some(remote) = topology
            .beyond(last.node, open.current().dst)
            .and_then(|beyond| beyond.remote_node)
    {
        topology.show(last.node, remote, answered.address);
    }
}

/// All that was seen of it, in order of time.
fn sightings(open: &Open, topology: &Topology) -> Vec<Sighting> {
    let start = open.first().time;
    let mut all: Vec<(&Seen, Option<&Detail>)> = open.seen.iter().map(|seen| (seen, None)).collect();
    all.extend(
        open.waypoints
            .iter()
            .map(|waypoint| (&waypoint.seen, waypoint.detail.as_ref())),
    );
    all.sort_by_key(|(seen, _)| seen.time);
    all.into_iter()
        .map(|(seen, detail)| {
            let ipv6 = open.flow.src.is_ipv6();
            let logged = detail.and_then(|detail| waypoint::log_report(detail, seen, ipv6, topology));
            sighting(seen, detail, logged, start, topology)
        })
        .collect()
}

fn sighting(
    seen: &Seen,
    detail: Option<&Detail>,
    logged: Option<LogReport>,
    start: u64,
    topology: &Topology,
) -> Sighting {
    Sighting {
        node: topology.name(seen.node).cloned(),
        netns: seen.netns,
        interface: topology.interface_name(seen.netns, seen.ifindex).cloned(),
        hook: hooks::row(seen.hook).name,
        joined: seen.joined,
        direction: match seen.hook.direction() {
            Direction::Ingress => Some("ingress"),
            Direction::Egress => Some("egress"),
            Direction::None => None,
        },
        elapsed_ns: seen.time.saturating_sub(start),
        ttl: seen.ttl,
        length: seen.length,
        segments: (seen.segments > 1).then_some(seen.segments),
        mtu: topology
            .device(seen.netns, seen.ifindex)
            .filter(|_| seen.hook.direction() != Direction::None)
            .map(|device| device.mtu),
        encap: seen.encap.as_ref().map(|encap| SightedEncap {
            kind: encap.kind,
            src: encap.src,
            dst: encap.dst,
            ttl: encap.ttl,
            id: encap.src.is_ipv4().then_some(encap.ip_id),
            length: (encap.length != 0).then_some(encap.length),
            vni: encap.vni,
        }),
        detail: detail.map(|detail| match &logged {
            Some(LogReport {
                logged: Some(logged), ..
            }) => logged.to_string(),
            _ => waypoint::describe(detail),
        }),
        logged: logged.map(Box::new),
    }
}

fn lost_report(open: &Open, topology: &Topology) -> LostReport {
    let last = open.last();
    let next = match topology.next(last.node, last.encap.as_deref(), open.current().dst) {
        Next::Node(node) => Some(node),
        Next::Unobserved => None,
    };
    let uplink = next.and_then(|node| topology.uplink(node, last.encap.as_ref().map(|encap| encap.dst)));
    LostReport {
        node: topology.name(last.node).cloned(),
        interface: topology.interface_name(last.netns, last.ifindex).cloned(),
        next_node: next.and_then(|node| topology.name(node).cloned()),
        elapsed_ns: last.time.saturating_sub(open.first().time),
        encap: match &last.encap {
            Some(encap) => Some(encap.kind),
            None => topology
                .is_encrypted(last.node, last.ifindex)
                .then_some(EncapKind::Wireguard),
        },
        xdp: uplink
            .filter(|device| device.xdp)
            .map(|device| Name::clone(&device.name)),
        too_large: uplink.and_then(|device| too_large(last, device)),
    }
}

/// What left for a device that takes less. Of a super-packet the segments would have to be looked at.
fn too_large(last: &Seen, device: &Device) -> Option<TooLarge> {
    let length = match &last.encap {
        Some(encap) => u32::from(encap.length),
        None => last.length,
    };
    (last.segments <= 1 && length > device.mtu).then(|| TooLarge {
        interface: Name::clone(&device.name),
        mtu: device.mtu,
        length,
    })
}

fn drop_report(open: &Open, topology: &Topology) -> Option<DropReport> {
    let (drop, index) = open.drop.as_deref()?;
    let seen = &open.seen[*index];
    let named = topology.interface_name(seen.netns, seen.ifindex);
    let before = || {
        let last = open.seen[..*index]
            .iter()
            .rev()
            .find(|other| other.hook != Hook::KfreeSkb)?;
        topology.interface_name(last.netns, last.ifindex)
    };
    let blame::Blame {
        culprits,
        before: next,
        mtu,
        route,
    } = blame::of(open, topology);
    let policy = match &culprits[..] {
        [
            Culprit {
                cause: Cause::Policy { policy, .. },
                ..
            },
        ] => Some(policy.name.as_str().into()),
        _ => None,
    };
    Some(DropReport {
        reason: drop.reason.clone(),
        location: drop.location.clone(),
        node: topology.name(seen.node).cloned(),
        interface: named.or_else(before).cloned(),
        before: next.map(Into::into),
        mtu,
        route: route.map(|route| DeadEnd {
            kind: route.kind,
            prefix: route.prefix,
        }),
        netfilter: waypoint::netfilter_hook(open),
        policy,
        culprits,
    })
}
