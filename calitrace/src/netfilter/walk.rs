//! Follows a packet through the rules, as far as it may have come, and finds every rule that may have dropped it.

use super::{
    culprit::Culprit,
    elements, meaning,
    packet::{Asked, Device},
    rules::{Chain, End, Match, Rule, Ruleset, Table, Target, Way, What},
    sets::Sets,
};

/// A netfilter hook of IPv4 and IPv6 (`include/uapi/linux/netfilter.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `NF_INET_PRE_ROUTING`.
    Prerouting,
    /// `NF_INET_LOCAL_IN`.
    Input,
    /// `NF_INET_FORWARD`.
    Forward,
    /// `NF_INET_LOCAL_OUT`.
    Output,
    /// `NF_INET_POST_ROUTING`.
    Postrouting,
}

impl Hook {
    /// All, in the order of a packet's way.
    pub(super) const ALL: [Self; 5] = [
        Self::Prerouting,
        Self::Input,
        Self::Forward,
        Self::Output,
        Self::Postrouting,
    ];

    /// As `iptables` and `nft` name it, and its base chains.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        }
    }
}

/// Jumps within jumps. Chains cannot call themselves, so this only ends what is no real rule set.
const DEPTH: usize = 64;
/// Rules that are looked at for one packet in one table: a chain that many jump to is followed from each. Felix' rule sets for
/// hundreds of pods take some thousands.
const RULES: usize = 1_000_000;

impl Ruleset {
    /// The rules that may have dropped the packet at one of `hooks`, which it meets in this order. Several if not enough is
    /// known to tell; none if by these rules it cannot have been dropped.
    #[must_use]
    pub fn culprits(&self, packet: &Asked<'_>, hooks: &[Hook], sets: &Sets) -> Vec<Culprit> {
        let mut found = Vec::new();
        // What an earlier hook did to it is not known, but what no packet has.
        let mut flow = Some(Flow {
            known: self.unset,
            value: 0,
        });
        for hook in hooks {
            for base in self.bases.iter().filter(|base| base.hook == *hook) {
                let (Some(table), Some(now)) = (self.tables.get(&base.table), flow) else {
                    continue;
                };
                let mut walk = Walk {
                    packet,
                    sets,
                    left: RULES,
                    name: &base.table,
                    table,
                    found: &mut found,
                };
                flow = walk.base(&base.chain, now);
            }
        }
        // A policy may say the same by several rules, and a state be looked at in several chains.
        let mut culprits: Vec<Culprit> = Vec::new();
        for culprit in found {
            if culprits.iter().all(|known| known.cause != culprit.cause) {
                culprits.push(culprit);
            }
        }
        culprits
    }
}

/// Whether a rule's conditions hold for a packet of whose mark nothing is known.
pub(super) fn truth(rule: &Rule, packet: &Asked<'_>, sets: &Sets) -> Truth {
    marked_truth(rule, Flow::default(), packet, sets)
}

fn marked_truth(rule: &Rule, flow: Flow, packet: &Asked<'_>, sets: &Sets) -> Truth {
    let each = rule
        .matches
        .iter()
        .map(|condition| holds(condition, flow, packet, sets));
    each.min().unwrap_or(Truth::Yes)
}

/// What is known of the packet's mark on one way through the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Flow {
    /// Bits whose value is known.
    known: u32,
    value: u32,
}

impl Flow {
    /// The mark after `-j MARK --set-xmark value/mask`: the bits of the mask are cleared, then `value` is put in by
    /// exclusive or (`mark_tg`, `net/netfilter/xt_mark.c`).
    fn marked(self, value: Option<u32>, mask: u32) -> Self {
        match value {
            Some(value) => Self {
                known: self.known | mask,
                value: (self.value & !mask) ^ value,
            },
            None => Self {
                known: self.known & !mask,
                value: self.value & !mask,
            },
        }
    }
}

/// Where two ways meet, what is the same on both is known.
fn meet(one: Option<Flow>, other: Option<Flow>) -> Option<Flow> {
    let (Some(one), Some(other)) = (one, other) else {
        return one.or(other);
    };
    let known = one.known & other.known & !(one.value ^ other.value);
    Some(Flow {
        known,
        value: one.value & known,
    })
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Truth {
    No,
    Perhaps,
    Yes,
}

impl Truth {
    fn turned_if(self, not: bool) -> Self {
        match self {
            Self::No if not => Self::Yes,
            Self::Yes if not => Self::No,
            other => other,
        }
    }
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// How a packet may come out of a chain.
#[derive(Default)]
struct Exit {
    /// At its end, or by `RETURN`.
    back: Option<Flow>,
    /// Accepted, which ends this table.
    accepted: Option<Flow>,
}

struct Walk<'a> {
    packet: &'a Asked<'a>,
    sets: &'a Sets,
    /// Rules that may still be looked at.
    left: usize,
    name: &'a str,
    table: &'a Table,
    found: &'a mut Vec<Culprit>,
}

impl Walk<'_> {
    /// Through a base chain. How it goes on to the next table.
    fn base(&mut self, name: &str, flow: Flow) -> Option<Flow> {
        let exit = self.chain(name, flow, 0);
        if exit.back.is_some() && self.table.get(name).is_some_and(|chain| chain.drops) {
            self.found.push(meaning::of_policy(self.name, name));
            return exit.accepted;
        }
        meet(exit.back, exit.accepted)
    }

    fn chain(&mut self, name: &str, flow: Flow, depth: usize) -> Exit {
        let table = self.table;
        let mut exit = Exit::default();
        let is_followed = depth < DEPTH && self.left > 0;
        let Some(chain) = table.get(name).filter(|_| is_followed) else {
            // A target of an extension: it may accept the packet, and may let it go on.
            return Exit {
                back: Some(flow),
                accepted: Some(flow),
            };
        };
        let mut here = Some(flow);
        for (index, rule) in chain.rules.iter().enumerate() {
            let Some(now) = here else { break };
            self.left = self.left.saturating_sub(1);
            let truth = marked_truth(rule, now, self.packet, self.sets);
            if truth == Truth::No {
                continue;
            }
            let goes_on = self.follow(&rule.target, now, &mut exit, (name, chain, index), depth);
            let passed_by = (truth == Truth::Perhaps).then_some(now);
            here = meet(goes_on, passed_by);
        }
        exit.back = meet(exit.back, here);
        exit
    }

    /// What becomes of a packet that meets the conditions of a rule: how it goes on to the next one.
    fn follow(
        &mut self,
        target: &Target,
        now: Flow,
        exit: &mut Exit,
        rule: (&str, &Chain, usize),
        depth: usize,
    ) -> Option<Flow> {
        match target {
            Target::Next | Target::Log(_) => Some(now),
            Target::Mark { value, mask } => Some(now.marked(*value, *mask)),
            Target::Accept => {
                exit.accepted = meet(exit.accepted, Some(now));
                None
            }
            Target::Drop | Target::Reject => {
                let (name, chain, index) = rule;
                self.found.push(meaning::of_rule(self.name, name, chain, index));
                None
            }
            Target::Return => {
                exit.back = meet(exit.back, Some(now));
                None
            }
            Target::Chain { name, goto } => {
                let inner = self.chain(name, now, depth + 1);
                exit.accepted = meet(exit.accepted, inner.accepted);
                if *goto {
                    exit.back = meet(exit.back, inner.back);
                    None
                } else {
                    inner.back
                }
            }
            Target::Map(keys, verdicts) => {
                let mut goes_on = None;
                for (element, verdict) in verdicts.iter() {
                    self.left = self.left.saturating_sub(1);
                    let truth = match element {
                        Some(element) => elements::is(element, keys, self.packet),
                        None => Truth::Perhaps,
                    };
                    if truth == Truth::No {
                        continue;
                    }
                    // A map's verdicts are none of its own kind (`nft_verdict_init`, `net/netfilter/nf_tables_api.c`).
                    if !matches!(verdict, Target::Map(..)) {
                        goes_on = meet(goes_on, self.follow(verdict, now, exit, rule, depth));
                    }
                    if truth == Truth::Yes {
                        return goes_on;
                    }
                }
                meet(goes_on, Some(now))
            }
        }
    }
}

/// Whether a condition holds for a packet with this mark.
fn holds(condition: &Match, flow: Flow, packet: &Asked<'_>, sets: &Sets) -> Truth {
    let address = |end| match end {
        End::Source => packet.src,
        End::Destination => packet.dst,
    };
    let truth = match &condition.what {
        What::Address(end, net) => net.contains(&address(*end)).into(),
        What::Device(Way::In, pattern) => device(packet.input, pattern),
        What::Device(Way::Out, pattern) => device(packet.output, pattern),
        What::Protocol(number) => (packet.proto == *number).into(),
        What::Ports(end, ranges) => packet.port(*end).map_or(Truth::Perhaps, |port| {
            let mut ranges = ranges.iter();
            ranges
                .any(|(first, last)| (*first..=*last).contains(&port))
                .into()
        }),
        What::State(asked) => match packet.states.0 & asked {
            0 => Truth::No,
            all if all == packet.states.0 => Truth::Yes,
            _ => Truth::Perhaps,
        },
        What::Mark { value, mask } => {
            let differs = (flow.value ^ value) & mask & flow.known;
            match (differs, mask & !flow.known) {
                (0, 0) => Truth::Yes,
                (0, _) => Truth::Perhaps,
                _ => Truth::No,
            }
        }
        What::Icmp(kind, (first, last)) => match packet.icmp {
            Some((of, code)) => (of == *kind && (*first..=*last).contains(&code)).into(),
            None => Truth::Perhaps,
        },
        What::Local(end) => packet.local.contains(&address(*end)).into(),
        What::Set(name, ends) => sets.has(name, ends, packet).map_or(Truth::Perhaps, Truth::from),
        What::Among(keys, elements) => elements.has(keys, packet),
        What::Unreachable if packet.is_from_there => Truth::No,
        What::Unreachable | What::Unknown => Truth::Perhaps,
    };
    truth.turned_if(condition.not)
}

fn device(device: Device<'_>, pattern: &str) -> Truth {
    match device {
        Device::Is(name) => match pattern.strip_suffix('+') {
            Some(beginning) => name.starts_with(beginning).into(),
            None => (name == pattern).into(),
        },
        // Netfilter compares with an empty name then, which `+` alone fits.
        Device::None => (pattern == "+").into(),
        Device::Unknown => Truth::Perhaps,
    }
}
