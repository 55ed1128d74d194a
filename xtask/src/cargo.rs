//! Runs cargo builds and reads from its messages which programs came out.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::step::{output_of, say, text_of};
use crate::workspace;

/// A program that cargo built, or found to be fresh.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// The target's name in the manifest.
    pub(crate) target: String,
    /// `bin`, `lib`, `test`, …: the target's first kind.
    pub(crate) kind: String,
    /// The folder of the package's manifest: where `cargo test` runs tests.
    pub(crate) package_folder: PathBuf,
    /// A test program, or an ordinary one.
    pub(crate) is_test: bool,
    pub(crate) file: PathBuf,
}

/// Runs `cargo ARGUMENTS` (a verb that builds) and gives the programs it made. Diagnostics are shown as they come.
pub(crate) fn build(what: &str, arguments: &[&str]) -> Result<Vec<Executable>> {
    let mut command = Command::new("cargo");
    command.args(arguments);
    executables(what, command)
}

/// As [`build`], of programs that carry their libraries in them: the same files run here and in any guest.
pub(crate) fn build_static(what: &str, arguments: &[&str]) -> Result<Vec<Executable>> {
    let mut command = Command::new("cargo");
    command.args(arguments);
    link_statically(&mut command)?;
    executables(what, command)
}

/// What libFuzzer needs to see which way an input took and what it was compared with: cargo-fuzz's flags (0.13, `project.rs`).
const INSTRUMENTATION: [&str; 6] = [
    "--cfg fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Builds the programs of another workspace, in the folder `package`, instrumented for libFuzzer.
pub(crate) fn build_instrumented(
    what: &str,
    package: &Path,
    target_folder: &Path,
) -> Result<Vec<Executable>> {
    let host = host()?;
    let mut command = Command::new("cargo");
    command
        .args(["build", "--release", "--bins", "--locked", "--target", &host])
        .arg("--manifest-path")
        .arg(package.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_folder)
        .env("RUSTC_BOOTSTRAP", "1")
        .env(flags_variable(&host), INSTRUMENTATION.join(" "));
    executables(what, command)
}

/// Makes a cargo command that builds link statically. Named as the target, this machine's own triple gets flags that
/// build scripts and procedural macros are not given, which have to be dynamic.
pub(crate) fn link_statically(command: &mut Command) -> Result<()> {
    let host = host()?;
    command
        .args(["--target", &host])
        .env(flags_variable(&host), "-Ctarget-feature=+crt-static");
    Ok(())
}

/// The variable with the compiler's flags for a target.
fn flags_variable(triple: &str) -> String {
    format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        triple.to_uppercase().replace('-', "_")
    )
}

/// The triple of this machine.
fn host() -> Result<String> {
    let said = output_of(Command::new("rustc").arg("-vV"))?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

fn executables(what: &str, mut command: Command) -> Result<Vec<Executable>> {
    say(&format!("{what}: {}", text_of(&command)));
    let mut cargo = command
        .arg("--message-format=json-render-diagnostics")
        .current_dir(workspace::root())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{what}: cannot run `{}`", text_of(&command)))?;
    let mut executables = Vec::new();
    if let Some(messages) = cargo.stdout.take() {
        for line in BufReader::new(messages).lines() {
            executables.extend(executable(&line.context("messages of cargo")?));
        }
    }
    let status = cargo.wait().context("waiting for cargo")?;
    if !status.success() {
        bail!(
            "{what}: `{}` failed ({status}); see its output above",
            text_of(&command)
        );
    }
    Ok(executables)
}

/// The program that one line of cargo's JSON messages tells of, if it tells of one.
fn executable(line: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(line).ok()?;
    let manifest = PathBuf::from(message["manifest_path"].as_str()?);
    Some(Executable {
        target: message["target"]["name"].as_str()?.to_owned(),
        kind: message["target"]["kind"][0].as_str()?.to_owned(),
        package_folder: manifest.parent()?.to_owned(),
        is_test: message["profile"]["test"].as_bool()?,
        file: PathBuf::from(message["executable"].as_str()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_read_from_its_message() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///x/tests#calitrace-tests@0.1.0",
            "manifest_path":"/x/tests/Cargo.toml","target":{"kind":["test"],"crate_types":["bin"],"name":"e2e"},
            "profile":{"opt_level":"1","test":true},"filenames":["/x/e2e-1"],"executable":"/x/e2e-1","fresh":false}"#;
        let expected = Executable {
            target: "e2e".to_owned(),
            kind: "test".to_owned(),
            package_folder: "/x/tests".into(),
            is_test: true,
            file: "/x/e2e-1".into(),
        };
        assert_eq!(executable(line), Some(expected));
    }

    #[test]
    fn libraries_and_other_messages_are_no_programs() {
        let library = r#"{"reason":"compiler-artifact","manifest_path":"/x/Cargo.toml",
            "target":{"kind":["lib"],"name":"x"},"profile":{"test":false},"executable":null}"#;
        assert_eq!(executable(library), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(executable("not a message"), None);
    }
}
