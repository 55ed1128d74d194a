//! Who dropped a packet: the rule's meaning, in words and in JSON.

use std::{fmt, sync::Arc};

use serde::{Serialize, Serializer};

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
    /// The answer would not go back where the packet came from: its source address is not the sender's, or the sender's
    /// route is missing.
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
            Cause::ReversePath => formatter.write_str(
                "the node has no route to the source address through the interface it came by: not the sender's address, \
                 or its route is missing (reverse path filter)",
            ),
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
