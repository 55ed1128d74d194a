//! Where packets die, and why: policy, end of tier, blackhole, closed port, TTL. Beside each its twin without the fault.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Lab, Need, Options, Policy, command, lab::netfilter::Backend, needs::has_drop_reasons,
};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, goes, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("a_policy_that_denies", || policy(Policy::Deny)),
    test("the_end_of_a_tier", || policy(Policy::EndOfTier)),
    test("members_of_sets_tell_which_policy", sets).needs(&[Need::Program("ipset")]),
    test("an_unused_address_of_a_block", blackhole),
    test("a_closed_port", closed_port),
    test("a_ttl_that_runs_out", ttl),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";

/// The traces of what `traffic` sends from pod 1 with this protocol and destination.
fn traces(lab: &Lab, proto: &str, to: &str, traffic: impl FnOnce(&Lab) -> Result<()>) -> Result<Vec<Value>> {
    let watch = Watch::start(&with(lab, &["-o", "json"]))?;
    traffic(lab)?;
    let packets = watch.stop()?.packets()?;
    let found: Vec<Value> = packets
        .iter()
        .filter(|packet| goes(packet, proto, POD1, to))
        .cloned()
        .collect();
    ensure!(
        !found.is_empty(),
        "nothing from {POD1} to {to} was traced: {packets:#?}"
    );
    Ok(found)
}

fn ping(to: &'static str) -> impl FnOnce(&Lab) -> Result<()> {
    move |lab| lab.ping("pod1", to.parse()?, 3, &[]).map(drop)
}

fn policy(policy: Policy) -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let pod2 = lab.pod("pod2")?;
    for packet in traces(&lab, "icmp", POD2, ping(POD2))? {
        ensure!(packet["verdict"] == "delivered", "without the policy: {packet:#}");
    }
    lab.set_policy("pod2", policy)?;
    for packet in traces(&lab, "icmp", POD2, ping(POD2))? {
        ensure!(packet["verdict"] == "dropped", "{packet:#}");
        let drop = &packet["drop"];
        ensure!(drop["node"] == "minikube-m02", "{packet:#}");
        let reason = has_drop_reasons().then_some("NETFILTER_DROP");
        ensure!(drop["reason"].as_str() == reason, "{packet:#}");
        let location = drop["location"].as_str().context("a location")?;
        ensure!(["nf_hook_slow", "nft_do_chain"].contains(&location), "{packet:#}");
        // By name, and without a doubt: a request begins a connection, so it cannot be invalid.
        let culprits = drop["culprits"].as_array().context("culprits")?;
        ensure!(culprits.len() == 1, "{packet:#}");
        let (cause, name) = match policy {
            Policy::Deny => ("policy", "default/deny-all"),
            _ => ("end_of_tier", "default"),
        };
        ensure!(
            culprits[0]["cause"] == cause && culprits[0]["name"] == name,
            "{packet:#}"
        );
        ensure!(culprits[0]["direction"] == "ingress", "{packet:#}");
        let named = (policy == Policy::Deny).then_some(name);
        ensure!(drop["policy"].as_str() == named, "{packet:#}");
        // The last interface it passed: it came out of the tunnel and never went to the pod.
        ensure!(drop["interface"] == "vxlan.calico", "{packet:#}");
        let hooks = packet["observations"].as_array().context("observations")?;
        ensure!(
            hooks
                .iter()
                .all(|seen| seen["interface"] != pod2.interface.as_str()),
            "{packet:#}"
        );
    }
    Ok(())
}

/// Two policies for pod 2, which deny whom their sets have: `front` all pods of the first node, `back` nobody yet.
pub(crate) fn denied_by_sets(lab: &Lab) -> Result<()> {
    const POLICIES: [&str; 2] = ["front", "back"];
    let pod2 = lab.pod("pod2")?;
    let members = POLICIES.map(|name| format!("create cali40s:{name} hash:net family inet\n"));
    let rules = POLICIES.map(|name| {
        format!(
            ":cali-pi-np/default/{name} -\n\
             -A cali-pi-np/default/{name} -m set --match-set cali40s:{name} src \
             -m comment --comment \"NetworkPolicy default/{name} ingress\" -j DROP\n\
             -I cali-tw-{} 4 -j cali-pi-np/default/{name}\n",
            pod2.interface
        )
    });
    change_sets(lab, &members.concat())?;
    change_sets(lab, "add cali40s:front 10.244.120.64/26\n")?;
    let mut load = lab.exec(&pod2.node, ["iptables-nft-restore", "--noflush", "-w", "10"])?;
    command::run_with_input(&mut load, &format!("*filter\n{}COMMIT\n", rules.concat()))?;
    Ok(())
}

fn change_sets(lab: &Lab, change: &str) -> Result<()> {
    let mut restore = lab.exec(&lab.pod("pod2")?.node, ["ipset", "restore"])?;
    command::run_with_input(&mut restore, change)?;
    Ok(())
}

/// Who is in which set changes while calitrace is not looking; the twin is in none.
fn sets() -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter: Backend::Nft,
        ..Options::default()
    })?;
    denied_by_sets(&lab)?;
    let cases = [
        ("", Some("default/front")),
        (
            "add cali40s:front 10.244.120.67 nomatch\nadd cali40s:back 10.244.120.67\n",
            Some("default/back"),
        ),
        ("flush cali40s:back\n", None),
    ];
    for (change, denies) in cases {
        change_sets(&lab, change)?;
        for packet in traces(&lab, "icmp", POD2, ping(POD2))? {
            let verdict = if denies.is_some() { "dropped" } else { "delivered" };
            ensure!(packet["verdict"] == verdict, "{packet:#}");
            ensure!(packet["drop"]["policy"].as_str() == denies, "{packet:#}");
        }
    }
    Ok(())
}

fn blackhole() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let unused = lab.node("minikube-m02")?.unused_address.to_string();
    let found = traces(&lab, "icmp", &unused, |lab| {
        lab.ping("pod1", lab.node("minikube-m02")?.unused_address.into(), 3, &[])
            .map(drop)
    })?;
    for packet in found {
        ensure!(packet["verdict"] == "dropped", "{packet:#}");
        ensure!(packet["drop"]["node"] == "minikube-m02", "{packet:#}");
        ensure!(packet["drop"]["interface"] == "vxlan.calico", "{packet:#}");
        ensure!(packet["drop"]["location"] == "ip_error", "{packet:#}");
        let route = &packet["drop"]["route"];
        ensure!(
            route["kind"] == "blackhole" && route["prefix"] == "10.244.205.192/26",
            "{packet:#}"
        );
        ensure!(
            packet["drop"]["reason"].is_string() == has_drop_reasons(),
            "{packet:#}"
        );
    }
    Ok(())
}

fn closed_port() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let udp = traces(&lab, "udp", POD2, |lab| {
        lab.udp_flood("pod1", format!("{POD2}:9999").parse()?, 1, 50)
            .map(drop)
    })?;
    for packet in udp {
        ensure!(packet["verdict"] == "rejected", "{packet:#}");
        ensure!(packet["answer"]["kind"] == "unreachable", "{packet:#}");
        ensure!(packet["answer"]["address"] == POD2, "{packet:#}");
    }
    let tcp = traces(&lab, "tcp", POD2, |lab| {
        ensure!(
            lab.http_get("pod1", format!("{POD2}:9999").parse()?, 1).is_err(),
            "the port is open"
        );
        Ok(())
    })?;
    for packet in tcp {
        ensure!(packet["verdict"] == "rejected", "{packet:#}");
        ensure!(packet["answer"]["kind"] == "reset", "{packet:#}");
        ensure!(packet["answer"]["address"] == POD2, "{packet:#}");
    }
    Ok(())
}

fn ttl() -> Result<()> {
    for (ttl, node, hop) in [
        ("1", "minikube", "10.244.120.64"),
        ("2", "minikube-m02", "10.244.205.192"),
    ] {
        let lab = Lab::up(&Options::default())?;
        let found = traces(&lab, "icmp", POD2, |lab| {
            lab.ping("pod1", POD2.parse()?, 2, &["-t", ttl]).map(drop)
        })?;
        for packet in found {
            ensure!(packet["verdict"] == "expired", "{packet:#}");
            ensure!(packet["drop"]["node"] == node, "{packet:#}");
            ensure!(packet["answer"]["kind"] == "time_exceeded", "{packet:#}");
            ensure!(packet["answer"]["address"] == hop, "{packet:#}");
            let hops = packet["hops"].as_array().context("hops")?;
            ensure!(
                hops.last().is_some_and(|last| last["address"] == hop),
                "{packet:#}"
            );
            ensure!(hops.len().to_string() == ttl, "{packet:#}");
        }
    }
    Ok(())
}
