//! What makes a packet recognisable: its flow and its packet part.
//!
//! Knows packets only; where and when they were seen, and what is open, is for others. What the kernel leaves alone on
//! a packet's way, and what it does not, is from `net/ipv4` of Linux 6.1: forwarding touches TTL, checksums and the ECN
//! bits; segmentation and GRO move the boundaries (and IP ids) of TCP data; NAT touches addresses, ports and echo ids.

use std::hash::{Hash, Hasher};

use rustc_hash::FxHasher;

use crate::event::{Flow, Packet, Quoted, QuotedTransport, Transport};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// A datagram's share of a sequence interval: IP ids have 16 bits.
const DATAGRAM: u32 = 1 << 16;
/// No super-packet has more datagrams (`UDP_MAX_SEGMENTS`, include/linux/udp.h, 6.9; before 64).
pub(super) const MOST_SEGMENTS: u32 = 128;

/// The part of a packet that forwarding and NAT leave alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Part {
    /// TCP with payload: an interval of sequence numbers. `ip_id` is 0 for a super-packet, whose ids count segments.
    TcpData { seq: u32, payload: u32, ip_id: u32 },
    /// TCP without payload: never cut or merged, so its IP id stands.
    Tcp {
        seq: u32,
        ack: u32,
        window: u16,
        flags: u8,
        tsval: Option<u32>,
        ip_id: u32,
    },
    /// UDP.
    Udp { ip_id: u32, payload: u32, digest: u64 },
    /// A UDP super-packet: datagrams of `size` bytes in one `sk_buff`, the last may be shorter. Cut, each is one of its own
    /// (UDP GSO), and others are merged to one (GRO); so it goes by the IP ids that the datagrams have.
    UdpSegments {
        ip_id: u32,
        size: u32,
        payload: u32,
        digest: u64,
    },
    /// Echo request or reply. NAT may change `id`.
    Echo {
        reply: bool,
        id: u16,
        seq: u16,
        ip_id: u32,
        digest: u64,
    },
    /// An ICMP error, with what NAT leaves alone of the packet it quotes.
    IcmpError {
        icmp_type: u8,
        code: u8,
        ip_id: u32,
        quoted_proto: u8,
        quoted_id: u32,
        quoted_seq: u32,
    },
    /// Another ICMP message.
    Icmp {
        icmp_type: u8,
        code: u8,
        info: u32,
        ip_id: u32,
        digest: u64,
    },
    /// A fragment, the first one too.
    Fragment { ip_id: u32, offset: u32, length: u32 },
    /// Another protocol.
    Other { ip_id: u32, length: u32, digest: u64 },
}

impl Part {
    /// The packet part of `packet`.
    pub(super) fn of(packet: &Packet) -> Self {
        let ip_id = packet.ip_id;
        if packet.more_fragments || packet.fragment_offset > 0 {
            return Self::Fragment {
                ip_id,
                offset: packet.fragment_offset,
                length: packet.length,
            };
        }
        let digest = packet.digest;
        match packet.transport {
            Transport::Tcp {
                seq, payload, flags, ..
            } if payload > 0 && flags & SYN == 0 => {
                let ip_id = if packet.gso_segs > 1 || packet.gso_size > 0 {
                    0
                } else {
                    ip_id
                };
                Self::TcpData { seq, payload, ip_id }
            }
            Transport::Tcp {
                seq,
                ack,
                window,
                flags,
                tsval,
                ..
            } => Self::Tcp {
                seq,
                ack,
                window,
                flags,
                tsval,
                ip_id,
            },
            Transport::Udp { payload, .. } => match u32::from(packet.gso_size) {
                size if size > 0 && size < payload && payload.div_ceil(size) <= MOST_SEGMENTS => {
                    Self::UdpSegments {
                        ip_id,
                        size,
                        payload,
                        digest,
                    }
                }
                _ => Self::Udp {
                    ip_id,
                    payload,
                    digest,
                },
            },
            Transport::Echo { reply, id, seq } => Self::Echo {
                reply,
                id,
                seq,
                ip_id,
                digest,
            },
            Transport::IcmpError {
                icmp_type,
                code,
                ref quoted,
                ..
            } => Self::IcmpError {
                icmp_type,
                code,
                ip_id,
                quoted_proto: quoted.proto,
                quoted_id: quoted.ip_id,
                quoted_seq: match quoted.transport {
                    QuotedTransport::Tcp { seq, .. } => seq,
                    QuotedTransport::Echo { seq, .. } => seq.into(),
                    QuotedTransport::Udp { .. } | QuotedTransport::Sctp { .. } | QuotedTransport::Other => 0,
                },
            },
            Transport::Icmp {
                icmp_type,
                code,
                info,
            } => Self::Icmp {
                icmp_type,
                code,
                info,
                ip_id,
                digest,
            },
            // NAT changes the ports of SCTP, which are not in the packet part.
            Transport::Sctp { .. } | Transport::Other => Self::Other {
                ip_id,
                length: packet.length,
                digest,
            },
        }
    }

    /// Whether both can be of one packet: equal, or TCP data with bytes, or UDP with datagrams in common. With
    /// `translated`, an echo's identifier may differ.
    pub(super) fn matches(&self, other: &Self, translated: bool) -> bool {
        match (*self, *other) {
            (
                Self::TcpData { seq, payload, ip_id },
                Self::TcpData {
                    seq: other_seq,
                    payload: other_payload,
                    ip_id: other_id,
                },
            ) => {
                let whole = (seq, payload) == (other_seq, other_payload);
                // A retransmission carries the same bytes under another IP id.
                let retransmission = whole && ip_id != 0 && other_id != 0 && ip_id != other_id;
                !retransmission && overlap(seq, payload, other_seq, other_payload) > 0
            }
            (
                Self::Echo {
                    reply,
                    seq,
                    ip_id,
                    digest,
                    ..
                },
                Self::Echo {
                    reply: r,
                    seq: s,
                    ip_id: i,
                    digest: d,
                    ..
                },
            ) if translated => (reply, seq, ip_id, digest) == (r, s, i, d),
            (one @ Self::UdpSegments { .. }, two @ (Self::Udp { .. } | Self::UdpSegments { .. }))
            | (one @ Self::Udp { .. }, two @ Self::UdpSegments { .. }) => one.has_datagrams_of(&two),
            (one, two) => one == two,
        }
    }

    /// The sequence interval: of TCP data the bytes; of UDP the datagrams, [`DATAGRAM`] for each, from the IP id on, so that
    /// both kinds of numbers wrap where 32 bits do. Of anything else the empty one.
    pub(super) fn interval(&self) -> (u32, u32) {
        match *self {
            Self::TcpData { seq, payload, .. } => (seq, payload),
            Self::Udp { ip_id, .. } => (ip_id.wrapping_mul(DATAGRAM), DATAGRAM),
            Self::UdpSegments { ip_id, .. } => (ip_id.wrapping_mul(DATAGRAM), self.datagrams() * DATAGRAM),
            _ => (0, 0),
        }
    }

    /// Whether a reset can answer it: what takes up sequence numbers.
    pub(super) fn is_resettable(&self) -> bool {
        match *self {
            Self::TcpData { .. } => true,
            Self::Tcp { flags, .. } => flags & (SYN | FIN) != 0 && flags & RST == 0,
            _ => false,
        }
    }

    /// Whether the kernel numbers it, so that another packet of its flow with the same content has another number.
    pub(super) fn is_numbered(&self, packet: &Packet) -> bool {
        packet.ip_id != 0 || matches!(self, Self::Echo { .. })
    }

    /// Whether it is found by its sequence interval, which can be cut and merged on the way.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self, Self::TcpData { .. })
    }

    /// What an ICMP error or another answer can name the packet by, besides its flow.
    pub(super) fn tag(&self) -> u32 {
        match *self {
            Self::TcpData { seq, .. } | Self::Tcp { seq, .. } => seq,
            Self::Echo { seq, .. } => seq.into(),
            Self::Udp { ip_id, .. }
            | Self::IcmpError { ip_id, .. }
            | Self::Icmp { ip_id, .. }
            | Self::Fragment { ip_id, .. }
            | Self::UdpSegments { ip_id, .. }
            | Self::Other { ip_id, .. } => ip_id,
        }
    }

    /// All that an answer can name it by: of what is cut the pieces' tags, too.
    pub(super) fn tags(&self) -> impl Iterator<Item = u32> + use<> {
        let (first, is_cut) = (self.tag(), matches!(self, Self::UdpSegments { .. }));
        (0..self.datagrams()).map(move |piece| {
            if is_cut {
                first.wrapping_add(piece) & 0xffff
            } else {
                first
            }
        })
    }
}

/// Bytes that two sequence intervals have in common, modulo 2^32.
pub(super) fn overlap(seq: u32, len: u32, other: u32, other_len: u32) -> u32 {
    let ahead = other.wrapping_sub(seq);
    if ahead < len {
        return (len - ahead).min(other_len);
    }
    let behind = seq.wrapping_sub(other);
    if behind < other_len {
        (other_len - behind).min(len)
    } else {
        0
    }
}

/// The key of a packet in a cluster, for finding it again at another hook.
pub(super) fn content(cluster: u32, flow: &Flow, part: &Part) -> u64 {
    hash(&(cluster, flow, part))
}

/// The key by which answers find what they answer.
pub(super) fn reference(cluster: u32, flow: &Flow, tag: u32) -> u64 {
    hash(&(cluster, flow, tag))
}

/// The key of a packet between two machines, well mixed; `uplink` tells what is seen at the uplinks from what is seen at tunnel
/// devices.
///
/// TCP data goes by its first byte, which cutting and merging leave in front; IP id and timestamp tell what is sent again
/// from the first time it was. UDP goes by its first datagram, too.
pub(super) fn crossing(uplink: bool, packet: &Packet) -> u64 {
    let flow = packet.flow();
    let key = match packet.transport {
        Transport::Tcp {
            seq, payload, tsval, ..
        } if payload > 0 => hash(&(uplink, flow, seq, packet.ip_id, tsval)),
        _ => match Part::of(packet) {
            Part::Udp { ip_id, digest, .. } | Part::UdpSegments { ip_id, digest, .. } => {
                hash(&(uplink, flow, ip_id, digest))
            }
            part => hash(&(uplink, flow, part)),
        },
    };
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The key of the last byte of TCP data between two machines, or of the last datagram where IPv4 numbers them. Where segments
/// or datagrams are merged, it tells when the last of them was there; but it is not the packet's alone.
pub(super) fn crossing_end(uplink: bool, packet: &Packet) -> Option<u64> {
    let part = Part::of(packet);
    let end = match part {
        Part::TcpData { .. } => {
            let (seq, len) = part.interval();
            seq.wrapping_add(len)
        }
        Part::Udp { ip_id, .. } | Part::UdpSegments { ip_id, .. } if ip_id != 0 && packet.src.is_ipv4() => {
            ip_id.wrapping_add(part.datagrams()) & 0xffff
        }
        _ => return None,
    };
    let key = hash(&(uplink, packet.flow(), end, u8::MAX));
    Some(key.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The key of a flow's TCP data.
pub(super) fn stream(cluster: u32, flow: &Flow) -> u64 {
    hash(&(cluster, flow))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = FxHasher::default();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The flow of the packets that come back.
pub(super) fn reverse(flow: &Flow) -> Flow {
    let (src_port, dst_port) = match flow.proto {
        ICMP | ICMPV6 => (flow.src_port, flow.dst_port),
        _ => (flow.dst_port, flow.src_port),
    };
    Flow {
        proto: flow.proto,
        src: flow.dst,
        dst: flow.src,
        src_port,
        dst_port,
    }
}

/// Flow and tag of the packet that an ICMP error quotes.
pub(super) fn of_quoted(quoted: &Quoted) -> (Flow, u32) {
    let (src_port, dst_port, tag) = match quoted.transport {
        QuotedTransport::Tcp {
            src_port,
            dst_port,
            seq,
        } => (src_port, dst_port, seq),
        QuotedTransport::Udp { src_port, dst_port } | QuotedTransport::Sctp { src_port, dst_port } => {
            (src_port, dst_port, quoted.ip_id)
        }
        QuotedTransport::Echo { id, seq, .. } => (id, 0, seq.into()),
        QuotedTransport::Other => (0, 0, quoted.ip_id),
    };
    (
        Flow {
            proto: quoted.proto,
            src: quoted.src,
            dst: quoted.dst,
            src_port,
            dst_port,
        },
        tag,
    )
}

/// 128 bits made of flow, packet part and first time (FNV-1a, so that they are the same in every build).
pub(super) fn identity(flow: &Flow, part: &Part, time: u64) -> u128 {
    let mut hasher = Fnv(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
    flow.hash(&mut hasher);
    part.hash(&mut hasher);
    time.hash(&mut hasher);
    hasher.0
}

struct Fnv(u128);

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the trait wants 64 bits; the 128 are read directly"
    )]
    fn finish(&self) -> u64 {
        self.0 as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_counts_common_bytes_across_the_wrap() {
        assert_eq!(overlap(10, 10, 15, 10), 5);
        assert_eq!(overlap(15, 10, 10, 10), 5);
        assert_eq!(overlap(10, 10, 20, 10), 0);
        assert_eq!(overlap(10, 100, 20, 10), 10);
        assert_eq!(overlap(u32::MAX - 4, 10, 2, 10), 3);
        assert_eq!(overlap(2, 10, u32::MAX - 4, 10), 3);
        assert_eq!(overlap(0, 0, 0, 10), 0);
    }

    #[test]
    fn a_retransmission_is_another_packet_but_a_segment_is_not() {
        let first = Part::TcpData {
            seq: 1,
            payload: 100,
            ip_id: 7,
        };
        assert!(first.matches(&first, false));
        assert!(!first.matches(
            &Part::TcpData {
                seq: 1,
                payload: 100,
                ip_id: 8
            },
            false
        ));
        let whole = Part::TcpData {
            seq: 1,
            payload: 1000,
            ip_id: 0,
        };
        assert!(whole.matches(
            &Part::TcpData {
                seq: 501,
                payload: 500,
                ip_id: 8
            },
            false
        ));
        assert!(!whole.matches(
            &Part::TcpData {
                seq: 1001,
                payload: 500,
                ip_id: 8
            },
            false
        ));
    }

    #[test]
    fn only_translation_may_change_an_echo_identifier() {
        let one = Part::Echo {
            reply: false,
            id: 1,
            seq: 1,
            ip_id: 9,
            digest: 3,
        };
        let two = Part::Echo {
            reply: false,
            id: 2,
            seq: 1,
            ip_id: 9,
            digest: 3,
        };
        assert!(!one.matches(&two, false));
        assert!(one.matches(&two, true));
    }
}
