//! `calitrace watch` on the lab's nodes, and what its log holds.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow, bail};
use calitrace_tests::{Lab, Pod};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::step::{complain, output_of};

/// What `watch` says on standard error once it observes.
const READY: &str = "observing ";

/// A running `calitrace watch`; killed if dropped before [`Watch::stop`].
pub(super) struct Watch {
    child: Child,
    output: Option<JoinHandle<std::io::Result<String>>>,
    messages: Option<JoinHandle<()>>,
}

impl Watch {
    /// On this terminal, live.
    pub(super) fn shown(binary: &Path, lab: &Lab, arguments: &[OsString]) -> Result<Self> {
        Self::start(binary, lab, arguments, Stdio::inherit())
    }

    /// With its output kept for [`Watch::stop`].
    pub(super) fn kept(binary: &Path, lab: &Lab, arguments: &[OsString]) -> Result<Self> {
        Self::start(binary, lab, arguments, Stdio::piped())
    }

    /// Comes back once it observes.
    fn start(binary: &Path, lab: &Lab, arguments: &[OsString], output: Stdio) -> Result<Self> {
        let mut command = Command::new(binary);
        command
            .arg("watch")
            .args(arguments)
            .stdout(output)
            .stderr(Stdio::piped());
        for node in lab.nodes() {
            command.args(["--netns", &node.namespace]);
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("run {}", binary.display()))?;
        let output = child.stdout.take().map(|mut output| {
            std::thread::spawn(move || {
                let mut text = String::new();
                output.read_to_string(&mut text).map(|_| text)
            })
        });
        let mut lines = BufReader::new(child.stderr.take().context("standard error of calitrace")?).lines();
        let mut watch = Self {
            child,
            output,
            messages: None,
        };
        loop {
            let Some(line) = lines.next() else {
                let status = watch.child.wait().context("wait for calitrace watch")?;
                bail!("calitrace watch ended before it observed anything ({status})");
            };
            let line = line.context("read what calitrace says")?;
            if line.starts_with(READY) {
                break;
            }
            complain(&line);
        }
        watch.messages = Some(std::thread::spawn(move || {
            for line in lines.map_while(std::io::Result::ok) {
                complain(&line);
            }
        }));
        Ok(watch)
    }

    /// Ends it as Ctrl-C does; what it printed.
    pub(super) fn stop(mut self) -> Result<String> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).context("a process id")?);
        if self
            .child
            .try_wait()
            .context("wait for calitrace watch")?
            .is_none()
        {
            kill(pid, Signal::SIGINT).context("send SIGINT to calitrace watch")?;
        }
        let status = self.child.wait().context("wait for calitrace watch")?;
        if let Some(messages) = self.messages.take() {
            messages
                .join()
                .map_err(|_panic| anyhow!("reading calitrace's messages failed"))?;
        }
        if !status.success() {
            bail!("calitrace watch ended with {status}");
        }
        match self.output.take() {
            Some(output) => output
                .join()
                .map_err(|_panic| anyhow!("reading calitrace's output failed"))?
                .context("read calitrace's output"),
            None => Ok(String::new()),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) && self.child.kill().is_ok() {
            // Reaped, whatever its status.
            let _: std::io::Result<_> = self.child.wait();
        }
    }
}

/// The paths of the packets from one pod to another in an event log.
pub(super) fn read(binary: &Path, log: &Path, [from, to]: [&Pod; 2]) -> Result<Vec<Vec<String>>> {
    let mut command = Command::new(binary);
    command
        .arg("read")
        .arg(log)
        .args(["-o", "json", "--from", &from.full_name(), "--to", &to.full_name()]);
    output_of(&mut command)?
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).with_context(|| format!("not JSON: {line}")))
        .filter(|line| line.as_ref().map_or(true, |line| line["type"] == "packet"))
        .map(|packet| {
            let packet = packet?;
            let hops = packet["hops"].as_array().context("a packet without hops")?;
            Ok(hops
                .iter()
                .map(|hop| hop["address"].as_str().unwrap_or("*").to_owned())
                .collect())
        })
        .collect()
}
