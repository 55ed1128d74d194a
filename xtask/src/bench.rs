//! `cargo xtask bench`: what calitrace costs and how fast it is, printed and never judged (README.md, "Development").

use anyhow::{Context as _, Result};

use crate::step;
use crate::{cargo, root, setup};

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Copy, clap::Subcommand)]
enum What {
    /// Nanoseconds a packet of each kind costs at a TC hook (as root)
    Programs,
    /// Observations a second from ring records to packet traces, and the heap with 100,000 open traces
    Correlate,
    /// Reading 10,000 rules as Felix writes them, finding a drop's culprits in them, and the heap that they take
    Rules,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::for_build()?;
    let (name, as_root) = match options.what {
        What::Programs => ("programs", true),
        What::Correlate => ("correlate", false),
        What::Rules => ("rules", false),
    };
    // Built as the caller; only the measuring needs root.
    let built = cargo::build(
        "build",
        &["bench", "--package", "calitrace", "--bench", name, "--no-run"],
    )?;
    let program = built
        .into_iter()
        .find(|built| built.kind == "bench")
        .context("cargo built no benchmark")?;
    let mut command = if as_root {
        root::command("running eBPF programs", program.file.as_os_str(), &[])?
    } else {
        std::process::Command::new(&program.file)
    };
    // As cargo does: so criterion measures, and keeps what it measured in target/criterion for the next run to compare.
    command.arg("--bench").current_dir(&program.package_folder);
    step::run(name, &mut command)
}
