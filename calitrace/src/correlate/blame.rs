//! Who dropped a packet, and on its way to where: what the trace tells of it, put to the rules and routes of the node.

use std::net::IpAddr;

use super::{
    Name,
    open::{Open, Seen},
    topology::Topology,
    waypoint,
};
use crate::{
    event::{EncapKind, Hook, Route, RouteKind, Transport, has_ports},
    netfilter::{self, Asked, Culprit, Device, States},
};

/// IANA protocol numbers.
const IPIP: u8 = 4;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// What is known of a drop beside what the kernel says of it.
#[derive(Debug, Default)]
pub(super) struct Blame<'a> {
    /// The rules that may have dropped it; none where netfilter did not, or its rules are not known.
    pub(super) culprits: Vec<Culprit>,
    /// The device it was to leave by, where it was on its way there.
    pub(super) before: Option<&'a str>,
    /// The route to its destination, where that leads nowhere.
    pub(super) route: Option<&'a Route>,
}

/// Who dropped it, and on its way to where.
pub(super) fn of<'a>(open: &Open, topology: &'a Topology) -> Blame<'a> {
    let Some((drop, index)) = open.drop.as_deref() else {
        return Blame::default();
    };
    let seen = &open.seen[*index];
    if seen.in_pod {
        return Blame::default();
    }
    if drop.is_netfilter() {
        let hooks = hooks(open, *index, topology);
        let (input, output) = devices(open, seen, &hooks, topology);
        let packet = asked(open, seen, (input, output), topology);
        let culprits = topology
            .firewall(seen.node)
            .map_or_else(Vec::new, |firewall| firewall.culprits(&packet, &hooks));
        let before = match output {
            Device::Is(name) => Some(name),
            Device::None | Device::Unknown => None,
        };
        return Blame {
            culprits,
            before,
            route: None,
        };
    }
    let destination = destination(open, seen);
    // What is too large for a device is dropped before it (`ip_forward`, `net/ipv4/ip_forward.c`; `ip6_forward`,
    // `net/ipv6/ip6_output.c`).
    let is_too_large = drop.reason.as_deref() == Some("PKT_TOO_BIG")
        || open
            .answered
            .as_ref()
            .is_some_and(|answered| answered.mtu.is_some());
    let before = is_too_large
        .then(|| topology.way_out(seen.node, destination))
        .flatten()
        .map(|name| &**name);
    // What no route sends on is dropped by routing itself (`ip_error`, `net/ipv4/route.c`; `ip6_pkt_drop`,
    // `net/ipv6/route.c`), for the same reason as much else.
    let may_be_routing = matches!(
        drop.reason.as_deref(),
        None | Some("NOT_SPECIFIED" | "IP_INNOROUTES" | "IP_OUTNOROUTES")
    );
    let route = topology
        .route(seen.node, destination)
        .filter(|route| route.kind != RouteKind::Unicast)
        // The block of a tunnel's address is a blackhole, too.
        .filter(|_| may_be_routing && !topology.is_own(seen.node, destination));
    Blame {
        before,
        route,
        ..Blame::default()
    }
}

/// The hooks where it may have been dropped, in the order of its way.
///
/// Without netfilter's own word the TTL tells: it is lowered before `FORWARD` and after routing (`ip_forward`,
/// `net/ipv4/ip_forward.c`; `ip6_forward`, `net/ipv6/ip6_output.c`; 5.10 to 6.18).
fn hooks(open: &Open, index: usize, topology: &Topology) -> Vec<netfilter::Hook> {
    use netfilter::Hook::{Forward, Input, Output, Postrouting, Prerouting};
    const ALL: [netfilter::Hook; 5] = [Prerouting, Input, Forward, Output, Postrouting];
    if let Some(name) = waypoint::netfilter_hook(open) {
        return ALL.into_iter().filter(|hook| hook.name() == name).collect();
    }
    let seen = &open.seen[index];
    let dst = destination(open, seen);
    let before = open.seen[..index]
        .iter()
        .rev()
        .find(|before| before.hook != Hook::KfreeSkb && before.node == seen.node);
    match before {
        _ if seen.encap.is_some() && topology.is_own(seen.node, dst) => vec![Prerouting, Input],
        Some(before) if before.is_ingress() && seen.ttl < before.ttl => vec![Forward, Postrouting],
        Some(before) if before.is_ingress() && topology.is_own(seen.node, dst) => vec![Prerouting, Input],
        Some(before) if before.is_ingress() => vec![Prerouting],
        _ => vec![Output, Postrouting],
    }
}

fn destination(open: &Open, seen: &Seen) -> IpAddr {
    match &seen.encap {
        Some(encap) => encap.dst,
        None => open.flow_at(seen).dst,
    }
}

/// The device it came by, and the one it was to leave by: none of all where it was for the node itself.
fn devices<'a>(
    open: &Open,
    seen: &Seen,
    hooks: &[netfilter::Hook],
    topology: &'a Topology,
) -> (Device<'a>, Device<'a>) {
    use netfilter::Hook::{Forward, Input, Output, Postrouting, Prerouting};
    let known = |name: Option<&'a Name>| name.map_or(Device::Unknown, |name| Device::Is(name));
    // Netfilter's own word, where `nf_hook_slow` is observed.
    if let Some((input, output)) = waypoint::netfilter_devices(open) {
        let device = |ifindex| match ifindex {
            0 => Device::None,
            ifindex => known(topology.interface_name(seen.node, ifindex)),
        };
        return (device(input), device(output));
    }
    // Up to the output's own functions `skb->dev` is the device it came by.
    let input = match hooks.first() {
        Some(Output) => Device::None,
        Some(Prerouting | Input | Forward) => known(topology.interface_name(seen.netns, seen.ifindex)),
        Some(Postrouting) | None => Device::Unknown,
    };
    let output = match hooks.last() {
        Some(Prerouting | Input) => Device::None,
        _ => known(topology.way_out(seen.node, destination(open, seen))),
    };
    (input, output)
}

fn asked<'a>(
    open: &Open,
    seen: &Seen,
    (input, output): (Device<'a>, Device<'a>),
    topology: &'a Topology,
) -> Asked<'a> {
    let local = topology.addresses(seen.node);
    if let Some(encap) = &seen.encap {
        return Asked {
            src: encap.src,
            dst: encap.dst,
            proto: if encap.kind == EncapKind::Ipip { IPIP } else { UDP },
            ports: None,
            icmp: None,
            input,
            output,
            states: States::OPENING,
            local,
        };
    }
    let flow = open.flow_at(seen);
    // Later fragments have none, though netfilter puts them together where conntrack is.
    let ports = (flow.src_port, flow.dst_port);
    Asked {
        src: flow.src,
        dst: flow.dst,
        proto: flow.proto,
        ports: (has_ports(flow.proto) && ports != (0, 0)).then_some(ports),
        icmp: icmp(&open.packet.transport, flow.src.is_ipv6()),
        input,
        output,
        states: states(flow.proto, &open.packet.transport),
        local,
    }
}

/// Types of echo: RFC 792 and RFC 4443.
fn icmp(transport: &Transport, v6: bool) -> Option<(u8, u8)> {
    match *transport {
        Transport::Echo { reply, .. } => Some((
            match (v6, reply) {
                (false, false) => 8,
                (false, true) => 0,
                (true, false) => 128,
                (true, true) => 129,
            },
            0,
        )),
        Transport::IcmpError { icmp_type, code, .. } | Transport::Icmp { icmp_type, code, .. } => {
            Some((icmp_type, code))
        }
        _ => None,
    }
}

fn states(proto: u8, transport: &Transport) -> States {
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    match transport {
        Transport::Tcp { flags, .. } if flags & (SYN | ACK) == SYN => States::OPENING,
        Transport::Udp { .. } | Transport::Echo { reply: false, .. } => States::OPENING,
        // Segments and chunks amid a connection, answers, errors: without their connection they may be invalid.
        Transport::Tcp { .. }
        | Transport::Sctp { .. }
        | Transport::Echo { .. }
        | Transport::IcmpError { .. }
        | Transport::Icmp { .. } => States::ANY,
        Transport::Other if matches!(proto, TCP | SCTP) => States::ANY,
        Transport::Other => States::OPENING,
    }
}
