//! One step of a verb: says what it does, runs a command, and on failure names the command and its last lines.
//! The only place of xtask that prints.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// How many of a failed command's last lines are shown.
const LAST_LINES: usize = 20;

/// Prints one line to standard output.
#[expect(
    clippy::print_stdout,
    reason = "xtask talks to the person who runs it; all of it goes through here"
)]
pub(crate) fn say(line: &str) {
    println!("{line}");
}

/// Prints one line to standard error.
#[expect(
    clippy::print_stderr,
    reason = "xtask talks to the person who runs it; all of it goes through here"
)]
pub(crate) fn complain(line: &str) {
    eprintln!("{line}");
}

/// Runs `command` with its output kept back: shown (its last lines) only if it fails.
pub(crate) fn run_quietly(what: &str, command: &mut Command) -> Result<()> {
    say(&format!("{what}: {}", text_of(command)));
    let start = Instant::now();
    let output = command
        .stdin(Stdio::inherit())
        .output()
        .with_context(|| format!("{what}: cannot run `{}`", text_of(command)))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!(
            "{what}: `{}` failed ({}); its last lines:\n{}",
            text_of(command),
            output.status,
            last_lines(&String::from_utf8_lossy(&said))
        );
    }
    say(&format!("{what}: done in {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

/// Runs `command` with its output shown as it comes.
pub(crate) fn run(what: &str, command: &mut Command) -> Result<()> {
    say(&format!("{what}: {}", text_of(command)));
    let status = command
        .status()
        .with_context(|| format!("{what}: cannot run `{}`", text_of(command)))?;
    if !status.success() {
        bail!(
            "{what}: `{}` failed ({status}); see its output above",
            text_of(command)
        );
    }
    Ok(())
}

/// What `command` prints on standard output, if it ends well.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot run `{}`", text_of(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed ({}); its last lines:\n{}",
            text_of(command),
            output.status,
            last_lines(&String::from_utf8_lossy(&output.stderr))
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("output of `{}`", text_of(command)))
}

/// The command as one would type it.
pub(crate) fn text_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let kept = &lines[lines.len().saturating_sub(LAST_LINES)..];
    kept.iter()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_step_names_the_command_and_its_last_lines() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "for i in $(seq 30); do echo line $i; done; echo the reason >&2; exit 3",
        ]);
        let error = run_quietly("a step", &mut command).unwrap_err().to_string();
        assert!(error.starts_with("a step: `sh -c for i"), "{error}");
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("    line 30\n    the reason"), "{error}");
        assert!(
            !error.contains("line 11\n"),
            "only the last {LAST_LINES} lines: {error}"
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run("a step", &mut Command::new("/nowhere/program")).unwrap_err();
        assert!(
            format!("{error:#}").contains("cannot run `/nowhere/program`"),
            "{error:#}"
        );
    }
}
