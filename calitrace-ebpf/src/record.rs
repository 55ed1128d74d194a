//! Event records as they lie in the ring buffer.
//!
//! Four kinds, each the beginning of the next, so that a record costs only the bytes it needs: [`Plain`] (128 bytes),
//! [`Encapsulated`] (168, plus the outer header), [`Full`] (192, plus what a drop or an ICMP error tells) and [`Logged`]
//! (256, plus the text that a rule logs).
//! All integers are in host byte order. Addresses are IPv6; IPv4 ones are mapped (`::ffff:a.b.c.d`).
//! The header described is always the **innermost** one.

use core::mem::{offset_of, size_of};

/// The first byte of a record: which of the layouts follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// [`Plain`].
    Plain = 1,
    /// [`Encapsulated`].
    Encapsulated = 2,
    /// [`Full`].
    Full = 3,
    /// [`Logged`].
    Logged = 4,
}

/// Bits of [`Plain::flags`].
pub struct Flags;

impl Flags {
    /// The packet is IPv6.
    pub const V6: u8 = 1;
    /// IPv4 "don't fragment".
    pub const DF: u8 = 2;
    /// More fragments follow.
    pub const MF: u8 = 4;
    /// Made by a function that tells more than the packet: [`Plain::reason`] and [`Tail::location`] hold what the
    /// table at [`Plain::reason`] says.
    pub const TOLD: u8 = 8;
    /// Made by a drop: [`Plain::reason`] and [`Tail::location`] are set.
    pub const DROP: u8 = 16;
    /// An ICMP or ICMPv6 error that quotes a packet; see [`Plain`] for where the quoted fields lie.
    pub const ICMP_ERROR: u8 = 32;
    /// [`Plain::tsval`] holds a TCP timestamp.
    pub const TSVAL: u8 = 64;
    /// The transport header was not there, or could not be read: ports and what follows them are zero.
    pub const NO_TRANSPORT: u8 = 128;
}

/// How an outer header carries the inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TunnelKind {
    /// IPv4 protocol 4 (or 41 for IPv6 inside IPv4).
    Ipip = 1,
    /// UDP port 4789, or the one configured.
    Vxlan = 2,
    /// Not how the packet is carried: it is an ICMP error about a packet of the node's own IPIP tunnel, and quotes that
    /// one's outer header. The fields of a quoted packet are those of the packet inside, whose source address is in
    /// [`Outer::src`]; the rest of [`Outer`] is the quoted outer header, whose own source is the error's destination.
    QuotedIpip = 3,
}

/// What every record has.
///
/// | field | TCP | UDP, SCTP | ICMP echo | ICMP error | other ICMP |
/// | --- | --- | --- | --- | --- | --- |
/// | `sport` | source port | source port | type << 8 \| code | type << 8 \| code | type << 8 \| code |
/// | `dport` | destination port | destination port | 0 | quoted protocol << 8 \| quoted TTL | 0 |
/// | `seq` | sequence number | 0 | id << 16 \| sequence | quoted source port << 16 \| destination port, or quoted id << 16 \| sequence of an echo | rest of header |
/// | `ack` | acknowledgement | 0 | 0 | quoted TCP sequence number, or quoted ICMP type << 8 \| code | 0 |
/// | `window` | window | 0 | 0 | quoted IP id | 0 |
/// | `tsval` | timestamp value | 0 | 0 | rest of header (the next-hop MTU) | 0 |
/// | `payload` | payload bytes | payload bytes | payload bytes | quoted IP total length | bytes after the first 8 |
/// | `digest` | 0 | digest | digest | 0 | digest |
///
/// The source address of a quoted packet is the error's own destination; its destination is in [`Tail::quoted_dst`].
/// Other protocols have zero ports and a digest of their first bytes. So has a later fragment. SCTP's payload, and its digest,
/// begin at its first chunk.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Plain {
    /// [`Kind`].
    pub kind: u8,
    /// [`crate::Hook`].
    pub hook: u8,
    /// [`Flags`].
    pub flags: u8,
    /// Innermost transport protocol (IANA number), after IPv6 extension headers.
    pub proto: u8,
    /// CPU that ran the program.
    pub cpu: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class.
    pub tos: u8,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// Address of the `sk_buff`; 0 where it is not known.
    pub skb: u64,
    /// `skb->head`; 0 without BTF.
    pub head: u64,
    /// Inode number of the network namespace of the device; 0 if unknown.
    pub netns: u64,
    /// Interface index in that namespace; 0 if unknown.
    pub ifindex: u32,
    /// IP total length in bytes, header included; of a super-packet the whole.
    pub length: u32,
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// See the table.
    pub sport: u16,
    /// See the table.
    pub dport: u16,
    /// IPv4 identification, or the IPv6 fragment header's.
    pub ip_id: u32,
    /// Fragment offset in units of 8 bytes.
    pub frag_off: u16,
    /// `gso_size` of the `sk_buff`, 0 for a plain packet.
    pub gso_size: u16,
    /// `gso_segs` of the `sk_buff`.
    pub gso_segs: u16,
    /// TCP flags byte.
    pub tcp_flags: u8,
    /// Explicit padding.
    pub pad0: u8,
    /// See the table.
    pub seq: u32,
    /// See the table.
    pub ack: u32,
    /// See the table.
    pub window: u16,
    /// IP total length in bytes of the outer header, of IPv6 with it; 0 without one, or where it says none (big TCP).
    pub outer_length: u16,
    /// See the table.
    pub tsval: u32,
    /// See the table.
    pub payload: u32,
    /// `enum skb_drop_reason` of the running kernel, with [`Flags::DROP`]. With [`Flags::TOLD`], beside
    /// [`Tail::location`]:
    ///
    /// | hook | `reason` | `location` |
    /// | --- | --- | --- |
    /// | `IcmpSend`, `Icmp6Send` | type << 8 \| code | 0 |
    /// | `NfHookSlow` | protocol family << 16 \| netfilter hook << 8 \| verdict | input device << 32 \| output device |
    /// | `NfNatSetupInfo` | what is changed (0 source, 1 destination) << 16 \| new port | 0; the new address is in [`Tail::quoted_dst`] |
    /// | `SkbClone` | 0 | address of the clone |
    /// | `NflogTg`, `NftLogEval` | 0 | 0; the prefix is in [`Logged::prefix`] |
    ///
    /// A record of a `NfHookSlow` that dropped its packet has no packet (it is freed by then), only the address it had.
    pub reason: u32,
    /// 64-bit digest of the first up to 32 payload bytes; 0 for TCP and ICMP errors, without payload, and where a
    /// drop's payload lies outside the linear part of its buffer.
    pub digest: u64,
}

/// The outermost header of an encapsulated packet.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Outer {
    /// Outer source address; the inner one with [`TunnelKind::QuotedIpip`].
    pub src: [u8; 16],
    /// Outer destination address.
    pub dst: [u8; 16],
    /// [`TunnelKind`]; 0 when the packet is not encapsulated (in [`Full`]).
    pub kind: u8,
    /// Outer TTL or hop limit.
    pub ttl: u8,
    /// Outer IPv4 identification.
    pub ip_id: u16,
    /// VXLAN network identifier, 0 otherwise.
    pub vni: u32,
}

/// What a drop or an ICMP error adds.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Tail {
    /// Kernel address that called `kfree_skb_reason`, with [`Flags::DROP`]; with [`Flags::TOLD`] see [`Plain::reason`].
    pub location: u64,
    /// Destination address of the quoted packet, with [`Flags::ICMP_ERROR`]; the new address of a `NfNatSetupInfo`.
    pub quoted_dst: [u8; 16],
}

/// [`Plain`] and the outer header.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Encapsulated {
    /// The common part; `kind` is [`Kind::Encapsulated`].
    pub plain: Plain,
    /// The outer header.
    pub outer: Outer,
}

/// [`Encapsulated`] and what a drop or an ICMP error tells.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Full {
    /// The common part; `kind` is [`Kind::Full`].
    pub plain: Plain,
    /// The outer header; all zero when there is none.
    pub outer: Outer,
    /// Drop location and quoted destination.
    pub tail: Tail,
}

/// Bytes of the prefix that a log rule has: `struct xt_nflog_info` has as many, the last of them 0
/// (`include/uapi/linux/netfilter/xt_NFLOG.h`), and Felix keeps to that in nftables, too
/// (`felix/rules/nflogprefix.go`); what else nftables has up to 127 for is cut off.
pub const PREFIX: usize = 64;

/// [`Full`] and what a rule logs.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Logged {
    /// As in the shorter kinds; `kind` is [`Kind::Logged`].
    pub full: Full,
    /// The rule's prefix, and zeros behind it: at least one.
    pub prefix: [u8; PREFIX],
}

const _: () = {
    assert!(size_of::<Plain>() == 128);
    assert!(size_of::<Outer>() == 40);
    assert!(size_of::<Tail>() == 24);
    assert!(size_of::<Encapsulated>() == 168);
    assert!(size_of::<Full>() == 192);
    assert!(size_of::<Logged>() == 256);
    assert!(offset_of!(Plain, time) == 8);
    assert!(offset_of!(Plain, netns) == 32);
    assert!(offset_of!(Plain, src) == 48);
    assert!(offset_of!(Plain, sport) == 80);
    assert!(offset_of!(Plain, ip_id) == 84);
    assert!(offset_of!(Plain, seq) == 96);
    assert!(offset_of!(Plain, reason) == 116);
    assert!(offset_of!(Plain, digest) == 120);
    assert!(offset_of!(Full, outer) == 128);
    assert!(offset_of!(Full, tail) == 168);
    assert!(offset_of!(Logged, prefix) == 192);
};
