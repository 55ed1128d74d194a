//! The way of the packets: each flow passes its hooks in order, translated, wrapped, cut and merged on the way, beside all
//! others, on `sk_buff` addresses that are taken again as soon as they are free.

use std::net::IpAddr;

use smallvec::SmallVec;

use super::{
    facts::{POD, UPLINK, carrier, netns, node_address, tunnel_device},
    model::{Ends, Fate, Kind, Nat, SEGMENT, Sent, Spec, Way, ends, packet},
};
use crate::event::{Detail, Drop, Encap, EncapKind, Hook, Observation};

pub(in crate::correlate) const BEGIN: u64 = 1_000_000_000;
/// Nanoseconds from hook to hook.
pub(super) const PACE: u64 = 3000;

/// A hook on a way.
#[derive(Clone, Copy, Debug)]
struct Step {
    node: usize,
    ifindex: u32,
    hook: Hook,
    /// How often the TTL was lowered.
    lowered: u8,
    /// Source and destination there.
    ends: (IpAddr, IpAddr),
    encap: Option<EncapKind>,
}

/// What travels as one `sk_buff`.
#[derive(Clone, Debug)]
struct Unit {
    /// Which of all `sk_buff`s it is.
    buffer: usize,
    /// The one it was cut from.
    cut_from: Option<usize>,
    /// The packets it carries: one, or several that were merged.
    numbers: SmallVec<[usize; 2]>,
    /// What its IP ids count from.
    origin: u32,
    content: u32,
    seq: u32,
    len: u32,
    /// Its place in the packet it was cut from.
    segment: u32,
    /// The same bytes went before it, and vanished: merged with others nothing would tell which of the two arrived.
    alone: bool,
    fate: Fate,
    time: u64,
}

/// An observation, and the packets that it is of.
#[derive(Clone, Debug)]
pub(super) struct Walked {
    pub(super) observation: Observation,
    pub(super) numbers: SmallVec<[usize; 2]>,
    buffer: usize,
    cut_from: Option<usize>,
}

/// What the network does to TCP data besides: whether each unit is cut on its way out, and merged on its way in.
#[derive(Clone, Debug)]
pub(super) struct Offloads {
    pub(super) cut: Vec<bool>,
    pub(super) merge: Vec<bool>,
}

/// All that happens.
pub(super) struct Walk {
    pub(super) walked: Vec<Walked>,
    /// The packets, doubled ones as well: what was sent, and for a copy the number of the original.
    pub(super) packets: Vec<(Sent, Option<usize>)>,
}

impl Walk {
    /// Takes a copy for its original: nothing tells them apart when some of both is missing.
    pub(super) fn unite_copies(&mut self) {
        for walked in &mut self.walked {
            for number in &mut walked.numbers {
                *number = self.packets[*number].1.unwrap_or(*number);
            }
        }
    }
}

/// Walks the packets through the model. With `alike`, the first packets of all flows carry the same bytes; without, those
/// of translated ones do not: where records are missing, nothing would tell a translation from another packet with the
/// same bytes on the same address.
pub(super) fn walk(sent: &[Sent], encap: Option<EncapKind>, offloads: &Offloads, alike: bool) -> Walk {
    let mut walk = Walk {
        walked: Vec::new(),
        packets: sent.iter().map(|sent| (sent.clone(), None)).collect(),
    };
    let mut buffers = 0;
    let mut specs: Vec<Spec> = Vec::new();
    for packet in sent {
        if !specs.contains(&packet.spec) {
            specs.push(packet.spec);
        }
    }
    for (flow, spec) in (1..).zip(specs) {
        let translated = spec.nat != Nat::None || matches!(spec.way, Way::Out(_) | Way::Hairpin(_));
        let first = if translated && !alike { flow * 100 } else { 0 };
        let mut units = units(sent, &spec, first, &mut buffers, &mut walk.packets);
        pass_all(&spec, encap, &mut units, offloads, &mut buffers, &mut walk);
    }
    walk.walked.sort_by_key(|walked| walked.observation.time);
    let mut last = 0;
    for walked in &mut walk.walked {
        // No two at the same time: so each can be told by its time.
        last = walked.observation.time.max(last + 1);
        walked.observation.time = last;
    }
    place(&mut walk.walked);
    walk
}

/// The packets of a flow as they are sent.
fn units(
    sent: &[Sent],
    spec: &Spec,
    first: u32,
    buffers: &mut usize,
    packets: &mut [(Sent, Option<usize>)],
) -> Vec<Unit> {
    let mut own: Vec<usize> = (0..sent.len())
        .filter(|number| sent[*number].spec == *spec)
        .collect();
    own.sort_by_key(|number| sent[*number].start);
    let mut units: Vec<Unit> = Vec::new();
    let mut content = first;
    let mut seq = match spec.kind {
        // Counts datagrams, by their IP ids.
        Kind::Datagrams => (65_500 + first * 1000) * SEGMENT,
        _ => (u32::MAX - 30_000).wrapping_add(first << 22),
    };
    for number in own {
        let packet = &sent[number];
        let before = units.last().filter(|before| repeats(before, packet));
        let (carried, start, len) = match before {
            Some(before) => (before.content, before.seq, before.len),
            None => (content, seq, packet.payload),
        };
        if before.is_none() {
            content += 1;
            seq = seq.wrapping_add(match spec.kind {
                Kind::Datagrams => len.next_multiple_of(SEGMENT),
                _ => len,
            });
        }
        packets[number].0.payload = len;
        *buffers += 1;
        units.push(Unit {
            buffer: *buffers,
            cut_from: None,
            numbers: SmallVec::from_elem(number, 1),
            origin: u32::try_from(number).expect("few"),
            content: carried,
            seq: start,
            len: if spec.is_cut() { len } else { 0 },
            segment: 0,
            alone: before.is_some_and(|before| before.alone || before.fate == Fate::Vanishes),
            fate: packet.fate,
            time: BEGIN + packet.start,
        });
    }
    units
}

/// Whether a packet has the same bytes as the one before it in its flow. If one of two that nothing distinguishes vanishes
/// or is doubled, nobody can tell which; an IP id distinguishes TCP data that travels as it is.
fn repeats(before: &Unit, packet: &Sent) -> bool {
    let distinct = packet.spec.kind == Kind::Data && !packet.spec.v6 && before.len <= SEGMENT;
    let tell =
        !matches!(before.fate, Fate::Vanishes | Fate::Doubled) && !matches!(packet.fate, Fate::Doubled);
    // Fragments of one datagram are never the same, and equal super-packets have other IP ids.
    packet.again && !matches!(packet.spec.kind, Kind::Fragment | Kind::Datagrams) && (distinct || tell)
}

fn steps(spec: &Spec, encap: Option<EncapKind>) -> Vec<Step> {
    use Hook::{TunnelEgress, TunnelIngress, UplinkEgress, UplinkIngress, WorkloadEgress, WorkloadIngress};
    let Ends {
        written,
        carried,
        received,
    } = ends(spec);
    let step = |node, ifindex, hook, lowered, ends| Step {
        node,
        ifindex,
        hook,
        lowered,
        ends,
        encap: None,
    };
    match spec.way {
        Way::Same(node) => vec![
            step(node, POD, WorkloadIngress, 0, written),
            step(node, POD + 1, WorkloadEgress, 1, received),
        ],
        Way::Hairpin(node) => vec![
            step(node, POD, WorkloadIngress, 0, written),
            step(node, POD, WorkloadEgress, 1, received),
        ],
        Way::Out(node) => vec![
            step(node, POD, WorkloadIngress, 0, written),
            step(node, UPLINK, UplinkEgress, 1, carried),
        ],
        Way::Across(node) => {
            let (other, tunnel) = (1 - node, tunnel_device(spec.v6));
            let encap = carrier(encap, spec.v6);
            let uplink = |node, hook| Step {
                encap,
                ..step(node, UPLINK, hook, 1, carried)
            };
            let mut steps = vec![
                step(node, POD, WorkloadIngress, 0, written),
                step(node, tunnel, TunnelEgress, 1, carried),
                uplink(node, UplinkEgress),
                uplink(other, UplinkIngress),
                step(other, tunnel, TunnelIngress, 1, carried),
                step(other, POD, WorkloadEgress, 2, received),
            ];
            steps.retain(|step| encap.is_some() || step.ifindex != tunnel);
            steps
        }
    }
}

/// The units of a flow pass all hooks, in order, each at a time of its own.
fn pass_all(
    spec: &Spec,
    encap: Option<EncapKind>,
    units: &mut Vec<Unit>,
    offloads: &Offloads,
    buffers: &mut usize,
    walk: &mut Walk,
) {
    let steps = steps(spec, encap);
    for (index, step) in steps.iter().enumerate() {
        if index > 0 && steps[index - 1].node != step.node {
            arrive(units, buffers, walk);
        }
        match step.hook {
            // By the tunnel device, or by the uplink behind its hook.
            Hook::UplinkEgress if step.encap.is_some() => *units = cut(units, &offloads.cut, buffers, true),
            Hook::UplinkIngress => {
                *units = cut(units, &offloads.cut[1..], buffers, false);
                *units = merge(units, &offloads.merge);
            }
            Hook::TunnelIngress => *units = merge(units, &offloads.merge[1..]),
            _ => {}
        }
        let mut last = 0;
        for unit in units.iter_mut() {
            unit.time = (unit.time + PACE).max(last + 10);
            last = unit.time;
            walk.walked.push(observe(spec, unit, step, step.hook, step.ends));
        }
        if index == 0 && spec.nat == Nat::Announced {
            announce(spec, units, step, walk);
        }
        // What is dropped behind this hook goes no further. Netfilter may have translated it by then.
        let to = steps.get(index + 1).filter(|next| next.node == step.node);
        units.retain(|unit| {
            let Fate::Dropped(after) = unit.fate else {
                return true;
            };
            if after % (steps.len() - 1) != index {
                return true;
            }
            let ends = to.filter(|_| after % 2 == 1).map_or(step.ends, |next| next.ends);
            walk.walked.push(Walked {
                observation: Observation {
                    time: unit.time + PACE / 2,
                    drop: Some(Drop {
                        reason: Some("NETFILTER_DROP".into()),
                        location: Some("nf_hook_slow".into()),
                    }),
                    ..observe(spec, unit, step, Hook::KfreeSkb, ends).observation
                },
                numbers: unit.numbers.clone(),
                buffer: unit.buffer,
                cut_from: None,
            });
            false
        });
    }
}

/// Between the nodes some vanish, and some are doubled. On the other node all have new addresses.
fn arrive(units: &mut Vec<Unit>, buffers: &mut usize, walk: &mut Walk) {
    let mut arrived = Vec::new();
    for unit in units.drain(..).filter(|unit| unit.fate != Fate::Vanishes) {
        *buffers += 1;
        let copy = (unit.fate == Fate::Doubled).then(|| {
            let (sent, _) = walk.packets[unit.numbers[0]].clone();
            walk.packets.push((sent, Some(unit.numbers[0])));
            *buffers += 1;
            Unit {
                buffer: *buffers,
                numbers: SmallVec::from_elem(walk.packets.len() - 1, 1),
                ..unit.clone()
            }
        });
        let buffer = if copy.is_some() { *buffers - 1 } else { *buffers };
        arrived.push(Unit {
            buffer,
            cut_from: None,
            ..unit
        });
        arrived.extend(copy);
    }
    *units = arrived;
}

/// Cuts units into segments where `cut` says so. The pieces are `sk_buff`s of their own; if that is done `here`, on the node
/// that sees them, the whole lives until they are there.
fn cut(units: &[Unit], cut: &[bool], buffers: &mut usize, here: bool) -> Vec<Unit> {
    let mut pieces = Vec::new();
    for (unit, cut) in units.iter().zip(cut.iter().cycle()) {
        if !cut || unit.len <= SEGMENT || unit.fate != Fate::Arrives {
            pieces.push(unit.clone());
            continue;
        }
        for (segment, offset) in (0..).zip((0..unit.len).step_by(SEGMENT as usize)) {
            *buffers += 1;
            pieces.push(Unit {
                buffer: *buffers,
                cut_from: here.then_some(unit.buffer),
                seq: unit.seq.wrapping_add(offset),
                len: SEGMENT.min(unit.len - offset),
                segment,
                ..unit.clone()
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
            Some(last)
                if *merge
                    && unit.len > 0
                    && !(last.alone || unit.alone)
                    && (last.fate, unit.fate) == (Fate::Arrives, Fate::Arrives)
                    && last.seq.wrapping_add(last.len) == unit.seq
                    && last.len + unit.len < 65_000 =>
            {
                last.len += unit.len;
                last.time = unit.time;
                let new = unit
                    .numbers
                    .iter()
                    .filter(|number| !last.numbers.contains(number));
                let new: SmallVec<[usize; 2]> = new.copied().collect();
                last.numbers.extend(new);
            }
            _ => merged.push(unit.clone()),
        }
    }
    merged
}

/// The kernel gives the connection of the first packet its translation.
fn announce(spec: &Spec, units: &[Unit], step: &Step, walk: &mut Walk) {
    let Some(first) = units.first() else { return };
    let mut walked = observe(spec, first, step, Hook::NfNatSetupInfo, step.ends);
    walked.observation.time += 10;
    walked.observation.skb = 0;
    walked.observation.detail = Some(Detail::Translated {
        destination: true,
        address: ends(spec).carried.1,
        port: None,
    });
    walk.walked.push(walked);
}

fn observe(spec: &Spec, unit: &Unit, step: &Step, hook: Hook, ends: (IpAddr, IpAddr)) -> Walked {
    let mut packet = packet(
        spec,
        unit.content,
        unit.origin,
        (unit.seq, unit.len),
        unit.segment,
    );
    packet.ttl -= step.lowered;
    (packet.src, packet.dst) = ends;
    let from = spec.way.begins();
    let encap = step.encap.map(|kind| Encap {
        kind,
        src: node_address(from, spec.v6),
        dst: node_address(1 - from, spec.v6),
        ttl: 63,
        ip_id: 0,
        length: 0,
        vni: (kind == EncapKind::Vxlan).then_some(4096),
    });
    Walked {
        observation: Observation {
            time: unit.time,
            netns: netns(step.node),
            ifindex: step.ifindex,
            hook,
            cpu: 0,
            // Until all are known to each other: see `place`.
            skb: 1,
            head: 0,
            packet,
            encap,
            drop: None,
            detail: None,
        },
        numbers: unit.numbers.clone(),
        buffer: unit.buffer,
        cut_from: unit.cut_from,
    }
}

/// Gives each `sk_buff` its address, the one that was freed last, as the allocator does.
fn place(walked: &mut [Walked]) {
    let mut ends = std::collections::HashMap::new();
    for (index, walked) in walked.iter().enumerate() {
        ends.insert(walked.buffer, index);
        // What is cut lives on until the pieces are there.
        walked.cut_from.map(|parent| ends.insert(parent, index));
    }
    let mut freed: Vec<Vec<usize>> = vec![Vec::new(); walked.len()];
    for (buffer, index) in ends {
        freed[index].push(buffer);
    }
    let mut taken = std::collections::HashMap::new();
    let mut free: [Vec<u64>; 2] = [Vec::new(), Vec::new()];
    let mut fresh = 0x1000;
    for (index, walked) in walked.iter_mut().enumerate() {
        let free = &mut free[usize::from(walked.observation.netns == netns(1))];
        let address = *taken.entry(walked.buffer).or_insert_with(|| {
            free.pop().unwrap_or_else(|| {
                fresh += 0x100;
                fresh
            })
        });
        if walked.observation.skb != 0 {
            walked.observation.skb = address;
        }
        free.extend(freed[index].iter().filter_map(|buffer| taken.get(buffer)));
    }
}
