//! The TC programs: one body, one entry point a hook.
#![expect(
    clippy::needless_pass_by_value,
    reason = "aya's macro hands the context over by value"
)]

use aya_ebpf::{EbpfContext as _, bindings::__sk_buff, macros::classifier, programs::TcContext};
use aya_log_ebpf::debug;
use calitrace_ebpf::{Flags, Hook, Place};

use super::{
    account::{self, Outcome},
    maps::{self, Draft, settled},
    parse, transport,
    view::SkbView,
};

/// "Continue with the next program": any other code would end the chain before Calico's own programs
/// (`include/net/tcx.h`, `net/sched/cls_bpf.c`).
const TC_ACT_UNSPEC: i32 = -1;

/// The body. A constant parameter, so that each program has its own copy down to the log messages: a function that
/// several share would be a call.
#[inline(always)]
fn observe<const HOOK: u8>(ctx: &TcContext) -> i32 {
    let Some(hook) = Hook::from_number(HOOK) else {
        return TC_ACT_UNSPEC;
    };
    let skb = ctx.skb.skb;
    // The loader is privileged, so the verifier lets the context be used as a number: it is the `sk_buff`'s address.
    let address = ctx.as_ptr() as u64;
    // SAFETY: fields of the program's context.
    let (protocol, ifindex, gso_size, gso_segs) =
        unsafe { ((*skb).protocol, (*skb).ifindex, (*skb).gso_size, (*skb).gso_segs) };
    let netns = account::namespace(address);
    let Some(draft) = maps::draft() else {
        return TC_ACT_UNSPEC;
    };
    let parsed = parsed(skb, protocol as u16, draft);
    let draft = settled(draft);
    let in_scope = parsed
        && (matches!(hook.place(), Place::Workload)
            || account::in_scope(&draft.record.plain)
            || (matches!(hook, Hook::UplinkIngress) && is_about_tunnel(skb, draft)));
    let full = &mut settled(draft).record;
    let outcome = if !parsed {
        if protocol as u16 == parse::ETH_P_IP || protocol as u16 == parse::ETH_P_IPV6 {
            debug!(ctx, "interface {} of namespace {}: not parsed", ifindex, netns);
        }
        Outcome::NonIp
    } else if !in_scope {
        Outcome::OutOfScope
    } else {
        full.plain.netns = netns;
        full.plain.ifindex = ifindex;
        full.plain.gso_size = gso_size as u16;
        full.plain.gso_segs = gso_segs as u16;
        account::record(full, u32::from(HOOK), address)
    };
    account::count(u32::from(HOOK), netns, ifindex, outcome);
    if outcome == Outcome::Recorded {
        debug!(
            ctx,
            "hook {} interface {} protocol {} length {}", HOOK, ifindex, full.plain.proto, full.plain.length
        );
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn parsed(skb: *mut __sk_buff, protocol: u16, draft: &mut Draft) -> bool {
    match SkbView::new(skb) {
        Some(view) => parse::packet(&view, protocol, draft),
        None => false,
    }
}

/// Whether the packet is an ICMP error of the underlay to this node about a packet of a pod in its tunnel.
#[inline(always)]
fn is_about_tunnel(skb: *mut __sk_buff, draft: &mut Draft) -> bool {
    // Before the view is made a second time: this is asked of every packet that is out of scope.
    if draft.record.plain.flags & Flags::ICMP_ERROR == 0 {
        return false;
    }
    let Some(view) = SkbView::new(skb) else {
        return false;
    };
    transport::quoted_inside(&view, draft).is_some() && account::quote_in_scope(&draft.record)
}

#[classifier]
#[inline(always)]
fn calitrace_workload_ingress(ctx: TcContext) -> i32 {
    observe::<{ Hook::WorkloadIngress as u8 }>(&ctx)
}

#[classifier]
#[inline(always)]
fn calitrace_workload_egress(ctx: TcContext) -> i32 {
    observe::<{ Hook::WorkloadEgress as u8 }>(&ctx)
}

#[classifier]
#[inline(always)]
fn calitrace_tunnel_ingress(ctx: TcContext) -> i32 {
    observe::<{ Hook::TunnelIngress as u8 }>(&ctx)
}

#[classifier]
#[inline(always)]
fn calitrace_tunnel_egress(ctx: TcContext) -> i32 {
    observe::<{ Hook::TunnelEgress as u8 }>(&ctx)
}

#[classifier]
#[inline(always)]
fn calitrace_uplink_ingress(ctx: TcContext) -> i32 {
    observe::<{ Hook::UplinkIngress as u8 }>(&ctx)
}

#[classifier]
#[inline(always)]
fn calitrace_uplink_egress(ctx: TcContext) -> i32 {
    observe::<{ Hook::UplinkEgress as u8 }>(&ctx)
}

/// For benchmarks: what the others' cost is compared with.
#[classifier]
#[inline(always)]
fn calitrace_bare(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}
