//! The host endpoint, eth9.

use super::*;

#[test]
fn host_endpoints_have_directions() {
    const END: By = EndOfTier("default", Ingress);
    let through = |packet: Packet| Packet {
        input: Device::Is("eth9"),
        ..packet
    };
    require(&[
        (through(to("cali44444444444")), END),
        (through(to("cali44444444444")).tcp(1111), Nobody),
        (
            through(to("cali11111111111")).tcp(1111),
            Policy("NetworkPolicy", "default/deny-all", Ingress, 0),
        ),
        (into_node("eth9", ELSEWHERE).tcp(80), END),
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

/// Those with rules in the tables raw and mangle.
fn with_all_tables() -> impl Iterator<Item = Shown> {
    let all = all().into_iter();
    all.filter(Shown::has_all_tables)
}

fn before_routing(port: u16) -> Packet {
    Packet {
        input: Device::Is("eth9"),
        output: Device::Unknown,
        hook: Hook::Prerouting,
        ..to("").dst(NODE).tcp(port)
    }
}

fn from_node(port: u16) -> Packet {
    Packet {
        input: Device::None,
        output: Device::Is("eth9"),
        hook: Hook::Output,
        ..to("").src(NODE).dst(ELSEWHERE).tcp(port)
    }
}

#[test]
fn policies_before_connections_and_translation_are_named() {
    const BEFORE: By = Elsewhere(&Policy("GlobalNetworkPolicy", "before-nat", Ingress, 0));
    const INVALID: By = Elsewhere(&Denied(&Cause::Invalid));
    let untracked = |direction| Untracked("GlobalNetworkPolicy", "untracked", direction);
    let invalid = States(States::INVALID);
    let established = States(States::ESTABLISHED);
    let elsewhere = |port| Packet {
        input: Device::Is("eth0"),
        ..before_routing(port)
    };
    require_of(
        with_all_tables(),
        &[
            (before_routing(23), untracked(Ingress)),
            // Which know no connections.
            (before_routing(23).states(established), untracked(Ingress)),
            (before_routing(24), Nobody),
            (before_routing(24).states(invalid), INVALID),
            (before_routing(30_002), BEFORE),
            (before_routing(30_002).states(established), Nobody),
            // Allowed by the untracked policy, the other one is not asked.
            (before_routing(30_001), Nobody),
            // Failsafe.
            (before_routing(22), Nobody),
            (elsewhere(23), Nobody),
            (elsewhere(30_002), Nobody),
            (from_node(23), untracked(Egress)),
            // Nothing allows it, and nothing but failsafe ports may leave.
            (from_node(24), NoProfile(Egress)),
            (from_node(179), Nobody),
        ],
    );
}

#[test]
fn each_table_has_policies_of_its_own() {
    for shown in with_all_tables() {
        // With nftables all are one table, and its chains say which of iptables' they would be in.
        let of = |packet: Packet| {
            let culprits = packet.ask(&shown, true, |asked| {
                shown.rules.culprits(asked, &[packet.hook], &shown.sets)
            });
            let tables = culprits
                .iter()
                .map(|culprit| match culprit.chain.split_once('-') {
                    Some((layer, _)) if shown.is_native() => layer.to_owned(),
                    _ => culprit.table.clone(),
                });
            tables.collect::<Vec<_>>()
        };
        assert_eq!(of(before_routing(23)), ["raw"], "{}", shown.name);
        assert_eq!(of(before_routing(30_002)), ["mangle"], "{}", shown.name);
        assert_eq!(of(from_node(23)), ["raw"], "{}", shown.name);
        assert_eq!(of(from_node(24)), ["filter"], "{}", shown.name);
    }
}
