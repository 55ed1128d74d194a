//! A name server (`dnsmasq`) and a resolver (busybox's `nslookup`).

use std::io::{BufRead, BufReader};
use std::process::{ChildStderr, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::Lab;
use crate::command::{self, Running};

/// The one name the server knows.
pub const NAME: &str = "web.lab";
/// What it stands for.
pub const ADDRESSES: [&str; 2] = ["198.51.100.7", "2001:db8::7"];

/// A name server at work.
#[derive(Debug)]
pub struct NameServer {
    running: Running,
    log: BufReader<ChildStderr>,
}

impl Lab {
    /// Starts a name server on a UDP port of a part of the lab.
    pub fn name_server(&self, part: &str, port: u16) -> Result<NameServer> {
        let port = format!("--port={port}");
        let addresses = ADDRESSES.map(|address| format!("--address=/{NAME}/{address}"));
        let mut command = self.exec(
            part,
            [
                "dnsmasq",
                "--no-daemon",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--user=root",
                "--log-queries",
                "--log-facility=-",
                &port,
                &addresses[0],
                &addresses[1],
            ],
        )?;
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut running = Running::start(&mut command)?;
        let log = running.child().stderr.take().context("dnsmasq's log")?;
        let mut log = BufReader::new(log);
        let mut line = String::new();
        while !line.contains("cleared cache") {
            line.clear();
            ensure!(
                log.read_line(&mut line).context("dnsmasq's log")? > 0,
                "dnsmasq did not start"
            );
        }
        Ok(NameServer { running, log })
    }

    /// Looks the name up from a part of the lab, by UDP to port 53 of `server`.
    pub fn look_up(&self, part: &str, server: &str) -> Result<()> {
        let said = command::output(&mut self.exec(part, ["busybox", "nslookup", NAME, server])?)?;
        let said = command::text(&said);
        for address in ADDRESSES {
            ensure!(said.contains(address), "nslookup said:\n{said}");
        }
        Ok(())
    }
}

impl NameServer {
    /// Ends it, and returns how many queries it got.
    pub fn stop(mut self) -> Result<u64> {
        self.running.signal(Signal::SIGTERM)?;
        let mut queries = 0;
        for line in self.log.lines() {
            queries += u64::from(line.context("dnsmasq's log")?.contains(": query["));
        }
        self.running.wait()?;
        Ok(queries)
    }
}
