//! Builds the eBPF object that the binary carries: `$OUT_DIR/calitrace-ebpf`.
//!
//! What `aya-build` 0.2.0 does, with two differences: a build without problems prints nothing, and what is missing on
//! the machine is named together with its remedy. Knows how the object is made; must not know what is in it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The package, its binary, and the name of the object in `OUT_DIR`.
const PACKAGE: &str = "calitrace-ebpf";

#[expect(
    clippy::print_stderr,
    reason = "cargo shows what a failed build script wrote to standard error"
)]
fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .ok_or("the package has no parent folder")?;
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    require_rust_src()?;
    let linker = find_linker(workspace)?;
    for watched in [PACKAGE, "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(watched).display());
    }
    println!("cargo::rerun-if-changed={}", linker.display());

    // A target folder of its own: the outer cargo holds the lock of the usual one while this script runs.
    let target_dir = out_dir.join("ebpf-target");
    let output = Command::new(variable("CARGO")?)
        .current_dir(workspace)
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            PACKAGE,
            "--bin",
            PACKAGE,
            "--target",
            target,
        ])
        // The BPF targets come without a prebuilt core, and building one is an unstable feature of cargo.
        .args(["-Z", "build-std=core"])
        .env("RUSTC_BOOTSTRAP", "1")
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_BUILD_BUILD_DIR", &target_dir)
        .env(
            format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_")),
            &linker,
        )
        .env("CARGO_ENCODED_RUSTFLAGS", rust_flags()?)
        // `cargo clippy` names its driver here: it would check the programs instead of building them.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .output()
        .map_err(|error| format!("cannot run cargo for the eBPF programs: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!(
            "cannot build the eBPF programs (linker: {}): {}\n{said}",
            linker.display(),
            output.status
        ));
    }
    // `--quiet` leaves only the compiler's warnings.
    for line in said.lines().filter(|line| !line.is_empty()) {
        println!("cargo::warning={line}");
    }
    let object = target_dir.join(target).join("release").join(PACKAGE);
    fs::copy(&object, out_dir.join(PACKAGE))
        .map_err(|error| format!("cannot copy the eBPF object {}: {error}", object.display()))?;
    Ok(())
}

/// The compiler flags of the eBPF programs, in cargo's encoding (parted by 0x1f).
fn rust_flags() -> Result<String, String> {
    Ok([
        // aya-ebpf chooses the layout of `pt_regs` by this.
        format!("--cfg=bpf_target_arch=\"{}\"", variable("CARGO_CFG_TARGET_ARCH")?),
        // BTF is made out of the debug information.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ]
    .join("\u{1f}"))
}

fn require_rust_src() -> Result<(), String> {
    let output = Command::new(variable("RUSTC")?)
        .args(["--print", "sysroot"])
        .output()
        .map_err(|error| format!("cannot ask rustc for its sysroot: {error}"))?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if sysroot
        .join("lib/rustlib/src/rust/library/core/src/lib.rs")
        .exists()
    {
        return Ok(());
    }
    Err(missing(&format!(
        "the source of Rust's core library (rust-src) in {}",
        sysroot.display()
    )))
}

/// The bpf-linker that `cargo xtask setup` installed for this workspace, else the one on the path.
fn find_linker(workspace: &Path) -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    [workspace.join("target/tools/bin")]
        .into_iter()
        .chain(env::split_paths(OsStr::new(&path)))
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
        .ok_or_else(|| missing("bpf-linker on the path"))
}

fn missing(what: &str) -> String {
    format!(
        "the eBPF programs need {what}, which is not there.\nRun `cargo xtask setup`: it installs all that the build takes."
    )
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
