//! What flows from the sources to the correlator: decoded observations and the facts they are read with.
//!
//! The same [`Item`]s, one JSON object a line, are the event log; so whatever a live capture can be turned into, a
//! file can. Knows the wire format (to decode it) and nothing of how records are made, joined or shown.

mod decode;
mod fact;
mod log;
mod packet;
#[cfg(test)]
pub(crate) mod sample;

pub use decode::{DecodeError, DropNames, decode};
pub use fact::{
    Attachment, AttachmentState, Clock, ClockOffset, Fact, HopAddress, Interface, IpSets, Node, Pod, Role,
    Route, RouteKind, Rules, RulesRead,
};
pub use log::{FORMAT, Header, HookStatus, LogReader, LogWriter, VERSION};
pub use packet::{
    Detail, Drop, Encap, EncapKind, Flow, NetfilterVerdict, Observation, Packet, Quoted, QuotedTransport,
    Transport, has_ports, protocol_name,
};

pub use calitrace_ebpf::{Direction, Hook, Place};
use serde::{Deserialize, Serialize};

/// Inode number of a network namespace (or its cookie where BTF is missing): the key of a node in every event.
pub type Netns = u64;

/// The machine of a namespace among those of merged logs: inode numbers take the lower half, 0 is the first log's.
#[must_use]
pub const fn machine_of(netns: Netns) -> u64 {
    netns >> 32
}

/// One thing that a source hands on, in order of time; as JSON, one line of an event log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Item {
    /// What is recorded, how and where: always the first item.
    Header(Header),
    /// One packet seen once at one hook.
    Observation(Observation),
    /// Something known from its time on.
    Fact(Fact),
    /// Nothing older than `time` (`CLOCK_MONOTONIC`, ns) will follow.
    Tick {
        /// `CLOCK_MONOTONIC`, nanoseconds.
        time: u64,
    },
    /// The loss ledger so far.
    Ledger(Ledger),
    /// Observing ended in order: always the last item. A log without it was cut off.
    End {
        /// `CLOCK_MONOTONIC`, nanoseconds.
        time: u64,
    },
}

impl Item {
    /// Its time (`CLOCK_MONOTONIC`, ns); a header has none.
    #[must_use]
    pub fn time(&self) -> Option<u64> {
        match self {
            Self::Header(_) => None,
            Self::Observation(observation) => Some(observation.time),
            Self::Fact(fact) => Some(fact.time()),
            Self::Ledger(ledger) => Some(ledger.time),
            Self::Tick { time } | Self::End { time } => Some(*time),
        }
    }

    /// Its time, to be changed.
    pub fn time_mut(&mut self) -> Option<&mut u64> {
        match self {
            Self::Header(_) => None,
            Self::Observation(observation) => Some(&mut observation.time),
            Self::Fact(fact) => Some(fact.time_mut()),
            Self::Ledger(ledger) => Some(&mut ledger.time),
            Self::Tick { time } | Self::End { time } => Some(time),
        }
    }

    /// Calls `change` with every namespace that it names.
    pub fn namespaces_mut(&mut self, mut change: impl FnMut(&mut Netns)) {
        match self {
            Self::Observation(observation) => change(&mut observation.netns),
            Self::Fact(fact) => match fact {
                Fact::Node(node) => change(&mut node.netns),
                Fact::Interface(interface) => change(&mut interface.netns),
                Fact::Pod(pod) => {
                    change(&mut pod.netns);
                    pod.pod_netns.iter_mut().for_each(change);
                }
                Fact::Routes { netns, .. } => change(netns),
                Fact::HopAddress(hop) => change(&mut hop.netns),
                Fact::Attachment(attachment) => change(&mut attachment.netns),
                Fact::Rules(rules) => change(&mut rules.netns),
                Fact::IpSets(sets) => change(&mut sets.netns),
                Fact::RulesRead(read) => change(&mut read.netns),
                Fact::ClockOffset(offset) => change(&mut offset.netns),
                Fact::Services { .. } | Fact::Clock(_) => {}
            },
            Self::Ledger(ledger) => ledger
                .rows
                .iter_mut()
                .filter_map(|row| row.netns.as_mut())
                .for_each(change),
            Self::Header(_) | Self::Tick { .. } | Self::End { .. } => {}
        }
    }
}

/// Counts of what was seen, recorded, filtered, sampled away and lost, per hook and node.
///
/// For each row `seen = non_ip + out_of_scope + filtered + sampled_away + over_budget + ring_refused + recorded` and
/// `recorded = decoded + user_dropped`. Both hold exactly when `exact` is true: hooks detached, ring drained.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The hooks are detached and the ring is drained: the sums hold to the packet.
    pub exact: bool,
    /// One row for each hook and node.
    pub rows: Vec<LedgerRow>,
    /// Packet traces so far that were closed before their time, because too many were open. In an event log 0: who reads it
    /// counts anew.
    #[serde(default)]
    pub evicted: u64,
}

/// The counts of one hook on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRow {
    /// The node's name; null for drops in namespaces that are no node's.
    pub node: Option<String>,
    /// The node's namespace; null as above.
    pub netns: Option<Netns>,
    /// Name of the hook.
    pub hook: String,
    /// Times the program ran.
    pub seen: u64,
    /// Not IP.
    pub non_ip: u64,
    /// No address of a pod, block or service.
    pub out_of_scope: u64,
    /// Left out by a filter in the kernel.
    pub filtered: u64,
    /// Left out by sampling.
    pub sampled_away: u64,
    /// Left out by the budget that protects the node.
    pub over_budget: u64,
    /// Refused by the full ring: lost.
    pub ring_refused: u64,
    /// Records made.
    pub recorded: u64,
    /// Records decoded in user space.
    pub decoded: u64,
    /// Records that user space could not keep: lost.
    pub user_dropped: u64,
    /// Nanoseconds in which somebody else had taken the hook away from an interface, from the last look at which it was
    /// in place to its being attached again; the sum over interfaces. What passed then was seen by nobody.
    #[serde(default)]
    pub unobserved_ns: u64,
}

impl Ledger {
    /// Records lost in the kernel or in user space.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.rows
            .iter()
            .map(|row| row.ring_refused + row.user_dropped)
            .sum()
    }
}
