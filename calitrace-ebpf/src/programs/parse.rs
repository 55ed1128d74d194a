//! From the network header to the innermost IP header and its transport header.
//!
//! At most one tunnel header is stepped over: that of the node's own tunnel, whose outer addresses are nodes'. Where an
//! outer address is in scope, the sender is a pod with a tunnel of its own, which is its payload as anything else is.

use calitrace_ebpf::{Flags, Full, TunnelKind};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
    vlan::VlanHdr,
    vxlan::VxlanHdr,
};

use super::{account, maps::VXLAN_PORT, transport, view::View};

/// `skb->protocol` and `EthHdr::ether_type` as they lie in memory.
pub(super) const ETH_P_IP: u16 = 0x0800_u16.to_be();
pub(super) const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();
const ETH_P_8021Q: u16 = 0x8100_u16.to_be();

const IPPROTO_IPIP: u8 = 4;
pub(super) const IPPROTO_UDP: u8 = 17;
const IPPROTO_IPV6: u8 = 41;

/// Bounds of an IP packet, in bytes behind the network header.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// The transport header (behind IPv6 extension headers).
    pub(super) transport: u32,
    /// The end of the packet.
    pub(super) end: u32,
}

/// Fills `record` from the packet; false if it is no IP packet.
#[inline(always)]
pub(super) fn packet<V: View>(view: &V, protocol: u16, record: &mut Full) -> bool {
    let v6 = match protocol {
        ETH_P_IP => false,
        ETH_P_IPV6 => true,
        _ => return false,
    };
    let Some(mut bounds) = ip(view, v6, 0, record) else {
        return false;
    };
    if let Some((kind, vni, inner, v6)) = tunnel(view, bounds, record)
        && !account::in_scope(&record.plain)
    {
        record.outer.src = record.plain.src;
        record.outer.dst = record.plain.dst;
        record.outer.ttl = record.plain.ttl;
        record.outer.ip_id = record.plain.ip_id as u16;
        record.outer.vni = vni;
        // Without a kind the rest of the outer header counts for nothing.
        if let Some(inside) = ip(view, v6, inner, record) {
            record.outer.kind = kind as u8;
            bounds = inside;
        }
    }
    transport::header(view, bounds, record);
    true
}

/// Reads the IP header at `offset`. Leaves `record` alone if there is none.
#[inline(always)]
fn ip<V: View>(view: &V, v6: bool, offset: u32, record: &mut Full) -> Option<Bounds> {
    if v6 {
        ipv6(view, offset, record)
    } else {
        ipv4(view, offset, record)
    }
}

#[inline(always)]
fn ipv4<V: View>(view: &V, offset: u32, record: &mut Full) -> Option<Bounds> {
    let header: Ipv4Hdr = view.load(offset)?;
    let header_length = u32::from(header.vihl & 0xf) * 4;
    if header.vihl >> 4 != 4 || header_length < 20 {
        return None;
    }
    let length = total_length(view, offset, u32::from(u16::from_be_bytes(header.tot_len)))?;
    if length < header_length {
        return None;
    }
    let plain = &mut record.plain;
    let fragment = u16::from_be_bytes(header.frags);
    plain.flags = if fragment & 0x4000 != 0 { Flags::DF } else { 0 };
    if fragment & 0x2000 != 0 {
        plain.flags |= Flags::MF;
    }
    plain.frag_off = fragment & 0x1fff;
    plain.proto = header.proto;
    plain.ttl = header.ttl;
    plain.tos = header.tos;
    plain.length = length;
    plain.ip_id = u32::from(u16::from_be_bytes(header.id));
    plain.src = mapped(header.src_addr);
    plain.dst = mapped(header.dst_addr);
    Some(Bounds {
        transport: offset + header_length,
        end: offset + length,
    })
}

#[inline(always)]
fn ipv6<V: View>(view: &V, offset: u32, record: &mut Full) -> Option<Bounds> {
    let header: Ipv6Hdr = view.load(offset)?;
    if header.vcf[0] >> 4 != 6 {
        return None;
    }
    let payload = u32::from(u16::from_be_bytes(header.payload_len));
    let length = total_length(view, offset, if payload == 0 { 0 } else { payload + 40 })?;
    let plain = &mut record.plain;
    plain.flags = Flags::V6;
    plain.frag_off = 0;
    plain.ip_id = 0;
    plain.ttl = header.hop_limit;
    plain.tos = header.vcf[0] << 4 | header.vcf[1] >> 4;
    plain.length = length;
    plain.src = header.src_addr;
    plain.dst = header.dst_addr;

    let mut next = header.next_hdr;
    let mut transport = offset + 40;
    for _ in 0..6 {
        match next {
            // Hop-by-hop options, routing, destination options: length in units of 8 bytes, without the first.
            0 | 43 | 60 => {
                let Some([following, size]) = view.load::<[u8; 2]>(transport) else {
                    break;
                };
                next = following;
                transport += (u32::from(size) + 1) * 8;
            }
            // Fragment.
            44 => {
                let Some([following, _, high, low, id @ ..]) = view.load::<[u8; 8]>(transport) else {
                    break;
                };
                let fragment = u16::from_be_bytes([high, low]);
                next = following;
                transport += 8;
                plain.frag_off = fragment >> 3;
                plain.ip_id = u32::from_be_bytes(id);
                if fragment & 1 != 0 {
                    plain.flags |= Flags::MF;
                }
                // What follows a later fragment's header is data.
                if plain.frag_off != 0 {
                    break;
                }
            }
            // Authentication header: units of 4 bytes, without the first two.
            51 => {
                let Some([following, size]) = view.load::<[u8; 2]>(transport) else {
                    break;
                };
                next = following;
                transport += (u32::from(size) + 2) * 4;
            }
            _ => break,
        }
    }
    plain.proto = next;
    Some(Bounds {
        transport,
        end: offset + length,
    })
}

/// The length that a header says, or that of a super-packet above 64 KiB, whose header says 0 (big TCP,
/// include/net/ipv6.h and include/linux/ip.h `iph_totlen`, Linux 6.3).
#[inline(always)]
fn total_length<V: View>(view: &V, offset: u32, said: u32) -> Option<u32> {
    if said == 0 {
        view.end()?.checked_sub(offset)
    } else {
        Some(said)
    }
}

/// Whether the packet carries another in a tunnel: its kind, VNI, the offset of the inner IP header and whether that
/// is IPv6.
#[inline(always)]
fn tunnel<V: View>(view: &V, outer: Bounds, record: &Full) -> Option<(TunnelKind, u32, u32, bool)> {
    if record.plain.frag_off != 0 {
        return None;
    }
    match record.plain.proto {
        IPPROTO_IPIP => Some((TunnelKind::Ipip, 0, outer.transport, false)),
        IPPROTO_IPV6 => Some((TunnelKind::Ipip, 0, outer.transport, true)),
        IPPROTO_UDP => {
            let udp: UdpHdr = view.load(outer.transport)?;
            if u32::from(u16::from_be_bytes(udp.dst)) != VXLAN_PORT.load() {
                return None;
            }
            let vxlan: VxlanHdr = view.load(outer.transport + 8)?;
            // Bit 3, "I": the network identifier is valid (RFC 7348, 5).
            if vxlan.flags & 8 == 0 {
                return None;
            }
            let ethernet: EthHdr = view.load(outer.transport + 16)?;
            let mut inner = outer.transport + 30;
            let mut ether_type = ethernet.ether_type;
            if ether_type == ETH_P_8021Q {
                let vlan: VlanHdr = view.load(inner)?;
                ether_type = vlan.ether_type;
                inner += 4;
            }
            let [a, b, c] = vxlan.vni;
            let vni = u32::from_be_bytes([0, a, b, c]);
            match ether_type {
                ETH_P_IP => Some((TunnelKind::Vxlan, vni, inner, false)),
                ETH_P_IPV6 => Some((TunnelKind::Vxlan, vni, inner, true)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// An IPv4 address as `::ffff:a.b.c.d`.
#[inline(always)]
pub(super) fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}
