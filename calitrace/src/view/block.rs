//! The block: what is shown of a flow or a probe run, in the shape of traceroute's output.

use std::{net::IpAddr, sync::Arc};

use super::way::{self, Step};
use crate::{
    correlate::{Answer, AnswerKind, Certainty, FlowName, Hop, Name, PacketTrace, Verdict},
    event::{Packet, Transport},
};

/// What a block shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The latest packets of a flow; times are one way, from the packet's first observation.
    Flow,
    /// A traceroute at work; times are round trips.
    ProbeRun,
}

/// What is shown of a flow or a probe run.
#[derive(Clone, Debug)]
pub struct Block {
    /// Which of the two.
    pub kind: Kind,
    /// The flow, of a probe run that of its first probe.
    pub flow: FlowName,
    /// How many packets, and what became of them.
    pub counts: Counts,
    /// Round trip of the latest answered echo or handshake of a flow, in nanoseconds.
    pub round_trip: Option<u64>,
    /// Highest TTL a line could have: of a flow its number of hops, of a probe run the highest TTL sent.
    pub hops_max: u8,
    /// IP total length of the latest packet, in bytes.
    pub length: u32,
    /// One line for each hop, from 1.
    pub lines: Vec<Line>,
    /// Interfaces that the latest packet passed outside the lines: before its first hop or after the last one.
    pub stray: Vec<Step>,
    /// The packet that tells how it ended: the latest of a flow; of a probe run the one that met most trouble.
    pub latest: Arc<PacketTrace>,
    /// Probes sent with a higher TTL than the one the receiver answered first.
    pub later_probes: usize,
}

/// What became of the packets of a flow or probe run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All of them.
    pub packets: u64,
    /// Dropped, or lost between nodes.
    pub lost: u64,
    /// Dropped by a receiver that was past them: nothing is lost by it.
    pub superfluous: u64,
    /// Answered by a reset or an ICMP unreachable.
    pub rejected: u64,
    /// The TTL ran out.
    pub expired: u64,
    /// Unknown, because records were lost or hooks not attached yet.
    pub unknown: u64,
}

/// A line: one hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its number.
    pub ttl: u8,
    /// One for each packet, the oldest first; none where nothing is known or nobody answered.
    pub readings: Vec<Option<Reading>>,
    /// The node's name, or its address where only that is known.
    pub node: Option<Name>,
    /// The receiving pod.
    pub pod: Option<Name>,
    /// How sure it is.
    pub certainty: Certainty,
    /// Why nobody answered, where that is known.
    pub reason: Option<String>,
    /// What the packet passed on the hop's node.
    pub way: Vec<Step>,
}

/// What is known of one packet at a hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The hop's address.
    pub address: IpAddr,
    /// Nanoseconds: one way for a flow, round trip for a probe. None where the hop was not observed.
    pub time: Option<u64>,
    /// traceroute's mark for an ICMP unreachable (`!X`).
    pub mark: Option<String>,
}

impl Counts {
    /// Those that did not get where they were meant to.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.lost + self.rejected
    }

    /// Counts one more packet.
    pub fn add(&mut self, trace: &PacketTrace) {
        self.packets += 1;
        match trace.verdict {
            Verdict::Dropped if trace.is_superfluous() => self.superfluous += 1,
            Verdict::Dropped | Verdict::Lost => self.lost += 1,
            Verdict::Rejected => self.rejected += 1,
            Verdict::Expired => self.expired += 1,
            Verdict::Unknown => self.unknown += 1,
            Verdict::Delivered | Verdict::Left | Verdict::Unfinished => {}
        }
    }
}

impl Block {
    /// Whether its packets meet trouble: it is shown before others.
    #[must_use]
    pub fn troubled(&self) -> bool {
        troubled(&self.latest)
    }
}

/// Whether a packet met trouble.
pub(super) fn troubled(trace: &PacketTrace) -> bool {
    match trace.verdict {
        Verdict::Rejected | Verdict::Lost => true,
        Verdict::Dropped => !trace.is_superfluous(),
        _ => false,
    }
}

/// The lines of real traffic: of each hop the one-way times of `packets`, the oldest first; the rest from the last one.
pub(super) fn flow_lines<'a>(packets: &(impl Iterator<Item = &'a Arc<PacketTrace>> + Clone)) -> Vec<Line> {
    let last = packets
        .clone()
        .flat_map(|packet| packet.hops.iter().map(|hop| hop.ttl))
        .max()
        .unwrap_or_default();
    let Some(latest) = packets.clone().last() else {
        return Vec::new();
    };
    let ways = way::of(latest);
    (1..=last)
        .map(|ttl| {
            let readings = packets
                .clone()
                .map(|packet| hop(packet, ttl).and_then(one_way))
                .collect();
            let described = hop(latest, ttl).or_else(|| packets.clone().find_map(|packet| hop(packet, ttl)));
            line(ttl, readings, described, ways.of_hop(ttl))
        })
        .collect()
}

/// A line, with what a hop says of it.
pub(super) fn line(ttl: u8, readings: Vec<Option<Reading>>, hop: Option<&Hop>, way: Vec<Step>) -> Line {
    Line {
        ttl,
        readings,
        node: hop.and_then(|hop| hop.node.clone()),
        pod: hop.and_then(|hop| hop.pod.clone()),
        certainty: hop.map_or(Certainty::Observed, |hop| hop.certainty),
        reason: hop.and_then(|hop| hop.reason.clone()),
        way,
    }
}

/// The hop of a packet with this number.
pub(super) fn hop(packet: &PacketTrace, ttl: u8) -> Option<&Hop> {
    packet.hops.iter().find(|hop| hop.ttl == ttl)
}

fn one_way(hop: &Hop) -> Option<Reading> {
    Some(Reading {
        address: hop.address?,
        time: hop.left_ns,
        mark: None,
    })
}

/// What traceroute shows of an answered probe.
pub(super) fn round_trip(answer: &Answer) -> Option<Reading> {
    Some(Reading {
        address: answer.address,
        time: Some(answer.rtt_ns?),
        mark: mark(answer),
    })
}

/// traceroute's marks (traceroute(8), LIST OF AVAILABLE ANNOTATIONS): port unreachable has none, it is the receiver.
fn mark(answer: &Answer) -> Option<String> {
    let (AnswerKind::Unreachable, Some((icmp_type, code))) = (answer.kind, answer.icmp) else {
        return None;
    };
    let v6 = icmp_type == 1;
    let mark = match (v6, code) {
        (false, 0 | 6 | 8 | 11) | (true, 0) => "!N",
        (false, 1 | 7 | 12) | (true, 3) => "!H",
        (false, 2) => "!P",
        (false, 3) | (true, 4) => return None,
        (false, 4) => "!F",
        (false, 5) => "!S",
        (false, 9 | 10 | 13) | (true, 1) => "!X",
        (false, 14) => "!V",
        (false, 15) => "!C",
        _ => return Some(format!("!<{code}>")),
    };
    Some(mark.to_owned())
}

/// Whether a packet answers another: its flow is shown with the probes it answers, if there are any.
pub(super) fn is_answer(packet: &Packet) -> bool {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    match packet.transport {
        Transport::Echo { reply, .. } => reply,
        Transport::Tcp { flags, .. } => flags & RST != 0 || flags & (SYN | ACK) == SYN | ACK,
        _ => false,
    }
}
