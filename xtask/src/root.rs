//! Steps that need root: run as they are by root, by sudo for anybody else. Nothing else of xtask runs as root.

use std::ffi::OsStr;
use std::io::{IsTerminal as _, stdin};
use std::process::Command;

use anyhow::{Result, bail};
use nix::unistd::Uid;

use crate::step::say;
use crate::workspace;

/// Whether steps that need root can run here at all.
pub(crate) fn available() -> bool {
    Uid::effective().is_root() || workspace::find_program("sudo").is_some()
}

/// A command that runs `program` as root, with the environment variables `variables` (sudo drops those of the caller).
/// `why` says, after "sudo for", what root is needed for.
pub(crate) fn command(why: &str, program: &OsStr, variables: &[(&str, &OsStr)]) -> Result<Command> {
    if Uid::effective().is_root() {
        let mut command = Command::new(program);
        command.envs(variables.iter().copied());
        return Ok(command);
    }
    let Some(sudo) = workspace::find_program("sudo") else {
        bail!("{why} needs root, and there is no sudo here: run this as root");
    };
    say(&format!("sudo for {why}"));
    let mut command = Command::new(sudo);
    if !stdin().is_terminal() {
        // Nobody there to type a password: fail instead of waiting for one.
        command.arg("-n");
    }
    command.args(["--", "env"]);
    for (name, value) in variables {
        let mut assignment = OsStr::new(name).to_os_string();
        assignment.push("=");
        assignment.push(value);
        command.arg(assignment);
    }
    command.arg(program);
    Ok(command)
}
