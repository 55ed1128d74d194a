//! What the fuzz targets share: ring records, taken apart and put together.

use std::net::IpAddr;

use calitrace::event::{
    Detail, DropNames, EncapKind, Hook, NetfilterVerdict, Observation, Quoted, QuotedTransport, Transport,
};
use calitrace_ebpf::{Encapsulated, Flags, Full, Kind, Logged, Outer, Plain, TunnelKind, record::PREFIX};

/// Names of a drop from which its numbers can be had again.
pub struct Numbers;

impl DropNames for Numbers {
    fn reason(&self, reason: u32) -> Option<String> {
        Some(reason.to_string())
    }

    fn symbol(&self, address: u64) -> Option<String> {
        Some(address.to_string())
    }
}

/// The length of a record by its first byte. None for no kind.
pub fn record_length(kind: u8) -> Option<usize> {
    match kind {
        kind if kind == Kind::Plain as u8 => Some(size_of::<Plain>()),
        kind if kind == Kind::Encapsulated as u8 => Some(size_of::<Encapsulated>()),
        kind if kind == Kind::Full as u8 => Some(size_of::<Full>()),
        kind if kind == Kind::Logged as u8 => Some(size_of::<Logged>()),
        _ => None,
    }
}

/// A record from which this observation would be decoded (with [`Numbers`]). The names of a drop that are no numbers
/// become 0.
pub fn record(observation: &Observation) -> Vec<u8> {
    let mut full = header(observation);
    transport(observation, &mut full);
    if let Some(encap) = &observation.encap {
        full.outer = Outer {
            src: address(encap.src),
            dst: address(encap.dst),
            kind: match encap.kind {
                EncapKind::Vxlan => TunnelKind::Vxlan,
                _ => TunnelKind::Ipip,
            } as u8,
            ttl: encap.ttl,
            ip_id: encap.ip_id,
            vni: encap.vni.unwrap_or_default(),
        };
        full.plain.outer_length = encap.length;
    }
    if let Some(detail) = &observation.detail {
        told(detail, &mut full);
    }
    if let Some(drop) = &observation.drop {
        full.plain.flags |= Flags::DROP;
        full.plain.reason = number(drop.reason.as_deref());
        full.tail.location = number(drop.location.as_deref());
    }
    let has_tail = full.plain.flags & (Flags::DROP | Flags::TOLD | Flags::ICMP_ERROR) != 0;
    let prefix = match &observation.detail {
        Some(Detail::Logged { prefix }) => Some(prefix.as_bytes()),
        _ => None,
    };
    let kind = match (has_tail, observation.encap.is_some()) {
        _ if prefix.is_some() => Kind::Logged,
        (true, _) => Kind::Full,
        (false, true) => Kind::Encapsulated,
        (false, false) => Kind::Plain,
    };
    full.plain.kind = kind as u8;
    let mut logged = Logged {
        full,
        prefix: [0; PREFIX],
    };
    for (to, from) in logged.prefix[..PREFIX - 1]
        .iter_mut()
        .zip(prefix.unwrap_or_default())
    {
        *to = *from;
    }
    // SAFETY: a record is made of integers, with explicit padding: all its bytes are set.
    let bytes =
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&logged).cast::<u8>(), size_of::<Logged>()) };
    bytes[..record_length(kind as u8).unwrap_or(bytes.len())].to_vec()
}

/// What does not depend on the protocol.
fn header(observation: &Observation) -> Full {
    let packet = &observation.packet;
    let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
    let plain = Plain {
        hook: observation.hook as u8,
        flags: flag(packet.dont_fragment, Flags::DF)
            | flag(packet.more_fragments, Flags::MF)
            | flag(is_v6(observation), Flags::V6),
        proto: packet.proto,
        cpu: observation.cpu,
        ttl: packet.ttl,
        tos: packet.tos,
        time: observation.time,
        skb: observation.skb,
        head: observation.head,
        netns: observation.netns,
        ifindex: observation.ifindex,
        length: packet.length,
        src: address(packet.src),
        dst: address(packet.dst),
        ip_id: packet.ip_id,
        frag_off: u16::try_from(packet.fragment_offset / 8).unwrap_or(u16::MAX),
        gso_size: packet.gso_size,
        gso_segs: packet.gso_segs,
        digest: packet.digest,
        ..Plain::default()
    };
    Full {
        plain,
        ..Full::default()
    }
}

/// Which version's numbers of ICMP types the record has. That of the addresses, unless a type is an echo's there and the
/// observation says that it is none.
fn is_v6(observation: &Observation) -> bool {
    match observation.packet.transport {
        Transport::Icmp { icmp_type: 0 | 8, .. } => true,
        Transport::Icmp {
            icmp_type: 128 | 129, ..
        } => false,
        _ => observation.packet.src.is_ipv6(),
    }
}

fn transport(observation: &Observation, full: &mut Full) {
    let plain = &mut full.plain;
    let is_v6 = plain.flags & Flags::V6 != 0;
    match &observation.packet.transport {
        Transport::Tcp {
            src_port,
            dst_port,
            seq,
            ack,
            flags,
            window,
            tsval,
            payload,
        } => {
            (plain.sport, plain.dport) = (*src_port, *dst_port);
            (plain.seq, plain.ack, plain.window) = (*seq, *ack, *window);
            (plain.tcp_flags, plain.payload) = (*flags, *payload);
            if let Some(tsval) = tsval {
                plain.flags |= Flags::TSVAL;
                plain.tsval = *tsval;
            }
        }
        Transport::Udp {
            src_port,
            dst_port,
            payload,
        }
        | Transport::Sctp {
            src_port,
            dst_port,
            payload,
        } => {
            (plain.sport, plain.dport, plain.payload) = (*src_port, *dst_port, *payload);
        }
        Transport::Echo { id, .. } if observation.hook == Hook::NfNatSetupInfo => plain.dport = *id,
        Transport::Echo { reply, id, seq } => {
            plain.sport = u16::from(echo_type(is_v6, *reply)) << 8;
            plain.seq = word(*id, *seq);
        }
        Transport::Icmp {
            icmp_type,
            code,
            info,
        } => {
            plain.sport = u16::from_be_bytes([*icmp_type, *code]);
            plain.seq = *info;
        }
        Transport::IcmpError {
            icmp_type,
            code,
            info,
            quoted,
        } => {
            plain.flags |= Flags::ICMP_ERROR;
            plain.sport = u16::from_be_bytes([*icmp_type, *code]);
            plain.tsval = *info;
            quote(quoted, is_v6, full);
        }
        Transport::Other => plain.flags |= Flags::NO_TRANSPORT,
    }
}

fn quote(quoted: &Quoted, is_v6: bool, full: &mut Full) {
    let plain = &mut full.plain;
    plain.dport = u16::from_be_bytes([quoted.proto, quoted.ttl]);
    plain.window = u16::try_from(quoted.ip_id).unwrap_or(u16::MAX);
    plain.payload = quoted.length;
    full.tail.quoted_dst = address(quoted.dst);
    match quoted.transport {
        QuotedTransport::Tcp {
            src_port,
            dst_port,
            seq,
        } => {
            plain.seq = word(src_port, dst_port);
            plain.ack = seq;
        }
        QuotedTransport::Udp { src_port, dst_port } | QuotedTransport::Sctp { src_port, dst_port } => {
            plain.seq = word(src_port, dst_port);
        }
        QuotedTransport::Echo { reply, id, seq } => {
            plain.seq = word(id, seq);
            plain.ack = u32::from(echo_type(is_v6, reply)) << 8;
        }
        // No type of an echo.
        QuotedTransport::Other => plain.ack = 0xff00,
    }
    if let Some(encap) = &quoted.encap {
        full.outer = Outer {
            src: address(quoted.src),
            dst: address(encap.dst),
            kind: TunnelKind::QuotedIpip as u8,
            ttl: encap.ttl,
            ip_id: encap.ip_id,
            vni: 0,
        };
        plain.outer_length = encap.length;
    }
}

fn told(detail: &Detail, full: &mut Full) {
    full.plain.flags |= Flags::TOLD;
    let (reason, location) = (&mut full.plain.reason, &mut full.tail.location);
    match *detail {
        Detail::Answered { icmp_type, code } => *reason = u32::from_be_bytes([0, 0, icmp_type, code]),
        Detail::Judged {
            verdict,
            family,
            hook,
            input,
            output,
        } => {
            *reason = u32::from_be_bytes([0, family, hook, (verdict == NetfilterVerdict::Taken).into()]);
            *location = u64::from(input) << 32 | u64::from(output);
        }
        Detail::Translated {
            destination,
            address: new,
            port,
        } => {
            *reason = u32::from(destination) << 16 | u32::from(port.unwrap_or_default());
            full.tail.quoted_dst = address(new);
        }
        Detail::Cloned { skb } => *location = skb,
        // What it is stands behind the rest.
        Detail::Logged { .. } => {}
    }
}

fn echo_type(is_v6: bool, reply: bool) -> u8 {
    match (is_v6, reply) {
        (false, false) => 8,
        (false, true) => 0,
        (true, false) => 128,
        (true, true) => 129,
    }
}

fn word(high: u16, low: u16) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

fn number<T: std::str::FromStr + Default>(name: Option<&str>) -> T {
    name.and_then(|name| name.parse().ok()).unwrap_or_default()
}

fn address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}
