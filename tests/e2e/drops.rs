//! Where packets die, and why: policy, end of tier, blackhole, closed port, TTL. Beside each its twin without the fault.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Lab, Need, Options, Policy, command, lab::netfilter::Backend, needs::has_drop_reasons,
};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, arrived, change_rules, goes, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("a_policy_that_denies", || policy(Backend::Any, Policy::Deny)),
    test("the_end_of_a_tier", || policy(Backend::Any, Policy::EndOfTier)),
    test("members_of_sets_tell_which_policy", || sets(Backend::Nft)).needs(&[Need::Program("ipset")]),
    test("a_policy_of_nftables_that_denies", || {
        policy(Backend::Native, Policy::Deny)
    })
    .needs(NFT),
    test("the_end_of_a_tier_of_nftables", || {
        policy(Backend::Native, Policy::EndOfTier)
    })
    .needs(NFT),
    test("members_of_nftables_sets_tell_which_policy", || {
        sets(Backend::Native)
    })
    .needs(NFT),
    test("rules_of_nftables_that_change", changing).needs(NFT),
    test("a_rule_of_somebody_else_s_in_nftables", foreign).needs(NFT),
    test("an_unused_address_of_a_block", blackhole),
    test("a_closed_port", closed_port),
    test("a_ttl_that_runs_out", ttl),
];

const NFT: &[Need] = &[Need::Program("nft")];

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

fn policy(netfilter: Backend, policy: Policy) -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter,
        ..Options::default()
    })?;
    let pod2 = lab.pod("pod2")?;
    for packet in traces(&lab, "icmp", POD2, ping(POD2))? {
        ensure!(arrived(&packet), "without the policy: {packet:#}");
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
    load(lab, &["ipset", "restore"], &members.concat())?;
    load(lab, &["ipset", "restore"], "add cali40s:front 10.244.120.64/26\n")?;
    let rules = format!("*filter\n{}COMMIT\n", rules.concat());
    change_rules(lab, &pod2.node, &rules)
}

/// The same in Calico's nftables mode.
fn denied_by_nftables_sets(lab: &Lab) -> Result<()> {
    let rules = ["front", "back"].map(|name| {
        let chain = format!("filter-cali-pi-np/default/{name}");
        format!(
            "add set ip calico cali40s-{name} {{ type ipv4_addr; flags interval; }}\n\
             add chain ip calico {chain}\n\
             add rule ip calico {chain} ip saddr @cali40s-{name} counter drop \
             comment \"cali:0000000000000000; NetworkPolicy default/{name} ingress\"\n\
             insert rule ip calico filter-cali-tw-cali79f33e4263e index 2 counter jump {chain}\n"
        )
    });
    load(lab, &["nft", "-f", "-"], &rules.concat())?;
    let members = "add element ip calico cali40s-front { 10.244.120.64/26 }\n";
    load(lab, &["nft", "-f", "-"], members)
}

/// Has a tool on pod 2's node read a text.
fn load(lab: &Lab, tool: &[&str], text: &str) -> Result<()> {
    let mut tool = lab.exec(&lab.pod("pod2")?.node, tool)?;
    command::run_with_input(&mut tool, text)?;
    Ok(())
}

/// Who is in which set changes while calitrace is not looking; the twin is in none.
fn sets(netfilter: Backend) -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter,
        ..Options::default()
    })?;
    let (tool, front_but_one, back_empty): (&[&str], _, _) = if netfilter == Backend::Native {
        denied_by_nftables_sets(&lab)?;
        (
            &["nft", "-f", "-"],
            "flush set ip calico cali40s-front\n\
             add element ip calico cali40s-front { 10.244.120.64-10.244.120.66, 10.244.120.68/30 }\n\
             add element ip calico cali40s-back { 10.244.120.67 }\n",
            "flush set ip calico cali40s-back\n",
        )
    } else {
        denied_by_sets(&lab)?;
        (
            &["ipset", "restore"],
            "add cali40s:front 10.244.120.67 nomatch\nadd cali40s:back 10.244.120.67\n",
            "flush cali40s:back\n",
        )
    };
    let cases = [
        (None, Some("default/front")),
        (Some(front_but_one), Some("default/back")),
        (Some(back_empty), None),
    ];
    for (change, denies) in cases {
        if let Some(change) = change {
            load(&lab, tool, change)?;
        }
        for packet in traces(&lab, "icmp", POD2, ping(POD2))? {
            let verdict = if denies.is_some() { "dropped" } else { "delivered" };
            ensure!(packet["verdict"] == verdict, "{packet:#}");
            ensure!(packet["drop"]["policy"].as_str() == denies, "{packet:#}");
        }
    }
    Ok(())
}

/// Policies come while calitrace is looking: the rules are read again.
fn changing() -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter: Backend::Native,
        ..Options::default()
    })?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    for (policy, cause) in [(Policy::Deny, "policy"), (Policy::EndOfTier, "end_of_tier")] {
        lab.set_policy("pod2", policy)?;
        watch.until(&format!("a drop by {cause}"), |watch| {
            let sent = lab.ping("pod1", IpAddr::V4([10, 244, 205, 193].into()), 1, &[]);
            sent.is_ok()
                && watch.packets().iter().any(|packet| {
                    let culprits = packet["drop"]["culprits"].as_array();
                    culprits.is_some_and(|culprits| culprits.len() == 1 && culprits[0]["cause"] == cause)
                })
        })?;
    }
    watch.stop()?;
    Ok(())
}

/// The firewall of a distribution denies what Calico allows.
fn foreign() -> Result<()> {
    const POD4: &str = "10.244.205.194";
    let lab = Lab::up(&Options::default())?;
    let rules = "table inet firewall {\nchain forward {\ntype filter hook forward priority 10; policy accept;\n\
                 ct state established,related accept\n\
                 ip daddr 10.244.205.194 icmp type echo-request drop comment \"no pings\"\n}\n}\n";
    load(&lab, &["nft", "-f", "-"], rules)?;
    for packet in traces(&lab, "icmp", POD2, ping(POD2))? {
        ensure!(arrived(&packet), "{packet:#}");
    }
    for packet in traces(&lab, "icmp", POD4, ping(POD4))? {
        ensure!(packet["verdict"] == "dropped", "{packet:#}");
        let culprits = packet["drop"]["culprits"].as_array().context("culprits")?;
        ensure!(culprits.len() == 1, "{packet:#}");
        ensure!(
            culprits[0]["cause"] == "foreign" && culprits[0]["table"] == "inet firewall",
            "{packet:#}"
        );
        let text = culprits[0]["text"].as_str().context("the rule")?;
        ensure!(
            text.contains("ip daddr 10.244.205.194 icmp type 8 drop comment \"no pings\""),
            "{packet:#}"
        );
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
