//! The command as a user meets it: help, errors, exit codes. Nothing here needs privileges or the network.

mod help;
mod logs;

use std::process::{Command, Stdio};

/// What a run came to.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_calitrace"));
    // Help is wrapped to the width of the terminal that runs the tests, unless told otherwise.
    command
        .args(args)
        .env("COLUMNS", "100")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Run {
    finish(&mut command(args))
}

fn finish(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
