//! What observations are read with: names, links, routes, hop addresses, clocks. A fact holds from its time on, until
//! another of the same subject replaces it; in an event log each stands before its first use.

use std::net::IpAddr;

use calitrace_ebpf::Hook;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{EncapKind, Netns};
use crate::kernel::hooks;

/// Something known from its time on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fact", rename_all = "snake_case")]
pub enum Fact {
    /// A node and the cluster it belongs to.
    Node(Node),
    /// An interface of a node.
    Interface(Interface),
    /// A pod and where it is attached.
    Pod(Pod),
    /// The routes of a node that matter for pods, all of them: each such fact replaces the node's former routes.
    Routes {
        /// `CLOCK_MONOTONIC`, nanoseconds.
        time: u64,
        /// The node.
        netns: Netns,
        /// Its routes, the most specific first.
        routes: Vec<Route>,
    },
    /// The address a node's ICMP errors towards a sender would come from.
    HopAddress(HopAddress),
    /// Addresses of services: what lies in these prefixes is translated before it reaches a pod.
    Services {
        /// `CLOCK_MONOTONIC`, nanoseconds.
        time: u64,
        /// The service prefixes.
        prefixes: Vec<IpNet>,
    },
    /// A reading of both clocks.
    Clock(Clock),
    /// The clock of a node's machine was another one (in merged logs).
    ClockOffset(ClockOffset),
    /// A hook began or ceased to observe an interface.
    Attachment(Attachment),
    /// The netfilter rules of a node.
    Rules(Rules),
    /// [`IpSets`].
    IpSets(IpSets),
    /// [`RulesRead`].
    RulesRead(RulesRead),
}

impl Fact {
    /// From when on it holds (`CLOCK_MONOTONIC`, ns).
    #[must_use]
    pub fn time(&self) -> u64 {
        match self {
            Self::Node(Node { time, .. })
            | Self::Interface(Interface { time, .. })
            | Self::Pod(Pod { time, .. })
            | Self::Routes { time, .. }
            | Self::HopAddress(HopAddress { time, .. })
            | Self::Services { time, .. }
            | Self::Clock(Clock { time, .. })
            | Self::ClockOffset(ClockOffset { time, .. })
            | Self::Attachment(Attachment { time, .. })
            | Self::Rules(Rules { time, .. })
            | Self::IpSets(IpSets { time, .. })
            | Self::RulesRead(RulesRead { time, .. }) => *time,
        }
    }

    /// Its time, to be changed.
    pub fn time_mut(&mut self) -> &mut u64 {
        match self {
            Self::Node(Node { time, .. })
            | Self::Interface(Interface { time, .. })
            | Self::Pod(Pod { time, .. })
            | Self::Routes { time, .. }
            | Self::HopAddress(HopAddress { time, .. })
            | Self::Services { time, .. }
            | Self::Clock(Clock { time, .. })
            | Self::ClockOffset(ClockOffset { time, .. })
            | Self::Attachment(Attachment { time, .. })
            | Self::Rules(Rules { time, .. })
            | Self::IpSets(IpSets { time, .. })
            | Self::RulesRead(RulesRead { time, .. }) => time,
        }
    }
}

/// A node: one network namespace that routes for pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// Its namespace.
    pub netns: Netns,
    /// Its name.
    pub name: String,
    /// Nodes with the same number are of one cluster; packets are never joined across clusters.
    pub cluster: u32,
    /// Its own addresses, tunnel addresses included.
    pub addresses: Vec<IpAddr>,
}

/// What an interface is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The host end of a pod's device.
    Workload,
    /// A tunnel device.
    Tunnel,
    /// A device towards other nodes.
    Uplink,
    /// Anything else.
    Other,
}

/// An interface of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The node.
    pub netns: Netns,
    /// Interface index.
    pub ifindex: u32,
    /// Interface name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// MTU in bytes.
    pub mtu: u32,
    /// Its addresses, without prefix lengths.
    pub addresses: Vec<IpAddr>,
    /// An XDP program runs in its driver. What that drops no hook sees.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub xdp: bool,
    /// It was deleted.
    pub gone: bool,
}

/// A pod of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The node.
    pub netns: Netns,
    /// Index of the workload interface on the node.
    pub ifindex: u32,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// `namespace/name`; null where nothing names it.
    pub name: Option<String>,
    /// Network namespace of the pod itself, where it is on this host and known.
    pub pod_netns: Option<Netns>,
    /// It is gone.
    pub gone: bool,
}

/// What a route does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    /// Sends on.
    Unicast,
    /// Drops in silence; for an IPAM block: the block is local.
    Blackhole,
    /// Answers with an ICMP unreachable.
    Unreachable,
    /// Answers with "administratively prohibited".
    Prohibit,
}

/// A route of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub prefix: IpNet,
    /// What it does.
    pub kind: RouteKind,
    /// Gateway, if any.
    pub gateway: Option<IpAddr>,
    /// Output interface, if any.
    pub ifindex: Option<u32>,
    /// The encapsulation of the output device.
    pub encap: Option<EncapKind>,
    /// The address of the node behind a tunnel gateway (`192.168.49.3`): the gateway itself for IPIP and without
    /// encapsulation, what the forwarding database says for VXLAN.
    pub remote_node: Option<IpAddr>,
}

/// The address that a router's ICMP errors towards `towards` carry: what traceroute prints for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HopAddress {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The node that routes.
    pub netns: Netns,
    /// The sender of the packet.
    pub towards: IpAddr,
    /// The answer of the kernel's route look-up; null if there is no route back.
    pub address: Option<IpAddr>,
}

/// Both clocks read at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// `CLOCK_REALTIME`, nanoseconds since the Unix epoch.
    pub realtime: u64,
}

/// The times of a node were taken by another clock than those of the log they are merged into, and moved to that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockOffset {
    /// `CLOCK_MONOTONIC` of the merged log, nanoseconds.
    pub time: u64,
    /// The node.
    pub netns: Netns,
    /// Nanoseconds by which its clock was ahead at that time.
    pub ahead_ns: i64,
    /// By how many nanoseconds that is wrong at most; null if it is not known.
    pub bound_ns: Option<u64>,
}

/// A hook began or ceased to observe an interface. Packets before it make verdicts unknown, not lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The node; 0 for hooks that are not bound to one.
    pub netns: Netns,
    /// The interface; 0 for hooks that are not bound to one.
    pub ifindex: u32,
    /// The hook.
    #[serde(with = "hooks::by_name")]
    pub hook: Hook,
    /// What happened.
    pub state: AttachmentState,
    /// Of a lost one: when it was last seen in place (`CLOCK_MONOTONIC`, nanoseconds). What passed since may be missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// Names of the TC programs of others on this side of the interface; told anew when they change. They may drop
    /// packets and hand them on past all further hooks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
}

/// What happened to an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachmentState {
    /// It observes from here on.
    Attached,
    /// It was taken away in order: the interface is gone, or watching ended.
    Detached,
    /// Somebody else took it away.
    Lost,
}

/// The netfilter rules of a node, as one tool shows them: they replace what it showed before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The node.
    pub netns: Netns,
    /// The tool: `iptables-nft-save`, `ip6tables-legacy-save`, or [`Rules::NFT`].
    pub tool: String,
    /// They are for IPv6, not for IPv4.
    pub ipv6: bool,
    /// What it wrote, without counters, comment lines and the nat table, which drops nothing. Of `nft`: the objects of its JSON
    /// that a packet may come to at a hook, one a line, of all tables that the other tools do not show.
    pub text: String,
}

impl Rules {
    /// The tool that shows nftables' own tables.
    pub const NFT: &str = "nft";
}

/// The IP sets that a node's netfilter rules look into: they replace what was known of them before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpSets {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The node.
    pub netns: Netns,
    /// What `ipset save` wrote, of each set its type, of each member what it is and whether it is an exception.
    pub text: String,
}

/// All rules and sets of a node were read again: the facts before this one are how they were then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RulesRead {
    /// When that began: `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The node.
    pub netns: Netns,
}
