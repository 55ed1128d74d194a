//! Entries of kernel functions that have a packet among their arguments.
//!
//! A kprobe's program is a stub that knows its function's number and arguments, and leaves the rest to one body by a
//! tail call: so the body is loaded and verified once, and no helper (`bpf_get_func_ip`, 5.15) nor symbol table is
//! needed to tell the functions apart. For the functions that every forwarded packet runs through there is a cheaper
//! fentry program, too; each is a copy of the body, as trampolines do not take tail calls of different functions.
#![expect(
    clippy::needless_pass_by_value,
    reason = "aya's macros hand the context over by value"
)]

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::bpf_probe_read_kernel_str,
    macros::{fentry, kprobe},
    programs::{FEntryContext, ProbeContext},
};
use calitrace_ebpf::{Flags, Hook, TunnelKind, record::PREFIX, shared::BODY};

use super::{
    account::{self, Outcome},
    maps::{self, BODIES, Call, Draft, known, settled},
    parse::{IPPROTO_UDP, mapped},
    tracing,
    view::field,
};

/// `struct xt_nflog_info`.`prefix` (`include/uapi/linux/netfilter/xt_NFLOG.h`).
const XT_NFLOG_PREFIX: u64 = 12;

/// Arguments of a probed function, counted from 0.
trait Arguments {
    fn argument(&self, n: usize) -> Option<u64>;
}

impl Arguments for ProbeContext {
    #[inline(always)]
    fn argument(&self, n: usize) -> Option<u64> {
        if let Some(value) = self.arg(n) {
            return Some(value);
        }
        // On x86-64 the seventh and following lie on the stack, behind the return address.
        #[cfg(bpf_target_arch = "x86_64")]
        {
            // SAFETY: a field of the program's context.
            let stack = unsafe { (*self.regs).rsp };
            field(stack, (n - 5) * 8)
        }
        #[cfg(not(bpf_target_arch = "x86_64"))]
        None
    }
}

impl Arguments for FEntryContext {
    #[inline(always)]
    fn argument(&self, n: usize) -> Option<u64> {
        argument(self.as_ptr() as u64, n)
    }
}

/// An argument of a function with a trampoline. Read as memory, not through the context: there the verifier knows it for
/// a pointer and refuses to compare it.
#[inline(always)]
pub(super) fn argument(context: u64, n: usize) -> Option<u64> {
    field(context, n * 8)
}

/// The packet as argument `n`, and nothing else.
#[inline(always)]
fn packet_at(arguments: &impl Arguments, n: usize) -> Option<Call> {
    Some(Call {
        skb: arguments.argument(n)?,
        ..Call::EMPTY
    })
}

/// `iptunnel_xmit(sk, rt, skb, src, dst, proto, tos, ttl, df, xnet, …)`: the same since 4.15, one more at the end since
/// 6.16. The outer header is what the arguments say; the skb still begins with the inner one (or with VXLAN's).
#[inline(always)]
fn tunnel(arguments: &impl Arguments) -> Option<Call> {
    let skb = arguments.argument(2)?;
    let mut call = Call {
        skb,
        outer_src: arguments.argument(3)? as u32,
        outer_dst: arguments.argument(4)? as u32,
        outer_ttl: arguments.argument(7).unwrap_or(0) as u8,
        outer_kind: TunnelKind::Ipip as u8,
        ..Call::EMPTY
    };
    if arguments.argument(5)? as u8 == IPPROTO_UDP {
        call.outer_kind = TunnelKind::Vxlan as u8;
        // The data begins with the UDP header; VXLAN's network identifier is in the last word of the eight bytes behind.
        let data: u64 = known!(skb_data).and_then(|offset| field(skb, offset))?;
        call.vni = u32::from_be(field(data, 12)?) >> 8;
    }
    Some(call)
}

/// `__icmp_send(skb_in, type, code, info, …)` and `icmp6_send(skb, type, code, info, …)`.
#[inline(always)]
fn icmp(arguments: &impl Arguments) -> Option<Call> {
    let (icmp_type, code) = (arguments.argument(1)? as u8, arguments.argument(2)? as u8);
    Some(Call {
        skb: arguments.argument(0)?,
        told: 1,
        reason: u32::from(icmp_type) << 8 | u32::from(code),
        ..Call::EMPTY
    })
}

/// `nflog_tg(skb, par)` (`net/netfilter/xt_NFLOG.c`, 5.10 to 6.18).
#[inline(always)]
fn nflog(arguments: &impl Arguments) -> Option<Call> {
    let info: u64 = field(arguments.argument(1)?, known!(xt_targinfo)?)?;
    Some(Call {
        skb: arguments.argument(0)?,
        told: 1,
        prefix: info.wrapping_add(XT_NFLOG_PREFIX),
        ..Call::EMPTY
    })
}

/// `nft_log_eval(expr, regs, pkt)` (`net/netfilter/nft_log.c`, 5.10 to 6.18). What `pkt` points to begins with the
/// `sk_buff`'s address (`struct nft_pktinfo`, `include/net/netfilter/nf_tables.h`).
#[inline(always)]
fn nft_log(arguments: &impl Arguments) -> Option<Call> {
    Some(Call {
        skb: field(arguments.argument(2)?, 0)?,
        told: 1,
        prefix: field(arguments.argument(0)?, known!(nft_log_prefix)?)?,
        ..Call::EMPTY
    })
}

macro_rules! kprobes {
    ($($name:ident: $hook:ident, $read:expr;)*) => {$(
        #[kprobe]
        #[inline(always)]
        fn $name(ctx: ProbeContext) -> u32 {
            let read: fn(&ProbeContext) -> Option<Call> = $read;
            hand_over(&ctx, Hook::$hook, read(&ctx))
        }
    )*};
}

kprobes! {
    calitrace_ip_forward: IpForward, |ctx| packet_at(ctx, 0);
    calitrace_ip6_forward: Ip6Forward, |ctx| packet_at(ctx, 0);
    calitrace_iptunnel_xmit: IptunnelXmit, |ctx| tunnel(ctx);
    calitrace_ip_tunnel_rcv: IpTunnelRcv, |ctx| packet_at(ctx, 1);
    calitrace_vxlan_xmit: VxlanXmit, |ctx| packet_at(ctx, 0);
    calitrace_vxlan_rcv: VxlanRcv, |ctx| packet_at(ctx, 1);
    calitrace_icmp_send: IcmpSend, |ctx| icmp(ctx);
    calitrace_icmp6_send: Icmp6Send, |ctx| icmp(ctx);
    calitrace_nflog_tg: NflogTg, |ctx| nflog(ctx);
    calitrace_nft_log_eval: NftLogEval, |ctx| nft_log(ctx);
}

/// Notes the call and goes on with the body. The note is this CPU's, and the kernel runs no other kprobe program on it
/// meanwhile (`bpf_prog_active`, `kernel/trace/bpf_trace.c`).
#[inline(always)]
fn hand_over(ctx: &ProbeContext, hook: Hook, call: Option<Call>) -> u32 {
    if let (Some(call), Some(note)) = (call, maps::call()) {
        // SAFETY: a map value of this CPU.
        unsafe {
            note.write(Call {
                hook: hook as u32,
                ..call
            });
            BODIES.tail_call(ctx, BODY);
        }
    }
    0
}

#[kprobe]
#[inline(always)]
fn calitrace_function(_ctx: ProbeContext) -> u32 {
    if let Some(note) = maps::call() {
        // SAFETY: a map value of this CPU, written by the stub before.
        observe(&unsafe { note.read() });
    }
    0
}

#[fentry]
#[inline(always)]
fn calitrace_ip_forward_entry(ctx: FEntryContext) -> i32 {
    enter(Hook::IpForward, packet_at(&ctx, 0))
}

#[fentry]
#[inline(always)]
fn calitrace_iptunnel_xmit_entry(ctx: FEntryContext) -> i32 {
    enter(Hook::IptunnelXmit, tunnel(&ctx))
}

#[inline(always)]
fn enter(hook: Hook, call: Option<Call>) -> i32 {
    if let Some(call) = call {
        observe(&Call {
            hook: hook as u32,
            ..call
        });
    }
    0
}

/// The body.
#[inline(always)]
pub(super) fn observe(call: &Call) {
    let (netns, ifindex) = tracing::device(call.skb);
    let outcome = maps::nested_draft(|draft| packet(call, (netns, ifindex), draft)).unwrap_or(Outcome::NonIp);
    account::count(call.hook, netns, 0, outcome);
}

#[inline(always)]
fn packet(call: &Call, (netns, ifindex): (u64, u32), draft: &mut Draft) -> Outcome {
    if !tracing::parsed(call.skb, draft) {
        return Outcome::NonIp;
    }
    let full = &mut settled(draft).record;
    if !account::in_scope(&full.plain) {
        return Outcome::OutOfScope;
    }
    full.plain.netns = netns;
    full.plain.ifindex = ifindex;
    if call.outer_kind != 0 {
        mapped(call.outer_src.to_ne_bytes(), &mut full.outer.src);
        mapped(call.outer_dst.to_ne_bytes(), &mut full.outer.dst);
        full.outer.kind = call.outer_kind;
        full.outer.ttl = call.outer_ttl;
        full.outer.vni = call.vni;
    }
    if call.told != 0 {
        full.plain.flags |= Flags::TOLD;
        full.plain.reason = call.reason;
        full.tail.location = call.location;
    }
    tracing::segmentation(call.skb, full);
    if call.prefix != 0 {
        return logged(call, draft);
    }
    account::record(full, call.hook, call.skb)
}

/// A rule logs the packet. Without a prefix it has nothing to say.
#[inline(always)]
fn logged(call: &Call, draft: &mut Draft) -> Outcome {
    let prefix = &raw mut draft.prefix;
    for index in 0..PREFIX / 8 {
        // SAFETY: within the array. Volatile, or the compiler makes a call of `memset` of it.
        unsafe { prefix.cast::<u64>().add(index).write_volatile(0) };
    }
    // SAFETY: the helper checks the address it reads from, and writes no more than the array, with a 0 at the end.
    let length = unsafe { bpf_probe_read_kernel_str(prefix.cast(), PREFIX as u32, call.prefix as *const _) };
    // With the 0.
    if length <= 1 {
        return Outcome::Filtered;
    }
    account::record_logged(draft, call.hook, call.skb)
}
