//! Names for rules that drop: what Calico meant by them. Felix says it in comments and in the names of chains.
//!
//! Felix' words are those of `felix/rules/{policy,endpoints,dispatch,static}.go` from before and after v3.32, where policies
//! got their kind into the comment. In nftables the names of its chains begin with the table that they would be in with
//! iptables (`felix/nftables/table_layer.go`), and all comments of a rule are one, cut off at 128 bytes
//! (`felix/nftables/renderer.go`).

use std::{fmt, sync::Arc};

use serde::{Serialize, Serializer};

use super::{
    packet::States,
    rules::{Chain, Target, What},
};

/// A rule that may have dropped a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    /// What it means.
    pub cause: Cause,
    /// The table; empty where only the rule's log is known.
    pub table: String,
    /// The chain; as above.
    pub chain: String,
    /// It sends an answer.
    pub rejects: bool,
}

/// Towards the pod or from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// What goes to the pod.
    Ingress,
    /// What the pod sends.
    Egress,
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limited {
    /// Packets a second.
    Packets,
    /// Connections at a time.
    Connections,
}

/// Which policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyName {
    /// `NetworkPolicy`, `GlobalNetworkPolicy`, `KubernetesNetworkPolicy`…; null where Felix does not say, before v3.32.
    pub kind: Option<String>,
    /// `namespace/name`, or `name` of one without a namespace.
    pub name: String,
}

/// What a rule means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A policy denies.
    Policy {
        /// Which.
        policy: PolicyName,
        /// Its tier; null before v3.29, and where no endpoint's rules are known that ask it.
        tier: Option<Arc<str>>,
        /// Its direction; null for chains whose name does not tell.
        direction: Option<Direction>,
        /// Index of its rule, from 0, where flow logs are on.
        rule: Option<u32>,
    },
    /// A profile denies.
    Profile {
        /// Its name.
        profile: String,
        /// Its direction.
        direction: Option<Direction>,
    },
    /// Policies of the tier select the pod, and none of them allowed or passed the packet.
    EndOfTier {
        /// The tier.
        tier: String,
        /// Of the ingress or the egress policies.
        direction: Option<Direction>,
    },
    /// No policy selects the pod, and no profile of it allows the packet.
    NoProfile {
        /// Of ingress or egress.
        direction: Option<Direction>,
    },
    /// Conntrack calls the packet invalid.
    Invalid,
    /// The same of a packet that may begin a connection, which only a broken header or checksum makes invalid.
    Broken,
    /// Felix has no chains for the interface.
    UnknownInterface,
    /// The endpoint is disabled.
    AdminDown,
    /// More than the pod may have (Felix' controls of quality of service).
    Limit {
        /// Of what.
        of: Limited,
        /// To the pod or from it.
        direction: Option<Direction>,
    },
    /// A pod sent an encapsulated packet, which it must not.
    EncapsulatedByPod,
    /// The answer would not go back where the packet came from.
    ReversePath,
    /// An encapsulated packet from a host that is no node of the cluster, or not known as one here.
    UnknownTunnelPeer,
    /// A pod to its own node, by `defaultEndpointToHostAction`.
    EndpointToHost,
    /// To a service address that nothing handles: it would go round in a loop.
    ServiceLoop,
    /// The policy of a base chain.
    BaseChain,
    /// None of Calico's.
    Foreign {
        /// The rule as `iptables-save` or `nft` writes it.
        rule: String,
    },
}

impl fmt::Display for Culprit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = |direction: &Option<Direction>| match direction {
            Some(Direction::Ingress) => " (ingress)",
            Some(Direction::Egress) => " (egress)",
            None => "",
        };
        match &self.cause {
            Cause::Policy {
                policy,
                tier,
                direction: way,
                rule,
            } => {
                write!(formatter, "policy {}{}", policy.name, direction(way))?;
                // All are of that one where nobody made another.
                if let Some(tier) = tier.as_deref().filter(|tier| *tier != "default") {
                    write!(formatter, " of tier {tier}")?;
                }
                match rule {
                    Some(rule) => write!(formatter, ", rule {rule}"),
                    None => Ok(()),
                }
            }
            Cause::Profile {
                profile,
                direction: way,
            } => {
                write!(formatter, "profile {profile}{}", direction(way))
            }
            Cause::EndOfTier { tier, direction: way } => write!(
                formatter,
                "end of tier {tier}{}: no policy of it allows the packet",
                direction(way)
            ),
            Cause::NoProfile { direction: way } => {
                write!(formatter, "no profile{} allows the packet", direction(way))
            }
            Cause::Invalid => formatter.write_str("conntrack calls the packet INVALID"),
            Cause::Broken => formatter
                .write_str("no rule but the one for INVALID: conntrack finds its checksum or header broken"),
            Cause::UnknownInterface => formatter.write_str("Felix has no rules for the interface (yet)"),
            Cause::AdminDown => formatter.write_str("the endpoint is disabled"),
            Cause::Limit { of, direction: way } => write!(
                formatter,
                "more {}{} than the pod may have",
                match of {
                    Limited::Packets => "packets a second",
                    Limited::Connections => "connections",
                },
                direction(way)
            ),
            Cause::EncapsulatedByPod => formatter.write_str("pods must not send encapsulated packets"),
            Cause::ReversePath => {
                formatter.write_str("the source address is not the sender's (reverse path filter)")
            }
            Cause::UnknownTunnelPeer => {
                formatter.write_str("encapsulated by a host that is not known as a node of the cluster")
            }
            Cause::EndpointToHost => {
                formatter.write_str("pods may not reach their node (defaultEndpointToHostAction)")
            }
            Cause::ServiceLoop => {
                formatter.write_str("the service address is handled by nothing (service loop prevention)")
            }
            Cause::BaseChain => write!(
                formatter,
                "the policy of chain {} in table {}",
                self.chain, self.table
            ),
            Cause::Foreign { rule } => write!(formatter, "not Calico: `{rule}` in table {}", self.table),
        }
    }
}

impl Cause {
    /// One word for programs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Policy { .. } => "policy",
            Self::Profile { .. } => "profile",
            Self::EndOfTier { .. } => "end_of_tier",
            Self::NoProfile { .. } => "no_profile",
            Self::Invalid => "invalid",
            Self::Broken => "broken",
            Self::UnknownInterface => "unknown_interface",
            Self::AdminDown => "admin_down",
            Self::Limit { .. } => "limit",
            Self::EncapsulatedByPod => "encapsulated_by_pod",
            Self::ReversePath => "reverse_path",
            Self::UnknownTunnelPeer => "unknown_tunnel_peer",
            Self::EndpointToHost => "endpoint_to_host",
            Self::ServiceLoop => "service_loop",
            Self::BaseChain => "base_chain",
            Self::Foreign { .. } => "foreign",
        }
    }
}

impl Serialize for Culprit {
    /// With the same fields for every cause.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            cause: &'a str,
            text: String,
            /// Of a policy, profile or tier.
            name: Option<&'a str>,
            kind: Option<&'a str>,
            tier: Option<&'a str>,
            limited: Option<Limited>,
            direction: Option<Direction>,
            rule: Option<u32>,
            /// Null, as the chain, where only the rule's log is known.
            table: Option<&'a str>,
            chain: Option<&'a str>,
            rejects: bool,
        }
        fn known(name: &str) -> Option<&str> {
            (!name.is_empty()).then_some(name)
        }
        let (name, kind, direction, rule) = match &self.cause {
            Cause::Policy {
                policy,
                direction,
                rule,
                ..
            } => (Some(&policy.name), policy.kind.as_deref(), *direction, *rule),
            Cause::Profile {
                profile: name,
                direction,
            }
            | Cause::EndOfTier {
                tier: name,
                direction,
            } => (Some(name), None, *direction, None),
            Cause::NoProfile { direction } | Cause::Limit { direction, .. } => (None, None, *direction, None),
            _ => (None, None, None, None),
        };
        let tier = match &self.cause {
            Cause::Policy { tier, .. } => tier.as_deref(),
            Cause::EndOfTier { tier, .. } => Some(tier.as_str()),
            _ => None,
        };
        let limited = match &self.cause {
            Cause::Limit { of, .. } => Some(*of),
            _ => None,
        };
        Fields {
            cause: self.cause.name(),
            text: self.to_string(),
            name: name.map(String::as_str),
            kind,
            tier,
            limited,
            direction,
            rule,
            table: known(&self.table),
            chain: known(&self.chain),
            rejects: self.rejects,
        }
        .serialize(serializer)
    }
}

/// The base chain `chain` drops what comes to its end.
pub(super) fn of_policy(table: &str, chain: &str) -> Culprit {
    Culprit {
        cause: Cause::BaseChain,
        table: table.to_owned(),
        chain: chain.to_owned(),
        rejects: false,
    }
}

/// The rule at `index` of `chain`.
pub(super) fn of_rule(table: &str, name: &str, chain: &Chain, index: usize) -> Culprit {
    let rule = &chain.rules[index];
    Culprit {
        cause: cause(name, chain, index),
        table: table.to_owned(),
        chain: name.to_owned(),
        rejects: rule.target == Target::Reject,
    }
}

/// Beginnings of the names of Calico's chains (`felix/rules/rule_defs.go`).
const LAYERS: [&str; 4] = ["raw-", "mangle-", "nat-", "filter-"];
const POLICY: [(&str, Direction); 2] = [("cali-pi-", Direction::Ingress), ("cali-po-", Direction::Egress)];
const PROFILE: [(&str, Direction); 2] = [
    ("cali-pri-", Direction::Ingress),
    ("cali-pro-", Direction::Egress),
];
const GROUP: [&str; 2] = ["cali-gi-", "cali-go-"];
const ENDPOINT: [(&str, Direction); 6] = [
    ("cali-tw-", Direction::Ingress),
    ("cali-fw-", Direction::Egress),
    ("cali-th-", Direction::Egress),
    ("cali-fh-", Direction::Ingress),
    // What is forwarded by a host endpoint's interface.
    ("cali-thfw-", Direction::Egress),
    ("cali-fhfw-", Direction::Ingress),
];

/// Whether a chain is that of a policy.
pub(super) fn is_policy(chain: &str) -> bool {
    beginning(without_layer(chain), &POLICY).is_some()
}

/// Whether a chain is that of a policy or a profile.
pub(super) fn is_of_policy(chain: &str) -> bool {
    let name = without_layer(chain);
    beginning(name, &POLICY).is_some() || beginning(name, &PROFILE).is_some()
}

/// Whether a chain is that of an endpoint, which asks policies.
pub(super) fn is_of_endpoint(chain: &str) -> bool {
    beginning(without_layer(chain), &ENDPOINT).is_some()
}

/// Whether a chain is that of policies which are always asked together.
pub(super) fn is_of_group(chain: &str) -> bool {
    let name = without_layer(chain);
    GROUP.iter().any(|group| name.starts_with(group))
}

fn without_layer(name: &str) -> &str {
    let mut layers = LAYERS.iter();
    layers.find_map(|layer| name.strip_prefix(layer)).unwrap_or(name)
}

fn cause(name: &str, chain: &Chain, index: usize) -> Cause {
    let rule = &chain.rules[index];
    let foreign = || Cause::Foreign {
        rule: rule.text.as_deref().unwrap_or_default().to_owned(),
    };
    let name = without_layer(name);
    if !name.starts_with("cali-") {
        return foreign();
    }
    if let Some((rest, way)) = beginning(name, &POLICY) {
        return policy(rest, way, chain, index);
    }
    if let Some((rest, way)) = beginning(name, &PROFILE) {
        let mut comments = chain.rules.iter().flat_map(|rule| &rule.comments);
        let said = comments.find_map(|comment| titled(comment, "Profile "));
        return Cause::Profile {
            profile: said.unwrap_or(rest).to_owned(),
            direction: Some(way),
        };
    }
    let direction = beginning(name, &ENDPOINT).map(|(_, way)| way);
    // `DROP` or `REJECT` stand first, by the action that is configured.
    let says = |end: &str| rule.comments.iter().any(|comment| comment.ends_with(end));
    let asks = |what: &What| {
        let mut matches = rule.matches.iter();
        matches.any(|condition| !condition.not && condition.what == *what)
    };
    // Of a tier with a long name the rest may be cut off.
    let mut comments = rule.comments.iter();
    let ends_tier = comments.any(|comment| comment.starts_with("End of tier "));
    if ends_tier || says("if no policies passed packet") {
        return Cause::EndOfTier {
            tier: tier(chain, index),
            direction,
        };
    }
    if says("if no profiles matched") {
        return Cause::NoProfile { direction };
    }
    if asks(&What::State(States::INVALID)) {
        return Cause::Invalid;
    }
    if asks(&What::Unreachable) {
        return Cause::ReversePath;
    }
    if says("Unknown interface") || says("Unknown endpoint") {
        return Cause::UnknownInterface;
    }
    if says("Endpoint admin disabled") {
        return Cause::AdminDown;
    }
    let limits = [
        ("packet rate limit", Limited::Packets),
        ("connection limit", Limited::Connections),
    ];
    if let Some((_, of)) = limits.into_iter().find(|(end, _)| says(end)) {
        return Cause::Limit { of, direction };
    }
    if says("encapped packets originating in workloads") {
        return Cause::EncapsulatedByPod;
    }
    if says("packets from non-allowed hosts") || says("packets from non-Calico hosts") {
        return Cause::UnknownTunnelPeer;
    }
    match name {
        "cali-wl-to-host" => Cause::EndpointToHost,
        "cali-cidr-block" => Cause::ServiceLoop,
        _ => foreign(),
    }
}

fn beginning<'a>(name: &'a str, of: &[(&str, Direction)]) -> Option<(&'a str, Direction)> {
    of.iter()
        .find_map(|(beginning, way)| Some((name.strip_prefix(beginning)?, *way)))
}

/// What stands between `title` and the direction.
fn titled<'a>(comment: &'a str, title: &str) -> Option<&'a str> {
    let rest = comment.strip_prefix(title)?;
    rest.strip_suffix(" ingress")
        .or_else(|| rest.strip_suffix(" egress"))
}

/// The first rule of a policy's chain names it: `NetworkPolicy default/deny ingress`, before v3.32
/// `Policy default/knp.default.deny ingress`, after annotations if there are some. The name of the chain says it, too, but a
/// long one is a digest.
fn policy(rest: &str, way: Direction, chain: &Chain, index: usize) -> Cause {
    let mut comments = chain.rules.iter().flat_map(|rule| &rule.comments);
    let said = comments.find_map(|comment| {
        let title = comment
            .strip_suffix(" ingress")
            .or_else(|| comment.strip_suffix(" egress"))?;
        let (before, name) = title.rsplit_once(' ')?;
        let kind = before.rsplit(' ').next()?;
        if kind == "Policy" {
            return Some(before_kinds(name));
        }
        kind.ends_with("NetworkPolicy").then(|| PolicyName {
            kind: Some(kind.to_owned()),
            name: name.to_owned(),
        })
    });
    Cause::Policy {
        policy: said.unwrap_or_else(|| of_id(rest)),
        tier: chain.tier.clone(),
        direction: Some(way),
        rule: logged(chain, index),
    }
}

/// What the name of a policy's chain says: from v3.32 on a short word for its kind, and its name
/// (`KindShortName`, `felix/types`); from v3.29 to v3.31 its tier, and its name. It is asked where there is no comment to
/// tell: nftables' are cut off, and annotations stand before the title.
pub(super) fn of_id(id: &str) -> PolicyName {
    let named = id.split_once('/').and_then(|(word, name)| {
        let kind = match word {
            "np" => "NetworkPolicy",
            "gnp" => "GlobalNetworkPolicy",
            "knp" => "KubernetesNetworkPolicy",
            "kcnp" => "KubernetesClusterNetworkPolicy",
            "snp" => "StagedNetworkPolicy",
            "sgnp" => "StagedGlobalNetworkPolicy",
            "sknp" => "StagedKubernetesNetworkPolicy",
            _ => return None,
        };
        Some(PolicyName {
            kind: Some(kind.to_owned()),
            name: name.to_owned(),
        })
    });
    named.unwrap_or_else(|| match id.split_once('/') {
        // With one `/` it may be a namespace that stands before it, as up to v3.28.
        Some((_tier, name)) if name.contains('/') => before_kinds(name),
        _ => before_kinds(id),
    })
}

/// Names of policies before v3.32: those of Kubernetes have `knp.default.` before them, the others their tier.
pub(super) fn before_kinds(name: &str) -> PolicyName {
    let (namespace, own) = match name.split_once('/') {
        Some((namespace, own)) => (Some(namespace), own),
        None => (None, name),
    };
    let (kind, own) = match own.strip_prefix("knp.default.") {
        Some(own) => (Some("KubernetesNetworkPolicy".to_owned()), own),
        None => (None, own.strip_prefix("default.").unwrap_or(own)),
    };
    let name = namespace.map_or_else(|| own.to_owned(), |namespace| format!("{namespace}/{own}"));
    PolicyName { kind, name }
}

/// The index that the rule before has in the prefix of its log, `DPI0|…`: deny, policy, ingress, number
/// (`felix/rules/nflogprefix.go`). There is one where flow logs are on.
fn logged(chain: &Chain, index: usize) -> Option<u32> {
    let before = chain.rules.get(index.checked_sub(1)?)?;
    let Target::Log(prefix) = &before.target else {
        return None;
    };
    let (head, _) = prefix.split_once('|')?;
    head.strip_prefix('D')?.get(2..)?.parse().ok()
}

/// The tier that begins where this is said.
pub(super) fn begun_tier(comment: &str) -> Option<&str> {
    comment.strip_prefix("Start of tier ")
}

/// The tier that ends at a rule, by its own comment (`End of tier default. Drop if …`) or that of the tier's beginning.
fn tier(chain: &Chain, index: usize) -> String {
    let own = chain.rules[index].comments.iter().find_map(|comment| {
        let rest = comment.strip_prefix("End of tier ")?;
        rest.split_once(". ").map(|(tier, _)| tier)
    });
    let begun = || {
        let before = chain.rules[..index].iter().rev();
        before
            .flat_map(|rule| &rule.comments)
            .find_map(|comment| begun_tier(comment))
    };
    // Before there were tiers, in one without a name.
    own.or_else(begun).unwrap_or("default").to_owned()
}
