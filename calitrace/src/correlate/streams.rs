//! Properties of joining TCP data that is cut into segments and merged again on its way: each byte of each packet is told
//! of once at each hook, in the trace of the packet that carried it.

use proptest::{collection::vec, prelude::*};

use super::{
    Config, Correlator, Verdict, key,
    properties::{
        BEGIN, DRAIN, cases,
        facts::{POD, TUNNEL, UPLINK, facts, netns, pod_address},
    },
};
use crate::event::{EncapKind, Hook, Item, Observation, Packet, Transport};

const SEGMENT: u32 = 1448;

/// What travels as one `sk_buff`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Unit {
    seq: u32,
    len: u32,
    skb: u64,
    time: u64,
}

/// Cuts each unit into segments where `cut` says so. The pieces are `sk_buff`s of their own.
fn cut(units: &[Unit], cut: &[bool], skb: &mut u64) -> Vec<Unit> {
    let mut pieces = Vec::new();
    for (unit, cut) in units.iter().zip(cut.iter().cycle()) {
        if !cut || unit.len <= SEGMENT {
            pieces.push(*unit);
            continue;
        }
        for offset in (0..unit.len).step_by(SEGMENT as usize) {
            *skb += 0x100;
            let (seq, len) = (unit.seq.wrapping_add(offset), SEGMENT.min(unit.len - offset));
            pieces.push(Unit {
                seq,
                len,
                skb: *skb,
                time: unit.time,
            });
        }
    }
    pieces
}

/// Merges neighbours where `merge` says so, across packets, too. The first piece's `sk_buff` survives.
fn merge(units: &[Unit], merge: &[bool]) -> Vec<Unit> {
    let mut merged: Vec<Unit> = Vec::new();
    for (unit, merge) in units.iter().zip(merge.iter().cycle()) {
        match merged.last_mut() {
            Some(last) if *merge && last.len < 65_000 - unit.len => {
                last.len += unit.len;
                last.time = unit.time;
            }
            _ => merged.push(*unit),
        }
    }
    merged
}

/// All units pass a hook: in order, each at a time of its own.
fn pass(
    units: &mut [Unit],
    node: usize,
    ifindex: u32,
    hook: Hook,
    lowered: u8,
    seen: &mut Vec<(Observation, Unit)>,
) {
    let mut last = 0;
    for unit in units {
        unit.time = (unit.time + 3000).max(last + 10);
        last = unit.time;
        let super_packet = unit.len > SEGMENT;
        let transport = Transport::Tcp {
            src_port: 40_000,
            dst_port: 80,
            seq: unit.seq,
            ack: 1,
            flags: 16,
            window: 500,
            tsval: Some(7),
            payload: unit.len,
        };
        let packet = Packet {
            src: pod_address(0, 0),
            dst: pod_address(1, 0),
            proto: 6,
            ttl: 64 - lowered,
            tos: 0,
            ip_id: 0,
            length: unit.len + 52,
            dont_fragment: true,
            more_fragments: false,
            fragment_offset: 0,
            transport,
            digest: 0,
            gso_size: if super_packet { 1448 } else { 0 },
            gso_segs: if super_packet { 2 } else { 0 },
        };
        let observation = Observation {
            time: unit.time,
            netns: netns(node),
            ifindex,
            hook,
            cpu: 0,
            skb: unit.skb,
            head: 0,
            packet,
            encap: None,
            drop: None,
            detail: None,
        };
        seen.push((observation, *unit));
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn every_byte_is_told_of_once_at_each_hook(
        lengths in vec(1..30_000_u32, 1..12),
        gap in 0..20_000_u64,
        cuts in vec(any::<bool>(), 12),
        merges in vec(any::<bool>(), 64),
        more in vec(any::<bool>(), 64),
    ) {
        let mut skb = 0x1000;
        let mut seq = u32::MAX - 40_000;
        let mut units = Vec::new();
        for (number, len) in (0_u64..).zip(&lengths) {
            skb += 0x100;
            units.push(Unit { seq, len: *len, skb, time: BEGIN + number * gap });
            seq = seq.wrapping_add(*len);
        }
        let packets = units.clone();
        let mut seen = Vec::new();
        pass(&mut units, 0, POD, Hook::WorkloadIngress, 0, &mut seen);
        pass(&mut units, 0, TUNNEL, Hook::TunnelEgress, 1, &mut seen);
        units = cut(&units, &cuts, &mut skb);
        pass(&mut units, 0, UPLINK, Hook::UplinkEgress, 1, &mut seen);
        units = merge(&units, &merges);
        pass(&mut units, 1, TUNNEL, Hook::TunnelIngress, 1, &mut seen);
        units = merge(&units, &more);
        pass(&mut units, 1, POD, Hook::WorkloadEgress, 2, &mut seen);
        seen.sort_by_key(|(observation, _)| (observation.time, observation.hook));

        let mut correlator = Correlator::new(Config { drain_period: DRAIN, ..Config::default() });
        let mut traces = Vec::new();
        for fact in facts(Some(EncapKind::Vxlan)) {
            correlator.push(&Item::Fact(fact), &mut traces);
        }
        for (observation, _) in &seen {
            correlator.push(&Item::Observation(observation.clone()), &mut traces);
        }
        correlator.push(&Item::Tick { time: BEGIN + 10_000_000_000 }, &mut traces);

        prop_assert_eq!(traces.len(), packets.len());
        for trace in &traces {
            prop_assert_eq!(trace.verdict, Verdict::Delivered);
            let Transport::Tcp { seq, payload, .. } = trace.packet.transport else { unreachable!("all are TCP") };
            prop_assert!(packets.iter().any(|packet| (packet.seq, packet.len) == (seq, payload)));
            let hooks =
                ["workload_ingress", "tunnel_egress", "uplink_egress", "tunnel_ingress", "workload_egress"];
            for hook in hooks {
                let told: u32 = trace
                    .observations
                    .iter()
                    .filter(|sighting| sighting.hook == hook)
                    .map(|sighting| {
                        let time = trace.start_monotonic + sighting.elapsed_ns;
                        let unit = seen.iter().find(|(observation, unit)| {
                            observation.time == time
                                && crate::kernel::hooks::row(observation.hook).name == hook
                                && unit.len + 52 == sighting.length
                        });
                        let (_, unit) = unit.expect("it was given");
                        key::overlap(seq, payload, unit.seq, unit.len)
                    })
                    .sum();
                prop_assert_eq!(told, payload, "at {}", hook);
            }
        }
    }
}
