//! Components of the Rust toolchain that runs this program, whatever its name is on this machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::step::{output_of, run_quietly, say};

/// Components besides rustc and cargo, and a file in the sysroot by which each is known.
const COMPONENTS: [(&str, &str); 3] = [
    // cargo builds core for the BPF target from it.
    ("rust-src", "lib/rustlib/src/rust/library/core/src/lib.rs"),
    ("clippy", "bin/cargo-clippy"),
    ("rustfmt", "bin/cargo-fmt"),
];

/// Installs what `rust-toolchain.toml` names and is missing. rustup does so by itself when it installs the toolchain,
/// but not for a toolchain that was there before, nor with `RUSTUP_AUTO_INSTALL=0`.
pub(crate) fn require() -> Result<()> {
    let sysroot = PathBuf::from(output_of(Command::new("rustc").args(["--print", "sysroot"]))?.trim_end());
    let missing = missing_components(&sysroot);
    if missing.is_empty() {
        let names = COMPONENTS.map(|(component, _)| component);
        say(&format!(
            "toolchain: {} has {}",
            sysroot.display(),
            names.join(", ")
        ));
        return Ok(());
    }
    // Set by rustup for all that it starts, cargo and so this program among them.
    let Some(toolchain) = env::var_os("RUSTUP_TOOLCHAIN") else {
        bail!(
            "the Rust toolchain in {} lacks {}, and rustup does not manage it: install them as you installed it, \
             or use rustup (https://rustup.rs)",
            sysroot.display(),
            missing.join(", ")
        );
    };
    run_quietly(
        "toolchain",
        Command::new("rustup")
            .args(["component", "add", "--toolchain"])
            .arg(toolchain)
            .args(&missing),
    )
    .context("cannot complete the Rust toolchain")?;
    let missing = missing_components(&sysroot);
    if !missing.is_empty() {
        bail!(
            "rustup installed {}, but not into {}",
            missing.join(", "),
            sysroot.display()
        );
    }
    Ok(())
}

fn missing_components(sysroot: &Path) -> Vec<&'static str> {
    COMPONENTS
        .into_iter()
        .filter(|(_, file)| !sysroot.join(file).exists())
        .map(|(component, _)| component)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_sysroot_lacks_every_component() {
        assert_eq!(
            missing_components(Path::new("/nowhere")),
            ["rust-src", "clippy", "rustfmt"]
        );
    }
}
