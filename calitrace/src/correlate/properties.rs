//! Properties of joining, on packets sent through a model of two nodes: each walks its way step by step, interleaved with
//! the others, on `sk_buff` addresses that are reused as soon as they are free. Whatever happens, no trace mixes two
//! packets, and what a trace claims is true.

use std::{collections::BTreeMap, net::Ipv4Addr};

use proptest::{collection::vec, prelude::*};

use super::{Config, Correlator, PacketTrace, Verdict};
use crate::event::{
    Attachment, AttachmentState, Drop, Encap, EncapKind, Fact, Hook, Interface, Item, Ledger, LedgerRow,
    Node, Observation, Packet, Pod, Role, Route, RouteKind, Transport,
};

pub(super) const DRAIN: u64 = 10_000_000;
pub(super) const TUNNEL: u32 = 2;
pub(super) const UPLINK: u32 = 3;
pub(super) const POD: u32 = 10;
pub(super) const BEGIN: u64 = 1_000_000_000;

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// To the other pod of the node.
    Same(usize),
    /// From this node to the other one.
    Across(usize),
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Arrives,
    /// Dropped at the node it came to, after this step of its way.
    Dropped(usize),
    /// Vanishes between the nodes.
    Vanishes,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Udp,
    UdpWithoutId,
    Echo,
    Data,
    Ack,
    Other,
}

#[derive(Clone, Debug)]
struct Sent {
    kind: Kind,
    way: Way,
    fate: Fate,
    start: u64,
    /// The same bytes as the packet before it, if that takes the same way; TCP data under another IP id.
    again: bool,
}

fn sent() -> impl Strategy<Value = Sent> {
    let kind = prop_oneof![
        Just(Kind::Udp),
        Just(Kind::UdpWithoutId),
        Just(Kind::Echo),
        Just(Kind::Data),
        Just(Kind::Ack),
        Just(Kind::Other)
    ];
    let way = prop_oneof![
        (0..2_usize).prop_map(Way::Same),
        (0..2_usize).prop_map(Way::Across),
        (0..2_usize).prop_map(Way::Across)
    ];
    let fate = prop_oneof![
        6 => Just(Fate::Arrives),
        1 => (0..6_usize).prop_map(Fate::Dropped),
        1 => Just(Fate::Vanishes)
    ];
    (kind, way, fate, 0..200_000_u64, any::<bool>()).prop_map(|(kind, way, fate, start, again)| Sent {
        kind,
        way,
        fate,
        start,
        again,
    })
}

pub(super) fn netns(node: usize) -> u64 {
    4_026_532_000 + node as u64
}

fn octet(number: usize) -> u8 {
    u8::try_from(number).expect("small")
}

fn node_address(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 49, 2 + octet(node))
}

pub(super) fn pod_address(node: usize, pod: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, octet(node), 67 + octet(pod))
}

/// What is known about the two nodes.
pub(super) fn facts(tunnel: bool) -> Vec<Fact> {
    let mut facts = Vec::new();
    for node in 0..2 {
        let (netns, other) = (netns(node), 1 - node);
        let tunnel_address = Ipv4Addr::new(10, 244, octet(node), 64);
        facts.push(Fact::Node(Node {
            time: 0,
            netns,
            name: format!("node{node}"),
            cluster: 1,
            addresses: vec![node_address(node).into(), tunnel_address.into()],
        }));
        let gateway = if tunnel {
            Ipv4Addr::new(10, 244, octet(other), 64)
        } else {
            node_address(other)
        };
        facts.push(Fact::Routes {
            time: 0,
            netns,
            routes: vec![Route {
                prefix: format!("10.244.{other}.64/26").parse().expect("a prefix"),
                kind: RouteKind::Unicast,
                gateway: Some(gateway.into()),
                ifindex: Some(if tunnel { TUNNEL } else { UPLINK }),
                encap: tunnel.then_some(EncapKind::Vxlan),
                remote_node: Some(node_address(other).into()),
            }],
        });
        let interfaces = [
            (TUNNEL, Role::Tunnel, Hook::TunnelIngress),
            (UPLINK, Role::Uplink, Hook::UplinkIngress),
            (POD, Role::Workload, Hook::WorkloadIngress),
            (POD + 1, Role::Workload, Hook::WorkloadIngress),
        ];
        for (ifindex, role, hook) in interfaces {
            facts.push(Fact::Interface(Interface {
                time: 0,
                netns,
                ifindex,
                name: format!("if{ifindex}"),
                role,
                mtu: 1450,
                addresses: Vec::new(),
                gone: false,
            }));
            let state = AttachmentState::Attached;
            facts.push(Fact::Attachment(Attachment {
                time: 0,
                netns,
                ifindex,
                hook,
                state,
                since: None,
                others: Vec::new(),
            }));
        }
        for pod in 0..2 {
            facts.push(Fact::Pod(Pod {
                time: 0,
                netns,
                ifindex: POD + u32::from(octet(pod)),
                addresses: vec![pod_address(node, pod).into()],
                name: Some(format!("ns/pod{node}{pod}")),
                pod_netns: None,
                gone: false,
            }));
        }
    }
    facts
}

/// A step of a way: node, interface, hook, how often the TTL was lowered, whether it is encapsulated.
type Step = (usize, u32, Hook, u8, bool);

fn steps(way: Way, tunnel: bool) -> Vec<Step> {
    match way {
        Way::Same(node) => {
            vec![
                (node, POD, Hook::WorkloadIngress, 0, false),
                (node, POD + 1, Hook::WorkloadEgress, 1, false),
            ]
        }
        Way::Across(node) => {
            let other = 1 - node;
            let mut steps = vec![
                (node, POD, Hook::WorkloadIngress, 0, false),
                (node, TUNNEL, Hook::TunnelEgress, 1, false),
                (node, UPLINK, Hook::UplinkEgress, 1, tunnel),
                (other, UPLINK, Hook::UplinkIngress, 1, tunnel),
                (other, TUNNEL, Hook::TunnelIngress, 1, false),
                (other, POD, Hook::WorkloadEgress, 2, false),
            ];
            if !tunnel {
                steps.retain(|step| step.1 != TUNNEL);
            }
            steps
        }
    }
}

fn packet(sent: &Sent, content: usize, number: usize) -> Packet {
    let (source, destination) = match sent.way {
        Way::Same(node) => (pod_address(node, 0), pod_address(node, 1)),
        Way::Across(node) => (pod_address(node, 0), pod_address(1 - node, 0)),
    };
    let (mut ip_id, own) = (u32::from(octet(content)) + 1, u32::from(octet(number)) + 1);
    let seq = (u32::MAX - 3000).wrapping_add(u32::from(octet(content)) * 100);
    let tcp = |payload| Transport::Tcp {
        src_port: 40_000,
        dst_port: 80,
        seq,
        ack: 1,
        flags: 16,
        window: 500,
        tsval: Some(7),
        payload,
    };
    let (proto, transport) = match sent.kind {
        Kind::Udp => (
            17,
            Transport::Udp {
                src_port: 5000,
                dst_port: 53,
                payload: 20,
            },
        ),
        Kind::UdpWithoutId => {
            ip_id = 0;
            (
                17,
                Transport::Udp {
                    src_port: 5000,
                    dst_port: 53,
                    payload: 20,
                },
            )
        }
        Kind::Echo => (
            1,
            Transport::Echo {
                reply: false,
                id: 7,
                seq: u16::from(octet(content)),
            },
        ),
        Kind::Data => {
            ip_id = own;
            (6, tcp(100))
        }
        Kind::Ack => (6, tcp(0)),
        Kind::Other => (50, Transport::Other),
    };
    Packet {
        src: source.into(),
        dst: destination.into(),
        proto,
        ttl: 64,
        tos: 0,
        ip_id,
        length: 152,
        dont_fragment: true,
        more_fragments: false,
        fragment_offset: 0,
        transport,
        digest: if proto == 6 { 0 } else { content as u64 },
        gso_size: 0,
        gso_segs: 0,
    }
}

/// An observation and the packet that it is of.
#[derive(Clone, Debug)]
struct Walked {
    observation: Observation,
    number: usize,
    /// The last of what the model sees of the packet.
    last: bool,
}

/// Walks the packets through the model.
fn walk(sent: &[Sent], tunnel: bool) -> Vec<Walked> {
    // Time of each step; ties are broken by the packet's number, so all times are different.
    let mut plan = BTreeMap::new();
    let mut ways = Vec::new();
    for (number, packet) in sent.iter().enumerate() {
        let mut way: Vec<(Step, Option<Drop>)> = steps(packet.way, tunnel)
            .into_iter()
            .map(|step| (step, None))
            .collect();
        match packet.fate {
            Fate::Arrives => {}
            Fate::Vanishes => way.retain(|(step, _)| step.0 == way_begins(packet.way)),
            Fate::Dropped(after) => {
                way.truncate(after % (way.len() - 1) + 1);
                let (node, ifindex, _, lowered, encap) = way[way.len() - 1].0;
                let drop = Drop {
                    reason: Some("NETFILTER_DROP".into()),
                    location: Some("nf_hook_slow".into()),
                };
                way.push(((node, ifindex, Hook::KfreeSkb, lowered, encap), Some(drop)));
            }
        }
        for step in 0..way.len() {
            // The same pace for all: packets of a flow do not overtake each other.
            plan.insert((BEGIN + packet.start + step as u64 * 3000, number), step);
        }
        ways.push(way);
    }
    let mut free: [Vec<u64>; 2] = [
        (1..64).map(|skb| skb * 0x100).collect(),
        (1..64).map(|skb| skb * 0x100).collect(),
    ];
    let mut skbs = vec![0; sent.len()];
    let mut contents = vec![0_usize; sent.len()];
    let mut walked = Vec::new();
    for (order, ((time, number), step)) in plan.into_iter().enumerate() {
        let way = &ways[number];
        let ((node, ifindex, hook, lowered, encap), drop) = way[step].clone();
        if step == 0 {
            let before = number
                .checked_sub(1)
                .filter(|before| repeats(&sent[*before], &sent[number]));
            contents[number] = before.map_or(number, |before| contents[before]);
        }
        let enters = step == 0 || way[step - 1].0.0 != node;
        if enters {
            skbs[number] = free[node].pop().expect("enough addresses");
        }
        let (other, mut packet) = (1 - node, packet(&sent[number], contents[number], number));
        packet.ttl -= lowered;
        let outgoing =
            step + 1 < way.len() && way[step + 1].0.0 != node || node == way_begins(sent[number].way);
        let (from, to) = if outgoing { (node, other) } else { (other, node) };
        walked.push(Walked {
            observation: Observation {
                time: time * 100 + order as u64 % 100,
                netns: netns(node),
                ifindex,
                hook,
                cpu: 0,
                skb: skbs[number],
                head: 0,
                packet,
                encap: encap.then(|| Encap {
                    kind: EncapKind::Vxlan,
                    src: node_address(from).into(),
                    dst: node_address(to).into(),
                    ttl: 64,
                    ip_id: 0,
                    length: 0,
                    vni: Some(4096),
                }),
                drop,
                detail: None,
            },
            number,
            last: step + 1 == way.len(),
        });
        if step + 1 == way.len() || way[step + 1].0.0 != node {
            free[node].push(skbs[number]);
        }
    }
    walked
}

/// Whether a packet has the same bytes as the one before it. Copies that vanish cannot be told from those that do not,
/// except by the IP id of TCP data.
fn repeats(before: &Sent, packet: &Sent) -> bool {
    packet.again
        && (before.way, before.kind) == (packet.way, packet.kind)
        && before.start <= packet.start
        && (before.fate != Fate::Vanishes || packet.kind == Kind::Data)
}

fn way_begins(way: Way) -> usize {
    match way {
        Way::Same(node) | Way::Across(node) => node,
    }
}

fn ledger(time: u64, lost: u64) -> Item {
    let row = LedgerRow {
        ring_refused: lost,
        ..LedgerRow::default()
    };
    Item::Ledger(Ledger {
        time,
        exact: false,
        rows: vec![row],
    })
}

/// Correlates, with neighbours swapped where `swaps` says so.
fn correlate(walked: &[Walked], tunnel: bool, swaps: &[bool], lost: u64) -> Vec<PacketTrace> {
    let mut items: Vec<&Observation> = walked.iter().map(|walked| &walked.observation).collect();
    for (index, _) in swaps.iter().enumerate().filter(|(_, swap)| **swap) {
        if index + 1 < items.len() && items[index + 1].time - items[index].time < DRAIN / 2 {
            items.swap(index, index + 1);
        }
    }
    let mut correlator = Correlator::new(Config { drain_period: DRAIN });
    let mut closed = Vec::new();
    for fact in facts(tunnel) {
        correlator.push(&Item::Fact(fact), &mut closed);
    }
    correlator.push(&ledger(0, 0), &mut closed);
    for item in items {
        correlator.push(&Item::Observation(item.clone()), &mut closed);
    }
    let end = BEGIN * 100 + 10_000_000_000;
    correlator.push(&ledger(end - 1, lost), &mut closed);
    correlator.push(&Item::Tick { time: end }, &mut closed);
    assert_eq!(correlator.open.len(), 0, "everything closes");
    assert!(correlator.open.is_clean(), "nothing is left in an index");
    closed
}

/// The packets that a trace is of.
fn numbers(trace: &PacketTrace, walked: &[Walked]) -> Vec<usize> {
    let times = trace
        .observations
        .iter()
        .map(|seen| trace.start_monotonic + seen.elapsed_ns);
    let of = |time| {
        walked
            .iter()
            .find(|walked| walked.observation.time == time)
            .expect("it was given")
            .number
    };
    times.map(of).collect()
}

proptest! {
    /// With nothing lost each packet has its whole trace and the verdict that is its due.
    #[test]
    fn every_packet_is_one_trace(
        sent in vec(sent(), 1..40),
        tunnel in any::<bool>(),
        swaps in vec(any::<bool>(), 240),
    ) {
        let walked = walk(&sent, tunnel);
        let traces = correlate(&walked, tunnel, &swaps, 0);
        prop_assert_eq!(traces.len(), sent.len());
        for trace in &traces {
            let numbers = numbers(trace, &walked);
            prop_assert!(numbers.iter().all(|number| *number == numbers[0]), "mixed: {:?} in {trace:#?}", numbers);
            let all = walked.iter().filter(|walked| walked.number == numbers[0]).count();
            prop_assert_eq!(numbers.len(), all);
            let packet = &sent[numbers[0]];
            let expected = match (packet.fate, packet.way) {
                (Fate::Arrives, _) | (Fate::Vanishes, Way::Same(_)) => Verdict::Delivered,
                (Fate::Dropped(_), _) => Verdict::Dropped,
                (Fate::Vanishes, Way::Across(_)) => Verdict::Lost,
            };
            prop_assert_eq!(trace.verdict, expected);
            if trace.verdict == Verdict::Delivered {
                let routers = match packet.way { Way::Same(_) => 1, Way::Across(_) => 2 };
                prop_assert_eq!(trace.hops.len(), routers + 1);
                prop_assert_eq!(trace.hops.last().and_then(|hop| hop.address), Some(trace.flow.flow.dst));
            }
        }
    }

    /// When records are lost, still no trace mixes packets that can be told apart, and no claim is false.
    #[test]
    fn loss_makes_no_claim_false(
        mut sent in vec(sent(), 1..40),
        tunnel in any::<bool>(),
        kept in vec(prop::bool::weighted(0.7), 240),
    ) {
        for packet in &mut sent {
            packet.again = false;
        }
        let mut walked = walk(&sent, tunnel);
        let before = walked.len();
        let mut kept = kept.into_iter().cycle();
        walked.retain(|_| kept.next().unwrap_or(true));
        let lost = (before - walked.len()) as u64;
        for trace in correlate(&walked, tunnel, &[], lost) {
            let numbers = numbers(&trace, &walked);
            prop_assert!(numbers.iter().all(|number| *number == numbers[0]), "mixed: {:?} in {trace:#?}", numbers);
            let packet = &sent[numbers[0]];
            let ends = walked.iter().any(|walked| walked.number == numbers[0] && walked.last);
            match trace.verdict {
                Verdict::Delivered => prop_assert!(ends && !matches!(packet.fate, Fate::Dropped(_))),
                Verdict::Dropped => prop_assert!(ends && matches!(packet.fate, Fate::Dropped(_))),
                Verdict::Lost => prop_assert_eq!(lost, 0),
                Verdict::Unknown => {}
                other => prop_assert!(false, "{other:?} of {packet:?}"),
            }
        }
    }
}
