//! Builds the eBPF object that the binary carries.

use std::env;

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain, build_ebpf};

fn main() -> Result<()> {
    println!("cargo:rerun-if-env-changed=PATH");
    // `-Z build-std=core` on a stable compiler: the BPF target has no prebuilt core.
    // SAFETY: the build script has one thread, and nothing else reads the environment meanwhile.
    unsafe { env::set_var("RUSTC_BOOTSTRAP", "1") };
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "1.95.0".to_owned());
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../calitrace-ebpf");
    build_ebpf(
        [Package { name: "calitrace-ebpf", root_dir: root, ..Package::default() }],
        Toolchain::Custom(&toolchain),
    )
    .context("cannot build the eBPF programs; `cargo xtask setup` installs what it takes (rust-src, bpf-linker)")
}
