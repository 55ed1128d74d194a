//! What the programs that get a `struct sk_buff *` from the kernel have in common: the drop tracepoint and the
//! functions.

use calitrace_ebpf::Full;

use super::{
    account,
    maps::{Draft, known},
    parse,
    view::{KernelView, field},
};

/// Fills the draft's record from the packet of a `struct sk_buff *`; false if it is no IP packet.
#[inline(always)]
pub(super) fn parsed(skb: u64, draft: &mut Draft) -> bool {
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

/// Namespace and index of the packet's device; zeros if it has none.
#[inline(always)]
pub(super) fn device(skb: u64) -> (u64, u32) {
    let dev = known!(skb_dev)
        .and_then(|offset| field::<u64>(skb, offset))
        .unwrap_or(0);
    account::device(dev)
}

/// Reads `gso_size` and `gso_segs` from the `skb_shared_info` at the end of the buffer.
#[inline(always)]
pub(super) fn segmentation(skb: u64, full: &mut Full) {
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
