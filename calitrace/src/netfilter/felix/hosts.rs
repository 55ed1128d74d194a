//! Host endpoints.

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
