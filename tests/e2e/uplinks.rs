//! What a node does not let in by its uplink, before anything looks at the pod's packet: XDP programs and policies of host
//! endpoints. The pod's trace says so.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use calitrace_tests::stand_in::xdp::{self, Mode};

use crate::{
    Test,
    support::{change_rules, run, with},
    test,
    traced::{POD1, POD2, all, culprit, lab, ping, says, traced},
};

pub(crate) const TESTS: &[Test] = &[
    test("an_xdp_program_before_all_hooks", || by_xdp(Mode::Generic)),
    test("an_xdp_program_in_the_driver", || by_xdp(Mode::Native)),
    test("an_untracked_policy_of_a_host_endpoint", untracked),
];

const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 49, 2);
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 49, 9);

/// Felix drops so by the sender's address what untracked policies deny. The twin denies somebody else.
fn by_xdp(mode: Mode) -> Result<()> {
    let lab = lab()?;
    let node = lab.namespace("minikube-m02")?;
    let denies = xdp::attach(&node, "eth0", OTHER, mode)?;
    let (traces, _) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "delivered")?;
    drop(denies);
    let _denies = xdp::attach(&node, "eth0", NODE, mode)?;
    let path = run(&with(
        &lab,
        &["topology", "--from", &POD1.to_string(), "--to", &POD2.to_string()],
    ))?;
    // At a veth device nothing of it is out of sight.
    ensure!(path.status.success() && !path.stdout.contains("XDP"), "{path:?}");
    let (traces, text) = traced(&lab, "icmp", POD1, ping)?;
    ensure!(traces.len() == 3, "{traces:#?}");
    all(&traces, "dropped")?;
    for trace in &traces {
        let drop = &trace["drop"];
        ensure!(
            drop["node"] == "minikube-m02"
                && drop["interface"] == "eth0"
                && drop["culprits"] == serde_json::json!([]),
            "{trace:#}"
        );
    }
    says(
        &text,
        "✗ dropped on node minikube-m02 at eth0: an XDP program of the interface",
    )
}

/// As Felix has them, in the table raw (`felix/rules/{static,endpoints,dispatch}.go`). Before anything is unwrapped, they see
/// the outer packet. The twin denies somebody else.
fn untracked() -> Result<()> {
    let lab = lab()?;
    let policy = |from: Ipv4Addr| {
        let chain = "cali-pi-gnp/only-friends";
        let text = format!(
            "*raw\n:cali-from-host-endpoint -\n:cali-fh-eth0 -\n:{chain} -\n\
             -A cali-from-host-endpoint -i eth0 -g cali-fh-eth0\n\
             -A cali-fh-eth0 -m comment --comment \"Start of tier default\" -j MARK --set-xmark 0x0/0x20000\n\
             -A cali-fh-eth0 -m mark --mark 0x0/0x20000 -j {chain}\n\
             -A cali-fh-eth0 -m comment --comment \"Return if policy accepted\" -m mark --mark 0x10000/0x10000 -j RETURN\n\
             -A {chain} -s {from}/32 -m comment --comment \"GlobalNetworkPolicy only-friends ingress\" -j DROP\n\
             COMMIT\n"
        );
        change_rules(&lab, "minikube-m02", &text)
    };
    change_rules(
        &lab,
        "minikube-m02",
        "*raw\n:cali-from-host-endpoint -\n-A cali-PREROUTING -m mark --mark 0x0/0x80000 -j cali-from-host-endpoint\nCOMMIT\n",
    )?;
    policy(OTHER)?;
    let (traces, _) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "delivered")?;
    policy(NODE)?;
    let (traces, text) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "dropped")?;
    for trace in &traces {
        culprit(trace, "minikube-m02", "policy")?;
        ensure!(
            trace["drop"]["policy"] == "only-friends" && trace["drop"]["culprits"][0]["table"] == "raw",
            "{trace:#}"
        );
    }
    says(
        &text,
        "✗ dropped on node minikube-m02 at eth0: policy only-friends (ingress)",
    )
}
