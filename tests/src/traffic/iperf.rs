//! `iperf3` and what it says.

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Lab;
use crate::command::{self, Running};

/// The port of the server.
pub const PORT: u16 = 5201;

/// What one run of `iperf3` said.
#[derive(Clone, Debug)]
pub struct Iperf {
    /// Bytes of data that the server read.
    pub received: u64,
    /// UDP: datagrams sent, and those that the server missed.
    pub packets: u64,
    /// See `packets`.
    pub lost: u64,
}

impl Lab {
    /// Sends data from one part of the lab to a server in another. `extra` goes to the client: how much, and how.
    pub fn iperf(&self, client: &str, (server, to): (&str, IpAddr), extra: &[&str]) -> Result<Iperf> {
        let port = PORT.to_string();
        let mut command = self.exec(
            server,
            ["iperf3", "--server", "--one-off", "--forceflush", "-p", &port],
        )?;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut listening = Running::start(&mut command)?;
        let output = listening.child().stdout.take().context("iperf3's output")?;
        let mut lines = BufReader::new(output).lines();
        let ready = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("listening on")));
        ensure!(ready.is_some(), "iperf3 in {server} does not listen");
        let to = to.to_string();
        let words = ["iperf3", "--client", &to, "-p", &port, "--json"];
        let said = command::run(&mut self.exec(client, words.iter().chain(extra))?)?;
        // It writes a report, which nobody reads, until it ends.
        lines.for_each(drop);
        listening.wait()?;
        let said: Value = serde_json::from_slice(&said.stdout).context("iperf3's report")?;
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let sum = &said["end"]["sum"];
        Ok(Iperf {
            received: number(&said["end"]["sum_received"]["bytes"]),
            packets: number(&sum["packets"]),
            lost: number(&sum["lost_packets"]),
        })
    }
}
