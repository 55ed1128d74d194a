//! From the bytes of a ring record to an [`Observation`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use calitrace_ebpf::{Flags, Full, Hook, Kind, Logged, Outer, Plain, Tail, TunnelKind, record::PREFIX};

use super::{
    Detail, Drop, Encap, EncapKind, NetfilterVerdict, Observation, Packet, Quoted, QuotedTransport, Transport,
};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;

/// Why a record could not be decoded. Counted in the ledger as dropped in user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Shorter than its kind.
    Short,
    /// An unknown kind byte.
    Kind(u8),
    /// An unknown hook number.
    Hook(u8),
}

impl std::fmt::Display for DecodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Short => f.write_str("the record is shorter than its kind"),
            Self::Kind(kind) => write!(f, "unknown record kind {kind}"),
            Self::Hook(hook) => write!(f, "unknown hook number {hook}"),
        }
    }
}

impl std::error::Error for DecodeError {}

/// What turns the numbers of a drop into words.
pub trait DropNames {
    /// The name of a drop reason, without `SKB_DROP_REASON_`.
    fn reason(&self, reason: u32) -> Option<String>;
    /// The function an address lies in.
    fn symbol(&self, address: u64) -> Option<String>;
}

/// Decodes one record.
pub fn decode(record: &[u8], names: &dyn DropNames) -> Result<Observation, DecodeError> {
    let kind = *record.first().ok_or(DecodeError::Short)?;
    let plain: Plain = read(record, 0)?;
    let (outer, tail): (Option<Outer>, Option<Tail>) = match kind {
        k if k == Kind::Plain as u8 => (None, None),
        k if k == Kind::Encapsulated as u8 => (Some(read(record, size_of::<Plain>())?), None),
        k if k == Kind::Full as u8 || k == Kind::Logged as u8 => {
            let full: Full = read(record, 0)?;
            (Some(full.outer), Some(full.tail))
        }
        other => return Err(DecodeError::Kind(other)),
    };
    let logged: Option<Logged> = if kind == Kind::Logged as u8 {
        Some(read(record, 0)?)
    } else {
        None
    };
    let hook = Hook::from_number(plain.hook).ok_or(DecodeError::Hook(plain.hook))?;
    let v6 = plain.flags & Flags::V6 != 0;
    let transport = if hook == Hook::NfNatSetupInfo && matches!(plain.proto, ICMP | ICMPV6) {
        // Conntrack's tuple has the identifier where others have the port of the receiver.
        Transport::Echo {
            reply: false,
            id: plain.dport,
            seq: 0,
        }
    } else {
        transport(&plain, outer.as_ref(), tail.as_ref(), v6)
    };
    let drop = tail.filter(|_| plain.flags & Flags::DROP != 0).map(|tail| Drop {
        reason: names.reason(plain.reason),
        location: names.symbol(tail.location),
    });
    Ok(Observation {
        time: plain.time,
        netns: plain.netns,
        ifindex: plain.ifindex,
        hook,
        cpu: plain.cpu,
        skb: plain.skb,
        head: plain.head,
        packet: Packet {
            src: address(plain.src),
            dst: address(plain.dst),
            proto: plain.proto,
            ttl: plain.ttl,
            tos: plain.tos,
            ip_id: plain.ip_id,
            length: plain.length,
            dont_fragment: plain.flags & Flags::DF != 0,
            more_fragments: plain.flags & Flags::MF != 0,
            fragment_offset: u32::from(plain.frag_off) * 8,
            transport,
            digest: plain.digest,
            gso_size: plain.gso_size,
            gso_segs: plain.gso_segs,
        },
        encap: outer.and_then(|outer| encap(&plain, &outer)),
        drop,
        detail: if let Some(logged) = logged {
            prefix(&logged.prefix).map(|prefix| Detail::Logged {
                prefix: prefix.into(),
            })
        } else {
            tail.filter(|_| plain.flags & Flags::TOLD != 0)
                .and_then(|tail| detail(hook, &plain, &tail))
        },
    })
}

/// The text that a rule logs. What is none was read from where no text is.
fn prefix(bytes: &[u8; PREFIX]) -> Option<&str> {
    let end = bytes[..PREFIX - 1].iter().position(|byte| *byte == 0);
    let end = end.unwrap_or(PREFIX - 1);
    let text = match std::str::from_utf8(&bytes[..end]) {
        Ok(text) => text,
        // A longer one was cut off within a character.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    (!text.is_empty() && !text.contains(char::is_control)).then_some(text)
}

/// What the hook told; see the table at `Plain::reason`.
fn detail(hook: Hook, plain: &Plain, tail: &Tail) -> Option<Detail> {
    let [_, second, third, fourth] = plain.reason.to_be_bytes();
    Some(match hook {
        Hook::IcmpSend | Hook::Icmp6Send => Detail::Answered {
            icmp_type: third,
            code: fourth,
        },
        Hook::NfHookSlow => Detail::Judged {
            verdict: match fourth {
                0 => NetfilterVerdict::Dropped,
                _ => NetfilterVerdict::Taken,
            },
            family: second,
            hook: third,
            input: upper(tail.location),
            output: lower(tail.location),
        },
        Hook::NfNatSetupInfo => Detail::Translated {
            destination: second != 0,
            address: address(tail.quoted_dst),
            port: Some(low(plain.reason)).filter(|port| *port != 0),
        },
        Hook::SkbClone => Detail::Cloned { skb: tail.location },
        _ => return None,
    })
}

fn transport(plain: &Plain, outer: Option<&Outer>, tail: Option<&Tail>, v6: bool) -> Transport {
    if plain.flags & Flags::NO_TRANSPORT != 0 {
        return Transport::Other;
    }
    match plain.proto {
        TCP => Transport::Tcp {
            src_port: plain.sport,
            dst_port: plain.dport,
            seq: plain.seq,
            ack: plain.ack,
            flags: plain.tcp_flags,
            window: plain.window,
            tsval: (plain.flags & Flags::TSVAL != 0).then_some(plain.tsval),
            payload: plain.payload,
        },
        UDP => Transport::Udp {
            src_port: plain.sport,
            dst_port: plain.dport,
            payload: plain.payload,
        },
        SCTP => Transport::Sctp {
            src_port: plain.sport,
            dst_port: plain.dport,
            payload: plain.payload,
        },
        ICMP | ICMPV6 => icmp(plain, outer, tail, v6),
        _ => Transport::Other,
    }
}

fn icmp(plain: &Plain, outer: Option<&Outer>, tail: Option<&Tail>, v6: bool) -> Transport {
    let [icmp_type, code] = plain.sport.to_be_bytes();
    if plain.flags & Flags::ICMP_ERROR != 0
        && let Some(tail) = tail
    {
        return Transport::IcmpError {
            icmp_type,
            code,
            info: plain.tsval,
            quoted: Box::new(quoted(plain, outer, tail)),
        };
    }
    match echo(v6, icmp_type) {
        Some(reply) => Transport::Echo {
            reply,
            id: high(plain.seq),
            seq: low(plain.seq),
        },
        None => Transport::Icmp {
            icmp_type,
            code,
            info: plain.seq,
        },
    }
}

/// Whether an ICMP type is an echo, and if so whether it is the reply.
fn echo(v6: bool, icmp_type: u8) -> Option<bool> {
    match (v6, icmp_type) {
        (false, 8) | (true, 128) => Some(false),
        (false, 0) | (true, 129) => Some(true),
        _ => None,
    }
}

fn quoted(plain: &Plain, outer: Option<&Outer>, tail: &Tail) -> Quoted {
    let [proto, ttl] = plain.dport.to_be_bytes();
    let v6 = plain.flags & Flags::V6 != 0;
    let transport = match proto {
        TCP => QuotedTransport::Tcp {
            src_port: high(plain.seq),
            dst_port: low(plain.seq),
            seq: plain.ack,
        },
        UDP => QuotedTransport::Udp {
            src_port: high(plain.seq),
            dst_port: low(plain.seq),
        },
        SCTP => QuotedTransport::Sctp {
            src_port: high(plain.seq),
            dst_port: low(plain.seq),
        },
        ICMP | ICMPV6 => match echo(v6, u8::try_from(plain.ack >> 8).unwrap_or(u8::MAX)) {
            Some(reply) => QuotedTransport::Echo {
                reply,
                id: high(plain.seq),
                seq: low(plain.seq),
            },
            None => QuotedTransport::Other,
        },
        _ => QuotedTransport::Other,
    };
    let quoted_outer = outer.filter(|outer| outer.kind == TunnelKind::QuotedIpip as u8);
    Quoted {
        src: address(quoted_outer.map_or(plain.dst, |outer| outer.src)),
        dst: address(tail.quoted_dst),
        proto,
        ttl,
        ip_id: u32::from(plain.window),
        length: plain.payload,
        transport,
        encap: quoted_outer.map(|outer| {
            Box::new(Encap {
                kind: EncapKind::Ipip,
                src: address(plain.dst),
                dst: address(outer.dst),
                ttl: outer.ttl,
                ip_id: outer.ip_id,
                length: plain.outer_length,
                vni: None,
            })
        }),
    }
}

fn encap(plain: &Plain, outer: &Outer) -> Option<Encap> {
    let kind = match outer.kind {
        k if k == TunnelKind::Ipip as u8 => EncapKind::Ipip,
        k if k == TunnelKind::Vxlan as u8 => EncapKind::Vxlan,
        _ => return None,
    };
    Some(Encap {
        kind,
        src: address(outer.src),
        dst: address(outer.dst),
        ttl: outer.ttl,
        ip_id: outer.ip_id,
        length: plain.outer_length,
        vni: (kind == EncapKind::Vxlan).then_some(outer.vni),
    })
}

fn address(bytes: [u8; 16]) -> IpAddr {
    let v6 = Ipv6Addr::from(bytes);
    v6.to_ipv4_mapped()
        .map_or(IpAddr::V6(v6), |v4: Ipv4Addr| IpAddr::V4(v4))
}

const fn high(word: u32) -> u16 {
    (word >> 16) as u16
}

#[expect(clippy::cast_possible_truncation, reason = "takes the lower half")]
const fn low(word: u32) -> u16 {
    word as u16
}

const fn upper(word: u64) -> u32 {
    (word >> 32) as u32
}

#[expect(clippy::cast_possible_truncation, reason = "takes the lower half")]
const fn lower(word: u64) -> u32 {
    word as u32
}

/// A record type that any bytes make a valid value of.
///
/// # Safety
/// Integers and arrays of them only.
unsafe trait Record: Copy {}
// SAFETY: integers and byte arrays only.
unsafe impl Record for Plain {}
// SAFETY: integers and byte arrays only.
unsafe impl Record for Outer {}
// SAFETY: made of the three others.
unsafe impl Record for Full {}
// SAFETY: made of the one before and bytes.
unsafe impl Record for Logged {}

fn read<T: Record>(record: &[u8], offset: usize) -> Result<T, DecodeError> {
    let bytes = record
        .get(offset..offset + size_of::<T>())
        .ok_or(DecodeError::Short)?;
    // SAFETY: the slice is as long as T, any bytes make a T, and the read is unaligned.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nameless;

    impl DropNames for Nameless {
        fn reason(&self, _reason: u32) -> Option<String> {
            None
        }

        fn symbol(&self, _address: u64) -> Option<String> {
            None
        }
    }

    /// What is told of a record with these bytes for a prefix.
    fn told(prefix: &[u8]) -> Option<Detail> {
        let mut record = [0; size_of::<Logged>()];
        record[0] = Kind::Logged as u8;
        record[1] = Hook::NftLogEval as u8;
        record[2] = Flags::TOLD;
        record[size_of::<Full>()..][..prefix.len()].copy_from_slice(prefix);
        assert_eq!(
            decode(&record[..size_of::<Logged>() - 1], &Nameless),
            Err(DecodeError::Short)
        );
        decode(&record, &Nameless).unwrap().detail
    }

    #[test]
    fn what_a_rule_logs_is_text_or_nothing() {
        let text = |prefix: &str| {
            Some(Detail::Logged {
                prefix: prefix.into(),
            })
        };
        assert_eq!(told(b"DPI0|np/default/web"), text("DPI0|np/default/web"));
        assert_eq!(told(b"DRI\0DPI0"), text("DRI"));
        // A longer one is cut off, be it within a character.
        assert_eq!(told(&[b'x'; PREFIX]), text(&"x".repeat(63)));
        assert_eq!(told("ä".repeat(32).as_bytes()), text(&"ä".repeat(31)));
        assert_eq!(told(b""), None);
        assert_eq!(told(b"DPI0|\x1b[31m"), None);
        assert_eq!(told(&[0xff, 0x88, 0x12, 0x34, 0x80]), None);
    }
}
