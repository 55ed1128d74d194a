//! Datagrams that travel as one `sk_buff`: UDP super-packets that are cut on the way (UDP GSO), and datagrams that are merged
//! (GRO).
//!
//! IPv4 numbers the pieces on from the super-packet's IP id (`inet_gso_segment`, `net/ipv4/af_inet.c`, 6.1), and merges only
//! what is numbered so (`inet_gro_receive`); by these numbers they are found as TCP data is by its sequence numbers. IPv6 has
//! none: the pieces of a super-packet are told by their order and length alone, and what is merged of several packets is a
//! packet of its own.

use super::{
    Joint,
    join::{self, LIFE, Sight},
    key::Part,
    open::{Open, OpenTraces, Seen, WINDOW},
};

/// Payload bytes that the digest is of, at most. Of a super-packet with shorter datagrams it is one of several.
const DIGESTED: u32 = 32;

impl Part {
    /// How many datagrams a super-packet is cut into; 1 of anything else.
    pub(super) fn datagrams(&self) -> u32 {
        match *self {
            Self::UdpSegments { size, payload, .. } => payload.div_ceil(size),
            _ => 1,
        }
    }

    /// Payload bytes of the datagram with this number, counted from 0.
    fn datagram(&self, number: u32) -> Option<u32> {
        match *self {
            Self::Udp { payload, .. } => (number == 0).then_some(payload),
            Self::UdpSegments { size, payload, .. } => payload
                .checked_sub(number.checked_mul(size)?)
                .filter(|rest| *rest > 0)
                .map(|rest| rest.min(size)),
            _ => None,
        }
    }

    /// Whether `other`, a datagram, can be the one with this number: as long, and if it is the first with the same bytes.
    pub(super) fn has_datagram(&self, number: u32, other: &Self) -> bool {
        let (Self::UdpSegments { digest, .. }, Self::Udp { digest: its, .. }) = (self, other) else {
            return false;
        };
        let bytes = self.datagram(number);
        let is_told = number == 0 && bytes.is_some_and(|bytes| bytes >= DIGESTED);
        bytes == other.datagram(0) && (!is_told || digest == its)
    }

    /// Whether two parts of UDP have datagrams in common, and those agree.
    pub(super) fn has_datagrams_of(&self, other: &Self) -> bool {
        let (
            Self::Udp { ip_id, digest, .. } | Self::UdpSegments { ip_id, digest, .. },
            Self::Udp {
                ip_id: its_id,
                digest: its_digest,
                ..
            }
            | Self::UdpSegments {
                ip_id: its_id,
                digest: its_digest,
                ..
            },
        ) = (self, other)
        else {
            return false;
        };
        let number = |of: u32, among: u32| of.wrapping_sub(among) & 0xffff;
        let mut common = (0..self.datagrams())
            .filter_map(|own| {
                Some((
                    self.datagram(own)?,
                    other.datagram(number(ip_id.wrapping_add(own), *its_id))?,
                ))
            })
            .peekable();
        let first = self.datagram(0).min(other.datagram(0));
        let is_told = ip_id == its_id && first.is_some_and(|bytes| bytes >= DIGESTED);
        common.peek().is_some() && common.all(|(own, its)| own == its) && (!is_told || digest == its_digest)
    }
}

/// Whether the IP ids tell which datagrams of its flow these are.
pub(super) fn are_numbered(sight: &Sight<'_>) -> bool {
    matches!(sight.part, Part::Udp { .. } | Part::UdpSegments { .. }) && sight.flow.src.is_ipv4()
}

/// A datagram of IPv6 that was cut from a super-packet: the trace, which part of it, and why.
pub(super) fn unnumbered(
    sight: &Sight<'_>,
    open: &OpenTraces,
    cluster: u32,
) -> Option<(u32, (u32, u32), Joint)> {
    if !matches!(sight.part, Part::Udp { .. }) || !sight.flow.src.is_ipv6() {
        return None;
    }
    let place = sight.place;
    if let Some(index) = open.by_skb(place.node, sight.observation.skb) {
        let trace = open.get(index);
        let seen = trace.seen.iter().rev().find(|seen| {
            seen.skb == sight.observation.skb
                && seen.node == place.node
                && seen.interval.1 == sight.interval.1
        });
        if let Some(last) = seen.filter(|_| trace.part.datagrams() > 1)
            && sight.observation.time <= last.time + LIFE
            && *trace.flow_at(last) == sight.flow
            && join::follows(last, sight)
        {
            let number = last.interval.0 / sight.interval.1;
            let is_it = trace.part.has_datagram(number, &sight.part);
            return is_it.then_some((index, last.interval, Joint::Skb));
        }
    }
    // A super-packet is referred to by the numbers of all its pieces; number 1 no other packet without ids has.
    let candidates = open.by_reference(cluster, &sight.flow, 1).iter().copied();
    let candidates = candidates.filter(|index| open.get(*index).findable);
    let mut begun = None;
    for index in candidates {
        match next(sight, open.get(index)) {
            Some((0, share)) => return Some((index, (0, share), Joint::Order)),
            // Packets keep their order: what goes on is the one that began last.
            Some(interval) => begun = Some((index, interval, Joint::Order)),
            None => {}
        }
    }
    begun
}

/// Which of its datagrams it can be: at each hook they come in order, and some may be missing, but for the first, by whose
/// bytes the packet is known.
fn next(sight: &Sight<'_>, trace: &Open) -> Option<(u32, u32)> {
    let observation = sight.observation;
    let here = |seen: &&Seen| {
        (seen.node, seen.ifindex, seen.hook) == (sight.place.node, observation.ifindex, observation.hook)
    };
    let share = sight.interval.1;
    let ends = trace
        .seen
        .iter()
        .filter(here)
        .map(|seen| seen.interval.0 + seen.interval.1);
    let from = ends.max().unwrap_or_default() / share;
    let to = if from == 0 { 1 } else { trace.part.datagrams() };
    let number = (from..to).find(|number| trace.part.has_datagram(*number, &sight.part))?;
    let interval = (number * share, share);
    let last = trace.last_of(interval);
    let is_it = *trace.flow_at(last) == sight.flow
        && observation.time <= trace.first().time + WINDOW
        && join::follows(last, sight);
    is_it.then_some(interval)
}
