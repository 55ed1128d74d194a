//! The TC programs: one body, one entry point a hook.
#![expect(
    clippy::needless_pass_by_value,
    reason = "aya's macro hands the context over by value"
)]

use aya_ebpf::{EbpfContext as _, macros::classifier, programs::TcContext};
use aya_log_ebpf::debug;
use calitrace_ebpf::{Hook, Place};

use super::{
    account::{self, Outcome},
    maps, parse,
    view::SkbView,
};

/// "Continue with the next program": any other code would end the chain before Calico's own programs
/// (`include/net/tcx.h`, `net/sched/cls_bpf.c`).
const TC_ACT_UNSPEC: i32 = -1;

#[inline(always)]
fn observe(ctx: &TcContext, hook: Hook) -> i32 {
    let skb = ctx.skb.skb;
    // The loader is privileged, so the verifier lets the context be used as a number: it is the `sk_buff`'s address.
    let address = ctx.as_ptr() as u64;
    // SAFETY: fields of the program's context.
    let (protocol, ifindex, gso_size, gso_segs) =
        unsafe { ((*skb).protocol, (*skb).ifindex, (*skb).gso_size, (*skb).gso_segs) };
    let netns = account::namespace(address);
    let Some(full) = maps::draft() else {
        return TC_ACT_UNSPEC;
    };
    let outcome = if !parse::packet(&SkbView(skb), protocol as u16, full) {
        if protocol as u16 == parse::ETH_P_IP || protocol as u16 == parse::ETH_P_IPV6 {
            debug!(ctx, "interface {} of namespace {}: not parsed", ifindex, netns);
        }
        Outcome::NonIp
    } else if !matches!(hook.place(), Place::Workload) && !account::in_scope(&full.plain) {
        Outcome::OutOfScope
    } else {
        full.plain.netns = netns;
        full.plain.ifindex = ifindex;
        full.plain.gso_size = gso_size as u16;
        full.plain.gso_segs = gso_segs as u16;
        account::record(full, hook, address)
    };
    account::count(hook, netns, ifindex, outcome);
    if outcome == Outcome::Recorded {
        debug!(
            ctx,
            "hook {} interface {} protocol {} length {}",
            hook as u8,
            ifindex,
            full.plain.proto,
            full.plain.length
        );
    }
    TC_ACT_UNSPEC
}

#[classifier]
fn calitrace_workload_ingress(ctx: TcContext) -> i32 {
    observe(&ctx, Hook::WorkloadIngress)
}

#[classifier]
fn calitrace_workload_egress(ctx: TcContext) -> i32 {
    observe(&ctx, Hook::WorkloadEgress)
}

#[classifier]
fn calitrace_tunnel_ingress(ctx: TcContext) -> i32 {
    observe(&ctx, Hook::TunnelIngress)
}

#[classifier]
fn calitrace_tunnel_egress(ctx: TcContext) -> i32 {
    observe(&ctx, Hook::TunnelEgress)
}

#[classifier]
fn calitrace_uplink_ingress(ctx: TcContext) -> i32 {
    observe(&ctx, Hook::UplinkIngress)
}

#[classifier]
fn calitrace_uplink_egress(ctx: TcContext) -> i32 {
    observe(&ctx, Hook::UplinkEgress)
}
