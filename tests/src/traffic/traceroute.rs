//! Debian's and busybox's `traceroute` and what they say.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use crate::Lab;
use crate::command;

/// Which traceroute, and the packets it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linux traceroute, UDP to a new port for each probe.
    Udp,
    /// Linux traceroute, ICMP echo requests.
    Icmp,
    /// Linux traceroute, TCP SYN to this port, a new source port for each probe.
    Tcp(u16),
    /// busybox traceroute, UDP.
    Busybox,
    /// busybox traceroute, ICMP echo requests.
    BusyboxIcmp,
}

/// A line of a traceroute.
#[derive(Clone, Debug, PartialEq)]
pub struct Hop {
    /// The TTL its probes were sent with.
    pub ttl: u8,
    /// Who answered each probe, and after how many milliseconds; none for a `*`.
    pub probes: Vec<Option<(IpAddr, f64)>>,
}

/// What one run of `traceroute` said.
#[derive(Clone, Debug, PartialEq)]
pub struct Traceroute {
    /// Its lines.
    pub hops: Vec<Hop>,
    /// All of its output.
    pub raw: String,
}

impl Traceroute {
    /// The address of each line: the first that answered.
    pub fn addresses(&self) -> Vec<Option<IpAddr>> {
        self.hops
            .iter()
            .map(|hop| hop.probes.iter().flatten().next().map(|probe| probe.0))
            .collect()
    }

    /// The addresses as text, `*` for a line without an answer; for comparing and for messages.
    pub fn path(&self) -> Vec<String> {
        let text =
            |address: Option<IpAddr>| address.map_or_else(|| "*".to_owned(), |found| found.to_string());
        self.addresses().into_iter().map(text).collect()
    }
}

impl Lab {
    /// Runs a traceroute from a part of the lab, one probe at a time, so that no answer is lost to a full
    /// queue, and, Debian's, with five seconds for each answer: by itself it gives up after thrice the time of the
    /// hop's first answer, which may be too soon on a busy machine. `extra` goes to it as it is.
    pub fn traceroute(&self, part: &str, to: IpAddr, kind: Kind, extra: &[&str]) -> Result<Traceroute> {
        let words = words(to, kind, extra);
        let output = command::run(&mut self.exec(part, &words)?)?;
        let raw = command::text(&output);
        let hops = parse(&raw).with_context(|| format!("{} said:\n{raw}", words.join(" ")))?;
        ensure!(!hops.is_empty(), "{} printed no hop:\n{raw}", words.join(" "));
        Ok(Traceroute { hops, raw })
    }
}

/// The command line of a traceroute.
pub fn words(to: IpAddr, kind: Kind, extra: &[&str]) -> Vec<String> {
    let port;
    let mut words = match kind {
        Kind::Udp => vec!["traceroute", "-N", "1", "-w", "5"],
        Kind::Icmp => vec!["traceroute", "-N", "1", "-w", "5", "-I"],
        Kind::Tcp(number) => {
            port = number.to_string();
            vec!["traceroute", "-N", "1", "-w", "5", "-T", "-p", &port]
        }
        Kind::Busybox if to.is_ipv6() => vec!["busybox", "traceroute6"],
        Kind::Busybox => vec!["busybox", "traceroute"],
        Kind::BusyboxIcmp => vec!["busybox", "traceroute", "-I"],
    };
    words.extend(extra);
    let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    words.push(to.to_string());
    words
}

/// Reads what traceroute printed: its header and a line for each hop.
pub fn parse(raw: &str) -> Result<Vec<Hop>> {
    // The header begins with "traceroute"; everything else is a line of a hop.
    let lines = raw
        .lines()
        .filter(|line| !line.starts_with("traceroute") && !line.trim().is_empty());
    lines
        .map(|line| hop(line).with_context(|| format!("not a line of a hop: {line:?}")))
        .collect()
}

fn hop(line: &str) -> Option<Hop> {
    let mut words = line.split_whitespace().peekable();
    let ttl = words.next()?.parse().ok()?;
    let mut probes = Vec::new();
    let mut from: Option<IpAddr> = None;
    while let Some(word) = words.next() {
        if word == "*" {
            probes.push(None);
        } else if words.peek() == Some(&"ms") {
            probes.push(Some((from?, word.parse().ok()?)));
        } else if let Ok(address) = word.trim_matches(['(', ')']).parse() {
            from = Some(address);
        }
        // The rest are names, `ms` itself, and remarks such as `!X`.
    }
    Some(Hop { ttl, probes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_traceroute_of_the_founding_story() {
        let raw = "traceroute to 10.244.205.193 (10.244.205.193), 30 hops max, 46 byte packets
 1  10.244.120.64 (10.244.120.64)  0.017 ms  0.007 ms  0.005 ms
 2  10.244.205.192 (10.244.205.192)  0.008 ms  0.008 ms  0.004 ms
 3  10.244.205.193 (10.244.205.193)  0.008 ms  0.006 ms  0.003 ms
";
        let traceroute = Traceroute {
            hops: parse(raw).unwrap(),
            raw: raw.to_owned(),
        };
        assert_eq!(
            traceroute.path(),
            ["10.244.120.64", "10.244.205.192", "10.244.205.193"]
        );
        let address: IpAddr = "10.244.205.193".parse().unwrap();
        let third = Hop {
            ttl: 3,
            probes: vec![
                Some((address, 0.008)),
                Some((address, 0.006)),
                Some((address, 0.003)),
            ],
        };
        assert_eq!(traceroute.hops[2], third);
    }

    #[test]
    fn reads_missing_answers_changing_routers_and_remarks() {
        let found = hop(" 4  10.0.0.1  1.5 ms * 10.0.0.2  2.5 ms !X").unwrap();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(
            found.probes,
            [
                Some((address("10.0.0.1"), 1.5)),
                None,
                Some((address("10.0.0.2"), 2.5))
            ]
        );
    }

    #[test]
    fn other_lines_are_errors() {
        assert!(parse("sendto: Operation not permitted\n").is_err());
    }
}
