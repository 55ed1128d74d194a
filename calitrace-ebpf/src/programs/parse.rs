//! From the network header to the innermost IP header and its transport header.
//!
//! At most one tunnel header is stepped over: that of the node's own tunnel, whose outer addresses are nodes'. Where an
//! outer address is in scope, the sender is a pod with a tunnel of its own, which is its payload as anything else is.

use aya_ebpf::bindings::__sk_buff;
use calitrace_ebpf::{Flags, TunnelKind, shared::NODE_PORTS};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
    vlan::VlanHdr,
    vxlan::VxlanHdr,
};

use super::{
    account, answers,
    maps::{Draft, Scope, VXLAN_PORT, settled},
    transport,
    view::{self, View},
};

/// `skb->protocol` and `EthHdr::ether_type` as they lie in memory.
pub(super) const ETH_P_IP: u16 = 0x0800_u16.to_be();
pub(super) const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();
const ETH_P_8021Q: u16 = 0x8100_u16.to_be();

pub(super) const IPPROTO_IPIP: u8 = 4;
pub(super) const IPPROTO_TCP: u8 = 6;
pub(super) const IPPROTO_UDP: u8 = 17;
const IPPROTO_IPV6: u8 = 41;

/// Fills the draft's record from the packet; false if it is no IP packet.
#[inline(always)]
pub(super) fn packet<V: View>(view: &V, protocol: u16, draft: &mut Draft) -> bool {
    let v6 = match protocol {
        ETH_P_IP => false,
        ETH_P_IPV6 => true,
        _ => return false,
    };
    if ip(view, v6, 0, draft).is_none() {
        return false;
    }
    let draft = settled(draft);
    if tunnel(view, draft).is_some() {
        let draft = settled(draft);
        if draft.scope == Scope::Outside as u32
            || draft.scope == Scope::Unknown as u32 && !account::in_scope(&draft.record.plain)
        {
            step_inside(view, draft);
        }
    }
    transport::header(view, settled(draft));
    true
}

/// What the first bytes of a packet tell.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Glance {
    /// One of its addresses is in scope.
    InScope,
    /// No address of it is in scope, and it carries nothing that could be.
    OutOfScope,
    /// No address of its own is in scope; what it carries is to be looked into.
    Carrier,
    /// To be looked into.
    Unclear,
}

/// An IP header without options, and where ports are behind it: one call of a helper, which costs more than its bytes.
#[derive(Clone, Copy)]
#[repr(C)]
struct Beginning<T> {
    header: T,
    ports: [u8; 4],
}

/// At which of a node's devices a glance is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    Tunnel,
    UplinkEgress,
    /// In this namespace.
    UplinkIngress(u64),
}

/// Looks at the IP header and the ports only. Most packets at an uplink are none of ours, and this is all they cost.
#[inline(always)]
pub(super) fn glance(skb: *mut __sk_buff, v6: bool, at: At) -> Glance {
    let told = if v6 {
        glance_v6(skb, at)
    } else {
        glance_v4(skb, at)
    };
    told.unwrap_or(Glance::Unclear)
}

#[inline(always)]
fn glance_v4(skb: *mut __sk_buff, at: At) -> Option<Glance> {
    let Beginning::<Ipv4Hdr> { header, ports } = view::beginning(skb, 0)?;
    // No options, and no length that says something else than usual.
    if header.vihl != 0x45 || u16::from_be_bytes(header.tot_len) < 20 {
        return None;
    }
    if account::in_scope_v4(header.src_addr, header.dst_addr) {
        return Some(Glance::InScope);
    }
    // What a later fragment has there is payload, which may look like a node port.
    let ports = if header.frag_offset() == 0 { ports } else { [0; 4] };
    let ends = || (words_v4(header.src_addr), words_v4(header.dst_addr));
    Some(carries(header.proto, ports, at, ends))
}

#[inline(always)]
fn glance_v6(skb: *mut __sk_buff, at: At) -> Option<Glance> {
    let Beginning::<Ipv6Hdr> { header, ports } = view::beginning(skb, 0)?;
    if header.vcf[0] >> 4 != 6 || header.payload_len == [0; 2] {
        return None;
    }
    if account::in_scope_v6(header.src_addr, header.dst_addr) {
        return Some(Glance::InScope);
    }
    let ends = || (answers::words(&header.src_addr), answers::words(&header.dst_addr));
    Some(carries(header.next_hdr, ports, at, ends))
}

/// Whether it can be a tunnel's packet, or an ICMP error about one, or has further headers; or leads to a service by a
/// port of the node; or answers what was translated.
#[inline(always)]
fn carries(
    proto: u8,
    ports @ [a, b, c, d]: [u8; 4],
    at: At,
    ends: impl FnOnce() -> ([u64; 2], [u64; 2]),
) -> Glance {
    if proto != IPPROTO_TCP && proto != IPPROTO_UDP {
        return Glance::Carrier;
    }
    let (source, destination) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    if proto == IPPROTO_UDP && u32::from(destination) == VXLAN_PORT.load() {
        return Glance::Carrier;
    }
    let node_port = NODE_PORTS.contains(&source) || NODE_PORTS.contains(&destination);
    let in_scope = match at {
        At::Tunnel => false,
        At::UplinkEgress => node_port,
        At::UplinkIngress(netns) => {
            node_port || {
                let (src, dst) = ends();
                answers::expected(netns, src, dst, u32::from_be_bytes(ports), proto)
            }
        }
    };
    if in_scope {
        Glance::InScope
    } else {
        Glance::OutOfScope
    }
}

/// An address as it lies in a record.
#[inline(always)]
fn words_v4([a, b, c, d]: [u8; 4]) -> [u64; 2] {
    [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])]
}

/// Makes the packet the outer one, and the one inside it the packet.
#[inline(always)]
fn step_inside<V: View>(view: &V, draft: &mut Draft) {
    let record = &mut draft.record;
    record.outer.src = record.plain.src;
    record.outer.dst = record.plain.dst;
    record.outer.ttl = record.plain.ttl;
    record.outer.ip_id = record.plain.ip_id as u16;
    record.plain.outer_length = if record.plain.length > 0xffff {
        0
    } else {
        record.plain.length as u16
    };
    // Without a kind the rest of the outer header counts for nothing.
    if ip(view, draft.inner_v6 != 0, draft.inner, draft).is_some() {
        draft.record.outer.kind = draft.inner_kind as u8;
    }
}

/// Reads the IP header at `offset`. Leaves the draft alone if there is none.
#[inline(always)]
fn ip<V: View>(view: &V, v6: bool, offset: u32, draft: &mut Draft) -> Option<()> {
    if v6 {
        ipv6(view, offset, draft)
    } else {
        ipv4(view, offset, draft)
    }
}

#[inline(always)]
fn ipv4<V: View>(view: &V, offset: u32, draft: &mut Draft) -> Option<()> {
    let header: Ipv4Hdr = view.load(offset)?;
    let header_length = u32::from(header.vihl & 0xf) * 4;
    if header.vihl >> 4 != 4 || header_length < 20 {
        return None;
    }
    let length = total_length(view, offset, u32::from(u16::from_be_bytes(header.tot_len)))?;
    if length < header_length {
        return None;
    }
    let plain = &mut draft.record.plain;
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
    mapped(header.src_addr, &mut plain.src);
    mapped(header.dst_addr, &mut plain.dst);
    (draft.transport, draft.end) = (offset + header_length, offset + length);
    Some(())
}

#[inline(always)]
fn ipv6<V: View>(view: &V, offset: u32, draft: &mut Draft) -> Option<()> {
    let header: Ipv6Hdr = view.load(offset)?;
    if header.vcf[0] >> 4 != 6 {
        return None;
    }
    let payload = u32::from(u16::from_be_bytes(header.payload_len));
    let length = total_length(view, offset, if payload == 0 { 0 } else { payload + 40 })?;
    let plain = &mut draft.record.plain;
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
    (draft.transport, draft.end) = (transport, offset + length);
    Some(())
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

/// What VXLAN puts between the outer IP header and the inner one.
#[derive(Clone, Copy)]
#[repr(C)]
struct Wrapped {
    udp: UdpHdr,
    vxlan: VxlanHdr,
    ethernet: EthHdr,
}

const _: () = assert!(size_of::<Wrapped>() == 8 + 8 + 14);

/// Looks whether the packet carries another in a tunnel, and where.
#[inline(always)]
fn tunnel<V: View>(view: &V, draft: &mut Draft) -> Option<()> {
    let plain = &draft.record.plain;
    if plain.frag_off != 0 {
        return None;
    }
    match plain.proto {
        IPPROTO_IPIP => inside(draft, TunnelKind::Ipip, draft.transport, false),
        IPPROTO_IPV6 => inside(draft, TunnelKind::Ipip, draft.transport, true),
        IPPROTO_UDP => {
            let Wrapped { udp, vxlan, ethernet } = view.load(draft.transport)?;
            if u32::from(u16::from_be_bytes(udp.dst)) != VXLAN_PORT.load() {
                return None;
            }
            // Bit 3, "I": the network identifier is valid (RFC 7348, 5).
            if vxlan.flags & 8 == 0 {
                return None;
            }
            let [a, b, c] = vxlan.vni;
            draft.record.outer.vni = u32::from_be_bytes([0, a, b, c]);
            let mut inner = draft.transport + 30;
            let mut ether_type = ethernet.ether_type;
            if ether_type == ETH_P_8021Q {
                let vlan: VlanHdr = view.load(inner)?;
                ether_type = vlan.ether_type;
                inner += 4;
            }
            match ether_type {
                ETH_P_IP => inside(draft, TunnelKind::Vxlan, inner, false),
                ETH_P_IPV6 => inside(draft, TunnelKind::Vxlan, inner, true),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Notes where the inner IP header is.
#[inline(always)]
#[expect(
    clippy::unnecessary_wraps,
    reason = "one of a family; this one always succeeds"
)]
fn inside(draft: &mut Draft, kind: TunnelKind, at: u32, v6: bool) -> Option<()> {
    (draft.inner, draft.inner_kind, draft.inner_v6) = (at, kind as u32, u32::from(v6));
    Some(())
}

/// Writes an IPv4 address as `::ffff:a.b.c.d` to a field of a record, all of which lie at multiples of 8.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "the offsets are asserted below")]
pub(super) fn mapped([a, b, c, d]: [u8; 4], field: &mut [u8; 16]) {
    let words = core::ptr::from_mut(field).cast::<u64>();
    // SAFETY: two words fill the field. Volatile, or the compiler calls `memset` for the zeros.
    unsafe {
        words.write_volatile(0);
        words
            .add(1)
            .write_volatile(u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d]));
    }
}

const _: () = {
    use core::mem::offset_of;

    use calitrace_ebpf::{Full, Plain, Tail};
    assert!(offset_of!(Plain, src) % 8 == 0 && offset_of!(Plain, dst) % 8 == 0);
    assert!(offset_of!(Full, tail) % 8 == 0 && offset_of!(Tail, quoted_dst) % 8 == 0);
};
