//! `cargo xtask`: the project's only script. One file a verb; this one only tells them apart.

mod bench;
mod build;
mod cargo;
mod demo;
mod felix_rules;
mod fuzz;
mod lab;
mod lint;
mod root;
mod setup;
mod step;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Sets up, builds, tests and shows calitrace. Every verb may be repeated at will.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what building, testing and the demo take and is not there yet
    Setup,
    /// Build target/release/calitrace
    Build,
    /// Two Calico nodes in network namespaces, to look around in
    Lab(lab::Options),
    /// Raise a lab, make its pods talk, and show calitrace beside traceroute
    Demo(demo::Options),
    /// Check the format and run clippy, on the eBPF programs too
    Lint,
    /// Run the tests, layer by layer
    Test(test::Options),
    /// Run the fuzz targets: bytes of others, at random
    Fuzz(fuzz::Options),
    /// Run tests in virtual machines with stock Debian kernels
    Vm(vm::Options),
    /// Render Felix' rule sets with Calico's own packages, and keep what the tools show of them in tests/felix (by hand; needs
    /// Go and root)
    FelixRules,
    /// Measure what calitrace costs and how fast it is
    Bench(bench::Options),
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            step::complain(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Setup => setup::everything(),
        Verb::Build => build::run(),
        Verb::Lab(options) => lab::run(&options),
        Verb::Demo(options) => demo::run(&options),
        Verb::Lint => lint::run(),
        Verb::Test(options) => test::run(&options),
        Verb::Fuzz(options) => fuzz::run(&options),
        Verb::Vm(options) => vm::run(&options),
        Verb::FelixRules => felix_rules::run(),
        Verb::Bench(options) => bench::run(&options),
    }
}
