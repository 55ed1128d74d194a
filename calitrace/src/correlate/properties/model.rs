//! What pods send in the model: flows of several kinds, ways and translations, the packets of each, and what becomes of
//! them. Flows that differ in nothing but their way or destination carry the same bytes.

use std::net::IpAddr;

use proptest::prelude::*;

use super::facts::{floating, node_address, outside, pod_of, service};
use crate::event::{Packet, Quoted, QuotedTransport, Transport};

/// Bytes of a TCP segment.
pub(super) const SEGMENT: u32 = 1400;

/// Where a flow leads. The first number is the node it begins at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From the first pod of a node to its second.
    Same(usize),
    /// To the first pod of the other node.
    Across(usize),
    /// Out of the cluster, under the node's address.
    Out(usize),
    /// Through a service back to the pod itself, under the node's address.
    Hairpin(usize),
}

impl Way {
    pub(super) fn begins(self) -> usize {
        match self {
            Self::Same(node) | Self::Across(node) | Self::Out(node) | Self::Hairpin(node) => node,
        }
    }
}

/// How a flow is translated besides what its way asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nat {
    None,
    /// The destination was a service's, and became a pod's on the first node.
    Service,
    /// The destination is translated on the first node, and nothing but the kernel's word tells.
    Announced,
    /// An answer: on the last node the source becomes a service's again.
    Answer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Udp,
    /// UDP with IP id 0.
    UdpWithoutId,
    Echo,
    /// TCP with payload.
    Data,
    /// UDP in super-packets.
    Datagrams,
    /// TCP without.
    Ack,
    /// An ICMP error about something that is not traced.
    IcmpError,
    /// SCTP.
    Sctp,
    /// Another protocol: ESP.
    Other,
    /// The pieces of a datagram, each a packet of its own.
    Fragment,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Arrives,
    /// Dropped by the node it came to, after this step of its way.
    Dropped(usize),
    /// Vanishes between the nodes.
    Vanishes,
    /// Arrives twice at the other node: the network doubled it.
    Doubled,
}

/// A flow: packets that keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) kind: Kind,
    pub(super) way: Way,
    pub(super) nat: Nat,
    pub(super) v6: bool,
}

/// A packet as it is sent.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub(super) spec: Spec,
    pub(super) fate: Fate,
    /// Nanoseconds after the beginning.
    pub(super) start: u64,
    /// Bytes of TCP data, and of UDP in super-packets.
    pub(super) payload: u32,
    /// The same bytes as the packet before it in its flow; TCP data under another IP id.
    pub(super) again: bool,
}

impl Spec {
    /// Whether the packets can be cut on their way, and merged.
    pub(super) fn is_cut(&self) -> bool {
        matches!(self.kind, Kind::Data | Kind::Datagrams)
    }

    /// Whether the kernel numbers the packets, so that none has the same number as another with the same bytes.
    pub(super) fn is_numbered(&self) -> bool {
        self.kind == Kind::Echo || !self.v6 && self.kind != Kind::UdpWithoutId
    }
}

impl Sent {
    /// An echo request that arrives, the first thing sent.
    pub(super) fn ping(way: Way) -> Self {
        let (kind, nat, v6) = (Kind::Echo, Nat::None, false);
        Self {
            spec: Spec { kind, way, nat, v6 },
            fate: Fate::Arrives,
            start: 0,
            payload: 0,
            again: false,
        }
    }
}

pub(super) fn spec() -> impl Strategy<Value = Spec> {
    let kind = prop_oneof![
        1 => Just(Kind::Udp),
        1 => Just(Kind::UdpWithoutId),
        1 => Just(Kind::Echo),
        3 => Just(Kind::Data),
        1 => Just(Kind::Datagrams),
        1 => Just(Kind::Ack),
        1 => Just(Kind::IcmpError),
        1 => Just(Kind::Sctp),
        1 => Just(Kind::Other),
        1 => Just(Kind::Fragment),
    ];
    let way = (0..2_usize).prop_flat_map(|node| {
        prop_oneof![
            2 => Just(Way::Same(node)),
            4 => Just(Way::Across(node)),
            1 => Just(Way::Out(node)),
            1 => Just(Way::Hairpin(node)),
        ]
    });
    let nat = prop_oneof![
        2 => Just(Nat::None),
        1 => Just(Nat::Service),
        1 => Just(Nat::Announced),
        1 => Just(Nat::Answer),
    ];
    (kind, way, nat, any::<bool>()).prop_map(|(kind, way, nat, v6)| Spec {
        // IPv6 has no ids.
        kind: match kind {
            Kind::Udp | Kind::Datagrams if v6 => Kind::UdpWithoutId,
            kind => kind,
        },
        way,
        // Some ways are a translation themselves. Without ports and numbers conntrack tells flows apart by addresses only.
        // What the kernel announces is of a whole datagram, and its later fragments do not say whose they are.
        nat: match (way, kind, nat) {
            (Way::Out(_) | Way::Hairpin(_), _, _)
            | (_, Kind::Other | Kind::IcmpError, _)
            | (_, Kind::Fragment, Nat::Announced) => Nat::None,
            _ => nat,
        },
        v6,
    })
}

/// Packets of up to six flows.
pub(super) fn sent(count: usize) -> impl Strategy<Value = Vec<Sent>> {
    let fate = prop_oneof![
        8 => Just(Fate::Arrives),
        1 => (0..6_usize).prop_map(Fate::Dropped),
        1 => Just(Fate::Vanishes),
        1 => Just(Fate::Doubled),
    ];
    let payload = prop_oneof![Just(100_u32), Just(SEGMENT), 1..20_000_u32];
    let packet = (0..6_usize, fate, 0..200_000_u64, payload, any::<bool>());
    (
        prop::collection::vec(spec(), 1..6),
        prop::collection::vec(packet, 1..count),
    )
        .prop_map(|(specs, packets)| {
            let packets = packets
                .into_iter()
                .map(|(flow, fate, start, payload, again)| Sent {
                    spec: specs[flow % specs.len()],
                    fate,
                    start,
                    payload,
                    again,
                });
            packets.collect()
        })
}

/// The addresses of a flow: the sender's view, and after translation on the first and on the last node.
pub(super) struct Ends {
    pub(super) written: (IpAddr, IpAddr),
    pub(super) carried: (IpAddr, IpAddr),
    pub(super) received: (IpAddr, IpAddr),
}

pub(super) fn ends(spec: &Spec) -> Ends {
    let v6 = spec.v6;
    let node = spec.way.begins();
    let source = pod_of(node, 0, v6);
    let own = node_address(node, v6);
    let untranslated = |destination| Ends {
        written: (source, destination),
        carried: (source, destination),
        received: (source, destination),
    };
    let destination = match spec.way {
        Way::Same(node) => pod_of(node, 1, v6),
        Way::Across(node) => pod_of(1 - node, 0, v6),
        Way::Out(_) => {
            return Ends {
                carried: (own, outside(v6)),
                received: (own, outside(v6)),
                ..untranslated(outside(v6))
            };
        }
        Way::Hairpin(_) => {
            return Ends {
                carried: (own, source),
                received: (own, source),
                ..untranslated(service(v6))
            };
        }
    };
    let ends = untranslated(destination);
    match spec.nat {
        Nat::None => ends,
        Nat::Service => Ends {
            written: (source, service(v6)),
            ..ends
        },
        Nat::Announced => Ends {
            written: (source, floating(v6)),
            ..ends
        },
        Nat::Answer => Ends {
            received: (service(v6), destination),
            ..ends
        },
    }
}

/// The packet that a unit of the flow is, before its addresses. `content` numbers what it carries, `number` the packets
/// sent. `seq` and `payload` are for TCP data, `segment` is the unit's place in the packet it was cut from.
pub(super) fn packet(spec: &Spec, content: u32, number: u32, data: (u32, u32), segment: u32) -> Packet {
    // Flows that are one before or after translation would not have the same ports: conntrack sees to that.
    let port = match (spec.nat, spec.way) {
        (Nat::None, Way::Hairpin(_)) => 40_001,
        (Nat::None, _) => 40_000,
        (nat, way) => 40_000 + nat as u16 * 4 + u16::from(matches!(way, Way::Across(_))),
    };
    let (ports, seq) = ((port, 80), (u32::MAX - 3000).wrapping_add(content * 100));
    let v6 = spec.v6;
    let mut ip_id = if v6 { 0 } else { content + 1 };
    let tcp = |seq, payload, tsval| Transport::Tcp {
        src_port: ports.0,
        dst_port: ports.1,
        seq,
        ack: 1,
        flags: 16,
        window: 500,
        tsval: Some(tsval),
        payload,
    };
    let udp = Transport::Udp {
        src_port: ports.0,
        dst_port: ports.1,
        payload: 20,
    };
    let (mut length, mut offset, mut more) = (152, 0, false);
    let (proto, transport) = match spec.kind {
        Kind::Udp => (17, udp),
        Kind::UdpWithoutId => {
            ip_id = 0;
            (17, udp)
        }
        Kind::Echo => {
            let (reply, id) = (spec.nat == Nat::Answer, port);
            (
                if v6 { 58 } else { 1 },
                Transport::Echo {
                    reply,
                    id,
                    seq: small(content),
                },
            )
        }
        Kind::Data => {
            if !v6 {
                ip_id = (number * 50 + 1 + segment) & 0xffff;
            }
            length = data.1 + 52;
            (6, tcp(data.0, data.1, number))
        }
        Kind::Datagrams => {
            ip_id = (data.0 / SEGMENT) & 0xffff;
            length = data.1 + 28;
            let transport = Transport::Udp {
                // Other UDP has other ids, which may be the same numbers.
                src_port: ports.0 + 50,
                dst_port: ports.1,
                payload: data.1,
            };
            (17, transport)
        }
        Kind::Ack => (6, tcp(seq, 0, 7)),
        Kind::IcmpError => (if v6 { 58 } else { 1 }, icmp_error(v6, content)),
        Kind::Sctp => (132, sctp(ports)),
        Kind::Other => (50, Transport::Other),
        Kind::Fragment => {
            // Ids of fragments differ between destinations, or nobody could put them together.
            ip_id = content / 2 + 1000 * u32::from(port - 39_999);
            (offset, more) = if content.is_multiple_of(2) {
                (0, true)
            } else {
                (1400, false)
            };
            (17, if offset == 0 { udp } else { Transport::Other })
        }
    };
    let digest = match spec.kind {
        Kind::Data | Kind::Ack | Kind::IcmpError => 0,
        Kind::Datagrams => u64::from(data.0) + 1,
        _ => content.into(),
    };
    let segments = data.1.div_ceil(SEGMENT);
    let cut = spec.is_cut() && segments > 1;
    Packet {
        src: outside(v6),
        dst: outside(v6),
        proto,
        ttl: 64,
        tos: 0,
        ip_id,
        length,
        dont_fragment: !more && offset == 0,
        more_fragments: more,
        fragment_offset: offset,
        transport,
        digest,
        gso_size: if cut { small(SEGMENT) } else { 0 },
        gso_segs: if cut { small(segments) } else { 0 },
    }
}

fn small(number: u32) -> u16 {
    u16::try_from(number).expect("small")
}

fn sctp((src_port, dst_port): (u16, u16)) -> Transport {
    Transport::Sctp {
        src_port,
        dst_port,
        payload: 120,
    }
}

/// Destination unreachable: port, about a datagram that somebody else sent.
fn icmp_error(v6: bool, content: u32) -> Transport {
    let (icmp_type, code) = if v6 { (1, 4) } else { (3, 3) };
    let quoted = Quoted {
        src: outside(v6),
        dst: outside(v6),
        proto: 17,
        ttl: 60,
        ip_id: 60_000 + content,
        length: 80,
        transport: QuotedTransport::Udp {
            src_port: 53,
            dst_port: 9,
        },
        encap: None,
    };
    Transport::IcmpError {
        icmp_type,
        code,
        info: 0,
        quoted: Box::new(quoted),
    }
}
