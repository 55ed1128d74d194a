//! The programs: a packet is parsed (`parse`, `transport`) through a `view` of its bytes, judged and counted
//! (`account`), and recorded in the ring. They observe only: nothing is written, pulled or marked, and every TC
//! program returns `TC_ACT_UNSPEC`, so that those behind it run as if it were not there.
//!
//! Each program is one function without calls, and everything is inlined into it: in a program with calls, verifiers
//! before 6.4 or so take every scalar for one whose exact value matters (`mark_reg_unknown`, kernel/bpf/verifier.c), can
//! no longer tell states alike, and walk millions of instructions until they give up.
#![expect(
    clippy::inline_always,
    reason = "a BPF function takes five arguments at most and has a stack of its own; the compiler does not know"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "the kernel hands 8 and 16 bit fields over in wide registers, and sizes of headers are small"
)]

mod account;
mod answers;
mod classifier;
mod conntrack;
mod drops;
mod functions;
mod maps;
mod nat;
mod parse;
mod returns;
mod tracing;
mod transport;
mod view;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the object is built without panicking paths, and the verifier would refuse the loop.
    loop {}
}

/// `probe_read_kernel` and `ktime_get_ns` are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
