//! Datagrams that travel as one `sk_buff`: UDP super-packets that are cut on the way (UDP GSO), and datagrams that are merged
//! (GRO).
//!
//! IPv4 numbers the pieces on from the super-packet's IP id (`inet_gso_segment`, `net/ipv4/af_inet.c`, 6.1), and merges only
//! what is numbered so (`inet_gro_receive`); by these numbers they are found as TCP data is by its sequence numbers. IPv6 has
//! none: the pieces of a super-packet, and the packets that one is merged of, are told by their order and length alone, but
//! for the first, whose bytes are known.

use smallvec::SmallVec;

use super::{
    Joint,
    join::{self, LIFE, Sight},
    key::Part,
    nat::Translations,
    open::{Open, OpenTraces, Seen, WINDOW},
    topology::Topology,
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

    /// The first datagram, as it would be alone.
    fn first_datagram(&self) -> Option<Self> {
        match *self {
            Self::UdpSegments {
                ip_id, size, digest, ..
            } if size >= DIGESTED => Some(Self::Udp {
                ip_id,
                payload: size,
                digest,
            }),
            _ => None,
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

/// The packets that a super-packet of IPv6 was merged of, in their order, and why; none if not all are found.
pub(super) fn merged(
    sight: &Sight<'_>,
    open: &OpenTraces,
    topology: &Topology,
    translations: &Translations,
) -> SmallVec<[(u32, Joint); 4]> {
    let (none, cluster) = (SmallVec::new(), sight.place.cluster);
    if sight.part.datagrams() < 2 || !sight.flow.src.is_ipv6() {
        return none;
    }
    if let Some(known) = open.by_skb(sight.place.node, sight.observation.skb) {
        let trace = open.get(known);
        let (last, before) = (trace.last(), *trace.current());
        let is_one = before == sight.flow
            || last.is_ingress()
                && translations.is_one(topology, trace.cluster, last.node, &before, &sight.flow);
        // All that were merged were last seen as this one.
        let with = |index: &u32| {
            let (trace, own) = (open.get(*index), open.get(*index).last());
            (own.skb, own.node, own.interval, own.time) == (last.skb, last.node, sight.interval, last.time)
                && *trace.current() == before
                && trace.part.datagrams() == 1
                && join::follows(own, sight)
        };
        if is_one && with(&known) && sight.observation.time <= last.time + LIFE {
            let packets = open.by_reference(trace.cluster, &before, 0).iter();
            return packets
                .copied()
                .filter(with)
                .map(|index| (index, Joint::Skb))
                .collect();
        }
    }
    // Of one super-packet on its whole way nothing was merged.
    let whole = open.by_content(cluster, &sight.flow, &sight.part);
    let Some(first) = sight.part.first_datagram().filter(|_| whole.is_empty()) else {
        return none;
    };
    let follows = |index: &u32| join::may_be(sight, open.get(*index));
    let Some(first) = open
        .by_content(cluster, &sight.flow, &first)
        .iter()
        .copied()
        .find(follows)
    else {
        return none;
    };
    let packets = open.by_reference(cluster, &sight.flow, 0);
    let others = packets.iter().skip_while(|index| **index != first).skip(1);
    let mut found: SmallVec<[(u32, Joint); 4]> = SmallVec::from_slice(&[(first, Joint::Content)]);
    for index in others.copied().filter(follows) {
        let number = u32::try_from(found.len()).unwrap_or(u32::MAX);
        if !open.get(index).findable || !sight.part.has_datagram(number, &open.get(index).part) {
            continue;
        }
        found.push((index, Joint::Order));
        if found.len() == sight.part.datagrams() as usize {
            return found;
        }
    }
    none
}
