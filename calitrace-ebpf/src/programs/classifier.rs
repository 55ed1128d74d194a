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
    answers, conntrack,
    maps::{self, Draft, Scope, settled},
    parse::{self, At, Glance},
    transport,
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
    // SAFETY: fields of the program's context.
    let (protocol, ifindex) = unsafe { ((*skb).protocol as u16, (*skb).ifindex) };
    // The loader is privileged, so the verifier lets the context be used as a number: it is the `sk_buff`'s address.
    let (netns, slot) = account::interface(ctx.as_ptr() as u64, ifindex, u32::from(HOOK));
    let outcome = if protocol != parse::ETH_P_IP && protocol != parse::ETH_P_IPV6 {
        Outcome::NonIp
    } else {
        // What a pod sends or gets is always recorded.
        let glance = if matches!(hook.place(), Place::Workload) {
            Glance::Unclear
        } else {
            let at = match hook {
                Hook::UplinkIngress => At::UplinkIngress(netns),
                Hook::UplinkEgress => At::UplinkEgress,
                _ => At::Tunnel,
            };
            parse::glance(skb, protocol == parse::ETH_P_IPV6, at)
        };
        // Translated, it has a pod's address no more; on its way in, conntrack has not seen it yet. What the node sends
        // itself (most that is out of scope, and all that is encapsulated) came from no device, and is not looked up.
        let translated = HOOK == Hook::UplinkEgress as u8
            && matches!(glance, Glance::OutOfScope | Glance::Carrier)
            // SAFETY: a field of the program's context.
            && unsafe { (*skb).ingress_ifindex } != 0
            && conntrack::in_scope(ctx.as_ptr() as u64);
        if glance == Glance::OutOfScope && !translated {
            Outcome::OutOfScope
        } else {
            let scope = match glance {
                _ if translated => Scope::Translated,
                Glance::InScope => Scope::Inside,
                Glance::Carrier => Scope::Outside,
                _ => Scope::Unknown,
            };
            look_into::<HOOK>(ctx, protocol, netns, scope)
        }
    };
    account::count_at(slot, outcome);
    TC_ACT_UNSPEC
}

/// Parses the packet, and records it if it is in scope.
#[inline(always)]
fn look_into<const HOOK: u8>(ctx: &TcContext, protocol: u16, netns: u64, scope: Scope) -> Outcome {
    let skb = ctx.skb.skb;
    // SAFETY: fields of the program's context.
    let (ifindex, gso_size, gso_segs) = unsafe { ((*skb).ifindex, (*skb).gso_size, (*skb).gso_segs) };
    let Some(draft) = maps::draft() else {
        return Outcome::NonIp;
    };
    // There the verifier forgets it, and walks the rest once.
    draft.scope = scope as u32;
    if !parsed(skb, protocol, settled(draft)) {
        debug!(ctx, "interface {} of namespace {}: not parsed", ifindex, netns);
        return Outcome::NonIp;
    }
    let draft = settled(draft);
    if HOOK == Hook::UplinkEgress as u8 && draft.scope == Scope::Translated as u32 {
        answers::expect(netns, &draft.record.plain);
    }
    let in_scope = HOOK == Hook::WorkloadIngress as u8
        || HOOK == Hook::WorkloadEgress as u8
        || draft.scope == Scope::Inside as u32
        || (HOOK == Hook::UplinkEgress as u8 && draft.scope == Scope::Translated as u32)
        || account::in_scope(&draft.record.plain)
        || (HOOK == Hook::UplinkIngress as u8
            && (answers::is_expected(netns, &draft.record) || is_about_tunnel(skb, draft)));
    if !in_scope {
        return Outcome::OutOfScope;
    }
    let full = &mut settled(draft).record;
    full.plain.netns = netns;
    full.plain.ifindex = ifindex;
    full.plain.gso_size = gso_size as u16;
    full.plain.gso_segs = gso_segs as u16;
    let outcome = account::record(full, u32::from(HOOK), ctx.as_ptr() as u64);
    if outcome == Outcome::Recorded {
        debug!(
            ctx,
            "hook {} interface {} protocol {} length {}", HOOK, ifindex, full.plain.proto, full.plain.length
        );
    }
    outcome
}

#[inline(always)]
fn parsed(skb: *mut __sk_buff, protocol: u16, draft: &mut Draft) -> bool {
    match SkbView::new(skb, draft) {
        Some(view) => parse::packet(&view, protocol, settled(draft)),
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
    let Some(view) = SkbView::new(skb, draft) else {
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
