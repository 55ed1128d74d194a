//! `ping` and what it says.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::command;
use crate::wait::unhurried;

/// What one run of `ping` said.
#[derive(Clone, Debug, PartialEq)]
pub struct Ping {
    /// Echo requests sent.
    pub sent: u64,
    /// Echo replies received.
    pub received: u64,
    /// Each reply's sequence number, TTL and round-trip time in milliseconds.
    pub replies: Vec<(u16, u8, f64)>,
    /// All of its output.
    pub raw: String,
}

impl Lab {
    /// Sends `count` echo requests from a part of the lab, 20 ms apart, and waits for the replies. `extra`
    /// goes to `ping` as it is. No reply is not an error.
    pub fn ping(&self, part: &str, to: IpAddr, count: u32, extra: &[&str]) -> Result<Ping> {
        let (to, count) = (to.to_string(), count.to_string());
        // How long it waits for what does not come; `ping` takes fractions of a second.
        let wait = unhurried(Duration::from_secs(2)).as_secs_f64().to_string();
        let words = ["ping", "-n", "-i", "0.02", "-W", &wait, "-c", &count];
        let output = command::output(&mut self.exec(part, words.iter().chain(extra).chain([&&*to]))?)?;
        let raw = command::text(&output);
        parse(&raw).with_context(|| {
            format!(
                "ping to {to} from {part} said {raw:?} {:?}",
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }
}

fn parse(raw: &str) -> Option<Ping> {
    let summary = raw.lines().find(|line| line.contains("packets transmitted"))?;
    let mut numbers = summary.split(' ').filter_map(|word| word.parse().ok());
    let (sent, received) = (numbers.next()?, numbers.next()?);
    Some(Ping {
        sent,
        received,
        replies: raw.lines().filter_map(reply).collect(),
        raw: raw.to_owned(),
    })
}

fn reply(line: &str) -> Option<(u16, u8, f64)> {
    let value = |name: &str| {
        let rest = line.split(name).nth(1)?;
        rest.split(' ').next()
    };
    Some((
        value("icmp_seq=")?.parse().ok()?,
        value("ttl=")?.parse().ok()?,
        value("time=")?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_replies_and_the_summary() {
        let raw = "PING 10.244.205.193 (10.244.205.193) 56(84) bytes of data.\n\
            64 bytes from 10.244.205.193: icmp_seq=1 ttl=62 time=0.106 ms\n\
            64 bytes from 10.244.205.193: icmp_seq=3 ttl=62 time=0.080 ms\n\n\
            --- 10.244.205.193 ping statistics ---\n\
            3 packets transmitted, 2 received, 33.3333% packet loss, time 41ms\n";
        let ping = parse(raw).unwrap();
        assert_eq!((ping.sent, ping.received), (3, 2));
        assert_eq!(ping.replies, [(1, 62, 0.106), (3, 62, 0.080)]);
    }

    #[test]
    fn errors_count_as_no_replies() {
        let raw = "From 10.244.120.64 icmp_seq=1 Time to live exceeded\n\
            1 packets transmitted, 0 received, +1 errors, 100% packet loss, time 0ms\n";
        let ping = parse(raw).unwrap();
        assert_eq!((ping.sent, ping.received, ping.replies.len()), (1, 0, 0));
    }
}
