//! Host endpoints: eth9, which only what Calico's packages render has.

use super::*;

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

/// Those whose rules the host endpoint has in the tables raw and mangle.
fn with_all_tables() -> impl Iterator<Item = Shown> {
    let all = all().into_iter();
    all.filter(|shown| shown.release == Release::V3_28 && shown.has_all_tables())
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
    const BEFORE: By = Policy("GlobalNetworkPolicy", "before-nat", Ingress, 0);
    let untracked = |direction| Policy("GlobalNetworkPolicy", "untracked", direction, 0);
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
            (before_routing(24).states(invalid), Denied(&Cause::Invalid)),
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
    let place = |shown: &Shown, packet: Packet| {
        let culprits = packet.ask(shown, true, |asked| {
            shown.rules.culprits(asked, &[packet.hook], &shown.sets)
        });
        let places = culprits.into_iter();
        places
            .map(|culprit| format!("{} {}", culprit.table, culprit.chain))
            .collect::<Vec<_>>()
    };
    for shown in with_all_tables() {
        let of = |packet| place(&shown, packet);
        assert_eq!(of(before_routing(23)), ["raw cali-pi-default.untracked"]);
        assert_eq!(of(before_routing(30_002)), ["mangle cali-pi-default.before-nat"]);
        assert_eq!(of(from_node(23)), ["raw cali-po-default.untracked"]);
        assert_eq!(of(from_node(24)), ["filter cali-th-eth9"]);
    }
}
