//! `cargo xtask lint`: the format, and clippy over the whole workspace, on the host and on the BPF target.

use std::process::Command;

use anyhow::Result;

use crate::step;
use crate::{setup, workspace};

pub(crate) fn run() -> Result<()> {
    setup::for_build()?;
    setup::for_fuzz()?;
    step::run("format", cargo().args(["fmt", "--all", "--check"]))?;
    step::run(
        "clippy",
        cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    )?;
    // A workspace of its own; what both take is built once.
    let fuzz = workspace::root().join("calitrace/fuzz/Cargo.toml");
    step::run(
        "format of the fuzz targets",
        cargo().args(["fmt", "--check", "--manifest-path"]).arg(&fuzz),
    )?;
    step::run(
        "clippy of the fuzz targets",
        cargo()
            .args(["clippy", "--locked", "--all-targets", "--manifest-path"])
            .arg(&fuzz)
            .args(["--target-dir", "target", "--", "-D", "warnings"]),
    )?;
    // The programs are empty on the host. As in `calitrace/build.rs`: core is built, an unstable feature of cargo.
    step::run(
        "clippy of the eBPF programs",
        cargo()
            .args([
                "clippy",
                "--package",
                "calitrace-ebpf",
                "--bins",
                "--lib",
                "--target",
                "bpfel-unknown-none",
            ])
            .args(["-Z", "build-std=core", "--", "-D", "warnings"])
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", "--cfg=bpf_target_arch=\"x86_64\""),
    )
}

fn cargo() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(workspace::root());
    command
}
