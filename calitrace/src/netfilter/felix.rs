//! Packets put to rule sets of Felix' own, as `iptables-save` and `nft` show them (`tests/felix-rules`, which has the policies,
//! profiles and endpoints of each).

use super::*;

/// The members of the IP sets; nftables shows its sets with the rules.
const SETS: &str = include_str!("../../../tests/felix/ipsets");

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
    /// In Calico's nftables mode.
    is_native: bool,
    rules: Ruleset,
    sets: Sets,
    release: Release,
    flow_logs: bool,
}

macro_rules! shown {
    ($name:literal) => {
        shown($name, include_str!(concat!("../../../tests/felix/", $name)))
    };
}

fn shown(name: &'static str, text: &str) -> Shown {
    let is_native = name.rsplit_once('.').is_some_and(|(_, end)| end == "json");
    let rules = if is_native {
        Ruleset::parse_nft(&compact_nft(text).unwrap(), false)
    } else {
        Ruleset::parse(text)
    };
    Shown {
        name,
        is_native,
        rules,
        sets: Sets::parse(if is_native { "" } else { SETS }),
        release: match &name[..5] {
            "v3.28" => Release::V3_28,
            "v3.31" => Release::V3_31,
            _ => Release::V3_33,
        },
        flow_logs: name.contains("/flow-logs."),
    }
}

fn all() -> [Shown; 11] {
    [
        shown!("v3.28/plain.legacy.save"),
        shown!("v3.28/plain.nft.save"),
        shown!("v3.31-by-hand/flow-logs.legacy.save"),
        shown!("v3.31-by-hand/flow-logs.nft.save"),
        shown!("v3.31-by-hand/flow-logs.json"),
        shown!("v3.33-by-hand/plain.legacy.save"),
        shown!("v3.33-by-hand/plain.nft.save"),
        shown!("v3.33-by-hand/plain.json"),
        shown!("v3.33-by-hand/flow-logs.legacy.save"),
        shown!("v3.33-by-hand/flow-logs.nft.save"),
        shown!("v3.33-by-hand/flow-logs.json"),
    ]
}

/// Who drops a packet.
#[derive(Clone, Copy)]
enum By {
    Nobody,
    /// Kind, name, direction, index of the rule.
    Policy(&'static str, &'static str, Direction, u32),
    Profile(&'static str, Direction),
    EndOfTier(&'static str, Direction),
    NoProfile(Direction),
    Other(&'static Cause),
    /// The one where there are tiers, the other where there are none.
    Tiered(&'static By, &'static By),
}

use self::By::{EndOfTier, NoProfile, Nobody, Other, Policy, Profile, Tiered};
use Direction::{Egress, Ingress};

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
                    direction: Some(direction),
                    rule: shown.flow_logs.then_some(rule),
                }
            }
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
            Other(cause) => cause.clone(),
            Tiered(with, without) => {
                return if shown.release >= Release::V3_31 {
                    with
                } else {
                    without
                }
                .cause(shown);
            }
        })
    }
}

const NODE: &str = "192.168.49.2";
const POD: &str = "10.244.120.67";
const ELSEWHERE: &str = "10.244.205.193";

/// A packet, mostly of UDP: what differs from one to the other.
#[derive(Clone, Copy)]
struct Packet {
    proto: u8,
    src: &'static str,
    dst: &'static str,
    port: u16,
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

    fn ask<T>(self, is_from_there: bool, of: impl FnOnce(&Asked<'_>) -> T) -> T {
        let local = [NODE.parse().unwrap()];
        of(&Asked {
            src: self.src.parse().unwrap(),
            dst: self.dst.parse().unwrap(),
            proto: self.proto,
            ports: matches!(self.proto, 6 | 17).then_some((40_000, self.port)),
            icmp: (self.proto == 1).then_some((8, 0)),
            input: self.input,
            output: self.output,
            states: self.states,
            is_from_there,
            local: &local,
        })
    }

    fn causes(self, shown: &Shown, is_from_there: bool) -> Vec<Cause> {
        let culprits = self.ask(is_from_there, |asked| {
            shown.rules.culprits(asked, &[self.hook], &shown.sets)
        });
        culprits.into_iter().map(|culprit| culprit.cause).collect()
    }
}

/// Puts packets to each node's rules: who drops them, and nobody else.
fn require(cases: &[(Packet, By)]) {
    for shown in all() {
        for (index, (packet, by)) in cases.iter().enumerate() {
            let expected: Vec<Cause> = by.cause(&shown).into_iter().collect();
            assert_eq!(
                packet.causes(&shown, true),
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

#[test]
fn policies_that_deny_are_named() {
    const LONG: &str = "default/a-policy-with-a-name-that-is-too-long-for-its-chain";
    let web = to("caliaaaaaaaaaaa");
    let policy = |name, rule| Policy("NetworkPolicy", name, Ingress, rule);
    let guard = Policy("GlobalNetworkPolicy", "security.guard", Ingress, 1);
    require(&[
        (to("cali11111111111"), policy("default/deny-all", 0)),
        (
            from("cali11111111111").tcp(25),
            Policy("NetworkPolicy", "default/blocked-out", Egress, 0),
        ),
        (from("cali11111111111").tcp(26), Nobody),
        (to("cali22222222222").src("198.51.100.7"), guard),
        (to("cali77777777777").tcp(2222), policy("default/second", 0)),
        (to("cali88888888888").udp(53), policy(LONG, 0)),
        (to("cali88888888888"), Nobody),
        (web.tcp(22), policy("default/web", 2)),
        (web.udp(5353), policy("default/web", 4)),
        (web.udp(5353).src("203.0.113.9"), policy("default/web", 4)),
        // On the same node, what both pods' policies say counts.
        (
            Packet {
                input: Device::Is("cali44444444444"),
                ..to("cali11111111111")
            },
            policy("default/deny-all", 0),
        ),
    ]);
}

#[test]
fn what_policies_allow_or_pass_is_dropped_by_nobody() {
    let web = to("caliaaaaaaaaaaa");
    let guarded = to("cali22222222222");
    require(&[
        (web.tcp(80), Nobody),
        (web.tcp(8040), Nobody),
        (web.udp(5353).src("10.244.205.194"), Nobody),
        // Passed by one tier, allowed by the other.
        (guarded.udp(53), Nobody),
        (guarded.proto(1).src("192.0.2.1"), Nobody),
        (to("cali33333333333").tcp(8080), Nobody),
        (to("cali77777777777").tcp(1111), Nobody),
        // Passed to the profiles.
        (to("cali77777777777").tcp(3333), Nobody),
        (to("cali44444444444"), Nobody),
        (from("cali44444444444"), Nobody),
    ]);
}

#[test]
fn the_end_of_a_tier_is_named() {
    let web = to("caliaaaaaaaaaaa");
    let guarded = to("cali22222222222");
    let default = EndOfTier("default", Ingress);
    require(&[
        (to("cali33333333333"), EndOfTier("security", Ingress)),
        (to("cali77777777777").tcp(4444), default),
        (web.tcp(80).src("192.0.2.1"), default),
        (web.udp(5353).src("10.244.7.1"), default),
        // Passed to the next tier; without one, to the profiles.
        (guarded, Tiered(&EndOfTier("default", Ingress), &Nobody)),
        (
            guarded.udp(53).src("192.0.2.1"),
            Tiered(&EndOfTier("security", Ingress), &Nobody),
        ),
        (from("cali22222222222"), EndOfTier("default", Egress)),
    ]);
}

#[test]
fn profiles_are_named() {
    let profile = to("cali99999999999");
    require(&[
        (profile, Profile("no-udp", Ingress)),
        (profile.tcp(80), Nobody),
        (profile.proto(1), NoProfile(Ingress)),
        (from("cali99999999999"), Profile("no-udp", Egress)),
        (from("cali99999999999").tcp(80), Nobody),
        (to("cali55555555555"), NoProfile(Ingress)),
        (from("cali55555555555"), NoProfile(Egress)),
    ]);
}

#[test]
fn what_no_policy_says_is_told_apart() {
    const ADMIN_DOWN: By = Other(&Cause::AdminDown);
    const UNKNOWN: By = Other(&Cause::UnknownInterface);
    const ENCAPSULATED: By = Other(&Cause::EncapsulatedByPod);
    const STRANGER: By = Other(&Cause::UnknownTunnelPeer);
    let invalid = States(States::INVALID);
    let pod = into_node("cali44444444444", POD);
    require(&[
        (to("cali66666666666"), ADMIN_DOWN),
        (from("cali66666666666"), ADMIN_DOWN),
        (to("calibbbbbbbbbbb"), UNKNOWN),
        (from("calibbbbbbbbbbb"), UNKNOWN),
        (
            to("cali44444444444").tcp(80).states(invalid),
            Other(&Cause::Invalid),
        ),
        (
            from("cali11111111111").tcp(80).states(States::ANY),
            Other(&Cause::Invalid),
        ),
        (from("cali44444444444").udp(4789), ENCAPSULATED),
        (from("cali44444444444").proto(4), ENCAPSULATED),
        // What is sent to a pod may be encapsulated.
        (to("cali44444444444").udp(4789), Nobody),
        // Allowed by the policy, and of a service that is none.
        (
            from("cali22222222222").udp(53).dst("10.96.0.10"),
            Other(&Cause::ServiceLoop),
        ),
        (into_node("eth0", "192.168.49.9").proto(4), STRANGER),
        (into_node("eth0", "192.168.49.3").proto(4), Nobody),
        // A node without an address for VXLAN.
        (into_node("eth0", "192.168.49.2").udp(4789), STRANGER),
        (into_node("eth0", "192.168.49.3").udp(4789), Nobody),
        (into_node("eth0", "192.168.49.9").udp(53), Nobody),
        (pod, Other(&Cause::EndpointToHost)),
        (
            into_node("cali11111111111", POD).tcp(25),
            Policy("NetworkPolicy", "default/blocked-out", Egress, 0),
        ),
    ]);
}

#[test]
fn a_source_of_another_fails_before_routing() {
    for shown in all() {
        let before_routing = |packet: Packet| Packet {
            output: Device::Unknown,
            hook: Hook::Prerouting,
            ..packet
        };
        let spoofed = before_routing(from("cali44444444444"));
        assert_eq!(
            spoofed.causes(&shown, false),
            [Cause::ReversePath],
            "{}",
            shown.name
        );
        assert_eq!(spoofed.causes(&shown, true), [], "{}", shown.name);
        let foreign = before_routing(to(""));
        assert_eq!(foreign.causes(&shown, false), [], "{}", shown.name);
    }
}

#[test]
fn limits_are_named() {
    const TO: By = Other(&Cause::Limit {
        direction: Some(Ingress),
    });
    const FROM: By = Other(&Cause::Limit {
        direction: Some(Egress),
    });
    require(&[
        // Whether it was one too many is not known; nobody else drops it.
        (to("caliccccccccccc"), Tiered(&TO, &Nobody)),
        (to("caliccccccccccc").tcp(80), Tiered(&TO, &Nobody)),
        (from("caliccccccccccc"), Tiered(&FROM, &Nobody)),
    ]);
}

#[test]
fn host_endpoints_have_directions() {
    const END: By = EndOfTier("default", Ingress);
    let through = |packet: Packet| Packet {
        input: Device::Is("eth9"),
        ..packet
    };
    require(&[
        (through(to("cali44444444444")), Tiered(&Nobody, &END)),
        (through(to("cali44444444444")).tcp(1111), Nobody),
        (
            through(to("cali11111111111")).tcp(1111),
            Policy("NetworkPolicy", "default/deny-all", Ingress, 0),
        ),
        (into_node("eth9", ELSEWHERE).tcp(80), Tiered(&Nobody, &END)),
        // Failsafe, and of the policy.
        (into_node("eth9", ELSEWHERE).tcp(22), Nobody),
        (into_node("eth9", ELSEWHERE).tcp(1111), Nobody),
        // Without a policy for them, forwarded packets are let out.
        (
            Packet {
                output: Device::Is("eth9"),
                ..from("cali44444444444")
            },
            Nobody,
        ),
    ]);
}

#[test]
fn packets_out_of_the_pools_are_masqueraded() {
    let pod = from("cali44444444444");
    for shown in all() {
        let masquerades = |dst| {
            let packet = pod.dst(dst);
            packet.ask(true, |asked| {
                shown.rules.masquerades("cali-nat-outgoing", asked, &shown.sets)
            })
        };
        // Of nftables' rules those for addresses are not looked at.
        let of = |answer: bool| (!shown.is_native).then_some(answer);
        assert_eq!(masquerades("8.8.8.8"), of(true), "{}", shown.name);
        assert_eq!(masquerades(ELSEWHERE), of(false), "{}", shown.name);
    }
}

/// All conditions are understood but limits, and those for translated connections and for the device that an address is local
/// to: no rule that drops is reached by either.
#[test]
fn conditions_are_understood() {
    for shown in all() {
        let mut unknown: Vec<&str> = Vec::new();
        for chains in shown.rules.tables.values() {
            for (name, chain) in chains {
                let mut matches = chain.rules.iter().flat_map(|rule| &rule.matches);
                let is_unknown = matches.any(|condition| condition.what == rules::What::Unknown);
                if is_unknown && !name.ends_with("-caliccccccccccc") {
                    unknown.push(name);
                }
            }
        }
        unknown.sort_unstable();
        let expected: &[&str] = if shown.is_native {
            &["filter-cali-OUTPUT", "mangle-cali-POSTROUTING"]
        } else {
            // That of the table mangle, and that of nat.
            &["cali-OUTPUT", "cali-POSTROUTING", "cali-POSTROUTING"]
        };
        assert_eq!(unknown, expected, "{}", shown.name);
    }
}
