//! Which open trace a packet answers: ICMP errors by the packet they quote, echo replies, SYN-ACKs and resets by their
//! numbers (RFC 792, RFC 4443, RFC 9293).

use super::{
    AnswerKind, LOWEST_ORDINARY_TTL, key,
    key::Part,
    open::{Open, OpenTraces, Reached, Seen},
    topology::Place,
};
use crate::event::{Flow, Hook, Packet, Transport};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// An answer and the trace it is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) index: u32,
    pub(super) kind: AnswerKind,
    pub(super) icmp: Option<(u8, u8)>,
    pub(super) mtu: Option<u32>,
}

/// What `packet` answers, if anything that is open.
pub(super) fn find(open: &OpenTraces, cluster: u32, packet: &Packet, flow: &Flow) -> Option<Match> {
    match packet.transport {
        Transport::IcmpError { ref quoted, .. } => {
            let (kind, icmp_type, code) = of_icmp(packet)?;
            let (flow, tag) = key::of_quoted(quoted);
            let whole = |trace: &Open| {
                trace.part.tags().any(|own| own == tag)
                    && (trace.packet.gso_segs > 1 || trace.packet.length == quoted.length)
            };
            let index = first(open, cluster, &flow, tag, whole)?;
            Some(Match {
                index,
                kind,
                icmp: Some((icmp_type, code)),
                mtu: mtu(packet),
            })
        }
        Transport::Echo { reply: true, seq, .. } => {
            let request = |trace: &Open| matches!(trace.part, Part::Echo { reply: false, .. });
            let index = first(open, cluster, &key::reverse(flow), seq.into(), request)?;
            Some(Match {
                index,
                kind: AnswerKind::EchoReply,
                icmp: None,
                mtu: None,
            })
        }
        Transport::Tcp { seq, ack, flags, .. } if flags & RST != 0 => {
            let index = reset(
                open,
                cluster,
                &key::reverse(flow),
                (flags & ACK != 0).then_some(ack),
                seq,
            )?;
            Some(Match {
                index,
                kind: AnswerKind::Reset,
                icmp: None,
                mtu: None,
            })
        }
        Transport::Tcp { ack, flags, .. } if flags & (SYN | ACK) == SYN | ACK => {
            let tag = ack.wrapping_sub(1);
            let index = first(open, cluster, &key::reverse(flow), tag, is_syn)?;
            Some(Match {
                index,
                kind: AnswerKind::SynAck,
                icmp: None,
                mtu: None,
            })
        }
        _ => None,
    }
}

/// The packet that left a node in a tunnel and whose outer header `packet` quotes, if it is open.
pub(super) fn of_tunnelled(open: &OpenTraces, place: Place, packet: &Packet) -> Option<Match> {
    let Transport::IcmpError { ref quoted, .. } = packet.transport else {
        return None;
    };
    let (kind, icmp_type, code) = of_icmp(packet)?;
    let outer = quoted.encap.as_deref()?;
    let (flow, tag) = key::of_quoted(quoted);
    let left = |trace: &Open| {
        let is_end = |seen: &Seen| {
            let carried = seen
                .encap
                .as_ref()
                .is_some_and(|encap| (encap.src, encap.dst) == (outer.src, outer.dst));
            seen.node == place.node && seen.hook == Hook::UplinkEgress && carried
        };
        let whole = trace.packet.gso_segs > 1 || trace.packet.length == quoted.length;
        trace.part.tags().any(|own| own == tag)
            && whole
            && trace.swallowed.is_none()
            && trace.seen.iter().any(is_end)
    };
    Some(Match {
        index: first(open, place.cluster, &flow, tag, left)?,
        kind,
        icmp: Some((icmp_type, code)),
        mtu: mtu(packet),
    })
}

/// What the next link takes, as ICMP fragmentation needed and packet too big tell it; routers older than RFC 1191 do not.
fn mtu(packet: &Packet) -> Option<u32> {
    let Transport::IcmpError {
        icmp_type,
        code,
        info,
        ..
    } = packet.transport
    else {
        return None;
    };
    match (packet.src.is_ipv6(), icmp_type, code) {
        // The lower half of the word.
        (false, 3, 4) => Some(info & 0xffff).filter(|mtu| *mtu != 0),
        (true, 2, _) => Some(info),
        _ => None,
    }
}

/// What an ICMP error says about the packet it quotes, with type and code. Redirects and reassembly time-outs are not
/// its end.
pub(super) fn of_icmp(packet: &Packet) -> Option<(AnswerKind, u8, u8)> {
    let Transport::IcmpError { icmp_type, code, .. } = packet.transport else {
        return None;
    };
    let kind = match (packet.src.is_ipv6(), icmp_type, code) {
        (false, 11, 0) | (true, 3, 0) => AnswerKind::TimeExceeded,
        (false, 3, _) | (true, 1 | 2, _) => AnswerKind::Unreachable,
        _ => return None,
    };
    Some((kind, icmp_type, code))
}

/// Whether an answer from afar may still tell more of a trace: of a traceroute's probe who answers, and when the answer is
/// back; of what left for somebody who is not observed whether he does.
pub(super) fn is_awaited(trace: &Open) -> bool {
    let asks = is_syn(trace) || matches!(trace.part, Part::Echo { reply: false, .. });
    let probes = trace.packet.ttl < LOWEST_ORDINARY_TTL;
    match &trace.answered {
        None => probes || (asks && trace.reached == Reached::Outside),
        Some(answered) => probes && answered.rtt.is_none(),
    }
}

fn is_syn(trace: &Open) -> bool {
    matches!(trace.part, Part::Tcp { flags, .. } if flags & (SYN | ACK) == SYN)
}

/// The oldest trace of the flow with that tag which is like that and has no answer yet.
fn first(
    open: &OpenTraces,
    cluster: u32,
    flow: &Flow,
    tag: u32,
    like: impl Fn(&Open) -> bool,
) -> Option<u32> {
    let traces = open.by_reference(cluster, flow, tag);
    traces.iter().copied().find(|index| {
        let trace = open.get(*index);
        trace.has_flow(flow) && trace.answered.is_none() && like(trace)
    })
}

/// A reset acknowledges all of what it answers, or, to a packet with an acknowledgement, takes its number from there
/// (RFC 9293, 3.5.2).
fn reset(open: &OpenTraces, cluster: u32, flow: &Flow, ack: Option<u32>, seq: u32) -> Option<u32> {
    open.recent(cluster, flow).iter().copied().find(|index| {
        let trace = open.get(*index);
        let Transport::Tcp {
            seq: start,
            ack: acknowledged,
            flags,
            payload,
            ..
        } = trace.packet.transport
        else {
            return false;
        };
        let numbers = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let answers = match ack {
            Some(ack) => start.wrapping_add(numbers) == ack,
            None => flags & ACK != 0 && acknowledged == seq,
        };
        answers && trace.answered.is_none() && trace.has_flow(flow)
    })
}
