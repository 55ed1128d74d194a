//! `cargo xtask setup`: what building, testing and the demo take. Each part first looks, installs only what is missing,
//! and says what it did; with nothing missing it only looks.

pub(crate) mod jc;
mod linker;
mod packages;
mod toolchain;

use anyhow::Result;

pub(crate) use packages::{FUZZ, GO, GUESTS, LAB, PYTHON, TRAFFIC, require as require_programs};

/// All that any verb takes.
pub(crate) fn everything() -> Result<()> {
    for_build()?;
    for_fuzz()?;
    for_tests()?;
    jc::require()
}

/// What `cargo build` takes. Needs no root.
pub(crate) fn for_build() -> Result<()> {
    toolchain::require()?;
    linker::require()
}

/// What the fuzz targets take besides. Needs root if a program is missing.
pub(crate) fn for_fuzz() -> Result<()> {
    require_programs(&FUZZ)
}

/// The programs of the tests, which run in the lab. Needs root if one is missing.
pub(crate) fn for_tests() -> Result<()> {
    for_lab()?;
    require_programs(&TRAFFIC)
}

/// What virtual machines take. Needs root if a program is missing.
pub(crate) fn for_guests() -> Result<()> {
    require_programs(&GUESTS)
}

/// What renders Felix' rule sets and loads them. Needs root if a program is missing.
pub(crate) fn for_felix_rules() -> Result<()> {
    for_tests()?;
    require_programs(&GO)
}

/// The programs of the lab and the demo. Needs root if one is missing.
pub(crate) fn for_lab() -> Result<()> {
    require_programs(&LAB)
}
