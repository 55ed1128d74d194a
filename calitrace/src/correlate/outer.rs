//! Where the packet between two nodes is cut, and not the one inside it: the uplink's MTU is too small for the outer header.
//!
//! `ip_do_fragment` gives each fragment an `sk_buff` of its own (`ip_frag_next`, `net/ipv4/ip_output.c`, 6.1), and the other
//! node puts all into the one that came last (`inet_frag_reasm_prepare`, `net/ipv4/inet_fragment.c`, 6.1). Only the first
//! fragment has the inner header, so it stands for the packet; the others have nothing but the nodes' addresses, and the
//! outer IP id that the first one has, too.

use std::net::IpAddr;

use super::{
    again::Recent,
    join::Sight,
    key::Part,
    open::{Seen, WINDOW},
};
use crate::event::{Encap, EncapKind, Hook};

const IPIP: u8 = 4;
const UDP: u8 = 17;
const IPV6: u8 = 41;

/// What is between the outer IP header and the inner one: UDP, VXLAN (RFC 7348, 5) and Ethernet.
const VXLAN_HEADERS: u32 = 8 + 8 + 14;

/// Whether the outer packet is the first fragment of one: its length is not that of a whole one around an inner packet of
/// `length` bytes.
fn is_first_fragment(encap: &Encap, length: u32) -> bool {
    let outer = u32::from(encap.length);
    let between = match encap.kind {
        EncapKind::Vxlan => VXLAN_HEADERS,
        EncapKind::Ipip => 0,
        EncapKind::Wireguard => return false,
    };
    // 0 is of one whose header does not say.
    outer != 0
        && match encap.src {
            IpAddr::V4(_) => outer < 20 + between + length,
            // The first fragment has a fragment header of 8 bytes more, and what was cut off may be less.
            IpAddr::V6(_) => outer != 40 + between + length,
        }
}

/// Whether `sight`, on the node of `last`, may have another `sk_buff`, since the outer packet was cut or made whole between.
pub(super) fn changes_skb(last: &Seen, sight: &Sight<'_>) -> bool {
    let observation = sight.observation;
    let is_whole =
        |encap: Option<&Encap>, length| encap.is_none_or(|encap| !is_first_fragment(encap, length));
    match (last.hook, observation.hook) {
        (Hook::UplinkIngress, _) => !is_whole(last.encap.as_deref(), last.length),
        // What is dropped on its way out may have been cut already.
        (Hook::TunnelEgress, Hook::UplinkEgress | Hook::KfreeSkb) => {
            !is_whole(observation.encap.as_ref(), observation.packet.length)
        }
        _ => false,
    }
}

/// Cluster, addresses, kind and IP id of an outer packet. Of an IPv6 id the lower half, which is what [`Encap`] has.
type Key = (u32, IpAddr, IpAddr, EncapKind, u16);

/// The outer packets that were cut, with the times when their first fragment was seen last.
#[derive(Debug, Default)]
pub(super) struct Cut(Recent<Key, u64>);

impl Cut {
    /// Takes note of a first fragment.
    pub(super) fn note(&mut self, sight: &Sight<'_>) {
        let observation = sight.observation;
        if let Some(encap) = &observation.encap
            && is_first_fragment(encap, observation.packet.length)
        {
            let key = (sight.place.cluster, encap.src, encap.dst, encap.kind, encap.ip_id);
            self.0.insert(key, observation.time);
        }
    }

    /// Whether it is a later fragment of one at an uplink: a part of a packet that is told of already. A drop of it is told.
    pub(super) fn is_rest(&self, sight: &Sight<'_>) -> bool {
        let (observation, packet) = (sight.observation, &sight.observation.packet);
        let is_later = matches!(sight.part, Part::Fragment { offset, .. } if offset > 0)
            && matches!(observation.hook, Hook::UplinkEgress | Hook::UplinkIngress)
            && observation.encap.is_none();
        let kind = match packet.proto {
            UDP => EncapKind::Vxlan,
            IPIP | IPV6 => EncapKind::Ipip,
            _ => return false,
        };
        let Ok(id) = u16::try_from(packet.ip_id & 0xffff) else {
            return false;
        };
        let first = || {
            self.0
                .get(&(sight.place.cluster, packet.src, packet.dst, kind, id))
        };
        // IP ids come round again.
        is_later && first().is_some_and(|time| observation.time <= time + WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outer_packet_too_short_for_the_inner_one_is_a_first_fragment() {
        let cut = |src: &str, kind, length, inner| {
            let address: IpAddr = src.parse().unwrap();
            let encap = Encap {
                kind,
                src: address,
                dst: address,
                ttl: 64,
                ip_id: 1,
                length,
                vni: None,
            };
            is_first_fragment(&encap, inner)
        };
        let v4 = |kind, length, inner| cut("192.168.49.2", kind, length, inner);
        assert!(v4(EncapKind::Vxlan, 1396, 1428));
        assert!(v4(EncapKind::Vxlan, 1492, 1450));
        assert!(!v4(EncapKind::Vxlan, 1500, 1450));
        assert!(v4(EncapKind::Ipip, 1396, 1400));
        assert!(!v4(EncapKind::Ipip, 1420, 1400));
        // A super-packet above 64 KiB.
        assert!(!v4(EncapKind::Vxlan, 0, 80_000));
        let v6 = |length, inner| cut("fd00::2", EncapKind::Vxlan, length, inner);
        assert!(!v6(1500, 1430));
        assert!(v6(1400, 1430));
        // 1456 of 1460 bytes, behind two headers.
        assert!(v6(1504, 1430));
    }
}
