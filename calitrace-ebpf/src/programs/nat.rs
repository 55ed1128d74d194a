//! `nf_nat_setup_info`: a connection gets a translation. Once for each new connection and direction, so its cost does
//! not count; there is no packet among its arguments.

use aya_ebpf::{macros::kprobe, programs::ProbeContext};
use calitrace_ebpf::{Flags, Full, Hook};

use super::{
    account::{self, Outcome},
    maps::{self, known, settled},
    parse::mapped,
    view::field,
};

const HOOK: u32 = Hook::NfNatSetupInfo as u32;

/// `struct nf_conntrack_tuple` (`include/net/netfilter/nf_conntrack_tuple.h`, unchanged from 5.10 to 6.18).
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Tuple {
    src: [u8; 16],
    src_port: u16,
    family: u16,
    dst: [u8; 16],
    dst_port: u16,
    proto: u8,
    direction: u8,
}

impl Tuple {
    /// Whether one of its addresses is a pod's, a block's or a service's.
    #[inline(always)]
    #[expect(clippy::many_single_char_names, reason = "bytes of two addresses")]
    pub(super) fn in_scope(&self) -> bool {
        if self.family == AF_INET6 {
            account::in_scope_v6(self.src, self.dst)
        } else {
            let [a, b, c, d, ..] = self.src;
            let [e, f, g, h, ..] = self.dst;
            account::in_scope_v4([a, b, c, d], [e, f, g, h])
        }
    }
}

/// `struct nf_nat_range2` (`include/uapi/linux/netfilter/nf_nat.h`), up to what is of use.
#[derive(Clone, Copy)]
#[repr(C)]
struct Range {
    flags: u32,
    min: [u32; 4],
    max: [u32; 4],
    min_port: u16,
    max_port: u16,
}

const NF_NAT_RANGE_MAP_IPS: u32 = 1;
const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 2;
const AF_INET6: u16 = 10;

/// `nf_nat_setup_info(ct, range, maniptype)`
#[kprobe]
#[inline(always)]
#[expect(
    clippy::needless_pass_by_value,
    reason = "aya's macro hands the context over by value"
)]
fn calitrace_nf_nat_setup_info(ctx: ProbeContext) -> u32 {
    let (Some(ct), Some(range), Some(kind)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1), ctx.arg::<u32>(2))
    else {
        return 0;
    };
    let netns = known!(ct_net)
        .and_then(|offset| field::<u64>(ct, offset))
        .and_then(account::network)
        .unwrap_or(0);
    let outcome = maps::nested_draft(|draft| {
        let full = &mut settled(draft).record;
        let Some(outcome) = observe(ct, range, kind & 1, full) else {
            return Outcome::NonIp;
        };
        full.plain.netns = netns;
        match outcome {
            Outcome::Recorded => account::record(full, HOOK, 0),
            other => other,
        }
    });
    account::count(HOOK, netns, 0, outcome.unwrap_or(Outcome::NonIp));
    0
}

/// Fills the record with the connection's flow as it is so far, and what becomes of it.
#[inline(always)]
fn observe(ct: u64, range: u64, kind: u32, full: &mut Full) -> Option<Outcome> {
    let reply: Tuple = field(ct, known!(ct_reply_tuple)?)?;
    let range: Range = field(range, 0)?;
    let v6 = reply.family == AF_INET6;
    // The answers' tuple, turned round, is the flow with the translations it has so far.
    let plain = &mut full.plain;
    address(v6, reply.dst, &mut plain.src);
    address(v6, reply.src, &mut plain.dst);
    plain.proto = reply.proto;
    plain.sport = u16::from_be(reply.dst_port);
    plain.dport = u16::from_be(reply.src_port);
    plain.flags = Flags::TOLD | if v6 { Flags::V6 } else { 0 };
    if !account::in_scope(plain) {
        return Some(Outcome::OutOfScope);
    }
    // Each connection gets an empty translation at least, and a choice among several is not made yet.
    let one = range.min[0] == range.max[0] && range.min[3] == range.max[3];
    if range.flags & NF_NAT_RANGE_MAP_IPS == 0 || !one {
        return Some(Outcome::Filtered);
    }
    let mut new = [0_u8; 16];
    for (index, word) in range.min.iter().enumerate() {
        let [a, b, c, d] = word.to_ne_bytes();
        (
            new[index * 4],
            new[index * 4 + 1],
            new[index * 4 + 2],
            new[index * 4 + 3],
        ) = (a, b, c, d);
    }
    address(v6, new, &mut full.tail.quoted_dst);
    let (address, port) = if kind == 0 {
        (&plain.src, plain.sport)
    } else {
        (&plain.dst, plain.dport)
    };
    let new_port = if range.flags & NF_NAT_RANGE_PROTO_SPECIFIED == 0 {
        0
    } else {
        u16::from_be(range.min_port)
    };
    if same(address, &full.tail.quoted_dst) && (new_port == 0 || new_port == port) {
        return Some(Outcome::Filtered);
    }
    plain.reason = kind << 16 | u32::from(new_port);
    Some(Outcome::Recorded)
}

#[inline(always)]
fn address(v6: bool, from: [u8; 16], to: &mut [u8; 16]) {
    if v6 {
        *to = from;
    } else {
        let [a, b, c, d, ..] = from;
        mapped([a, b, c, d], to);
    }
}

/// Compares word by word: `==` of arrays is a call of `memcmp`.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "read unaligned")]
fn same(one: &[u8; 16], other: &[u8; 16]) -> bool {
    // SAFETY: both have 16 bytes; reads are unaligned.
    unsafe {
        let (one, other) = (one.as_ptr().cast::<u64>(), other.as_ptr().cast::<u64>());
        one.read_unaligned() == other.read_unaligned()
            && one.add(1).read_unaligned() == other.add(1).read_unaligned()
    }
}
