//! jc, with which the end-to-end tests check that others can read `-o traceroute`: taken from Python's package index
//! into a Python environment of the workspace's own.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::step::{output_of, run_quietly, say};
use crate::workspace;

const VERSION: &str = "1.26.1";

/// The folder with the environment's programs.
pub(crate) fn programs() -> PathBuf {
    environment().join("bin")
}

/// Makes the environment, unless it is there with the right version.
pub(crate) fn require() -> Result<()> {
    let jc = programs().join("jc");
    if output_of(Command::new(&jc).arg("--version")).is_ok_and(|said| said.contains(VERSION)) {
        say(&format!("jc: {} is {VERSION}", jc.display()));
        return Ok(());
    }
    super::require_programs(&super::PYTHON)?;
    let python = workspace::find_program("python3").context("no python3 on the path")?;
    run_quietly(
        "jc",
        Command::new(python)
            .args(["-m", "venv", "--clear"])
            .arg(environment()),
    )?;
    run_quietly(
        "jc",
        Command::new(programs().join("pip"))
            .arg("install")
            .arg(format!("jc=={VERSION}")),
    )
}

fn environment() -> PathBuf {
    workspace::tools().join("python")
}
