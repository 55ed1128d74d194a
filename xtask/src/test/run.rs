//! Runs test programs, shows their output as it comes, and counts.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::report::Report;
use super::totals::Totals;
use crate::cargo::Executable;
use crate::setup::jc;
use crate::step::{complain, say, text_of};
use crate::{root, workspace};

/// Variables of the caller that test programs may read, and that sudo would drop.
const HANDED_ON: [&str; 6] = [
    "CI",
    "CALITRACE_TIME_SCALE",
    "INSTA_UPDATE",
    "PROPTEST_CASES",
    "RUST_BACKTRACE",
    "TMPDIR",
];

/// What test programs find in their environment.
pub(super) struct Environment {
    variables: Vec<(&'static str, OsString)>,
}

impl Environment {
    /// `product` is the calitrace binary: `CALITRACE_BIN` for the tests. Tools of the tests come first on the path.
    pub(super) fn new(product: OsString) -> Result<Self> {
        let folders = [jc::programs()].into_iter().chain(workspace::search_path());
        let path = env::join_paths(folders).context("search path of the tests")?;
        let mut variables = vec![("PATH", path), ("CALITRACE_BIN", product)];
        variables.extend(
            HANDED_ON
                .into_iter()
                .filter_map(|name| Some((name, env::var_os(name)?))),
        );
        Ok(Self { variables })
    }

    /// Runs one test program in its package's folder, as `cargo test` does; as root if `as_root`.
    pub(super) fn run(&self, program: &Executable, as_root: bool, only: Option<&str>) -> Result<Report> {
        let variables: Vec<(&str, &OsStr)> = self
            .variables
            .iter()
            .map(|(name, value)| (*name, value.as_os_str()))
            .collect();
        let mut command = if as_root {
            root::command(
                &format!("the tests `{}`", program.target),
                program.file.as_os_str(),
                &variables,
            )?
        } else {
            let mut command = Command::new(&program.file);
            command.envs(variables);
            command
        };
        command.args(only).current_dir(&program.package_folder);
        counted(
            &format!("{} of {}", program.target, program.package_folder.display()),
            &mut command,
        )
    }
}

/// Runs a program that prints closing lines. One that ends badly without telling of a failed test counts as one.
pub(super) fn counted(name: &str, command: &mut Command) -> Result<Report> {
    say(&format!("tests: {name}"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{}`", text_of(command)))?;
    let mut report = Report::default();
    let mut closed = false;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n') {
            let line = line.with_context(|| format!("output of `{}`", text_of(command)))?;
            let line = String::from_utf8_lossy(&line);
            say(&line);
            report.failures.line(&line);
            if let Some(more) = Totals::parse(&line) {
                report.totals += more;
                closed = true;
            }
        }
    }
    let status = child
        .wait()
        .with_context(|| format!("waiting for `{}`", text_of(command)))?;
    if (!status.success() || !closed) && report.totals.failed == 0 {
        let what = format!(
            "`{}` ended with {status} and told of no failed test",
            text_of(command)
        );
        complain(&format!("tests: {name}: {what}"));
        report.fail(name, &what);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Totals {
        counted("a shell", Command::new("sh").args(["-c", script]))
            .unwrap()
            .totals
    }

    #[test]
    fn closing_lines_are_added_up() {
        let line =
            "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        let totals = shell(&format!("echo noise; echo '{line}'; echo '{line}'"));
        assert_eq!(
            totals,
            Totals {
                passed: 4,
                failed: 0,
                skipped: 2
            }
        );
    }

    #[test]
    fn a_crash_counts_as_a_failed_test() {
        let line =
            "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(shell(&format!("echo '{line}'; kill -SEGV $$")).failed, 1);
    }

    #[test]
    fn silence_counts_as_a_failed_test() {
        assert_eq!(
            shell("exit 0"),
            Totals {
                passed: 0,
                failed: 1,
                skipped: 0
            }
        );
    }
}
