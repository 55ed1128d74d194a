//! Packets put to rule sets of Felix' own, as `iptables-save` and `nft` show them (`tests/felix-rules`, which has the policies,
//! profiles and endpoints of each).

mod hosts;
mod others;
mod policies;
mod readers;
mod tiers;

use std::net::IpAddr;

use super::*;

/// The members of the IP sets, those of IPv6 last; nftables shows its sets with the rules.
const SETS: [&str; 2] = [
    include_str!("../../../../tests/felix/ipsets"),
    include_str!("../../../../tests/felix/ipsets6"),
];

/// What releases of Felix differ in, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Release {
    /// Policies of the tier `security` are the first of `default`, since there are no tiers.
    V3_28,
    /// With tiers.
    V3_31,
    /// The kinds of policies are told, as from v3.32 on.
    V3_33,
}

/// A node's rules.
struct Shown {
    name: &'static str,
    rules: Ruleset,
    sets: Sets,
    release: Release,
    flow_logs: bool,
    /// What is denied is answered (`iptablesFilterDenyAction: Reject`).
    rejects: bool,
    /// The rules are those for IPv6.
    ipv6: bool,
}

impl Shown {
    /// In Calico's nftables mode.
    fn is_native(&self) -> bool {
        is_native(self.name)
    }

    /// There are raw and mangle, too: the kernel takes `REJECT` in the table filter only, and refuses a table that has it
    /// (projectcalico/calico#7914).
    fn has_all_tables(&self) -> bool {
        self.release > Release::V3_28 || !self.rejects
    }
}

fn is_native(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, end)| end == "json")
}

macro_rules! shown {
    ($name:literal) => {
        shown($name, include_str!(concat!("../../../../tests/felix/", $name)))
    };
}

fn shown(name: &'static str, text: &str) -> Shown {
    let is_native = is_native(name);
    let ipv6 = name.contains("/ipv6.");
    let rules = if is_native {
        Ruleset::parse_nft(&compact_nft_with_nat(text).unwrap(), ipv6)
    } else {
        Ruleset::parse(text)
    };
    Shown {
        name,
        rules,
        sets: Sets::parse(if is_native { "" } else { SETS[usize::from(ipv6)] }),
        release: match &name[..5] {
            "v3.28" => Release::V3_28,
            "v3.31" => Release::V3_31,
            _ => Release::V3_33,
        },
        flow_logs: name.contains("/flow-logs.") || name.contains("v3.33-by-hand/ipv6."),
        rejects: name.contains("/reject."),
        ipv6,
    }
}

fn all() -> [Shown; 21] {
    [
        shown!("v3.28/plain.legacy.save"),
        shown!("v3.28/plain.nft.save"),
        shown!("v3.28/reject.legacy.save"),
        shown!("v3.28/reject.nft.save"),
        shown!("v3.28/ipv6.legacy.save"),
        shown!("v3.28/ipv6.nft.save"),
        shown!("v3.31-by-hand/flow-logs.legacy.save"),
        shown!("v3.31-by-hand/flow-logs.nft.save"),
        shown!("v3.31-by-hand/flow-logs.json"),
        shown!("v3.33-by-hand/plain.legacy.save"),
        shown!("v3.33-by-hand/plain.nft.save"),
        shown!("v3.33-by-hand/plain.json"),
        shown!("v3.33-by-hand/flow-logs.legacy.save"),
        shown!("v3.33-by-hand/flow-logs.nft.save"),
        shown!("v3.33-by-hand/flow-logs.json"),
        shown!("v3.33-by-hand/reject.legacy.save"),
        shown!("v3.33-by-hand/reject.nft.save"),
        shown!("v3.33-by-hand/reject.json"),
        shown!("v3.33-by-hand/ipv6.legacy.save"),
        shown!("v3.33-by-hand/ipv6.nft.save"),
        shown!("v3.33-by-hand/ipv6.json"),
    ]
}

/// Who drops a packet.
#[derive(Clone, Copy)]
enum By {
    Nobody,
    /// Kind, name, direction, index of the rule.
    Policy(&'static str, &'static str, Direction, u32),
    /// One whose rules log nothing: kind, name, direction.
    Untracked(&'static str, &'static str, Direction),
    Profile(&'static str, Direction),
    EndOfTier(&'static str, Direction),
    NoProfile(Direction),
    /// Another rule whose action is the one that is configured.
    Denied(&'static Cause),
    /// One that drops whatever is configured.
    Dropped(&'static Cause),
    /// The same in the tables raw and mangle, where nothing can be rejected.
    Elsewhere(&'static By),
    /// The one where there are tiers, the other where there are none.
    Tiered(&'static By, &'static By),
    /// The one for IPv4, the other for IPv6.
    Families(&'static By, &'static By),
}

use self::By::{
    Denied, Dropped, Elsewhere, EndOfTier, Families, NoProfile, Nobody, Policy, Profile, Tiered, Untracked,
};
use Direction::{Egress, Ingress};

/// In the scenario, policies of other tiers than the usual one have its name before theirs.
fn tier_of(policy: &str) -> &str {
    let (tier, _) = policy.split_once('.').unwrap_or(("default", policy));
    tier
}

impl By {
    fn cause(self, shown: &Shown) -> Option<Cause> {
        Some(match self {
            Nobody => return None,
            Policy(kind, name, direction, rule) => {
                // Of the others the name does not tell, before v3.32.
                let is_told = shown.release >= Release::V3_33 || kind == "KubernetesNetworkPolicy";
                Cause::Policy {
                    policy: PolicyName {
                        kind: is_told.then(|| kind.to_owned()),
                        name: name.to_owned(),
                    },
                    tier: (shown.release >= Release::V3_31).then(|| tier_of(name).into()),
                    direction: Some(direction),
                    rule: shown.flow_logs.then_some(rule),
                }
            }
            Untracked(kind, name, direction) => {
                let mut cause = Policy(kind, name, direction, 0).cause(shown)?;
                if let Cause::Policy { rule, .. } = &mut cause {
                    *rule = None;
                }
                cause
            }
            Elsewhere(by) => return by.cause(shown),
            Profile(profile, direction) => Cause::Profile {
                profile: profile.to_owned(),
                direction: Some(direction),
            },
            EndOfTier(tier, direction) => Cause::EndOfTier {
                tier: if shown.release >= Release::V3_31 {
                    tier
                } else {
                    "default"
                }
                .to_owned(),
                direction: Some(direction),
            },
            NoProfile(direction) => Cause::NoProfile {
                direction: Some(direction),
            },
            Denied(cause) | Dropped(cause) => cause.clone(),
            Tiered(..) | Families(..) => return self.of(shown).cause(shown),
        })
    }

    /// What it is by these rules.
    fn of(self, shown: &Shown) -> Self {
        match self {
            Tiered(with, _) if shown.release >= Release::V3_31 => with.of(shown),
            Tiered(_, without) => without.of(shown),
            Families(_, other) if shown.ipv6 => other.of(shown),
            Families(one, _) => one.of(shown),
            other => other,
        }
    }

    /// The rule's cause, and whether it answers.
    fn expected(self, shown: &Shown) -> Option<(Cause, bool)> {
        let rejects = shown.rejects && !matches!(self.of(shown), Dropped(_) | Elsewhere(_) | Untracked(..));
        Some((self.cause(shown)?, rejects))
    }
}

const NODE: &str = "192.168.49.2";
const POD: &str = "10.244.120.67";
const ELSEWHERE: &str = "10.244.205.193";

/// An address, or that of IPv6 which the scenario has in its place: `fd00:10:244:120::67` for `10.244.120.67`.
fn address(text: &str, ipv6: bool) -> IpAddr {
    let text = match text.rsplit_once('.') {
        Some((net, host)) if ipv6 => format!("fd00:{}::{host}", net.replace('.', ":")),
        _ => text.to_owned(),
    };
    text.parse().unwrap()
}

/// A packet, mostly of UDP: what differs from one to the other.
#[derive(Clone, Copy)]
struct Packet {
    proto: u8,
    src: &'static str,
    dst: &'static str,
    port: u16,
    icmp: Option<(u8, u8)>,
    input: Device<'static>,
    output: Device<'static>,
    hook: Hook,
    states: States,
}

/// From another node's pod to one of this node.
fn to(interface: &'static str) -> Packet {
    Packet {
        proto: 17,
        src: ELSEWHERE,
        dst: POD,
        port: 54,
        icmp: None,
        input: Device::Is("tunl0"),
        output: Device::Is(interface),
        hook: Hook::Forward,
        states: States::OPENING,
    }
}

/// From a pod of this node to another node's.
fn from(interface: &'static str) -> Packet {
    Packet {
        src: POD,
        dst: ELSEWHERE,
        input: Device::Is(interface),
        output: Device::Is("tunl0"),
        ..to("")
    }
}

/// To the node itself.
fn into_node(interface: &'static str, src: &'static str) -> Packet {
    Packet {
        src,
        dst: NODE,
        input: Device::Is(interface),
        output: Device::None,
        hook: Hook::Input,
        ..to("")
    }
}

impl Packet {
    fn tcp(self, port: u16) -> Self {
        Self {
            proto: 6,
            port,
            ..self
        }
    }

    fn udp(self, port: u16) -> Self {
        Self { port, ..self }
    }

    fn src(self, src: &'static str) -> Self {
        Self { src, ..self }
    }

    fn dst(self, dst: &'static str) -> Self {
        Self { dst, ..self }
    }

    fn proto(self, proto: u8) -> Self {
        Self { proto, ..self }
    }

    fn states(self, states: States) -> Self {
        Self { states, ..self }
    }

    fn ask<T>(self, shown: &Shown, is_from_there: bool, of: impl FnOnce(&Asked<'_>) -> T) -> T {
        let local = [address(NODE, shown.ipv6)];
        // An echo request.
        let (proto, icmp) = match (self.proto, shown.ipv6) {
            (1, false) => (1, Some((8, 0))),
            (1, true) => (58, Some((128, 0))),
            (proto, _) => (proto, None),
        };
        of(&Asked {
            src: address(self.src, shown.ipv6),
            dst: address(self.dst, shown.ipv6),
            proto,
            ports: matches!(proto, 6 | 17).then_some((Some(40_000), self.port)),
            icmp: self.icmp.or(icmp),
            input: self.input,
            output: self.output,
            states: self.states,
            is_from_there,
            local: &local,
        })
    }

    /// Who may have dropped it, and whether they answer.
    fn met(self, shown: &Shown, is_from_there: bool) -> Vec<(Cause, bool)> {
        let culprits = self.ask(shown, is_from_there, |asked| {
            shown.rules.culprits(asked, &[self.hook], &shown.sets)
        });
        culprits
            .into_iter()
            .map(|culprit| (culprit.cause, culprit.rejects))
            .collect()
    }
}

/// Puts packets to each node's rules: who drops them, and nobody else.
fn require(cases: &[(Packet, By)]) {
    require_of(all(), cases);
}

fn require_of(several: impl IntoIterator<Item = Shown>, cases: &[(Packet, By)]) {
    for shown in several {
        for (index, (packet, by)) in cases.iter().enumerate() {
            let expected: Vec<(Cause, bool)> = by.expected(&shown).into_iter().collect();
            assert_eq!(
                packet.met(&shown, true),
                expected,
                "case {index} in {}: port {} of protocol {} from {}, {:?} to {:?}",
                shown.name,
                packet.port,
                packet.proto,
                packet.src,
                packet.input,
                packet.output
            );
        }
    }
}
