//! bpf-linker, in the one version that reads this project's compiler (see `rust-toolchain.toml`).

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::step::{output_of, run_quietly, say};
use crate::workspace;

/// The last one that brings no LLVM of its own but loads the compiler's: 0.11 wants the system's LLVM 22
/// (aya-rs/bpf-linker, release 0.11.0).
const VERSION: &str = "0.10.4";

/// Installs bpf-linker if neither the workspace nor the path has it in the right version.
///
/// Where there is none it goes where `cargo install` puts it, for every checkout to use. Where there is one of another
/// version it is left alone, since another project may depend on it, and ours goes into `target/tools`.
pub(crate) fn require() -> Result<()> {
    let ours = workspace::tools().join("bin/bpf-linker");
    let on_path = workspace::find_program("bpf-linker");
    // `calitrace/build.rs` looks in the same two places in the same order.
    let used = if ours.is_file() {
        Some(ours)
    } else {
        on_path.clone()
    };
    if let Some(file) = used
        && version_of(&file).as_deref() == Some(VERSION)
    {
        say(&format!("bpf-linker: {} is {VERSION}", file.display()));
        return Ok(());
    }
    say("bpf-linker: is built from source now; takes two to five minutes");
    let mut command = Command::new("cargo");
    command.args([
        "install",
        "bpf-linker",
        "--version",
        VERSION,
        "--locked",
        "--force",
    ]);
    if let Some(other) = on_path {
        let version = version_of(&other).unwrap_or_else(|| "of unknown version".to_owned());
        say(&format!(
            "bpf-linker: {} is {version} and stays as it is",
            other.display()
        ));
        command.arg("--root").arg(workspace::tools());
    }
    run_quietly("bpf-linker", &mut command)
}

/// What the linker says of itself; none if it does not run.
fn version_of(file: &Path) -> Option<String> {
    let said = output_of(Command::new(file).arg("--version")).ok()?;
    said.trim().strip_prefix("bpf-linker ").map(str::to_owned)
}
