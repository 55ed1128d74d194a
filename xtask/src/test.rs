//! `cargo xtask test`: all tests, from cheap to dear, layer by layer (README.md, "Development").
//!
//! Test programs are built as the caller; those that need root are run by root or sudo. A layer that cannot run is
//! counted as skipped, and in CI, the guests apart, as failed.

mod failures;
mod layer;
mod report;
mod run;
mod totals;

use std::env;
use std::ffi::OsString;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::cargo::Executable;
use crate::step::{complain, say};
use crate::{cargo, fuzz, root, setup, vm, workspace};
pub(crate) use failures::Failures;
pub(crate) use layer::{Layer, plan};
pub(crate) use report::Report;
use run::Environment;
pub(crate) use totals::Totals;

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run these layers only
    #[arg(value_enum)]
    layers: Vec<Layer>,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// Runs the layers and ends with what failed, and their totals, alone on a line.
pub(crate) fn run(options: &Options) -> Result<()> {
    let chosen: Vec<Layer> = Layer::ALL
        .into_iter()
        .filter(|layer| options.layers.is_empty() || options.layers.contains(layer))
        .collect();
    setup::for_build()?;
    if chosen.iter().any(|layer| layer.needs_root()) {
        setup::for_tests()?;
    }
    if chosen.contains(&Layer::EndToEnd) {
        setup::jc::require()?;
    }
    let built = build()?;
    let plan = plan(&built)?;
    let environment = Environment::new(product(&built)?)?;
    let in_ci = env::var_os("CI").is_some_and(|value| value == "true");

    let mut sum = Report::default();
    let mut times = Vec::new();
    for layer in chosen {
        let start = Instant::now();
        say(&format!("\nlayer {layer}"));
        let mut report = if layer == Layer::Vm {
            guests(&plan, &built, options.only.as_deref())?
        } else if layer == Layer::Fuzz {
            fuzz::layer(options.only.as_deref())?
        } else if layer.needs_root() && !root::available() {
            say(&format!(
                "layer {layer}: skipped: needs root, and there is no sudo here"
            ));
            Report::skipped()
        } else {
            run_layer(layer, &plan, &environment, options.only.as_deref())?
        };
        if in_ci && layer.required_in_ci() && report.totals.passed + report.totals.failed == 0 {
            let what = "ran no test, and none may be left out in CI";
            complain(&format!("layer {layer}: {what}"));
            report.fail(&format!("layer {layer}"), what);
        }
        times.push(format!(
            "{layer:<8} {}, {:.1} s",
            report.totals,
            start.elapsed().as_secs_f64()
        ));
        sum += report;
    }
    say("");
    let failures = sum.failures.lines();
    for line in &failures {
        say(line);
    }
    if !failures.is_empty() {
        say("");
    }
    for line in &times {
        say(line);
    }
    say(&sum.totals.to_string());
    if sum.totals.failed > 0 {
        bail!("{} of the tests failed; see above", sum.totals.failed);
    }
    Ok(())
}

/// Builds all test programs and the product.
pub(crate) fn build() -> Result<Vec<Executable>> {
    cargo::build_static("tests", &["test", "--workspace", "--no-run"])
}

fn run_layer(
    layer: Layer,
    plan: &[(Layer, &Executable)],
    environment: &Environment,
    only: Option<&str>,
) -> Result<Report> {
    let mut report = Report::default();
    for (_, program) in plan.iter().filter(|(its_layer, _)| *its_layer == layer) {
        report += environment.run(program, layer.needs_root(), only)?;
    }
    if layer == Layer::Unit {
        let mut doc_tests = Command::new("cargo");
        doc_tests
            .current_dir(workspace::root())
            .args(["test", "--quiet", "--workspace", "--doc"]);
        cargo::link_statically(&mut doc_tests)?;
        doc_tests.arg("--").args(only);
        report += run::counted("documentation", &mut doc_tests)?;
    }
    Ok(report)
}

/// The layer of guests. Skipped where they cannot be had, with the reason.
fn guests(plan: &[(Layer, &Executable)], built: &[Executable], only: Option<&str>) -> Result<Report> {
    let kernels = match vm::prepare() {
        Ok(kernels) => kernels,
        Err(error) => {
            say(&format!("layer {}: skipped: {error:#}", Layer::Vm));
            return Ok(Report::skipped());
        }
    };
    let programs: Vec<&Executable> = plan.iter().map(|(_, program)| *program).collect();
    vm::subset(&kernels, &programs, &product(built)?, only)
}

/// The calitrace binary of this build, which the end-to-end tests run.
pub(crate) fn product(built: &[Executable]) -> Result<OsString> {
    let binary = built
        .iter()
        .find(|built| built.kind == "bin" && built.target == "calitrace" && !built.is_test);
    Ok(binary
        .context("cargo built no calitrace binary")?
        .file
        .clone()
        .into_os_string())
}
