//! Policies, tiers and profiles.

use super::*;

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
