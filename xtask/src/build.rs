//! `cargo xtask build`: the release binary, after what it takes has been set up.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::step::say;
use crate::{cargo, setup};

pub(crate) fn run() -> Result<()> {
    setup::for_build()?;
    binary().map(drop)
}

/// Builds it and tells where it is; what building takes must be there.
pub(crate) fn binary() -> Result<PathBuf> {
    let built = cargo::build("build", &["build", "--release", "--package", "calitrace"])?;
    let binary = built
        .into_iter()
        .find(|built| built.kind == "bin")
        .context("cargo built no binary")?;
    let bytes = fs::metadata(&binary.file)
        .with_context(|| format!("size of {}", binary.file.display()))?
        .len();
    say(&format!(
        "build: {} ({}.{} MB)",
        binary.file.display(),
        bytes / 1_000_000,
        bytes / 100_000 % 10
    ));
    Ok(binary.file)
}
