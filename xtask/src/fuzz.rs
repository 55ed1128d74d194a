//! `cargo xtask fuzz`: feeds what calitrace reads and did not write itself with inputs that nobody would think of
//! (`calitrace/fuzz`, libFuzzer).
//!
//! The targets are built as `cargo fuzz build --sanitizer none` builds them, with flags that the pinned compiler takes from
//! `RUSTC_BOOTSTRAP` only. What libFuzzer finds worth keeping lies in `target/fuzz/corpus` and is taken up again by the
//! next run; an input that fails lies in `target/fuzz/artifacts`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cargo::{self, Executable};
use crate::step::{self, complain, say, text_of};
use crate::test::Report;
use crate::{setup, workspace};

/// Targets, by name; each is a file of `calitrace/fuzz/fuzz_targets`.
const TARGETS: [&str; 7] = ["btf", "filter", "log", "names", "record", "rules", "views"];
/// How long each target runs as a part of `cargo xtask test`, in seconds.
const SHORT: u32 = 4;

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run these targets only: btf, filter, log, names, record, rules, views
    #[arg(value_parser = TARGETS, hide_possible_values = true)]
    targets: Vec<String>,
    /// How long to run each target
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

/// Runs the targets and shows what libFuzzer says.
pub(crate) fn run(options: &Options) -> Result<()> {
    let fuzz = Fuzz::build()?;
    for target in TARGETS {
        if options.targets.is_empty() || options.targets.iter().any(|wanted| wanted == target) {
            step::run(target, &mut fuzz.command(target, options.seconds)?)?;
        }
    }
    Ok(())
}

/// The targets as a layer of the tests: a short run of each is a test.
pub(crate) fn layer(only: Option<&str>) -> Result<Report> {
    let wanted = |target: &&str| only.is_none_or(|only| target.contains(only));
    let targets: Vec<&str> = TARGETS.into_iter().filter(wanted).collect();
    let mut report = Report::default();
    if targets.is_empty() {
        return Ok(report);
    }
    let fuzz = Fuzz::build()?;
    for target in targets {
        let mut command = fuzz.command(target, SHORT)?;
        let output = command
            .output()
            .with_context(|| format!("cannot run `{}`", text_of(&command)))?;
        let said = String::from_utf8_lossy(&output.stderr);
        match inputs(&said) {
            Some(inputs) if output.status.success() => {
                say(&format!("test fuzz::{target} ... ok ({inputs} inputs)"));
                report.totals.passed += 1;
            }
            _ => {
                complain(&said);
                say(&format!("test fuzz::{target} ... FAILED ({})", output.status));
                report.fail(&format!("fuzz::{target}"), &said);
            }
        }
    }
    Ok(report)
}

/// The number of inputs that libFuzzer says to have tried; none if it tried none.
fn inputs(said: &str) -> Option<u64> {
    let line = said
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
    line.trim().parse().ok().filter(|inputs| *inputs > 0)
}

/// The targets, built.
struct Fuzz {
    programs: Vec<Executable>,
    folder: PathBuf,
}

impl Fuzz {
    /// Builds them, and makes the seeds that come of the scenarios.
    fn build() -> Result<Self> {
        setup::for_fuzz()?;
        let folder = workspace::root().join("target/fuzz");
        let fuzz = Self {
            programs: cargo::build_instrumented("fuzz targets", Path::new("calitrace/fuzz"), &folder)?,
            folder,
        };
        let mut seeds = Command::new(fuzz.program("seeds")?);
        seeds
            .arg(workspace::root().join("tests/scenarios"))
            .arg(fuzz.folder.join("seeds"));
        step::run("seeds", &mut seeds)?;
        Ok(fuzz)
    }

    fn program(&self, name: &str) -> Result<&Path> {
        let program = self.programs.iter().find(|program| program.target == name);
        Ok(&program.with_context(|| format!("cargo built no {name}"))?.file)
    }

    /// Runs `target` for so many seconds on what is known, and mutations of it.
    fn command(&self, target: &str, seconds: u32) -> Result<Command> {
        let [corpus, artifacts] = ["corpus", "artifacts"].map(|kind| self.folder.join(kind).join(target));
        for folder in [&corpus, &artifacts] {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let seeds = [
            self.folder.join("seeds").join(target),
            workspace::root().join("calitrace/fuzz/seeds").join(target),
        ];
        let seeds: Vec<PathBuf> = seeds.into_iter().filter(|folder| folder.is_dir()).collect();
        if seeds.is_empty() {
            bail!("the fuzz target {target} has no seeds");
        }
        let mut command = Command::new(self.program(target)?);
        command
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            // A parser that takes this long for an input of some kilobytes, or this much, is at fault.
            .args(["-timeout=20", "-rss_limit_mb=2048"])
            .args(["-print_final_stats=1", "-verbosity=1"])
            .arg(corpus)
            .args(seeds);
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_known() {
        let folder = workspace::root().join("calitrace/fuzz/fuzz_targets");
        let mut files: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| {
                entry
                    .unwrap()
                    .path()
                    .file_stem()
                    .unwrap()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        files.sort();
        assert_eq!(files, TARGETS);
    }

    #[test]
    fn a_run_that_tried_nothing_is_none() {
        assert_eq!(
            inputs("stat::number_of_executed_units: 812\nstat::x: 3\n"),
            Some(812)
        );
        assert_eq!(inputs("stat::number_of_executed_units: 0\n"), None);
        assert_eq!(inputs("INFO: Seed: 3\n"), None);
    }
}
