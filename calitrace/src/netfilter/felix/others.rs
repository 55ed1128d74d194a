//! What is dropped by rules that belong to no policy.

use super::*;

#[test]
fn what_no_policy_says_is_told_apart() {
    const ADMIN_DOWN: By = Denied(&Cause::AdminDown);
    const UNKNOWN: By = Denied(&Cause::UnknownInterface);
    const ENCAPSULATED: By = Denied(&Cause::EncapsulatedByPod);
    let invalid = States(States::INVALID);
    let pod = into_node("cali44444444444", POD);
    require(&[
        (to("cali66666666666"), ADMIN_DOWN),
        (from("cali66666666666"), ADMIN_DOWN),
        (to("calibbbbbbbbbbb"), UNKNOWN),
        (from("calibbbbbbbbbbb"), UNKNOWN),
        (
            to("cali44444444444").tcp(80).states(invalid),
            Denied(&Cause::Invalid),
        ),
        (
            from("cali11111111111").tcp(80).states(States::ANY),
            Denied(&Cause::Invalid),
        ),
        (from("cali44444444444").udp(4789), ENCAPSULATED),
        (from("cali44444444444").proto(4), ENCAPSULATED),
        // What is sent to a pod may be encapsulated.
        (to("cali44444444444").udp(4789), Nobody),
        // Allowed by the policy, and of a service that is none.
        (
            from("cali22222222222").udp(53).dst("10.96.0.10"),
            Dropped(&Cause::ServiceLoop),
        ),
        (
            into_node("eth0", "192.168.49.9").proto(4),
            Families(&Denied(&Cause::UnknownTunnelPeer), &Nobody),
        ),
        (into_node("eth0", "192.168.49.3").proto(4), Nobody),
        // A node without an address for VXLAN.
        (
            into_node("eth0", "192.168.49.2").udp(4789),
            Families(
                &Dropped(&Cause::UnknownTunnelPeer),
                &Denied(&Cause::UnknownTunnelPeer),
            ),
        ),
        (into_node("eth0", "192.168.49.3").udp(4789), Nobody),
        (into_node("eth0", "192.168.49.9").udp(53), Nobody),
        (pod, Dropped(&Cause::EndpointToHost)),
        (
            into_node("cali11111111111", POD).tcp(25),
            Policy("NetworkPolicy", "default/blocked-out", Egress, 0),
        ),
    ]);
}

/// By whatever tool and version: without it an outer packet may meet each rule for VXLAN, or none.
#[test]
fn the_port_of_vxlan_is_known() {
    for shown in all() {
        assert_eq!(shown.rules.vxlan_port(), Some(4789));
    }
}

/// Of interfaces whose names begin alike, a further chain knows which there are; with nftables, one map of all.
#[test]
fn names_that_begin_alike_are_told_apart() {
    const UNKNOWN: By = Denied(&Cause::UnknownInterface);
    for shown in all() {
        let chains = shown.rules.tables.values().flat_map(|table| table.keys());
        let mut further: Vec<&str> = chains
            .map(String::as_str)
            .filter(|name| name.contains("-wl-dispatch-"))
            .collect();
        further.sort_unstable();
        let expected: &[&str] = if shown.is_native() {
            &[]
        } else {
            &["cali-from-wl-dispatch-1", "cali-to-wl-dispatch-1"]
        };
        assert_eq!(further, expected, "{}", shown.name);
    }
    require(&[
        (to("cali1eeeeeeeeee"), Nobody),
        (from("cali1eeeeeeeeee"), Nobody),
        (to("cali1ffffffffff"), UNKNOWN),
        (from("cali1ffffffffff"), UNKNOWN),
        (into_node("cali1ffffffffff", POD), UNKNOWN),
        (
            Packet {
                input: Device::Is("cali1eeeeeeeeee"),
                ..to("cali11111111111")
            },
            Policy("NetworkPolicy", "default/deny-all", Ingress, 0),
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
        let expected = if shown.has_all_tables() {
            vec![(Cause::ReversePath, false)]
        } else {
            Vec::new()
        };
        assert_eq!(spoofed.met(&shown, false), expected, "{}", shown.name);
        assert_eq!(spoofed.met(&shown, true), [], "{}", shown.name);
        let foreign = before_routing(to(""));
        assert_eq!(foreign.met(&shown, false), [], "{}", shown.name);
    }
}

#[test]
fn limits_are_named() {
    const fn limit(of: Limited, direction: Direction) -> Cause {
        Cause::Limit {
            of,
            direction: Some(direction),
        }
    }
    const TO: By = Dropped(&limit(Limited::Packets, Ingress));
    const FROM: By = Dropped(&limit(Limited::Packets, Egress));
    require(&[
        // Whether it was one too many is not known; nobody else drops it.
        (to("caliccccccccccc"), Tiered(&TO, &Nobody)),
        (from("caliccccccccccc"), Tiered(&FROM, &Nobody)),
    ]);
    // With tiers came limits, and connections that are too many are reset.
    for shown in all().into_iter().filter(|shown| shown.release >= Release::V3_31) {
        let either = [
            (limit(Limited::Packets, Ingress), false),
            (limit(Limited::Connections, Ingress), true),
        ];
        let connection = to("caliccccccccccc").tcp(80);
        assert_eq!(connection.met(&shown, true), either, "{}", shown.name);
    }
}

#[test]
fn pods_may_ask_their_node_for_neighbours() {
    for shown in all().into_iter().filter(|shown| shown.ipv6) {
        let met = |kind| {
            let packet = Packet {
                proto: 58,
                icmp: Some((kind, 0)),
                ..into_node("cali44444444444", POD)
            };
            packet.met(&shown, true)
        };
        for asks in [130, 131, 132, 133, 135, 136] {
            assert_eq!(met(asks), [], "{asks} in {}", shown.name);
        }
        for other in [128, 134, 137] {
            let expected = [(Cause::EndpointToHost, false)];
            assert_eq!(met(other), expected, "{other} in {}", shown.name);
        }
    }
}
