//! Raw tracepoint `skb:kfree_skb`: packets that the kernel frees as drops, in all namespaces.

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};
use aya_log_ebpf::debug;
use calitrace_ebpf::{Flags, Full, Hook};

use super::{
    account::{self, Outcome},
    maps::{self, Draft, known, settled},
    parse,
    view::{KernelView, field},
};

#[raw_tracepoint(tracepoint = "kfree_skb")]
#[expect(
    clippy::needless_pass_by_value,
    reason = "aya's macro hands the context over by value"
)]
fn calitrace_kfree_skb(ctx: RawTracePointContext) -> i32 {
    let skb: u64 = ctx.arg(0);
    let dev = known!(skb_dev)
        .and_then(|offset| field::<u64>(skb, offset))
        .unwrap_or(0);
    let (netns, ifindex) = account::device(dev);
    let outcome =
        maps::nested_draft(|draft| observe(&ctx, skb, (netns, ifindex), draft)).unwrap_or(Outcome::NonIp);
    account::count(Hook::KfreeSkb, netns, 0, outcome);
    0
}

#[inline(always)]
fn observe(ctx: &RawTracePointContext, skb: u64, (netns, ifindex): (u64, u32), draft: &mut Draft) -> Outcome {
    if !parsed(skb, draft) {
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
    segmentation(skb, full);
    debug!(
        ctx,
        "drop, reason {} at {:x}", full.plain.reason, full.tail.location
    );
    account::record(full, Hook::KfreeSkb, skb)
}

#[inline(always)]
fn parsed(skb: u64, draft: &mut Draft) -> bool {
    let Some(protocol) = known!(skb_protocol).and_then(|offset| field::<u16>(skb, offset)) else {
        return false;
    };
    if protocol != parse::ETH_P_IP && protocol != parse::ETH_P_IPV6 {
        return false;
    }
    match KernelView::new(skb) {
        Some(view) => parse::packet(&view, protocol, draft),
        None => false,
    }
}

/// Reads `gso_size` and `gso_segs` from the `skb_shared_info` at the end of the buffer.
#[inline(always)]
fn segmentation(skb: u64, full: &mut Full) {
    let (Some(head), Some(end), Some(size), Some(segs)) = (
        known!(skb_head),
        known!(skb_end),
        known!(shinfo_gso_size),
        known!(shinfo_gso_segs),
    ) else {
        return;
    };
    let (Some(head), Some(end)) = (field::<u64>(skb, head), field::<u32>(skb, end)) else {
        return;
    };
    let shared_info = head + u64::from(end);
    full.plain.gso_size = field(shared_info, size).unwrap_or(0);
    full.plain.gso_segs = field(shared_info, segs).unwrap_or(0);
}
