//! What correlation yields: packet traces. Their serde form is the stable `-o json` interface
//! (`calitrace/schema/calitrace-1.schema.json`): fields only ever get added, unknown is null, never absent.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::{Serialize, Serializer};

use crate::{
    event::{EncapKind, Flow, Netns, Packet, RouteKind},
    netfilter::{Action, By, Culprit, Direction, Logged},
};

/// A node's, interface's or pod's name. Every sighting has some, so they are not copied.
pub type Name = Arc<str>;

/// How a packet ended, as far as it was seen. Strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The TTL ran out.
    Expired,
    /// A RST or an ICMP unreachable answered it.
    Rejected,
    /// The kernel freed it as a drop.
    Dropped,
    /// It passed the last egress hook of the interface that owns the destination and no drop followed within 50 ms.
    Delivered,
    /// Handed to an uplink, and not followed beyond it: nobody there is observed, or it goes to a node itself.
    Left,
    /// It left one observed node and never reached the next, and both ledgers are clean.
    Lost,
    /// Still under way when observing ended.
    Unfinished,
    /// Records that could tell were lost, or hooks were not attached yet.
    Unknown,
}

/// All observations of one packet, in order, and what follows from them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename = "packet")]
pub struct PacketTrace {
    /// Version of this form.
    pub version: u32,
    /// 128 bits made of the packet's key and first time, in hex.
    #[serde(serialize_with = "hex")]
    pub id: u128,
    /// The flow as the sender wrote it.
    #[serde(serialize_with = "flow")]
    pub flow: FlowName,
    /// First observation, RFC 3339 with nanoseconds in UTC.
    #[serde(serialize_with = "rfc3339")]
    pub start: u64,
    /// IP total length at the first observation.
    pub length: u32,
    /// How it ended.
    pub verdict: Verdict,
    /// How sure it is that all observations are of this packet: as the least sure of them.
    pub certainty: Joint,
    /// How often its first byte had been sent before, of TCP seen where a pod sent it; null for what is sent for the first time.
    pub retransmit: Option<u32>,
    /// What a TCP segment without new data is, seen where a pod sent it; null for all else.
    pub segment: Option<Segment>,
    /// Of a duplicate acknowledgement: the how manieth it is.
    pub dup_ack: Option<u32>,
    /// Set when the kernel freed it as a drop (verdicts dropped, expired, and rejected where seen).
    pub drop: Option<DropReport>,
    /// Set when it was lost between two nodes.
    pub lost: Option<LostReport>,
    /// Who answered, for expired and rejected packets, echo requests and handshakes.
    pub answer: Option<Answer>,
    /// Address translations, in order.
    pub nat: Vec<NatStep>,
    /// Routers in order, the receiver last: what traceroute prints.
    pub hops: Vec<Hop>,
    /// Every sighting, in order of time.
    pub observations: Vec<Sighting>,
    /// Set when no hook saw it go on from where a TC program of somebody else's stands.
    pub bypass: Option<Bypass>,
    /// TTL at the sender, as far as known: the first observation's, plus the routers before it.
    pub ttl: u8,
    /// Network namespace of the first observation's node.
    #[serde(skip)]
    pub netns: Netns,
    /// Cluster of the first observation's node.
    #[serde(skip)]
    pub cluster: u32,
    /// First observation, `CLOCK_MONOTONIC`, nanoseconds.
    #[serde(skip)]
    pub start_monotonic: u64,
    /// When the trace was closed, on the observations' own clock, nanoseconds.
    #[serde(skip)]
    pub closed_monotonic: u64,
    /// The packet as first observed.
    #[serde(skip)]
    pub packet: Packet,
}

impl PacketTrace {
    /// Whether nothing is lost by its drop: the receiver's TCP was past what it carried, as it is with what is sent twice and
    /// with acknowledgements that later ones overtook (`include/net/dropreason-core.h`, Linux 6.18).
    #[must_use]
    pub fn is_superfluous(&self) -> bool {
        let reason = self.drop.as_ref().and_then(|report| report.reason.as_deref());
        matches!(
            reason,
            Some(
                "TCP_OLD_DATA"
                    | "TCP_OFOMERGE"
                    | "TCP_OLD_SEQUENCE"
                    | "TCP_OLD_ACK"
                    | "TCP_TOO_OLD_ACK"
                    | "TCP_RFC7323_PAWS_ACK"
            )
        )
    }
}

/// A TCP segment without new data, in Wireshark's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Segment {
    /// One sequence number before what is to come: asks whether the other end is there.
    KeepAlive,
    /// The answer to that.
    KeepAliveAck,
    /// Acknowledges the same once more, with the same window, while data is missing (RFC 5681 2).
    DupAck,
    /// Another acknowledgement without data.
    Ack,
}

/// A flow with the names of its ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FlowName {
    /// The flow.
    pub flow: Flow,
    /// `namespace/name` of the sending pod.
    pub src_pod: Option<Name>,
    /// `namespace/name` of the receiving pod; behind a service the pod it was sent on to.
    pub dst_pod: Option<Name>,
}

/// Where and why the kernel dropped it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DropReport {
    /// The kernel's reason, `NETFILTER_DROP`.
    pub reason: Option<String>,
    /// The kernel function.
    pub location: Option<String>,
    /// The node; for a drop inside a pod's own namespace the node of the pod.
    pub node: Option<Name>,
    /// The interface it was last seen at, or the one the kernel names.
    pub interface: Option<Name>,
    /// The interface it was to leave by, where netfilter dropped it on the way there, or it is too large for that one. As
    /// netfilter says, or else as pods and routes tell.
    pub before: Option<Name>,
    /// The MTU of that interface in bytes, where the packet is too large for it.
    pub mtu: Option<u32>,
    /// The route to its destination, where that leads nowhere and routing dropped it.
    pub route: Option<DeadEnd>,
    /// The netfilter hook that dropped it (`FORWARD`), where netfilter did and `nf_hook_slow` is observed.
    pub netfilter: Option<&'static str>,
    /// The Calico policy, where its rule logged the packet (with flow logs) or the rules, as they were read last, leave no
    /// doubt.
    pub policy: Option<Name>,
    /// The netfilter rules that may have dropped it: one where that is certain, by the rules or by what one of them logged;
    /// none where it is not known or netfilter did not.
    pub culprits: Vec<Culprit>,
}

/// A route that sends nothing on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeadEnd {
    /// What it does instead.
    pub kind: RouteKind,
    /// What it is for; of a blackhole that Felix or BIRD made the node's IPAM block.
    pub prefix: IpNet,
}

/// Between which nodes a packet was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LostReport {
    /// The node that it left.
    pub node: Option<Name>,
    /// The interface it left by.
    pub interface: Option<Name>,
    /// The node that it did not come to, though that is observed.
    pub next_node: Option<Name>,
    /// When it left, nanoseconds after the packet's first observation.
    pub elapsed_ns: u64,
    /// How it was carried; null without encapsulation.
    pub encap: Option<EncapKind>,
    /// The next node's uplink with an XDP program, which may have dropped it where no hook sees it; null without one.
    pub xdp: Option<Name>,
    /// Set where it was larger than the next node's uplink takes, which may have dropped it where no hook sees it
    /// (`is_skb_forwardable`, `include/linux/netdevice.h`, of veth; many NICs' drivers, too).
    pub too_large: Option<TooLarge>,
}

/// A device that takes less than was sent to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TooLarge {
    /// The device.
    pub interface: Name,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// IP total length of the packet on the wire, in bytes.
    pub length: u32,
}

/// Where a packet was last seen coming in, beside TC programs of others. Such a program may hand it on past all further
/// hooks, as Felix's eBPF dataplane does straight into a pod (`bpf_redirect_peer`), or drop it where drops are not seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bypass {
    /// The node.
    pub node: Option<Name>,
    /// The interface.
    pub interface: Option<Name>,
    /// Names of the programs, as far as the kernel keeps them.
    pub programs: Vec<String>,
}

/// Who answered a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// What came back.
    pub kind: AnswerKind,
    /// Its source address: what traceroute prints.
    pub address: IpAddr,
    /// From the packet's first observation to the answer's last at the same interface; null if not seen there.
    pub rtt_ns: Option<u64>,
    /// ICMP type and code of an ICMP error, null otherwise.
    pub icmp: Option<(u8, u8)>,
    /// The MTU that ICMP fragmentation needed or packet too big tells of, null otherwise.
    pub mtu: Option<u32>,
    /// Set when the answer was dropped on its way back, and the sender was told nothing.
    pub dropped: Option<DropReport>,
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerKind {
    /// ICMP time exceeded.
    TimeExceeded,
    /// ICMP unreachable.
    Unreachable,
    /// TCP reset.
    Reset,
    /// Echo reply.
    EchoReply,
    /// TCP SYN+ACK.
    SynAck,
}

/// Why an observation is taken for one of the packet, the surest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Joint {
    /// The same `sk_buff` on the same node, and the same content.
    Skb,
    /// The same content, and nothing else under way had it.
    Content,
    /// Others with the same content were under way, or their records may be lost: packets of a flow keep their order.
    Order,
}

/// An address translation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NatStep {
    /// Which side changed.
    pub kind: NatKind,
    /// Where.
    pub node: Option<Name>,
    /// Before.
    pub from: Endpoint,
    /// After.
    pub to: Endpoint,
}

/// Which side a translation changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NatKind {
    /// The destination.
    Dnat,
    /// The source.
    Snat,
}

/// One end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// Address.
    pub address: IpAddr,
    /// Port, null without ports.
    pub port: Option<u16>,
}

/// How sure a statement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Certainty {
    /// Seen.
    Observed,
    /// Follows from routes and blocks, not seen.
    Inferred,
}

/// A router that decremented the TTL, or the final receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hop {
    /// Its number, as traceroute counts: 1 is the first router.
    pub ttl: u8,
    /// What traceroute prints; null if it is not known here.
    pub address: Option<IpAddr>,
    /// The node's name, or its address where only that is known.
    pub node: Option<Name>,
    /// `namespace/name` of the receiving pod.
    pub pod: Option<Name>,
    /// First sighting at this hop, nanoseconds after the packet's first observation.
    pub arrived_ns: Option<u64>,
    /// When the packet left it (first observation with the TTL lowered), nanoseconds after the first observation; of
    /// the receiver the egress hook of its interface.
    pub left_ns: Option<u64>,
    /// Round trip of a probe that this hop answered.
    pub rtt_ns: Option<u64>,
    /// By how many nanoseconds `arrived_ns` and `left_ns` may be wrong because the hop has another clock than the packet's
    /// first observation: 0 on the same machine; null if that is not known.
    pub clock_bound_ns: Option<u64>,
    /// How sure it is.
    pub certainty: Certainty,
    /// Why it has no address, in words, where that is known: the packet ended there, and nobody told its sender.
    pub reason: Option<String>,
}

/// An observation as a trace shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sighting {
    /// The node's name.
    pub node: Option<Name>,
    /// Its network namespace.
    pub netns: Netns,
    /// Name of the interface.
    pub interface: Option<Name>,
    /// Name of the hook.
    pub hook: &'static str,
    /// Why it is taken for one of this packet; null for the first.
    pub joined: Option<Joint>,
    /// `ingress`, `egress`, or null for hooks without a direction.
    pub direction: Option<&'static str>,
    /// Nanoseconds after the packet's first observation.
    pub elapsed_ns: u64,
    /// TTL or hop limit there.
    pub ttl: u8,
    /// IP total length there.
    pub length: u32,
    /// How many packets a super-packet (GSO, GRO) is or is to become; null of others.
    pub segments: Option<u16>,
    /// MTU of the interface in bytes; null where it is not known, and for functions.
    pub mtu: Option<u32>,
    /// Outer header, null where the packet is not encapsulated.
    pub encap: Option<SightedEncap>,
    /// What a function of the kernel told beside the packet, in words; null where it told nothing.
    pub detail: Option<String>,
    /// What a rule logged of it; null where none did.
    pub logged: Option<Box<LogReport>>,
}

/// What a rule logged of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogReport {
    /// The rule's prefix.
    pub prefix: Box<str>,
    /// What Felix means by it; none where the rule is not Felix's.
    pub logged: Option<Logged>,
}

impl Serialize for LogReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Form<'a> {
            prefix: &'a str,
            action: Option<Action>,
            cause: Option<&'a str>,
            name: Option<&'a str>,
            kind: Option<&'a str>,
            direction: Option<Direction>,
            rule: Option<u32>,
            staged: bool,
            cut: bool,
        }
        let logged = self.logged.as_ref();
        Form {
            prefix: &self.prefix,
            action: logged.map(|logged| logged.action),
            cause: logged.map(Logged::cause),
            name: logged.and_then(Logged::name),
            kind: logged.and_then(|logged| match &logged.by {
                By::Policy(policy) => policy.kind.as_deref(),
                _ => None,
            }),
            direction: logged.map(|logged| logged.direction),
            rule: logged.and_then(|logged| logged.rule),
            staged: logged.is_some_and(|logged| logged.staged),
            cut: logged.is_some_and(|logged| logged.cut),
        }
        .serialize(serializer)
    }
}

/// The outer header of a sighting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SightedEncap {
    /// How the packet is carried.
    pub kind: EncapKind,
    /// Outer source.
    pub src: IpAddr,
    /// Outer destination.
    pub dst: IpAddr,
    /// Outer TTL.
    pub ttl: u8,
    /// Outer IPv4 identification, null for IPv6.
    pub id: Option<u16>,
    /// Outer IP total length in bytes, of a super-packet the whole; null if the header does not say.
    pub length: Option<u16>,
    /// VXLAN network identifier, null for others.
    pub vni: Option<u32>,
}

fn hex<S: Serializer>(id: &u128, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{id:032x}"))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn rfc3339<S: Serializer>(start: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(*start);
    serializer.collect_str(&humantime::format_rfc3339_nanos(time))
}

fn flow<S: Serializer>(name: &FlowName, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Form<'a> {
        proto: &'a str,
        src: IpAddr,
        src_port: Option<u16>,
        dst: IpAddr,
        dst_port: Option<u16>,
        icmp_id: Option<u16>,
        src_pod: Option<&'a str>,
        dst_pod: Option<&'a str>,
    }
    let flow = &name.flow;
    let ports = matches!(flow.proto, 6 | 17 | 132) && (flow.src_port, flow.dst_port) != (0, 0);
    // Messages other than echoes have no identifier, and flows know them by the port 0.
    let echo = matches!(flow.proto, 1 | 58) && flow.src_port != 0;
    Form {
        proto: &crate::event::protocol_name(flow.proto),
        src: flow.src,
        src_port: ports.then_some(flow.src_port),
        dst: flow.dst,
        dst_port: ports.then_some(flow.dst_port),
        icmp_id: echo.then_some(flow.src_port),
        src_pod: name.src_pod.as_deref(),
        dst_pod: name.dst_pod.as_deref(),
    }
    .serialize(serializer)
}
