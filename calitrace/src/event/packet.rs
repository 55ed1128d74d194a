//! The decoded observation.

use std::net::IpAddr;

use calitrace_ebpf::Hook;
use serde::{Deserialize, Serialize};

use super::Netns;
use crate::kernel::hooks;

/// One packet seen once at one hook (RFC 5474's observation point).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// Network namespace of the device it was seen at; 0 if unknown.
    pub netns: Netns,
    /// Interface index in that namespace; 0 if unknown.
    pub ifindex: u32,
    /// The hook.
    #[serde(with = "hooks::by_name")]
    pub hook: Hook,
    /// CPU that saw it.
    pub cpu: u16,
    /// Address of the `sk_buff`; 0 if unknown. Identity within one node only, and only for a moment.
    pub skb: u64,
    /// `skb->head`; 0 if unknown.
    pub head: u64,
    /// The innermost packet.
    pub packet: Packet,
    /// The outer header, where the packet is encapsulated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encap: Option<Encap>,
    /// Set when the observation is a drop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop: Option<Drop>,
    /// What a function of the kernel tells beside the packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<Detail>,
}

/// What a function of the kernel tells beside the packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "told", rename_all = "snake_case")]
pub enum Detail {
    /// The kernel answers with this ICMP or ICMPv6 error.
    Answered {
        /// Type.
        icmp_type: u8,
        /// Code.
        code: u8,
    },
    /// Netfilter did not accept it. If it dropped it, the observation has no packet of its own, only the address of
    /// the one that was dropped.
    Judged {
        /// What it did.
        verdict: NetfilterVerdict,
        /// Protocol family, `NFPROTO_…` (include/uapi/linux/netfilter.h).
        family: u8,
        /// Number of the hook in that family.
        hook: u8,
        /// Index of the input interface; 0: none.
        input: u32,
        /// Index of the output interface; 0: none.
        output: u32,
    },
    /// Packets of this flow get a translation.
    Translated {
        /// The destination is changed, not the source.
        destination: bool,
        /// The new address.
        address: IpAddr,
        /// The new port; none: as it is.
        port: Option<u16>,
    },
    /// It goes on as a clone with this address.
    Cloned {
        /// Address of the clone's `sk_buff`.
        skb: u64,
    },
    /// A rule logs it, with this prefix: Felix's say what becomes of it by which policy.
    Logged {
        /// Its first 63 bytes.
        prefix: Box<str>,
    },
}

/// What netfilter did with a packet that it did not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetfilterVerdict {
    /// `NF_DROP`.
    Dropped,
    /// `NF_STOLEN` or `NF_QUEUE`: a fragment that waits for the others, IPVS, a queue to user space.
    Taken,
}

impl Detail {
    /// The name of the netfilter hook, as `iptables` and `nft` have it.
    #[must_use]
    pub fn netfilter_hook(&self) -> Option<&'static str> {
        /// `NFPROTO_INET`, `NFPROTO_IPV4`, `NFPROTO_BRIDGE`, `NFPROTO_IPV6`: the same numbers of hooks.
        const IP: [u8; 4] = [1, 2, 7, 10];
        const NETDEV: u8 = 5;
        let Self::Judged { family, hook, .. } = self else {
            return None;
        };
        Some(match (family, hook) {
            (family, 0) if IP.contains(family) => "PREROUTING",
            (family, 1) if IP.contains(family) => "INPUT",
            (family, 2) if IP.contains(family) => "FORWARD",
            (family, 3) if IP.contains(family) => "OUTPUT",
            (family, 4) if IP.contains(family) => "POSTROUTING",
            (&NETDEV, 0) | (1, 5) => "INGRESS",
            (&NETDEV, 1) => "EGRESS",
            _ => return None,
        })
    }
}

/// The innermost IP packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IANA protocol number, after IPv6 extension headers.
    pub proto: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tos: u8,
    /// IPv4 identification, or the IPv6 fragment header's; 0 without.
    pub ip_id: u32,
    /// IP total length in bytes; of a super-packet the whole.
    pub length: u32,
    /// IPv4 "don't fragment".
    #[serde(default, skip_serializing_if = "is_false")]
    pub dont_fragment: bool,
    /// More fragments follow.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more_fragments: bool,
    /// Fragment offset in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub fragment_offset: u32,
    /// What the transport header says.
    pub transport: Transport,
    /// Digest of the first up to 32 payload bytes; 0 for TCP and ICMP errors.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub digest: u64,
    /// `gso_size`, 0 for a plain packet.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gso_size: u16,
    /// `gso_segs`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gso_segs: u16,
}

/// What the transport header says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// Sequence number.
        seq: u32,
        /// Acknowledgement number.
        ack: u32,
        /// Flags byte (FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128).
        flags: u8,
        /// Window field, unscaled.
        window: u16,
        /// Timestamp option's value.
        tsval: Option<u32>,
        /// Payload bytes.
        payload: u32,
    },
    /// UDP.
    Udp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// Payload bytes.
        payload: u32,
    },
    /// SCTP.
    Sctp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// Bytes of all chunks.
        payload: u32,
    },
    /// ICMP or ICMPv6 echo request or reply.
    Echo {
        /// A reply, not a request.
        reply: bool,
        /// Identifier.
        id: u16,
        /// Sequence number.
        seq: u16,
    },
    /// An ICMP or ICMPv6 error.
    IcmpError {
        /// ICMP or ICMPv6 type.
        icmp_type: u8,
        /// Code.
        code: u8,
        /// The second word of the header: the next-hop MTU of "fragmentation needed" and "packet too big".
        info: u32,
        /// The packet it answers. Few packets are errors, so it has a place of its own.
        quoted: Box<Quoted>,
    },
    /// Other ICMP or ICMPv6.
    Icmp {
        /// ICMP or ICMPv6 type.
        icmp_type: u8,
        /// Code.
        code: u8,
        /// The second word of the header.
        info: u32,
    },
    /// Another protocol, a later fragment, or a header that could not be read.
    Other,
}

/// The packet that an ICMP error quotes, as far as it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quoted {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IANA protocol number.
    pub proto: u8,
    /// TTL as it was when the error was made.
    pub ttl: u8,
    /// IPv4 identification.
    pub ip_id: u32,
    /// IP total length.
    pub length: u32,
    /// The first eight bytes of its transport header.
    pub transport: QuotedTransport,
    /// The outer header that is quoted before it: the error is to a node about a packet of its tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encap: Option<Box<Encap>>,
}

/// The first eight bytes of a quoted transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum QuotedTransport {
    /// TCP.
    Tcp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// Sequence number.
        seq: u32,
    },
    /// UDP.
    Udp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
    },
    /// SCTP.
    Sctp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
    },
    /// ICMP or ICMPv6 echo.
    Echo {
        /// A reply, not a request.
        reply: bool,
        /// Identifier.
        id: u16,
        /// Sequence number.
        seq: u16,
    },
    /// Anything else.
    Other,
}

/// The outermost header of an encapsulated packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encap {
    /// How the inner packet is carried.
    pub kind: EncapKind,
    /// Outer source address.
    pub src: IpAddr,
    /// Outer destination address.
    pub dst: IpAddr,
    /// Outer TTL.
    pub ttl: u8,
    /// Outer IPv4 identification.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ip_id: u16,
    /// Outer IP total length in bytes, of a super-packet the whole; 0 if it does not say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub length: u16,
    /// VXLAN network identifier, null for others.
    pub vni: Option<u32>,
}

/// A kind of encapsulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncapKind {
    /// IP in IP.
    Ipip,
    /// VXLAN.
    Vxlan,
    /// `WireGuard` (never seen in an outer header: the inner one is encrypted there; used for routes).
    Wireguard,
}

/// Why and where the kernel freed a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drop {
    /// Name of the drop reason without its prefix (`NETFILTER_DROP`), from the running kernel's BTF; its number as
    /// text where the name is not known; null where the kernel gives none (before 5.17).
    pub reason: Option<String>,
    /// Function that freed it (`nf_hook_slow`), from kallsyms; null if not known.
    pub location: Option<String>,
}

/// A flow: the 5-tuple (ICMP echo: the identifier in place of ports) in the direction of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// IANA protocol number.
    pub proto: u8,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port; the identifier of an echo; 0 for protocols without ports.
    pub src_port: u16,
    /// Destination port; 0 for protocols without ports, and for an echo.
    pub dst_port: u16,
}

impl Drop {
    /// Whether netfilter dropped it. Kernels before 5.17 give no reason; there the location tells, as far as symbols are
    /// shown.
    #[must_use]
    pub fn is_netfilter(&self) -> bool {
        match self.reason.as_deref() {
            Some(reason) => reason == "NETFILTER_DROP",
            None => matches!(self.location.as_deref(), Some("nf_hook_slow" | "nft_do_chain")),
        }
    }
}

impl Packet {
    /// The flow the packet belongs to, as its header stands here.
    #[must_use]
    pub fn flow(&self) -> Flow {
        let (src_port, dst_port) = match self.transport {
            Transport::Tcp {
                src_port, dst_port, ..
            }
            | Transport::Udp {
                src_port, dst_port, ..
            }
            | Transport::Sctp {
                src_port, dst_port, ..
            } => (src_port, dst_port),
            Transport::Echo { id, .. } => (id, 0),
            _ => (0, 0),
        };
        Flow {
            proto: self.proto,
            src: self.src,
            dst: self.dst,
            src_port,
            dst_port,
        }
    }
}

/// `tcp`, `udp`, `icmp`, `icmpv6`, `sctp`, or the number.
#[must_use]
pub fn protocol_name(proto: u8) -> std::borrow::Cow<'static, str> {
    match proto {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmpv6".into(),
        132 => "sctp".into(),
        other => other.to_string().into(),
    }
}

/// Whether a protocol has ports: TCP, UDP and SCTP.
#[must_use]
pub const fn has_ports(proto: u8) -> bool {
    matches!(proto, 6 | 17 | 132)
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}
