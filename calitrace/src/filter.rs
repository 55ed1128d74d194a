//! Which packet traces are shown: a pure predicate. Knows traces, not how the filter was typed or where traces go.
//!
//! All conditions must hold. Addresses and ports match in both forms of a translated packet, so that a service and the
//! pod behind it name the same packets.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;

use crate::correlate::{Endpoint, NatKind, PacketTrace, Verdict};

/// The conditions; those left out hold for every packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// One end is this pod.
    pub pods: Vec<PodName>,
    /// The sender.
    pub from: Option<End>,
    /// The receiver.
    pub to: Option<End>,
    /// IANA protocol number.
    pub protocol: Option<Protocol>,
    /// One end has this port.
    pub port: Option<u16>,
    /// It passed the interface with this name.
    pub interface: Option<String>,
    /// It was dropped, rejected, or lost between nodes.
    pub dropped: bool,
}

/// `namespace/name` of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName(String);

/// One end of a flow as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// A pod.
    Pod(PodName),
    /// An address or a prefix.
    Net(IpNet),
}

/// An IANA protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol(pub u8);

impl Filter {
    /// Whether a packet trace is shown.
    #[must_use]
    pub fn matches(&self, trace: &PacketTrace) -> bool {
        let flow = &trace.flow.flow;
        let either_pod = |name: &PodName| {
            is_pod(trace.flow.src_pod.as_deref(), name) || is_pod(trace.flow.dst_pod.as_deref(), name)
        };
        (self.pods.is_empty() || self.pods.iter().any(either_pod))
            && self.from.as_ref().is_none_or(|end| sender(trace, end))
            && self.to.as_ref().is_none_or(|end| receiver(trace, end))
            && self.protocol.is_none_or(|protocol| protocol.0 == flow.proto)
            && self.port.is_none_or(|port| has_port(trace, port))
            && self.interface.as_ref().is_none_or(|name| passed(trace, name))
            && (!self.dropped || failed(trace.verdict))
    }
}

impl Filter {
    /// The pods it names.
    pub fn named_pods(&self) -> impl Iterator<Item = &PodName> {
        let ends = [&self.from, &self.to].into_iter().flatten();
        self.pods.iter().chain(ends.filter_map(|end| match end {
            End::Pod(name) => Some(name),
            End::Net(_) => None,
        }))
    }
}

/// Whether it failed. Probes of traceroute that end for want of hops did not; those that a closed port answers are rejected.
fn failed(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Dropped | Verdict::Rejected | Verdict::Lost)
}

fn sender(trace: &PacketTrace, end: &End) -> bool {
    match end {
        End::Pod(name) => is_pod(trace.flow.src_pod.as_deref(), name),
        End::Net(net) => {
            net.contains(&trace.flow.flow.src)
                || translated(trace, NatKind::Snat).any(|end| net.contains(&end.address))
        }
    }
}

fn receiver(trace: &PacketTrace, end: &End) -> bool {
    match end {
        End::Pod(name) => is_pod(trace.flow.dst_pod.as_deref(), name),
        End::Net(net) => {
            net.contains(&trace.flow.flow.dst)
                || translated(trace, NatKind::Dnat).any(|end| net.contains(&end.address))
        }
    }
}

fn has_port(trace: &PacketTrace, port: u16) -> bool {
    let flow = &trace.flow.flow;
    let ports = crate::event::has_ports(flow.proto);
    ports
        && (flow.src_port == port
            || flow.dst_port == port
            || [NatKind::Snat, NatKind::Dnat]
                .iter()
                .any(|kind| translated(trace, *kind).any(|end| end.port == Some(port))))
}

fn passed(trace: &PacketTrace, interface: &str) -> bool {
    trace
        .observations
        .iter()
        .any(|sighting| sighting.interface.as_deref() == Some(interface))
        || trace
            .drop
            .as_ref()
            .is_some_and(|drop| drop.interface.as_deref() == Some(interface))
}

/// The ends that translations of one kind left behind and made.
fn translated(trace: &PacketTrace, kind: NatKind) -> impl Iterator<Item = Endpoint> + '_ {
    trace
        .nat
        .iter()
        .filter(move |step| step.kind == kind)
        .flat_map(|step| [step.from, step.to])
}

fn is_pod(pod: Option<&str>, name: &PodName) -> bool {
    pod == Some(name.0.as_str())
}

impl FromStr for PodName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A namespace is an RFC 1123 label, so that no prefix (10.0.0.0/8) can be taken for a pod.
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let subdomain = |c: char| label(c) || c == '.';
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty()
                    && !name.is_empty()
                    && namespace.chars().all(label)
                    && name.chars().all(subdomain) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err("a pod is named NAMESPACE/NAME, for example default/web-0".into()),
        }
    }
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Net(address.into()));
        }
        if let Ok(net) = text.parse::<IpNet>() {
            return Ok(Self::Net(net.trunc()));
        }
        if let Ok(pod) = text.parse() {
            return Ok(Self::Pod(pod));
        }
        Err("expected a pod (NAMESPACE/NAME), an address or a prefix (10.244.0.0/16)".into())
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "icmp" => Ok(Self(1)),
            "tcp" => Ok(Self(6)),
            "udp" => Ok(Self(17)),
            "icmpv6" => Ok(Self(58)),
            "sctp" => Ok(Self(132)),
            number => match number.parse() {
                Ok(number) => Ok(Self(number)),
                Err(_) => Err("expected tcp, udp, icmp, icmpv6, sctp or a number up to 255".into()),
            },
        }
    }
}

impl PodName {
    /// `namespace/name`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => name.fmt(f),
            Self::Net(net) if net.prefix_len() == net.max_prefix_len() => net.addr().fmt(f),
            Self::Net(net) => net.fmt(f),
        }
    }
}

/// The filter as one would type it; empty without conditions.
impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words: Vec<String> = self.pods.iter().map(|pod| format!("--pod {pod}")).collect();
        words.extend(self.from.as_ref().map(|end| format!("--from {end}")));
        words.extend(self.to.as_ref().map(|end| format!("--to {end}")));
        words.extend(
            self.protocol
                .map(|protocol| format!("--proto {}", crate::event::protocol_name(protocol.0))),
        );
        words.extend(self.port.map(|port| format!("--port {port}")));
        words.extend(self.interface.as_ref().map(|name| format!("--interface {name}")));
        words.extend(self.dropped.then(|| "--dropped".to_owned()));
        f.write_str(&words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{correlate::NatStep, event::Transport, view::sample};

    /// A query of pod 1 to a service, which pod 2 answers on another port.
    fn query() -> PacketTrace {
        let transport = Transport::Udp {
            src_port: 40_000,
            dst_port: 53,
            payload: 20,
        };
        let mut trace = sample::delivered(0, transport);
        let end = |address: &str, port| Endpoint {
            address: address.parse().unwrap(),
            port: Some(port),
        };
        let (from, to) = (end("10.96.0.10", 53), end("10.244.205.193", 5353));
        trace.flow.flow.dst = from.address;
        trace.nat.push(NatStep {
            kind: NatKind::Dnat,
            node: None,
            from,
            to,
        });
        trace
    }

    fn matches(change: impl FnOnce(&mut Filter)) -> bool {
        let mut filter = Filter::default();
        change(&mut filter);
        filter.matches(&query())
    }

    #[test]
    fn ends_are_pods_addresses_and_prefixes_in_both_forms() {
        let pod = |name: &str| matches(|filter| filter.pods.push(name.parse().unwrap()));
        let from = |end: &str| matches(|filter| filter.from = Some(end.parse().unwrap()));
        let to = |end: &str| matches(|filter| filter.to = Some(end.parse().unwrap()));
        assert!(pod(sample::POD_1) && pod(sample::POD_2) && !pod("default/other"));
        assert!(from(sample::POD_1) && !from(sample::POD_2));
        assert!(from("10.244.120.67") && from("10.244.120.64/26") && !from("10.244.205.193"));
        assert!(to(sample::POD_2) && !to(sample::POD_1));
        assert!(to("10.96.0.10") && to("10.244.205.193") && to("10.244.205.0/24") && !to("10.244.120.0/24"));
    }

    #[test]
    fn other_conditions_tell_packets_apart() {
        let proto = |name: &str| matches(|filter| filter.protocol = Some(name.parse().unwrap()));
        let port = |port| matches(|filter| filter.port = Some(port));
        let interface = |name: &str| matches(|filter| filter.interface = Some(name.into()));
        assert!(proto("udp") && proto("17") && !proto("tcp"));
        assert!(port(53) && port(40_000) && port(5353) && !port(54));
        assert!(interface("tunl0") && !interface("tunl"));
    }

    #[test]
    fn dropped_are_those_that_failed() {
        let filter = Filter {
            dropped: true,
            ..Filter::default()
        };
        let mut trace = sample::denied(0);
        for (verdict, shown) in [
            (Verdict::Dropped, true),
            (Verdict::Rejected, true),
            (Verdict::Lost, true),
            (Verdict::Delivered, false),
            (Verdict::Left, false),
            (Verdict::Expired, false),
            (Verdict::Unfinished, false),
            (Verdict::Unknown, false),
        ] {
            trace.verdict = verdict;
            assert_eq!(filter.matches(&trace), shown, "{verdict:?}");
        }
    }

    #[test]
    fn all_conditions_must_hold() {
        assert!(matches(|_| ()));
        assert!(!matches(
            |filter| (filter.port, filter.from) = (Some(53), "10.0.0.1".parse().ok())
        ));
    }

    #[test]
    fn the_identifier_of_an_echo_is_no_port() {
        let mut ping = sample::ping(0, 1);
        ping.flow.flow.src_port = 53;
        assert!(
            !Filter {
                port: Some(53),
                ..Filter::default()
            }
            .matches(&ping)
        );
    }

    #[test]
    fn what_names_no_end_is_refused() {
        for bad in [
            "",
            "web-0",
            "a/b/c",
            "/web-0",
            "default/",
            "10.0.0.0/33",
            "10.0.0.256",
        ] {
            assert!(bad.parse::<End>().is_err(), "{bad}");
        }
        for bad in ["", "-1", "256", "TCP", "quic"] {
            assert!(bad.parse::<Protocol>().is_err(), "{bad}");
        }
    }
}
