//! Which kinds of tunnel devices this machine's kernel has.

use std::fmt::{self, Display, Formatter};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, unshare};

use super::plan::Encapsulation;
use crate::command;

/// This machine's kernel has no devices of this kind. Found by `downcast_ref` in the error of [`super::Lab::up`]; a
/// test skips its case with it.
#[derive(Debug)]
pub struct Unsupported(pub(super) &'static str);

impl Display for Unsupported {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "this kernel has no {} devices", self.0)
    }
}

impl std::error::Error for Unsupported {}

/// Whether this kernel has the devices that an encapsulation needs, tried in a nameless namespace. Needs root.
pub(super) fn support(encapsulation: Encapsulation) -> Result<bool> {
    let words: &'static [&'static str] = match encapsulation {
        Encapsulation::Ipip => &["ipip", "remote", "192.0.2.1"],
        Encapsulation::Wireguard => &["wireguard"],
        Encapsulation::Vxlan | Encapsulation::None => return Ok(true),
    };
    let trial = move || {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        let mut ip = Command::new("ip");
        let added = command::output(ip.args(["link", "add", "trial", "type"]).args(words))?;
        Ok(added.status.success())
    };
    thread::scope(|scope| {
        scope
            .spawn(trial)
            .join()
            .unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
    })
}
