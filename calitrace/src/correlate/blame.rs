//! Who dropped a packet, and on its way to where: what the trace tells of it, put to the rules and routes of the node.

use std::net::IpAddr;

use super::{
    AnswerKind, Name,
    firewall::Firewall,
    node::Device,
    open::{Open, Seen},
    timers::MILLISECOND,
    topology::Topology,
    waypoint,
};
use crate::{
    event::{Drop, EncapKind, Hook, Route, RouteKind, Transport, has_ports},
    netfilter::{self, Asked, Cause, Culprit, Device as At, States},
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
    /// The MTU of that, where the packet is too large for it.
    pub(super) mtu: Option<u32>,
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
        let firewall = topology.firewall(seen.node);
        let mut culprits = firewall.map_or_else(Vec::new, |firewall| {
            culprits(firewall, &packet, &hooks, seen.time)
        });
        // What a rule logged of the packet itself leaves no doubt.
        if let Some((prefix, mut logged)) = waypoint::logged_before(open, *index) {
            let loggers = firewall.map_or_else(Vec::new, |firewall| {
                firewall.loggers(prefix, packet.src.is_ipv6(), seen.time)
            });
            logged.complete(&loggers);
            if let Some(culprit) = logged.culprit(&culprits, &loggers) {
                culprits = vec![culprit];
            }
        }
        // Who drops it does not answer.
        if is_refused(open) && culprits.iter().any(|culprit| culprit.rejects) {
            culprits.retain(|culprit| culprit.rejects);
        }
        let before = match output {
            At::Is(name) => Some(name),
            At::None | At::Unknown => None,
        };
        return Blame {
            culprits,
            before,
            ..Blame::default()
        };
    }
    let destination = destination(open, seen);
    // What is too large for a device is dropped before it (`ip_forward`, `net/ipv4/ip_forward.c`; `ip6_forward`,
    // `net/ipv6/ip6_output.c`).
    let told = open
        .answered
        .as_ref()
        .is_some_and(|answered| answered.mtu.is_some());
    let is_too_large = |device: &&Device| {
        told || drop.reason.as_deref() == Some("PKT_TOO_BIG") || exceeds(open, drop, seen, device.mtu)
    };
    let before = topology.way_out(seen.node, destination).filter(is_too_large);
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
        before: before.map(|device| &*device.name),
        mtu: before.map(|device| device.mtu),
        route,
        ..Blame::default()
    }
}

/// Whether an answer came back that says no.
fn is_refused(open: &Open) -> bool {
    let answer = open.answered.as_ref().map(|answered| answered.kind);
    matches!(answer, Some(AnswerKind::Unreachable | AnswerKind::Reset))
}

/// The rules that may have dropped it.
///
/// What may begin a connection is invalid to conntrack only if it is broken (bad checksums are looked for before routing,
/// `nf_checksum` in `net/netfilter/nf_conntrack_proto_{tcp,udp,icmp}.c`): that is rare, so it is thought of only where no
/// other rule explains the drop. Else each policy that denies would share its drops with the rule for INVALID before it.
fn culprits(firewall: &Firewall, packet: &Asked<'_>, hooks: &[netfilter::Hook], time: u64) -> Vec<Culprit> {
    let culprits = firewall.culprits(packet, hooks, time);
    if !culprits.is_empty() || packet.states != States::OPENING {
        return culprits;
    }
    let broken = Asked {
        states: States::BROKEN,
        ..*packet
    };
    let of_broken = firewall.culprits(&broken, hooks, time);
    let because = of_broken
        .into_iter()
        .filter(|culprit| culprit.cause == Cause::Invalid);
    because
        .map(|culprit| Culprit {
            cause: Cause::Broken,
            ..culprit
        })
        .collect()
}

/// Whether forwarding dropped what does not fit a device, on kernels that give no reason.
fn exceeds(open: &Open, drop: &Drop, seen: &Seen, mtu: u32) -> bool {
    let whole = open.packet.dont_fragment || open.packet.src.is_ipv6();
    let without_reason = matches!(drop.reason.as_deref(), None | Some("NOT_SPECIFIED"));
    let forwarding = matches!(drop.location.as_deref(), Some("ip_forward" | "ip6_forward"));
    let one = seen.encap.is_none() && seen.segments <= 1;
    one && whole && without_reason && forwarding && seen.ttl > 1 && seen.length > mtu
}

/// Whether netfilter dropped it, and the node's rules may be read again before `deadline`: as they were before they may have
/// changed.
pub(super) fn awaits_rules(open: &Open, topology: &Topology, deadline: u64) -> bool {
    /// They are asked for with the drop, but where they are many and keep changing, only a quarter of the time is spent on it.
    const PATIENCE: u64 = 2000 * MILLISECOND;
    open.drop.as_deref().is_some_and(|(drop, index)| {
        let seen = &open.seen[*index];
        drop.is_netfilter()
            && !seen.in_pod
            && deadline < seen.time + PATIENCE
            && topology
                .firewall(seen.node)
                .is_some_and(|firewall| firewall.is_stale(seen.time))
    })
}

/// The hooks where it may have been dropped, in the order of its way.
///
/// Without netfilter's own word the TTL tells: it is lowered before `FORWARD` and after routing (`ip_forward`,
/// `net/ipv4/ip_forward.c`; `ip6_forward`, `net/ipv6/ip6_output.c`; 5.10 to 6.18).
///
/// What conntrack put together from fragments has a trace that begins with the drop, and no TTL to compare; that it came in
/// its source tells (`ipv4_conntrack_defrag`, `net/ipv4/netfilter/nf_defrag_ipv4.c`; `ipv6_defrag`,
/// `net/ipv6/netfilter/nf_defrag_ipv6_hooks.c`; 6.1).
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
        None if came_in(open, seen, topology) && topology.is_own(seen.node, dst) => vec![Prerouting, Input],
        None if came_in(open, seen, topology) => vec![Prerouting, Forward, Postrouting],
        _ => vec![Output, Postrouting],
    }
}

/// Whether a packet of which nothing but its drop was seen on the node came in by an interface of it.
fn came_in(open: &Open, seen: &Seen, topology: &Topology) -> bool {
    topology.interface_name(seen.netns, seen.ifindex).is_some()
        && !topology.is_own(seen.node, open.flow_at(seen).src)
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
) -> (At<'a>, At<'a>) {
    use netfilter::Hook::{Forward, Input, Output, Postrouting, Prerouting};
    let known = |name: Option<&'a Name>| name.map_or(At::Unknown, |name| At::Is(name));
    // Netfilter's own word, where `nf_hook_slow` is observed.
    if let Some((input, output)) = waypoint::netfilter_devices(open) {
        let device = |ifindex| match ifindex {
            0 => At::None,
            ifindex => known(topology.interface_name(seen.node, ifindex)),
        };
        return (device(input), device(output));
    }
    // Up to the output's own functions `skb->dev` is the device it came by.
    let input = match hooks.first() {
        Some(Output) => At::None,
        Some(Prerouting | Input | Forward) => known(topology.interface_name(seen.netns, seen.ifindex)),
        Some(Postrouting) | None => At::Unknown,
    };
    let output = match hooks.last() {
        Some(Prerouting | Input) => At::None,
        _ => known(
            topology
                .way_out(seen.node, destination(open, seen))
                .map(|device| &device.name),
        ),
    };
    (input, output)
}

fn asked<'a>(
    open: &Open,
    seen: &Seen,
    (input, output): (At<'a>, At<'a>),
    topology: &'a Topology,
) -> Asked<'a> {
    let local = topology.addresses(seen.node);
    if let Some(encap) = &seen.encap {
        // Hooks tell VXLAN by its port, which is Calico's. They do not say which that is; the rules do.
        let port = || {
            let firewall = topology.firewall(seen.node)?;
            firewall.vxlan_port(encap.src.is_ipv6(), seen.time)
        };
        let is_vxlan = encap.kind == EncapKind::Vxlan;
        return Asked {
            src: encap.src,
            dst: encap.dst,
            proto: if encap.kind == EncapKind::Ipip { IPIP } else { UDP },
            ports: is_vxlan.then(port).flatten().map(|port| (None, port)),
            icmp: None,
            input,
            output,
            states: States::OPENING,
            is_from_there: false,
            local,
        };
    }
    let flow = open.flow_at(seen);
    // Later fragments have none, though netfilter puts them together where conntrack is.
    let ports = (flow.src_port, flow.dst_port);
    // It came in by its pod's own interface, where it may have been dropped, too.
    let is_from_there = open.seen.iter().any(|came| {
        matches!(came.hook, Hook::WorkloadIngress | Hook::KfreeSkb)
            && came.node == seen.node
            && topology.leads_back(open.cluster, came.node, came.ifindex, flow.src)
    });
    Asked {
        src: flow.src,
        dst: flow.dst,
        proto: flow.proto,
        ports: (has_ports(flow.proto) && ports != (0, 0)).then_some((Some(ports.0), ports.1)),
        icmp: icmp(&open.packet.transport, flow.src.is_ipv6()),
        input,
        output,
        states: states(flow.proto, &open.packet.transport),
        is_from_there,
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
