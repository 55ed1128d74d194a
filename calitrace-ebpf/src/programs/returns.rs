//! Returns of kernel functions: what netfilter decided, and under which address a packet goes on.
//!
//! With a trampoline (fexit) one program sees arguments and result. Without, a kprobe notes the arguments under the
//! address of the function's frame, and a kretprobe finds them there.
#![expect(
    clippy::needless_pass_by_value,
    reason = "aya's macros hand the context over by value"
)]

use aya_ebpf::{
    EbpfContext as _,
    macros::{fexit, kprobe, kretprobe},
    programs::{FExitContext, ProbeContext, RetProbeContext},
};
use calitrace_ebpf::{Flags, Hook};

use super::{
    account::{self, Outcome},
    functions,
    maps::{self, Call, Draft, FRAMES, Frame, known, settled},
    tracing,
    view::{field, is_kernel_address},
};

/// `NF_ACCEPT` comes back as 1, a drop as a negative error, and 0 says that the packet was stolen or queued
/// (`nf_hook_slow`, net/netfilter/core.c, 5.10 to 6.18).
const ACCEPTED: i32 = 1;

/// `nf_hook_slow(skb, state, entries, index)`
#[fexit]
#[inline(always)]
fn calitrace_nf_hook_slow_exit(ctx: FExitContext) -> i32 {
    let context = ctx.as_ptr() as u64;
    if let Some(verdict) = functions::argument(context, 4) {
        netfilter(verdict as i32, || {
            Some(Frame {
                skb: functions::argument(context, 0)?,
                second: functions::argument(context, 1)?,
            })
        });
    }
    0
}

/// `skb_clone(skb, gfp)`
#[fexit]
#[inline(always)]
fn calitrace_skb_clone_exit(ctx: FExitContext) -> i32 {
    let context = ctx.as_ptr() as u64;
    if let (Some(skb), Some(clone)) = (functions::argument(context, 0), functions::argument(context, 2)) {
        cloned(skb, clone);
    }
    0
}

/// `pskb_expand_head(skb, nhead, ntail, gfp)`
#[fexit]
#[inline(always)]
fn calitrace_pskb_expand_head_exit(ctx: FExitContext) -> i32 {
    let context = ctx.as_ptr() as u64;
    if let (Some(skb), Some(0)) = (functions::argument(context, 0), functions::argument(context, 4)) {
        moved(skb);
    }
    0
}

/// Notes the first two arguments of any of these functions.
#[kprobe]
#[inline(always)]
fn calitrace_enter(ctx: ProbeContext) -> u32 {
    let (Some(skb), Some(second)) = (ctx.arg(0), ctx.arg(1)) else {
        return 0;
    };
    // Full is no error: the map forgets the oldest, whose return must have been missed.
    let _ = FRAMES.insert(stack(ctx.regs), Frame { skb, second }, 0);
    0
}

#[kretprobe]
#[inline(always)]
fn calitrace_nf_hook_slow_return(ctx: RetProbeContext) -> u32 {
    netfilter(ctx.ret(), || frame(&ctx));
    0
}

#[kretprobe]
#[inline(always)]
fn calitrace_skb_clone_return(ctx: RetProbeContext) -> u32 {
    if let Some(frame) = frame(&ctx) {
        cloned(frame.skb, ctx.ret());
    }
    0
}

#[kretprobe]
#[inline(always)]
fn calitrace_pskb_expand_head_return(ctx: RetProbeContext) -> u32 {
    if ctx.ret::<i32>() == 0
        && let Some(frame) = frame(&ctx)
    {
        moved(frame.skb);
    }
    0
}

/// The stack pointer: at a function's entry, the address of its return address.
#[inline(always)]
fn stack(regs: *mut aya_ebpf::bindings::pt_regs) -> u64 {
    // SAFETY: a field of the program's context.
    unsafe {
        #[cfg(bpf_target_arch = "x86_64")]
        return (*regs).rsp;
        #[cfg(bpf_target_arch = "aarch64")]
        return (*regs).sp;
    }
}

/// What was noted at the entry of the function that returns. The return address is popped by then; some kernels have
/// pushed one again on the way to the probe.
#[inline(always)]
fn frame(ctx: &RetProbeContext) -> Option<Frame> {
    let stack = stack(ctx.regs);
    for above in [8_u64, 0, 16] {
        let key = stack.wrapping_sub(above);
        // SAFETY: written by this very call of the function, which nobody else has the frame of.
        if let Some(frame) = unsafe { FRAMES.get(key) } {
            return Some(*frame);
        }
    }
    None
}

/// Netfilter's verdict on a packet. Most are accepted, and of those nothing is told but their number.
#[inline(always)]
fn netfilter(verdict: i32, frame: impl FnOnce() -> Option<Frame>) {
    const HOOK: u32 = Hook::NfHookSlow as u32;
    if verdict == ACCEPTED {
        account::count(HOOK, 0, 0, Outcome::Filtered);
        return;
    }
    let Some(Frame { skb, second: state }) = frame() else {
        return;
    };
    let netns = known!(nf_state_net)
        .and_then(|offset| field::<u64>(state, offset))
        .and_then(account::network)
        .unwrap_or(0);
    let outcome = maps::nested_draft(|draft| {
        if verdict < 0 {
            // It is freed: what it was the drop's record tells, and that there is one that it is ours to tell of.
            if !maps::was_dropped(skb) {
                return Outcome::OutOfScope;
            }
        } else if !tracing::parsed(skb, draft) {
            return Outcome::NonIp;
        } else if !account::in_scope(&draft.record.plain) {
            return Outcome::OutOfScope;
        }
        judged(settled(draft), state, verdict, netns);
        account::record(&mut draft.record, HOOK, skb)
    });
    account::count(HOOK, netns, 0, outcome.unwrap_or(Outcome::NonIp));
}

/// Writes down where netfilter was asked, and what it said.
#[inline(always)]
fn judged(draft: &mut Draft, state: u64, verdict: i32, netns: u64) {
    let device = |offset: Option<usize>| {
        let device: u64 = offset.and_then(|offset| field(state, offset)).unwrap_or(0);
        account::device(device).1
    };
    let byte = |offset: Option<usize>| -> u8 {
        // Of a wider number the first byte, which is the lowest on the machines there are.
        offset.and_then(|offset| field(state, offset)).unwrap_or(u8::MAX)
    };
    let (hook, family) = (byte(known!(nf_state_hook)), byte(known!(nf_state_pf)));
    let (input, output) = (device(known!(nf_state_in)), device(known!(nf_state_out)));
    let full = &mut draft.record;
    full.plain.flags |= Flags::TOLD;
    full.plain.netns = netns;
    full.plain.ifindex = if input != 0 { input } else { output };
    full.plain.reason = u32::from(family) << 16 | u32::from(hook) << 8 | u32::from(verdict == 0);
    full.tail.location = u64::from(input) << 32 | u64::from(output);
}

/// A packet goes on under a second address.
#[inline(always)]
fn cloned(skb: u64, clone: u64) {
    if is_kernel_address(clone) {
        functions::observe(&Call {
            skb,
            hook: Hook::SkbClone as u32,
            told: 1,
            location: clone,
            ..Call::EMPTY
        });
    }
}

/// A packet's bytes have moved to another buffer.
#[inline(always)]
fn moved(skb: u64) {
    functions::observe(&Call {
        skb,
        hook: Hook::PskbExpandHead as u32,
        ..Call::EMPTY
    });
}
