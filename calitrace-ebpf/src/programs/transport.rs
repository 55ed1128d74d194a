//! Transport headers: ports, sequence numbers, what an ICMP error quotes, and the payload digest. Where the fields go
//! is said in the table of `calitrace_ebpf::Plain`.

use calitrace_ebpf::{Flags, Full, TunnelKind};
use network_types::{
    icmp::Icmpv4Hdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::{
    maps::{Draft, settled},
    parse::{IPPROTO_IPIP, IPPROTO_TCP, IPPROTO_UDP, mapped},
    view::View,
};

pub(super) const IPPROTO_ICMP: u8 = 1;
pub(super) const IPPROTO_ICMPV6: u8 = 58;
const IPPROTO_SCTP: u8 = 132;

/// Reads the transport header into the draft's record, as far as it is there.
#[inline(always)]
pub(super) fn header<V: View>(view: &V, draft: &mut Draft) {
    let plain = &mut draft.record.plain;
    plain.payload = draft.end.saturating_sub(draft.transport);
    let v6 = plain.flags & Flags::V6 != 0;
    let read = if plain.frag_off != 0 {
        draft.digested = draft.transport;
        None
    } else {
        match plain.proto {
            IPPROTO_TCP => tcp(view, draft),
            IPPROTO_UDP => udp(view, draft),
            IPPROTO_ICMP if !v6 => icmp(view, v6, draft),
            IPPROTO_ICMPV6 if v6 => icmp(view, v6, draft),
            IPPROTO_SCTP => sctp(view, draft),
            _ => digest_from(draft, draft.transport),
        }
    };
    if read.is_none() {
        draft.record.plain.flags |= Flags::NO_TRANSPORT;
    }
    let draft = settled(draft);
    if draft.digested != 0 {
        draft.record.plain.digest = digest(view, draft);
    }
}

#[inline(always)]
#[expect(
    clippy::unnecessary_wraps,
    reason = "one of a family; this one always succeeds"
)]
fn digest_from(draft: &mut Draft, at: u32) -> Option<()> {
    draft.digested = at;
    Some(())
}

#[inline(always)]
fn tcp<V: View>(view: &V, draft: &mut Draft) -> Option<()> {
    let tcp: TcpHdr = view.load(draft.transport)?;
    let plain = &mut draft.record.plain;
    // SAFETY: bytes 12 and 13 of the 20 that were read: data offset, and the flags as one byte.
    let [offset, flags] = unsafe { (&raw const tcp).cast::<[u8; 2]>().add(6).read() };
    let header = u32::from(offset >> 4) * 4;
    plain.sport = u16::from_be_bytes(tcp.source);
    plain.dport = u16::from_be_bytes(tcp.dest);
    plain.seq = u32::from_be_bytes(tcp.seq);
    plain.ack = u32::from_be_bytes(tcp.ack_seq);
    plain.window = u16::from_be_bytes(tcp.window);
    plain.tcp_flags = flags;
    plain.payload = plain.payload.saturating_sub(header);
    if let Some(tsval) = timestamp(view, draft.transport + 20, draft.transport + header) {
        plain.tsval = tsval;
        plain.flags |= Flags::TSVAL;
    }
    Some(())
}

/// The timestamp value among the TCP options in `from..to`.
#[inline(always)]
fn timestamp<V: View>(view: &V, from: u32, to: u32) -> Option<u32> {
    if to < from + 10 {
        return None;
    }
    // NOP, NOP, timestamps: what Linux sends with every segment of an established connection.
    let common: [u8; 8] = view.load(from)?;
    if let [1, 1, 8, 10, value @ ..] = common {
        return Some(u32::from_be_bytes(value));
    }
    let mut at = from;
    for _ in 0..8 {
        if at + 2 > to {
            return None;
        }
        let [kind, length]: [u8; 2] = view.load(at)?;
        match kind {
            0 => return None,
            1 => at += 1,
            8 => return Some(u32::from_be_bytes(view.load(at + 2)?)),
            _ if length < 2 => return None,
            _ => at += u32::from(length),
        }
    }
    None
}

#[inline(always)]
fn udp<V: View>(view: &V, draft: &mut Draft) -> Option<()> {
    let udp: UdpHdr = view.load(draft.transport)?;
    let plain = &mut draft.record.plain;
    plain.sport = u16::from_be_bytes(udp.src);
    plain.dport = u16::from_be_bytes(udp.dst);
    plain.payload = plain.payload.saturating_sub(8);
    digest_from(draft, draft.transport + 8)
}

/// Ports, and a digest from the first chunk on: NAT rewrites the first and the last four of the twelve bytes before it, ports
/// and checksum (RFC 9260, 3.1).
#[inline(always)]
fn sctp<V: View>(view: &V, draft: &mut Draft) -> Option<()> {
    let [a, b, c, d]: [u8; 4] = view.load(draft.transport)?;
    let plain = &mut draft.record.plain;
    plain.sport = u16::from_be_bytes([a, b]);
    plain.dport = u16::from_be_bytes([c, d]);
    plain.payload = plain.payload.saturating_sub(12);
    digest_from(draft, draft.transport + 12)
}

#[inline(always)]
fn icmp<V: View>(view: &V, v6: bool, draft: &mut Draft) -> Option<()> {
    // ICMPv6 has the same first eight bytes.
    let icmp: Icmpv4Hdr = view.load(draft.transport)?;
    let plain = &mut draft.record.plain;
    plain.sport = u16::from_be_bytes([icmp.type_, icmp.code]);
    plain.payload = plain.payload.saturating_sub(8);
    let error = if v6 {
        icmp.type_ < 128
    } else {
        matches!(icmp.type_, 3..=5 | 11 | 12)
    };
    if error && quoted(view, draft.transport + 8, v6, &mut draft.record).is_some() {
        draft.record.plain.tsval = u32::from_be_bytes(icmp.data);
        draft.record.plain.flags |= Flags::ICMP_ERROR;
        return Some(());
    }
    // Identifier and sequence number of an echo, as one word.
    draft.record.plain.seq = u32::from_be_bytes(icmp.data);
    digest_from(draft, draft.transport + 8)
}

/// Reads the packet that an ICMP error quotes. Leaves `record` alone if there is none.
#[inline(always)]
#[expect(clippy::many_single_char_names, reason = "bytes of two words")]
#[expect(
    clippy::verbose_bit_mask,
    reason = "the mask is the fragment offset of RFC 791"
)]
fn quoted<V: View>(view: &V, offset: u32, v6: bool, record: &mut Full) -> Option<()> {
    let (proto, ttl, id, length, transport, first) = if v6 {
        let ip: Ipv6Hdr = view.load(offset)?;
        if ip.vcf[0] >> 4 != 6 {
            return None;
        }
        record.tail.quoted_dst = ip.dst_addr;
        let length = u32::from(u16::from_be_bytes(ip.payload_len)) + 40;
        (ip.next_hdr, ip.hop_limit, 0, length, offset + 40, true)
    } else {
        let ip: Ipv4Hdr = view.load(offset)?;
        if ip.vihl >> 4 != 4 {
            return None;
        }
        mapped(ip.dst_addr, &mut record.tail.quoted_dst);
        (
            ip.proto,
            ip.ttl,
            u16::from_be_bytes(ip.id),
            u32::from(u16::from_be_bytes(ip.tot_len)),
            offset + u32::from(ip.vihl & 0xf) * 4,
            u16::from_be_bytes(ip.frags) & 0x1fff == 0,
        )
    };
    let plain = &mut record.plain;
    plain.dport = u16::from_be_bytes([proto, ttl]);
    plain.window = id;
    plain.payload = length;
    // Routers quote eight bytes of the transport header at least (RFC 792).
    if first && let Some(bytes) = view.load::<[u8; 8]>(transport) {
        let [a, b, c, d, e, f, g, h] = bytes;
        let (former, latter) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
        match proto {
            IPPROTO_TCP => (plain.seq, plain.ack) = (former, latter),
            IPPROTO_ICMP | IPPROTO_ICMPV6 => (plain.seq, plain.ack) = (latter, former >> 16),
            _ => plain.seq = former,
        }
    }
    Some(())
}

/// An ICMP error that quotes a packet of an IPIP tunnel: replaces what was read of the quoted packet by what is inside
/// of it ([`TunnelKind::QuotedIpip`]). Routers quote as much as makes 576 bytes (RFC 1812, 4.3.2.3); of the eight bytes
/// that RFC 792 asks for nothing could be told.
#[inline(always)]
pub(super) fn quoted_inside<V: View>(view: &V, draft: &mut Draft) -> Option<()> {
    let record = &mut draft.record;
    if record.plain.flags & (Flags::ICMP_ERROR | Flags::V6) != Flags::ICMP_ERROR
        || record.plain.dport >> 8 != u16::from(IPPROTO_IPIP)
    {
        return None;
    }
    let at = draft.transport + 8;
    let outer: Ipv4Hdr = view.load(at)?;
    let at = at + u32::from(outer.vihl & 0xf) * 4;
    let inner: Ipv4Hdr = view.load(at)?;
    record.outer.ttl = outer.ttl;
    record.outer.ip_id = u16::from_be_bytes(outer.id);
    record.plain.outer_length = u16::from_be_bytes(outer.tot_len);
    mapped(outer.dst_addr, &mut record.outer.dst);
    mapped(inner.src_addr, &mut record.outer.src);
    quoted(view, at, false, record)?;
    record.outer.kind = TunnelKind::QuotedIpip as u8;
    Some(())
}

/// A digest of the first up to 32 bytes from `draft.digested` on: the same at every hook, whatever NAT does to the
/// headers. 0 if there are none or they cannot be read.
#[inline(always)]
fn digest<V: View>(view: &V, draft: &mut Draft) -> u64 {
    let mut at = draft.digested;
    let length = draft.end.saturating_sub(at);
    if length == 0 {
        return 0;
    }
    let words = &raw mut draft.payload;
    let mut status = 0;
    // SAFETY: each piece lies within the 32 bytes of `words`. In pieces of constant size, because verifiers lose track of
    // a variable one; straight into the draft, because they would keep apart which parts of the stack were written.
    unsafe {
        if length >= 32 {
            status |= view.copy(at, words);
        } else {
            if length & 16 != 0 {
                status |= view.copy(at, words.cast::<[u64; 2]>());
                at += 16;
            }
            if length & 8 != 0 {
                status |= view.copy(at, words.cast::<u64>().add(2));
                at += 8;
            }
            if length & 4 != 0 {
                status |= view.copy(at, words.cast::<u32>().add(6));
                at += 4;
            }
            if length & 2 != 0 {
                status |= view.copy(at, words.cast::<u16>().add(14));
                at += 2;
            }
            if length & 1 != 0 {
                status |= view.copy(at, words.cast::<u8>().add(30));
            }
        }
    }
    if status != 0 {
        return 0;
    }
    let mut hash = u64::from(if length > 32 { 32 } else { length });
    for word in settled(draft).payload {
        hash = mix(hash ^ word);
    }
    if hash == 0 { 1 } else { hash }
}

/// The finaliser of `SplitMix64`: every bit of the input changes half of the output's.
#[inline(always)]
pub(super) fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
