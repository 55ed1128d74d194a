//! Which netfilter rules may have dropped a packet: what the trace tells of it, put to the rules of the node.

use std::net::IpAddr;

use super::{
    open::{Open, Seen},
    topology::Topology,
    waypoint,
};
use crate::{
    event::{EncapKind, Hook, Transport, has_ports},
    netfilter::{self, Asked, Culprit, Device, States},
};

/// IANA protocol numbers.
const IPIP: u8 = 4;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The rules that may have dropped it; none where netfilter did not, or its rules are not known.
pub(super) fn culprits(open: &Open, topology: &Topology) -> Vec<Culprit> {
    let Some((drop, index)) = open.drop.as_deref() else {
        return Vec::new();
    };
    let seen = &open.seen[*index];
    if !drop.is_netfilter() || seen.in_pod {
        return Vec::new();
    }
    let hooks = hooks(open, *index, topology);
    let packet = asked(open, seen, &hooks, topology);
    topology
        .firewall(seen.node)
        .map_or_else(Vec::new, |firewall| firewall.culprits(&packet, &hooks))
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

fn asked<'a>(open: &Open, seen: &Seen, hooks: &[netfilter::Hook], topology: &'a Topology) -> Asked<'a> {
    use netfilter::Hook::{Forward, Input, Output, Postrouting, Prerouting};
    let known = |name: Option<&'a super::Name>| name.map_or(Device::Unknown, |name| Device::Is(name));
    let dst = destination(open, seen);
    // Up to the output's own functions `skb->dev` is the device it came by.
    let input = match hooks.first() {
        Some(Output) => Device::None,
        Some(Prerouting | Input | Forward) => known(topology.interface_name(seen.netns, seen.ifindex)),
        Some(Postrouting) | None => Device::Unknown,
    };
    let output = match hooks.last() {
        Some(Prerouting | Input) => Device::None,
        _ => known(topology.way_out(seen.node, dst)),
    };
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
        Transport::Udp { .. } | Transport::Sctp { .. } | Transport::Echo { reply: false, .. } => {
            States::OPENING
        }
        // Segments amid a connection, answers, errors: without their connection they may be invalid.
        Transport::Tcp { .. }
        | Transport::Echo { .. }
        | Transport::IcmpError { .. }
        | Transport::Icmp { .. } => States::ANY,
        Transport::Other if proto == TCP => States::ANY,
        Transport::Other => States::OPENING,
    }
}
