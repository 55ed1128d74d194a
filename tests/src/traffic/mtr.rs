//! `mtr` and what it says.

use std::net::IpAddr;

use anyhow::{Context, Result};

use crate::Lab;
use crate::command;

/// A line of a report of `mtr`.
#[derive(Clone, Debug, PartialEq)]
pub struct Hop {
    /// The TTL its probes were sent with.
    pub ttl: u8,
    /// Who answered; none for `???`.
    pub address: Option<IpAddr>,
    /// Probes sent.
    pub sent: u64,
    /// Of a hundred, how many were not answered.
    pub loss: f64,
}

/// What one run of `mtr` said.
#[derive(Clone, Debug, PartialEq)]
pub struct Mtr {
    /// Its lines.
    pub hops: Vec<Hop>,
    /// All of its output.
    pub raw: String,
}

impl Lab {
    /// Runs `mtr` from a part of the lab: three rounds, 0.3 s each, with ICMP echo requests or as `extra` says.
    pub fn mtr(&self, part: &str, to: IpAddr, extra: &[&str]) -> Result<Mtr> {
        let to = to.to_string();
        let words = [
            "mtr",
            "--report",
            "--report-wide",
            "-n",
            "-c",
            "3",
            "-i",
            "0.3",
            "-G",
            "2",
        ];
        let mut command = self.exec(part, words.iter().chain(extra).chain([&&*to]))?;
        let raw = command::text(&command::run(&mut command)?);
        let hops = parse(&raw).with_context(|| format!("mtr to {to} from {part} said:\n{raw}"))?;
        Ok(Mtr { hops, raw })
    }
}

fn parse(raw: &str) -> Option<Vec<Hop>> {
    let lines = raw.lines().filter(|line| line.contains("|--"));
    let hops: Vec<Hop> = lines.map(hop).collect::<Option<_>>()?;
    (!hops.is_empty()).then_some(hops)
}

/// `  1.|-- 10.244.120.64   0.0%     3    0.1   0.1   0.1   0.2   0.0`
fn hop(line: &str) -> Option<Hop> {
    let (ttl, rest) = line.split_once(".|--")?;
    let mut words = rest.split_whitespace();
    let address = words.next()?.parse().ok();
    let loss = words.next()?.trim_end_matches('%').parse().ok()?;
    Some(Hop {
        ttl: ttl.trim().parse().ok()?,
        address,
        sent: words.next()?.parse().ok()?,
        loss,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_report() {
        let raw = "Start: 2026-11-23T11:05:04+0000
HOST: vm             Loss%   Snt   Last   Avg  Best  Wrst StDev
  1.|-- 10.244.120.64   0.0%     3    0.1   0.1   0.1   0.2   0.0
  2.|-- ???            100.0     3    0.0   0.0   0.0   0.0   0.0
";
        let hops = parse(raw).unwrap();
        let address = hops[0].address.map(|address| address.to_string());
        assert_eq!(address.as_deref(), Some("10.244.120.64"));
        assert_eq!((hops[0].ttl, hops[0].sent, hops[0].loss), (1, 3, 0.0));
        assert_eq!((hops[1].ttl, hops[1].address, hops[1].loss), (2, None, 100.0));
        assert!(parse("mtr: unable to get raw sockets.\n").is_none());
    }
}
