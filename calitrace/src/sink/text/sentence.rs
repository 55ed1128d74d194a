//! How a packet ended, in one sentence.

use super::{
    reasons,
    render::{Look, Row, row},
};
use crate::{
    correlate::{Answer, AnswerKind, Bypass, DeadEnd, DropReport, Name, PacketTrace, TooLarge, Verdict},
    event::{EncapKind, RouteKind},
    netfilter::Culprit,
    view::{Block, Kind},
};

/// How the latest packet ended, where that is not simply delivery.
pub(super) fn end(block: &Block) -> Option<Row> {
    let packet = &*block.latest;
    let run = block.kind == Kind::ProbeRun;
    match packet.verdict {
        Verdict::Dropped => {
            let look = if packet.is_superfluous() {
                Look::Faint
            } else {
                Look::Alarm
            };
            Some(row(look, dropped(packet)))
        }
        Verdict::Lost => Some(row(Look::Alarm, lost(packet))),
        // The normal end of a probe run: the receiver's closed port, or one router less than there are.
        Verdict::Rejected
            if run
                && packet
                    .answer
                    .as_ref()
                    .is_some_and(|answer| answer.address == packet.flow.flow.dst) =>
        {
            None
        }
        Verdict::Expired if run => None,
        // Nobody told the sender.
        Verdict::Expired | Verdict::Rejected if reason(packet).is_some() => Some(row(
            Look::Alarm,
            format!("✗ {}", reason(packet).unwrap_or_default()),
        )),
        Verdict::Rejected => Some(row(Look::Alarm, rejected(packet))),
        Verdict::Expired => Some(row(Look::Alarm, expired(packet))),
        Verdict::Left => Some(row(
            Look::Faint,
            format!("→ {}, and is not followed beyond it", departure(packet)),
        )),
        Verdict::Unknown if packet.bypass.is_some() => packet
            .bypass
            .as_ref()
            .map(|bypass| row(Look::Faint, handed_on(bypass))),
        Verdict::Unknown => Some(row(
            Look::Faint,
            "? how it ended is unknown: records were lost, or hooks were not attached yet".into(),
        )),
        Verdict::Unfinished => Some(row(Look::Faint, "… still under way when observing ended".into())),
        Verdict::Delivered => None,
    }
}

fn reason(packet: &PacketTrace) -> Option<&str> {
    packet.hops.last()?.reason.as_deref()
}

fn handed_on(bypass: &Bypass) -> String {
    let part = |word: &str, value: &Option<Name>| {
        let value = value.as_ref().map(|value| format!(" {word} {value}"));
        value.unwrap_or_default()
    };
    format!(
        "? how it ended was not seen: the TC program {}{}{} may hand packets on past all further hooks",
        bypass.programs.join(", "),
        part("at", &bypass.interface),
        part("of node", &bypass.node),
    )
}

fn dropped(packet: &PacketTrace) -> String {
    match &packet.drop {
        Some(report) => format!("✗ dropped{}", place_and_reason(packet, report)),
        None => "✗ dropped".into(),
    }
}

/// ` on node a at eth0: why`, of the packet or of the answer to it.
fn place_and_reason(packet: &PacketTrace, report: &DropReport) -> String {
    let part = |word: &str, value: &Option<Name>| value.as_ref().map(|value| format!(" {word} {value}"));
    let ahead = report
        .before
        .as_ref()
        .filter(|next| report.interface.as_ref() != Some(next));
    let parts = [
        part("on node", &report.node),
        part("at", &report.interface),
        ahead.map(|next| format!(", before {next}")),
    ];
    let place = parts.into_iter().flatten().collect::<Vec<_>>().concat();
    let meaning = match report.mtu {
        Some(mtu) => Some(format!(
            "{}, and nobody was seen telling the sender: a path MTU black hole",
            size(packet, mtu)
        )),
        None if is_outer(packet, report) => {
            Some("no tunnel device here takes it out of its outer packet (is one down?)".to_owned())
        }
        None => meaning(report),
    };
    let reason = match (report.reason.as_deref(), &report.location) {
        (Some(reason), Some(location)) => Some(format!("{reason} at {location}")),
        (None, Some(location)) => Some(format!("at {location}")),
        (reason, None) => reason.map(str::to_owned),
    };
    let why: Vec<String> = meaning.into_iter().chain(reason).collect();
    let why = [culprits(&report.culprits), why.join(", ")];
    let why = why
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>();
    let colon = if why.is_empty() { "" } else { ": " };
    format!("{place}{colon}{}", why.join(" · "))
}

/// The drop reason of packets that no socket is there for.
const NOBODY: &str = "NO_SOCKET";

/// Whether it was for the outer packet that nobody was there: the tunnel device's socket is gone with it.
fn is_outer(packet: &PacketTrace, report: &DropReport) -> bool {
    let mut seen = packet.observations.iter().rev();
    let last = seen.find(|sighting| sighting.interface.is_some());
    packet.drop.as_ref() == Some(report)
        && report.reason.as_deref() == Some(NOBODY)
        && last.is_some_and(|sighting| sighting.encap.is_some())
}

/// The rule that did it, or those that may have.
fn culprits(all: &[Culprit]) -> String {
    /// More of them help nobody.
    const SHOWN: usize = 3;
    let mut shown: Vec<String> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    if all.len() > SHOWN {
        shown.push(format!("{} more", all.len() - SHOWN));
    }
    match all.len() {
        0 | 1 => shown.concat(),
        _ => format!("one of: {}", shown.join("; ")),
    }
}

/// The reason in plain words. Kernels before 5.17 give none, but netfilter's drops have a function of their own.
fn meaning(report: &DropReport) -> Option<String> {
    match report.reason.as_deref() {
        _ if is_netfilter(report) => {
            let hook = report.netfilter.map(|hook| format!(" {hook}"));
            let unnamed = if report.culprits.is_empty() {
                " (a policy or firewall rule)"
            } else {
                ""
            };
            Some(format!("netfilter{}{unnamed}", hook.unwrap_or_default()))
        }
        reason => match &report.route {
            Some(route) => Some(dead_end(route)),
            None => reasons::words(reason, report.location.as_deref()).map(str::to_owned),
        },
    }
}

fn is_netfilter(report: &DropReport) -> bool {
    matches!(
        (report.reason.as_deref(), report.location.as_deref()),
        (Some("NETFILTER_DROP"), _) | (None, Some("nf_hook_slow"))
    )
}

fn dead_end(route: &DeadEnd) -> String {
    let prefix = route.prefix;
    match route.kind {
        // Of a block: what the routes of pods leave over.
        RouteKind::Blackhole if prefix.prefix_len() < prefix.max_prefix_len() => {
            format!("no pod's route here leads to the address (blackhole route {prefix})")
        }
        RouteKind::Blackhole => format!("the blackhole route {prefix}"),
        RouteKind::Unreachable => format!("the unreachable route {prefix}"),
        RouteKind::Prohibit => format!("the prohibit route {prefix}"),
        RouteKind::Unicast => format!("the route {prefix} leads nowhere"),
    }
}

fn rejected(packet: &PacketTrace) -> String {
    let Some(answer) = &packet.answer else {
        return "✗ rejected".into();
    };
    if let Some(mtu) = answer.mtu {
        return too_large(packet, answer, mtu);
    }
    let how = match (answer.kind, answer.icmp) {
        (AnswerKind::Reset, _) => "TCP reset".to_owned(),
        (_, Some((icmp_type, code))) => unreachable(icmp_type, code),
        _ => "ICMP unreachable".to_owned(),
    };
    let end = unheard(packet, answer, "");
    // Else it came to whoever answered: a port nobody listens at.
    let has_reason = |report: &&DropReport| {
        let reason = report.reason.as_deref().filter(|reason| *reason != NOBODY);
        is_netfilter(report) || report.route.is_some() || reasons::words(reason, None).is_some()
    };
    let refused = packet.drop.as_ref().filter(has_reason);
    let Some(report) = refused else {
        return format!("✗ rejected by {}: {how}{end}", answer.address);
    };
    // Netfilter resets connections in the receiver's name (`nf_send_reset`, `net/ipv4/netfilter/nf_reject_ipv4.c`).
    let is_forged = answer.kind == AnswerKind::Reset && report.culprits.iter().any(|culprit| culprit.rejects);
    let told = if is_forged {
        format!("the node sent a {how} in the name of {}", answer.address)
    } else {
        format!("{} sent {how} to {}", answer.address, packet.flow.flow.src)
    };
    format!("✗ rejected{}; {told}{end}", place_and_reason(packet, report))
}

/// What became of an answer that the sender never got, and what that makes of it.
fn unheard(packet: &PacketTrace, answer: &Answer, consequence: &str) -> String {
    answer.dropped.as_ref().map_or_else(String::new, |report| {
        let end = place_and_reason(packet, report);
        format!(", but that was dropped{end}{consequence}")
    })
}

/// By how much it is too large. Of a super-packet each segment may be.
fn size(packet: &PacketTrace, mtu: u32) -> String {
    let fixed = if packet.packet.dont_fragment {
        " with DF"
    } else {
        ""
    };
    let segments = match packet.packet.gso_segs {
        0 | 1 => String::new(),
        segments => format!(" in {segments} segments"),
    };
    format!("{} bytes{segments}{fixed} exceed the MTU of {mtu}", packet.length)
}

/// Where the device stands that it does not fit, if that is seen, and who was told.
fn too_large(packet: &PacketTrace, answer: &Answer, mtu: u32) -> String {
    let report = packet.drop.as_ref();
    let place = match report.map(|report| (&report.node, &report.before)) {
        Some((Some(node), Some(device))) => format!("on node {node} before {device}"),
        Some((Some(node), None)) => format!("on node {node}"),
        _ => format!("by {}", answer.address),
    };
    let (icmp_type, code) = answer.icmp.unwrap_or_default();
    format!(
        "✗ rejected {place}: {}; {} sent {} to {}{}",
        size(packet, mtu),
        answer.address,
        unreachable(icmp_type, code),
        packet.flow.flow.src,
        unheard(packet, answer, ": a path MTU black hole")
    )
}

/// Between which nodes, when, and what that leaves as the reason.
fn lost(packet: &PacketTrace) -> String {
    let Some(report) = &packet.lost else {
        return "✗ lost".into();
    };
    let name = |name: &Option<Name>| name.as_deref().unwrap_or("a node").to_owned();
    let interface = report.interface.as_ref().map(|interface| format!(" {interface}"));
    let sent = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(packet.start + report.elapsed_ns);
    let sent = humantime::format_rfc3339_micros(sent).to_string();
    let time = sent.split(['T', 'Z']).nth(1).unwrap_or_default();
    let carrier = match report.encap {
        Some(EncapKind::Ipip) => "IPIP (protocol 4) is",
        Some(EncapKind::Vxlan) => "VXLAN (UDP) is",
        Some(EncapKind::Wireguard) => "WireGuard (UDP) is",
        None => "such packets are",
    };
    let xdp = report
        .xdp
        .as_ref()
        .map(|device| format!("dropped by the XDP program at its {device}, "));
    let too_large = report.too_large.as_ref().map(|device| {
        let TooLarge {
            interface,
            mtu,
            length,
        } = device;
        format!("larger ({length} bytes) than the MTU of {mtu} of its {interface}, ")
    });
    format!(
        "✗ lost between {}{} (sent {time} UTC) and {} (nothing lost in the ledgers): {carrier} {}filtered on the way, \
         or the node is down",
        name(&report.node),
        interface.unwrap_or_default(),
        name(&report.next_node),
        [too_large, xdp].into_iter().flatten().collect::<String>(),
    )
}

/// RFC 792 and RFC 1812 (type 3), RFC 4443 (types 1 and 2).
fn unreachable(icmp_type: u8, code: u8) -> String {
    let name = match (icmp_type, code) {
        (3, 0 | 6 | 11) | (1, 0) => "network",
        (3, 1 | 7 | 12) | (1, 3) => "host",
        (3, 2) => "protocol",
        (3, 3) | (1, 4) => "port",
        (3, 4) => return "ICMP fragmentation needed".into(),
        (2, _) => return "ICMP packet too big".into(),
        (3, 9 | 10 | 13) | (1, 1) => return "ICMP administratively prohibited".into(),
        _ => return format!("ICMP type {icmp_type}, code {code}"),
    };
    format!("ICMP {name} unreachable")
}

fn expired(packet: &PacketTrace) -> String {
    let place = packet.hops.last();
    let end = match (
        place.and_then(|hop| hop.node.as_deref()),
        place.and_then(|hop| hop.address),
    ) {
        (Some(node), Some(address)) => format!("✗ expired on node {node} ({address}): the TTL ran out"),
        (Some(node), None) => format!("✗ expired on node {node}: the TTL ran out"),
        (None, Some(address)) => format!("✗ expired at {address}: the TTL ran out"),
        (None, None) => "✗ expired: the TTL ran out".into(),
    };
    let told = packet.answer.as_ref().filter(|answer| answer.dropped.is_some());
    match told {
        Some(answer) => format!(
            "{end}; {} sent ICMP time exceeded{}",
            answer.address,
            unheard(packet, answer, "")
        ),
        None => end,
    }
}

/// Where it was seen last.
fn departure(packet: &PacketTrace) -> String {
    let last = packet.observations.last();
    let node = last.and_then(|sighting| sighting.node.as_deref());
    let interface = last.and_then(|sighting| sighting.interface.as_deref());
    match (node, interface) {
        (Some(node), Some(interface)) => format!("left node {node} by {interface}"),
        (Some(node), None) => format!("left node {node}"),
        (None, _) => "left".into(),
    }
}
