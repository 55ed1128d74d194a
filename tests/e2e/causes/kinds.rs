//! Kinds of packets and what becomes of each, and the lab that they are sent in.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use calitrace_tests::{Lab, Options, lab::netfilter::Backend};

/// What becomes of a kind of packets, and by which it is known: nothing else is sent to that address and port.
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) to: SocketAddr,
    /// Another source address than the pod's, or another TTL.
    pub(super) src: Option<Ipv4Addr>,
    pub(super) ttl: Option<u32>,
    pub(super) expected: Expected,
    /// Without the faults; one of several, with `|` between them.
    pub(super) verdict_without: &'static str,
}

pub(super) struct Expected {
    pub(super) verdict: &'static str,
    /// The node that drops it.
    pub(super) node: &'static str,
    /// What netfilter's rule means, and the name of the policy or tier.
    pub(super) cause: Option<(&'static str, Option<&'static str>)>,
    /// The rule, by the beginning of its chain's name and what else it has.
    pub(super) rule: Option<(String, &'static str)>,
}

pub(super) const ONE: &str = "minikube";
pub(super) const TWO: &str = "minikube-m02";
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub(super) const DISABLED: (&str, Ipv4Addr) = ("pod6", Ipv4Addr::new(10, 244, 205, 210));
pub(super) const UNKNOWN: (&str, Ipv4Addr) = ("pod7", Ipv4Addr::new(10, 244, 205, 211));
/// Pods that take datagrams, and the port.
pub(super) const RECEIVERS: [&str; 5] = ["pod2", "pod3", "pod4", DISABLED.0, UNKNOWN.0];
pub(super) const OPEN: u16 = 5353;

#[expect(clippy::too_many_lines, reason = "a table")]
pub(super) fn kinds(lab: &Lab) -> Result<Vec<Kind>> {
    let address = |pod: &str| lab.pod(pod).map(|pod| pod.address);
    let kind = |name, to: (Ipv4Addr, u16), expected, verdict_without| Kind {
        name,
        to: to.into(),
        src: None,
        ttl: None,
        expected,
        verdict_without,
    };
    let by_rule = |node, cause, called, chain: &str, text| Expected {
        verdict: "dropped",
        node,
        cause: Some((cause, called)),
        rule: Some((chain.to_owned(), text)),
    };
    // What the two languages say.
    let drop = in_words(lab, "-j DROP", "drop");
    let reject = in_words(lab, "-j REJECT", "reject");
    let reverse_path = in_words(lab, "-m rpfilter", "fib saddr");
    let plain = |verdict, node| Expected {
        verdict,
        node,
        cause: None,
        rule: None,
    };
    let pod2 = address("pod2")?;
    let rejects = Expected {
        verdict: "rejected",
        ..by_rule(
            TWO,
            "policy",
            Some("default/picky"),
            "cali-pi-np/default/picky",
            reject,
        )
    };
    let end = by_rule(TWO, "end_of_tier", Some("default"), "cali-tw-", "End of tier");
    let chain = format!("cali-tw-{}", lab.pod("pod3")?.interface);
    let own = lab.node(ONE)?.tunnel_address;
    let mut kinds = vec![
        kind("delivered", (pod2, OPEN), plain("delivered", TWO), "delivered"),
        kind("closed", (pod2, 9999), plain("rejected", TWO), "rejected"),
        kind(
            "policy",
            (pod2, 1001),
            by_rule(
                TWO,
                "policy",
                Some("default/picky"),
                "cali-pi-np/default/picky",
                drop,
            ),
            "rejected",
        ),
        kind("rejecting policy", (pod2, 1003), rejects, "rejected"),
        kind("end of tier", (address("pod4")?, OPEN), end, "delivered"),
        kind(
            "no profile",
            (address("pod3")?, OPEN),
            by_rule(ONE, "no_profile", None, &chain, "no profiles matched"),
            "delivered",
        ),
        kind(
            "disabled",
            (DISABLED.1, OPEN),
            by_rule(TWO, "admin_down", None, "cali-tw-", "admin disabled"),
            "delivered",
        ),
        kind(
            "unknown interface",
            (UNKNOWN.1, OPEN),
            by_rule(
                TWO,
                "unknown_interface",
                None,
                "cali-to-wl-dispatch",
                "Unknown interface",
            ),
            "delivered",
        ),
        kind(
            "encapsulated",
            (pod2, 4789),
            by_rule(ONE, "encapsulated_by_pod", None, "cali-fw-", "VXLAN encapped"),
            "dropped",
        ),
        kind(
            "to the node",
            (own, 7777),
            by_rule(ONE, "endpoint_to_host", None, "cali-wl-to-host", drop),
            "rejected",
        ),
        kind(
            "service loop",
            (Ipv4Addr::new(10, 96, 200, 200), 80),
            by_rule(ONE, "service_loop", None, "cali-cidr-block", drop),
            // It is masqueraded, and nobody there has the address.
            "rejected|left",
        ),
        kind(
            "no pod",
            (lab.node(TWO)?.unused_address, OPEN),
            plain("dropped", TWO),
            "dropped",
        ),
    ];
    let mut spoofed = kind(
        "not its address",
        (pod2, 1004),
        by_rule(ONE, "reverse_path", None, "cali-PREROUTING", reverse_path),
        "dropped",
    );
    spoofed.src = Some(ELSEWHERE);
    let mut short = kind("short-lived", (pod2, 1005), plain("expired", ONE), "expired");
    short.ttl = Some(1);
    kinds.extend([spoofed, short]);
    Ok(kinds)
}

fn in_words(lab: &Lab, iptables: &'static str, nftables: &'static str) -> &'static str {
    match lab.options().netfilter {
        Backend::Native => nftables,
        _ => iptables,
    }
}

/// A lab with two more pods, in which every pod takes datagrams.
pub(super) fn lab(netfilter: Backend) -> Result<Lab> {
    let lab = Lab::up(&Options {
        netfilter,
        ipv6: false,
        ..Options::default()
    })?;
    for (id, address) in [DISABLED, UNKNOWN] {
        lab.add_pod(id, TWO, &format!("busybox-{id}"), address)?;
    }
    lab.namespace("pod1")?
        .ip(&format!("address add {ELSEWHERE}/32 dev eth0\n"))?;
    for part in [ONE, "pod2"] {
        // Each one is answered.
        let limit = "net/ipv4/icmp_ratelimit".to_owned();
        lab.namespace(part)?.sysctls([(limit, "0")])?;
    }
    lab.namespace(TWO)?
        .sysctls([("net/ipv4/icmp_ratelimit".to_owned(), "0")])?;
    Ok(lab)
}
