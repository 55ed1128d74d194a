//! The eBPF programs. Built for the BPF target by `calitrace/build.rs`; empty on the host.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// Atomic addition without compare-and-swap is not on stable; `-Z build-std` needs an unlocked compiler anyway.
#![cfg_attr(
    target_arch = "bpf",
    feature(core_intrinsics),
    expect(internal_features, reason = "see above")
)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod programs;
