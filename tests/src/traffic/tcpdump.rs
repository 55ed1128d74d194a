//! `tcpdump`: a capture that has begun when it says so, and that misses nothing until it is stopped.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::Lab;
use crate::command::{self, Running};
use crate::wait::{unhurried, wait_until};

/// A running capture. Dropped, it ends, and what it wrote last may be missing: use [`Capture::stop`].
#[derive(Debug)]
pub struct Capture {
    running: Running,
    messages: BufReader<ChildStderr>,
    file: PathBuf,
}

impl Lab {
    /// Captures on an interface of a part of the lab into a file, and returns once capturing has begun.
    pub fn tcpdump(&self, part: &str, interface: &str, file: &Path, filter: &str) -> Result<Capture> {
        let name = file.to_str().context("a capture's file needs a name in UTF-8")?;
        let words = [
            "tcpdump", "-i", interface, "-n", "-U", "-B", "65536", "-Z", "root", "-w", name,
        ];
        let mut command = self.exec(
            part,
            words
                .into_iter()
                .chain(Some(filter).filter(|text| !text.is_empty())),
        )?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut running = Running::start(&mut command)?;
        let messages = running
            .child()
            .stderr
            .take()
            .context("standard error was asked for as a pipe")?;
        let mut capture = Capture {
            running,
            messages: BufReader::new(messages),
            file: file.to_owned(),
        };
        capture.read_until("listening on")?;
        Ok(capture)
    }
}

impl Capture {
    /// Ends the capture once it has written every packet the kernel gave it, and returns how many those
    /// are. Packets the kernel dropped for it are an error.
    pub fn stop(mut self) -> Result<u64> {
        // What came in between the opening of its socket and the setting of its filter counts as received for ever, and is
        // not captured: then the counts have to stand still.
        let (mut last, mut since) = ([0; 3], Instant::now());
        wait_until("tcpdump to write all it was given", || {
            let counts = self.counts()?;
            if counts != last {
                (last, since) = (counts, Instant::now());
            }
            let [captured, received, _] = counts;
            Ok(
                (captured == received || since.elapsed() > unhurried(Duration::from_millis(2500)))
                    .then_some(()),
            )
        })?;
        let [captured, _, dropped] = self.counts()?;
        ensure!(dropped == 0, "tcpdump lost {dropped} packets");
        self.running.stop(Signal::SIGINT)?;
        Ok(captured)
    }

    /// Packets captured, received by the filter, dropped by the kernel, so far.
    fn counts(&mut self) -> Result<[u64; 3]> {
        self.running.signal(Signal::SIGUSR1)?;
        let line = self.read_until("packets captured")?;
        let mut numbers = line.split(' ').filter_map(|word| word.parse().ok());
        let mut next = || numbers.next().with_context(|| format!("tcpdump said {line:?}"));
        Ok([next()?, next()?, next()?])
    }

    fn read_until(&mut self, what: &str) -> Result<String> {
        let mut seen = String::new();
        loop {
            let start = seen.len();
            let read = self
                .messages
                .read_line(&mut seen)
                .context("cannot read what tcpdump says")?;
            ensure!(
                read > 0,
                "tcpdump into {} ended and said:\n{seen}",
                self.file.display()
            );
            // `1 packet captured`, `2 packets captured`.
            if seen[start..].replace("packet ", "packets ").contains(what) {
                return Ok(seen[start..].to_owned());
            }
        }
    }
}

/// The packets of a capture that match a filter, one line each as `tcpdump -n` prints them.
pub fn read(file: &Path, filter: &str) -> Result<Vec<String>> {
    let mut command = Command::new("tcpdump");
    command.args(["-n", "-tt", "-r"]).arg(file);
    command.args(Some(filter).filter(|text| !text.is_empty()));
    let output = command::run(&mut command)?;
    Ok(command::text(&output).lines().map(str::to_owned).collect())
}
