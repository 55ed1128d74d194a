//! Raw tracepoint `skb:kfree_skb`: packets that the kernel frees as drops, in all namespaces.

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};
use aya_log_ebpf::debug;
use calitrace_ebpf::{Flags, Hook};

use super::{
    account::{self, Outcome},
    maps::{self, Draft, known, settled},
    tracing,
};

const HOOK: u32 = Hook::KfreeSkb as u32;

#[raw_tracepoint(tracepoint = "kfree_skb")]
#[expect(
    clippy::needless_pass_by_value,
    reason = "aya's macro hands the context over by value"
)]
fn calitrace_kfree_skb(ctx: RawTracePointContext) -> i32 {
    let skb: u64 = ctx.arg(0);
    let (netns, ifindex) = tracing::device(skb);
    let outcome =
        maps::nested_draft(|draft| observe(&ctx, skb, (netns, ifindex), draft)).unwrap_or(Outcome::NonIp);
    account::count(HOOK, netns, 0, outcome);
    if outcome == Outcome::Recorded {
        maps::remember_drop(skb);
    }
    0
}

#[inline(always)]
fn observe(ctx: &RawTracePointContext, skb: u64, (netns, ifindex): (u64, u32), draft: &mut Draft) -> Outcome {
    if !tracing::parsed(skb, draft) {
        return Outcome::NonIp;
    }
    let full = &mut settled(draft).record;
    if !account::in_scope(&full.plain) {
        return Outcome::OutOfScope;
    }
    full.plain.flags |= Flags::DROP;
    full.plain.netns = netns;
    full.plain.ifindex = ifindex;
    full.tail.location = ctx.arg(1);
    // The third argument is there from 5.17 on.
    if known!(kfree_has_reason) == Some(1) {
        full.plain.reason = ctx.arg(2);
    }
    tracing::segmentation(skb, full);
    debug!(
        ctx,
        "drop, reason {} at {:x}", full.plain.reason, full.tail.location
    );
    account::record(full, HOOK, skb)
}
