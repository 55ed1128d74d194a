//! Running the system's tools, with errors that carry the command and what it wrote.

use std::io::Write;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::wait_until;

/// The command as one would type it.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a command to its end and returns what it wrote. An exit code other than 0 is an error that
/// carries the command line and its standard error.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = output(command)?;
    check(command, &output)?;
    Ok(output)
}

/// Runs a command to its end, whatever its exit code.
pub fn output(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{}`", describe(command)))
}

/// Runs a command with `input` as its standard input. Errors as [`run`].
pub fn run_with_input(command: &mut Command, input: &str) -> Result<Output> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run `{}`", describe(command)))?;
    let mut pipe = child
        .stdin
        .take()
        .context("standard input was asked for as a pipe")?;
    // A tool that fails early closes its input: what it wrote to standard error tells more than EPIPE.
    let written = pipe.write_all(input.as_bytes());
    drop(pipe);
    let output = child
        .wait_with_output()
        .with_context(|| format!("cannot wait for `{}`", describe(command)))?;
    check(command, &output).with_context(|| format!("its input was:\n{}", input.trim_end()))?;
    written.with_context(|| format!("cannot write the input of `{}`", describe(command)))?;
    Ok(output)
}

/// Standard output as text.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn check(command: &Command, output: &Output) -> Result<()> {
    ensure!(
        output.status.success(),
        "`{}` failed ({}): {}",
        describe(command),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(())
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    words: String,
    child: Child,
}

impl Running {
    /// Starts a command. Where its output goes is the command's own.
    pub fn start(command: &mut Command) -> Result<Self> {
        let words = describe(command);
        let child = command.spawn().with_context(|| format!("cannot run `{words}`"))?;
        Ok(Self { words, child })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The process, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid()), signal)
            .with_context(|| format!("cannot send {signal} to `{}`", self.words))
    }

    /// Its exit status, or none while it runs.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("cannot wait for `{}`", self.words))
    }

    /// Waits for its end, for as long as tests wait.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        wait_until(format!("the end of `{}`", self.words.clone()), || self.status())
    }

    /// Sends it a signal and waits for its end.
    pub fn stop(&mut self, signal: Signal) -> Result<ExitStatus> {
        self.signal(signal)?;
        self.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_command_its_words_and_its_input() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such device >&2; exit 3"]);
        let error = format!(
            "{:#}",
            run_with_input(&mut command, "link set nosuch up\n").unwrap_err()
        );
        for part in ["exit 3", "no such device", "exit status: 3", "link set nosuch up"] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }

    #[test]
    fn input_reaches_the_command() {
        let output = run_with_input(&mut Command::new("cat"), "two words").unwrap();
        assert_eq!(text(&output), "two words");
    }
}
