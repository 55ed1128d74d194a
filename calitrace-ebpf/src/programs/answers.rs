//! Answers to packets that left a node under its own address: a pod's, masqueraded, or a service's. To whom such an answer
//! goes is known only once conntrack has translated it back, which is after uplink ingress. So uplink egress, where
//! [`super::conntrack`] tells, notes what an answer will look like, and uplink ingress looks it up.
//!
//! A note is a digest beside the time, in a table of pairs, where a third one takes the place of the older. A note that is
//! lost, or another's taken for it, costs a record too few or too many and no more: that a pod is an answer's receiver is
//! decided by what is seen of it further on.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, macros::map, maps::Array};
use calitrace_ebpf::{Flags, Full, Plain, TunnelKind};

use super::transport::{IPPROTO_ICMP, IPPROTO_ICMPV6, mix};

/// A power of two, with the lowest 16 bits of a digest for an index.
const PAIRS: u32 = 1 << 15;

#[map]
static ANSWERS: Array<Pair> = Array::with_max_entries(PAIRS, 0);

/// Two notes: the upper 48 bits of a digest, and when the last packet left, in the lowest 16 bits of units of 2^30 ns.
#[derive(Clone, Copy)]
#[repr(C)]
struct Pair {
    newer: u64,
    older: u64,
}

const TIME: u64 = 0xffff;

/// An answer is expected for so long, in units of 2^30 ns (about a second): as long as conntrack keeps a UDP stream, or a
/// TCP connection that was closed (`nf_conntrack_udp_timeout_stream`, `nf_conntrack_tcp_timeout_time_wait`: 120 s). Later
/// the node itself may use the port.
const EXPECTED: u64 = 112;

/// The packet, which leaves a node now, is of a translated connection.
#[inline(always)]
pub(super) fn expect(netns: u64, plain: &Plain) {
    let ports = if is_icmp(plain.proto) {
        plain.seq >> 16
    } else {
        u32::from(plain.dport) << 16 | u32::from(plain.sport)
    };
    let digest = digest(netns, words(&plain.dst), words(&plain.src), ports, plain.proto);
    let Some(pair) = ANSWERS.get_ptr_mut(digest as u32 & (PAIRS - 1)) else {
        return;
    };
    let note = digest & !TIME | now();
    // SAFETY: a map value, whose words are written as a whole. Of two notes made at once one may be lost.
    unsafe {
        let newer = (&raw const (*pair).newer).read_volatile();
        if newer == note {
            return;
        }
        if newer & !TIME != note & !TIME {
            (&raw mut (*pair).older).write_volatile(newer);
        }
        (&raw mut (*pair).newer).write_volatile(note);
    }
}

/// Whether a packet with these ends, which comes in now, answers one that was noted. `ports` has its source port in the
/// upper half.
#[inline(always)]
pub(super) fn expected(netns: u64, src: [u64; 2], dst: [u64; 2], ports: u32, proto: u8) -> bool {
    let digest = digest(netns, src, dst, ports, proto);
    let Some(pair) = ANSWERS.get_ptr(digest as u32 & (PAIRS - 1)) else {
        return false;
    };
    // SAFETY: a map value, whose words are written as a whole.
    let (newer, older) = unsafe {
        (
            (&raw const (*pair).newer).read_volatile(),
            (&raw const (*pair).older).read_volatile(),
        )
    };
    let known = if newer & !TIME == digest & !TIME {
        newer
    } else if older & !TIME == digest & !TIME {
        older
    } else {
        return false;
    };
    now().wrapping_sub(known) & TIME <= EXPECTED
}

/// As [`expected`], of a packet that was parsed; of an ICMP error it is what it quotes that was noted.
#[inline(always)]
pub(super) fn is_expected(netns: u64, full: &Full) -> bool {
    let plain = &full.plain;
    let (src, proto, ports) = if plain.flags & Flags::ICMP_ERROR != 0 {
        if full.outer.kind == TunnelKind::QuotedIpip as u8 {
            return false;
        }
        let proto = (plain.dport >> 8) as u8;
        // The ports of the packet that left.
        let ports = if is_icmp(proto) {
            plain.seq >> 16
        } else {
            plain.seq.rotate_left(16)
        };
        (&full.tail.quoted_dst, proto, ports)
    } else if is_icmp(plain.proto) {
        (&plain.src, plain.proto, plain.seq >> 16)
    } else {
        let ports = u32::from(plain.sport) << 16 | u32::from(plain.dport);
        (&plain.src, plain.proto, ports)
    };
    expected(netns, words(src), words(&plain.dst), ports, proto)
}

/// Of an echo the identifier stands for both ports.
#[inline(always)]
fn is_icmp(proto: u8) -> bool {
    proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6
}

#[inline(always)]
fn digest(netns: u64, src: [u64; 2], dst: [u64; 2], ports: u32, proto: u8) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let fold = |[high, low]: [u64; 2]| low ^ high.wrapping_mul(ODD);
    let first = mix(netns << 40 ^ u64::from(proto) << 32 ^ u64::from(ports) ^ fold(src));
    mix(first ^ fold(dst))
}

/// An address, as two words.
#[inline(always)]
pub(super) fn words(address: &[u8; 16]) -> [u64; 2] {
    // SAFETY: 16 bytes.
    unsafe { address.as_ptr().cast::<[u64; 2]>().read_unaligned() }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() >> 30 & TIME }
}
