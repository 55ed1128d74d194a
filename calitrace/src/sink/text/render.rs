//! A block as rows of text. How a packet ended is told in [`sentence`].

use std::net::IpAddr;

use super::{super::traceroute, sentence, sizes};
use crate::{
    correlate::{Certainty, Joint, NatKind, NatStep, PacketTrace, Segment},
    event::{EncapKind, Ledger, Transport, has_ports, protocol_name},
    view::{Block, Kind, Line, Step},
};

/// A row and how it looks where there are colours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) look: Look,
    pub(super) text: String,
}

/// How a row looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Title,
    Plain,
    /// Detail.
    Faint,
    /// Trouble.
    Alarm,
}

impl Row {
    /// Appends it as a line.
    pub(super) fn append_to(&self, text: &mut String, colours: bool) {
        let style = match self.look {
            Look::Title if colours => "\x1b[1m",
            Look::Faint if colours => "\x1b[2m",
            Look::Alarm if colours => "\x1b[31m",
            _ => "",
        };
        text.push_str(style);
        text.push_str(&self.text);
        text.push_str(if style.is_empty() { "\n" } else { "\x1b[0m\n" });
    }

    /// The row as rows that are not wider than this: the terminal would wrap it itself, and nobody would know how many
    /// rows it takes. Lines break between words; one that has no place to break is cut.
    pub(super) fn wrapped(&self, columns: usize) -> Vec<Self> {
        let mut rows = Vec::new();
        let mut line = String::new();
        let mut width = 0;
        for word in self.text.split_inclusive(' ') {
            let length = word.trim_end().chars().count();
            if width > INDENT.len() && width + length > columns {
                rows.push(Self {
                    look: self.look,
                    text: std::mem::take(&mut line),
                });
                line.push_str(INDENT);
                line.push_str("  ");
                width = INDENT.len() + 2;
            }
            line.push_str(word);
            width += word.chars().count();
        }
        rows.push(Self {
            look: self.look,
            text: line,
        });
        for row in &mut rows {
            row.text = row.text.trim_end().chars().take(columns).collect();
        }
        rows
    }
}

const INDENT: &str = "      ";

/// All rows of a block, with the sizes of its latest packet if they are asked for or explain its end.
pub(super) fn block(block: &Block, with_sizes: bool) -> Vec<Row> {
    let with_sizes = with_sizes || sizes::explain(&block.latest);
    let mut sized: Vec<&str> = Vec::new();
    let mut rows = vec![
        row(Look::Title, title(block)),
        row(Look::Plain, traceroute::header(block)),
    ];
    for line in &block.lines {
        rows.push(row(Look::Plain, hop(line)));
        let reason = line.reason.as_ref();
        rows.extend(reason.map(|reason| row(Look::Faint, format!("{INDENT}no answer: {reason}"))));
        rows.extend(way(line).map(|text| row(Look::Faint, text)));
        if let Some(node) = line.node.as_deref()
            && with_sizes
            && !line.way.is_empty()
            && !sized.contains(&node)
        {
            sized.push(node);
            let text = sizes::at(&block.latest, node);
            rows.extend(text.map(|text| row(Look::Faint, format!("{INDENT}bytes and MTU: {text}"))));
        }
        let nat = block
            .latest
            .nat
            .iter()
            .filter(|step| step.node.is_some() && step.node == line.node);
        rows.extend(
            nat.filter(|_| !line.way.is_empty())
                .map(|step| row(Look::Faint, translation(step))),
        );
        rows.extend(logged(&block.latest, line).map(|text| row(Look::Faint, text)));
    }
    if block.latest.certainty == Joint::Order {
        let text = "packets with the same content: which is which, their order decided";
        rows.push(row(Look::Faint, format!("{INDENT}{text}")));
    }
    rows.extend(clocks(&block.latest).map(|text| row(Look::Faint, format!("{INDENT}{text}"))));
    if !block.stray.is_empty() {
        rows.push(row(Look::Faint, format!("{INDENT}{}", steps(&block.stray))));
    }
    if block.later_probes > 0 {
        rows.push(row(
            Look::Faint,
            format!("{INDENT}and {} probes with a higher TTL", block.later_probes),
        ));
    }
    rows.extend(sentence::end(block));
    rows
}

/// What became of all packets of a flow that was shown before.
pub(super) fn total(block: &Block) -> Row {
    row(Look::Title, format!("in all: {}", title(block)))
}

/// What the ledger says of losses, if anything was lost.
pub(super) fn losses(ledger: &Ledger) -> Option<Row> {
    let lost = ledger.lost();
    (lost > 0).then(|| {
        let seen: u64 = ledger
            .rows
            .iter()
            .map(|row| row.recorded + row.ring_refused)
            .sum();
        row(
            Look::Alarm,
            format!("! {lost} of {seen} records were lost: traces may have gaps (try a larger --ring-size)"),
        )
    })
}

/// What the ledger says of packet traces that there was no room for, if there were any.
pub(super) fn evictions(ledger: &Ledger) -> Option<Row> {
    let evicted = ledger.evicted;
    (evicted > 0).then(|| {
        row(
            Look::Alarm,
            format!("! {evicted} packet traces were closed before their time (try a larger --max-open)"),
        )
    })
}

/// A row, made harmless: names come from other machines and files, and a terminal obeys what it prints.
pub(super) fn row(look: Look, text: String) -> Row {
    let text = if text.chars().any(char::is_control) {
        text.replace(char::is_control, "\u{fffd}")
    } else {
        text
    };
    Row { look, text }
}

fn title(block: &Block) -> String {
    let (flow, counts) = (&block.flow, &block.counts);
    let mut parts = vec![
        format!("{} → {}", sender(block), receiver(block)),
        what(&block.latest),
    ];
    if block.kind == Kind::ProbeRun {
        parts[1] = format!("traceroute by {}", protocol_name(flow.flow.proto).to_uppercase());
        parts.push(format!("{} probes", counts.packets));
    } else {
        let plural = if counts.packets == 1 { "" } else { "s" };
        let further = [
            (counts.superfluous, "superfluous"),
            (counts.rejected, "rejected"),
            (counts.expired, "expired"),
            (counts.unknown, "unknown"),
        ];
        let further: Vec<String> = further
            .iter()
            .filter(|(number, _)| *number > 0)
            .map(|(number, what)| format!(", {number} {what}"))
            .collect();
        let text = format!(
            "{} packet{plural}, {} lost{}",
            counts.packets,
            counts.lost,
            further.concat()
        );
        parts.push(text);
    }
    parts.extend(
        block
            .round_trip
            .map(|time| format!("round trip {}", traceroute::milliseconds(time))),
    );
    parts.join("   ")
}

fn sender(block: &Block) -> String {
    let flow = &block.flow.flow;
    end_of_flow(
        block.flow.src_pod.as_deref(),
        flow.src,
        port(block, flow.src_port),
    )
}

fn receiver(block: &Block) -> String {
    let flow = &block.flow.flow;
    let port = port(block, flow.dst_port);
    let pod = block.flow.dst_pod.as_deref();
    // Behind a service, the sender wrote the service's address, and the pod has another one.
    if block.latest.nat.iter().any(|step| step.kind == NatKind::Dnat) {
        let service = end_of_flow(None, flow.dst, port);
        return pod.map_or_else(|| service.clone(), |pod| format!("{service} ({pod})"));
    }
    let name = end_of_flow(pod, flow.dst, port);
    match block.lines.last().and_then(|line| line.node.as_deref()) {
        Some(node) if pod.is_none() && node.parse() != Ok(flow.dst) && is_receiver(block) => {
            format!("{name} (on node {node})")
        }
        _ => name,
    }
}

/// Whether the last line is the receiver's.
fn is_receiver(block: &Block) -> bool {
    let readings = block.lines.last().map(|line| line.readings.iter().flatten());
    readings.is_some_and(|mut readings| readings.any(|reading| reading.address == block.flow.flow.dst))
}

fn end_of_flow(pod: Option<&str>, address: IpAddr, port: Option<u16>) -> String {
    let name = match (pod, address, port) {
        (Some(pod), ..) => pod.to_owned(),
        (None, IpAddr::V6(address), Some(_)) => format!("[{address}]"),
        (None, address, _) => address.to_string(),
    };
    port.map_or_else(|| name.clone(), |port| format!("{name}:{port}"))
}

/// Ports of a probe run change with each probe: they say nothing.
fn port(block: &Block, port: u16) -> Option<u16> {
    (block.kind == Kind::Flow && has_ports(block.flow.flow.proto) && port != 0).then_some(port)
}

fn what(packet: &PacketTrace) -> String {
    let proto = packet.flow.flow.proto;
    let name = match protocol_name(proto) {
        name if name.starts_with(|c: char| c.is_ascii_digit()) => format!("protocol {name}"),
        name if name == "icmpv6" => "ICMPv6".to_owned(),
        name => name.to_uppercase(),
    };
    match &packet.packet.transport {
        Transport::Echo { reply: false, .. } => format!("{name} echo"),
        Transport::Echo { reply: true, .. } => format!("{name} echo reply"),
        Transport::IcmpError { icmp_type, code, .. } => format!("{name} error {icmp_type}/{code}"),
        Transport::Icmp { icmp_type, .. } => format!("{name} type {icmp_type}"),
        _ => match (packet.retransmit, packet.segment) {
            (Some(times), _) => format!("{name} retransmit {times}"),
            (None, Some(Segment::KeepAlive)) => format!("{name} keep-alive"),
            (None, Some(Segment::KeepAliveAck)) => format!("{name} keep-alive ack"),
            (None, Some(Segment::DupAck)) => {
                format!("{name} dup ack {}", packet.dup_ack.unwrap_or(1))
            }
            (None, Some(Segment::Ack)) => format!("{name} ack"),
            (None, None) => name,
        },
    }
}

fn hop(line: &Line) -> String {
    let mut text = traceroute::hop(line);
    if line.certainty == Certainty::Inferred {
        text.push_str("  (inferred)");
    }
    text
}

/// How exact the times are where they are those of several clocks.
fn clocks(packet: &PacketTrace) -> Option<String> {
    let timed = packet
        .hops
        .iter()
        .filter(|hop| hop.arrived_ns.or(hop.left_ns).is_some());
    let bounds: Option<Vec<u64>> = timed.map(|hop| hop.clock_bound_ns).collect();
    match bounds.map(|bounds| bounds.into_iter().max().unwrap_or_default()) {
        Some(0) => None,
        Some(bound) => Some(format!(
            "times between the nodes' clocks: ± {}",
            traceroute::milliseconds(bound)
        )),
        None => Some("times between the nodes' clocks: not known how exact".to_owned()),
    }
}

fn way(line: &Line) -> Option<String> {
    let node = line.node.as_deref();
    match (line.way.is_empty(), node) {
        (false, Some(node)) => Some(format!("{INDENT}{node}: {}", steps(&line.way))),
        (false, None) => Some(format!("{INDENT}{}", steps(&line.way))),
        // An unknown address, but a known node.
        (true, Some(node)) if line.readings.iter().all(Option::is_none) => {
            Some(format!("{INDENT}on node {node}, its address is not known here"))
        }
        (true, _) => None,
    }
}

/// `cali8d02ed71817 → tunl0 IPIP 192.168.49.2 → 192.168.49.3 → eth0`.
fn steps(steps: &[Step]) -> String {
    let words: Vec<String> = steps
        .iter()
        .enumerate()
        .map(|(index, step)| match step {
            Step::Interface(name) if index == 0 => name.to_string(),
            Step::Interface(name) => format!(" → {name}"),
            Step::Encapsulated(encap) => {
                let kind = match encap.kind {
                    EncapKind::Ipip => "IPIP",
                    EncapKind::Vxlan => "VXLAN",
                    EncapKind::Wireguard => "WireGuard",
                };
                let space = if index == 0 { "" } else { " " };
                format!("{space}{kind} {} → {}", encap.src, encap.dst)
            }
        })
        .collect();
    words.concat()
}

/// What policies said of the packet on the line's node, where they log. By which it was dropped is said at the end.
fn logged<'a>(packet: &'a PacketTrace, line: &'a Line) -> impl Iterator<Item = String> + 'a {
    let on_node = packet
        .observations
        .iter()
        .filter(|seen| seen.node.is_some() && seen.node == line.node && !line.way.is_empty());
    let said =
        on_node.filter_map(|seen| Some((seen.logged.as_ref()?.logged.as_ref()?, seen.detail.as_ref()?)));
    said.filter(|(logged, _)| packet.drop.is_none() || !logged.drops())
        .map(|(_, detail)| format!("{INDENT}{detail}"))
}

fn translation(step: &NatStep) -> String {
    let side = match step.kind {
        NatKind::Dnat => "destination",
        NatKind::Snat => "source",
    };
    let [from, to] = [step.from, step.to].map(|end| end_of_flow(None, end.address, end.port));
    format!("{INDENT}{side} translated from {from} to {to}")
}
