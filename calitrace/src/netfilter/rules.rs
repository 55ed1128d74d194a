//! Tables, chains, rules, matches and targets, as far as they matter for what is dropped.

use std::sync::Arc;

use ipnet::IpNet;
use rustc_hash::FxHashMap;

use super::{
    elements::{Element, Elements, Key},
    walk::Hook,
};

/// The rules of one address family in one namespace, as one tool shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    pub(super) tables: FxHashMap<String, Table>,
    /// In the order in which a hook calls them.
    pub(super) bases: Vec<Base>,
    /// Bits of the mark that no packet has which comes to a hook.
    pub(super) unset: u32,
}

/// A chain that a hook calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) hook: Hook,
    pub(super) priority: i64,
    pub(super) table: String,
    pub(super) chain: String,
}

/// Chains by name.
pub(super) type Table = FxHashMap<String, Chain>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    /// Of a base chain: it drops what comes to its end.
    pub(super) drops: bool,
    pub(super) rules: Vec<Rule>,
    /// Of a policy's: its tier.
    pub(super) tier: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) comments: Vec<String>,
    pub(super) matches: Vec<Match>,
    pub(super) target: Target,
    /// As it is written, of rules that may drop.
    pub(super) text: Option<Box<str>>,
}

/// One condition; `not` turns it round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) not: bool,
    pub(super) what: What,
}

/// What a condition is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Address(End, IpNet),
    /// With a `+` at its end the beginning of a name.
    Device(Way, String),
    Protocol(u8),
    Ports(End, Vec<(u16, u16)>),
    /// Bits of [`super::States`].
    State(u8),
    Mark {
        value: u32,
        mask: u32,
    },
    /// A type, and a range of codes.
    Icmp(u8, (u8, u8)),
    /// An address of the node itself.
    Local(End),
    /// In the IP set of this name, by these ends of the packet.
    Set(String, Vec<End>),
    /// These values together are among the elements.
    Among(Vec<Key>, Arc<Elements>),
    /// It comes from where the answer would not go to: netfilter's own reverse path filter failed.
    Unreachable,
    /// Something that is not understood here.
    Unknown,
}

/// An end of a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

/// Into the node or out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    In,
    Out,
}

/// What becomes of a packet that meets all conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nothing: a rule without a target, or with one that goes on to the next.
    Next,
    Accept,
    Drop,
    /// Dropped, with an answer.
    Reject,
    Return,
    /// The bits of `mask` become those of `value`; for what is computed from something else they become unknown.
    Mark {
        value: Option<u32>,
        mask: u32,
    },
    /// It goes on in another chain, and comes back here unless it went by `goto`.
    Chain {
        name: String,
        goto: bool,
    },
    /// What the first element says that these values together are; nothing where they are none.
    Map(Vec<Key>, Arc<Verdicts>),
    /// `NFLOG`, with its prefix.
    Log(String),
}

/// A map's elements, and what becomes of packets that are such a one; none for an element that is not understood.
pub(super) type Verdicts = Vec<(Option<Element>, Target)>;
