//! Flow logs: what Calico's rules log of a packet names its policy, whatever else is known of the rules.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Lab, Need, Options, Policy, command,
    lab::netfilter::{Backend, FlowLogs},
};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, arrived, goes, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("flow_logs_of_iptables_legacy", || named(Backend::Legacy)).needs(&[Need::Kprobes]),
    test("flow_logs_of_iptables_nft", || named(Backend::Nft)).needs(&[Need::Kprobes]),
    test("flow_logs_of_nftables", || named(Backend::Native)).needs(&[Need::Kprobes, Need::Program("nft")]),
    test("flow_logs_tell_which_of_two_in_iptables_legacy", || {
        which_of_two(Backend::Legacy, "iptables-legacy")
    })
    .needs(&[Need::Kprobes]),
    test("flow_logs_tell_which_of_two_in_iptables_nft", || {
        which_of_two(Backend::Nft, "iptables-nft")
    })
    .needs(&[Need::Kprobes]),
    test("with_flow_logs_rules_are_known_by_their_numbers", by_rules),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";
const POD4: &str = "10.244.205.194";

/// The traces of what goes from pod 1 with this protocol to `to`.
fn going<'a>(packets: &'a [Value], proto: &str, to: &str) -> Vec<&'a Value> {
    packets
        .iter()
        .filter(|packet| goes(packet, proto, POD1, to))
        .collect()
}

/// Node, and action, whose rule, name, direction and rule of what was logged of a packet, in order.
fn logged(packet: &Value) -> Vec<(&str, [&str; 4], Option<u64>)> {
    let observations = packet["observations"].as_array();
    let seen = observations
        .into_iter()
        .flatten()
        .filter(|seen| ["nflog_tg", "nft_log_eval"].contains(&seen["hook"].as_str().unwrap_or_default()));
    seen.map(|seen| {
        let logged = &seen["logged"];
        let text = |name| logged[name].as_str().unwrap_or("-");
        let words = [text("action"), text("cause"), text("name"), text("direction")];
        (
            seen["node"].as_str().unwrap_or("-"),
            words,
            logged["rule"].as_u64(),
        )
    })
    .collect()
}

/// A policy that denies and the end of a tier, in both grammars; the twin's namespace allows.
fn named(netfilter: Backend) -> Result<()> {
    for flow_logs in [FlowLogs::Kinds, FlowLogs::Tiers] {
        let lab = Lab::up(&Options {
            netfilter,
            flow_logs,
            ipv6: false,
            ..Options::default()
        })?;
        for (policy, word, said) in [
            (
                Policy::Deny,
                "policy default/deny-all (ingress), rule 0 denies",
                (["deny", "policy", "default/deny-all", "ingress"], Some(0)),
            ),
            (
                Policy::EndOfTier,
                "end of tier default (ingress) denies",
                (["deny", "end_of_tier", "default", "ingress"], None),
            ),
        ] {
            lab.set_policy("pod2", policy)?;
            let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
            for pod in ["pod2", "pod4"] {
                lab.ping("pod1", lab.pod(pod)?.ip(), 3, &[])?;
            }
            let packets = watch.stop()?.packets()?;
            let allowed = |direction| (["allow", "profile", "kns.default", direction], Some(0));
            let (sent, arrived) = (allowed("egress"), allowed("ingress"));

            let denied = going(&packets, "icmp", POD2);
            ensure!(denied.len() == 3, "{} packets were dropped", denied.len());
            for packet in denied {
                ensure!(packet["verdict"] == "dropped", "{packet:#}");
                let expected = [("minikube", sent.0, sent.1), ("minikube-m02", said.0, said.1)];
                ensure!(logged(packet) == expected, "{packet:#}");
                let drop = &packet["drop"];
                let culprits = drop["culprits"].as_array().context("culprits")?;
                ensure!(culprits.len() == 1, "{packet:#}");
                let [_, cause, name, _] = said.0;
                ensure!(
                    culprits[0]["cause"] == cause && culprits[0]["name"] == name,
                    "{packet:#}"
                );
                ensure!(culprits[0]["rule"].as_u64() == said.1, "{packet:#}");
                ensure!(culprits[0]["chain"].is_string(), "{packet:#}");
                let policy = (cause == "policy").then_some(name);
                ensure!(drop["policy"].as_str() == policy, "{packet:#}");
                let observations = packet["observations"].as_array().context("observations")?;
                ensure!(
                    observations.iter().any(|seen| seen["detail"] == word),
                    "{packet:#}"
                );
            }

            let delivered = going(&packets, "icmp", POD4);
            ensure!(delivered.len() == 3, "{} were delivered", delivered.len());
            for (index, packet) in delivered.into_iter().enumerate() {
                ensure!(
                    packet["verdict"] == "delivered" && packet["drop"].is_null(),
                    "{packet:#}"
                );
                // The others are of a connection by then, which passes no policy.
                let expected = [
                    ("minikube", sent.0, sent.1),
                    ("minikube-m02", arrived.0, arrived.1),
                ];
                let expected = if index == 0 { &expected[..] } else { &[] };
                ensure!(logged(packet) == expected, "{packet:#}");
            }
        }
    }
    Ok(())
}

/// Two policies for pod 2. Each first rule allows a port; whom `front` denies is left to chance, and `back` denies the rest:
/// by the rules alone it may have been either.
fn which_of_two(netfilter: Backend, tool: &str) -> Result<()> {
    const COUNT: u32 = 20;
    let lab = Lab::up(&Options {
        netfilter,
        flow_logs: FlowLogs::Kinds,
        ipv6: false,
        ..Options::default()
    })?;
    let pod2 = lab.pod("pod2")?;
    let policies = [
        ("front", 5353, "-m statistic --mode random --probability 0.5 "),
        ("back", 5354, ""),
    ];
    let rules = policies.map(|(name, port, chance)| {
        let chain = format!("cali-pi-np/default/{name}");
        let (accept, deny) = ("0x10000/0x10000", "0x40000/0x40000");
        let log = |mark, head| {
            format!(
                "-A {chain} -m mark --mark {mark} -j NFLOG --nflog-group 1 --nflog-prefix \"{head}|np/default/{name}\"\n"
            )
        };
        format!(
            ":{chain} -\n\
             -A {chain} -p udp -m udp --dport {port} -m comment --comment \"NetworkPolicy default/{name} ingress\" \
             -j MARK --set-xmark {accept}\n{}-A {chain} -m mark --mark {accept} -j RETURN\n\
             -A {chain} {chance}-j MARK --set-xmark {deny}\n{}-A {chain} -m mark --mark {deny} -j DROP\n",
            log(accept, "API0"),
            log(deny, "DPI1"),
        )
    });
    let chain = format!("cali-tw-{}", pod2.interface);
    let jumps = policies.map(|(name, ..)| {
        format!(
            "-A {chain} -m mark --mark 0x0/0x10000 -j cali-pi-np/default/{name}\n\
             -A {chain} -m mark --mark 0x10000/0x10000 -j RETURN\n"
        )
    });
    let text = format!(
        "*filter\n{}-F {chain}\n{}COMMIT\n",
        rules.concat(),
        jumps.concat()
    );
    let mut load = lab.exec(&pod2.node, [&format!("{tool}-restore"), "--noflush", "-w", "10"])?;
    command::run_with_input(&mut load, &text)?;

    let server = lab.udp_server("pod2", 5353, false)?;
    // By the rules alone, then by what they log.
    for hooks in ["tc", "all"] {
        let before = counted(&lab, tool)?;
        let watch = Watch::start(&with(&lab, &["-o", "json", "--hooks", hooks]))?;
        lab.ping("pod1", pod2.ip(), COUNT, &["-i", "0.05"])?;
        lab.udp_flood("pod1", (pod2.address, 5353).into(), 3, 100)?;
        let packets = watch.stop()?.packets()?;
        let after = counted(&lab, tool)?;
        let denied = going(&packets, "icmp", POD2);
        ensure!(
            denied.len() == COUNT as usize,
            "{} packets were dropped",
            denied.len()
        );
        let mut named = [0, 0];
        for packet in denied {
            ensure!(packet["verdict"] == "dropped", "{packet:#}");
            let culprits = packet["drop"]["culprits"].as_array().context("culprits")?;
            if hooks == "tc" {
                ensure!(culprits.len() == 2, "{packet:#}");
                ensure!(packet["drop"]["policy"].is_null(), "{packet:#}");
                continue;
            }
            ensure!(culprits.len() == 1 && culprits[0]["rule"] == 1, "{packet:#}");
            for (count, (name, ..)) in named.iter_mut().zip(policies) {
                if packet["drop"]["policy"] == format!("default/{name}") {
                    *count += 1;
                }
            }
        }
        if hooks == "all" {
            // As often as the rules dropped.
            let dropped = [0, 1].map(|index| after[index] - before[index]);
            ensure!(named == dropped, "named {named:?}, dropped {dropped:?}");
        }
        let delivered = going(&packets, "udp", POD2);
        ensure!(delivered.len() == 3, "{} were delivered", delivered.len());
        for packet in delivered {
            ensure!(arrived(packet), "{packet:#}");
            let said = logged(packet);
            let allowed = ["allow", "policy", "default/front", "ingress"];
            ensure!(
                (hooks == "tc" && said.is_empty())
                    || said.last() == Some(&("minikube-m02", allowed, Some(0))),
                "{packet:#}"
            );
        }
    }
    server.stop()?;
    Ok(())
}

/// Packets that each of the two policies has dropped.
fn counted(lab: &Lab, tool: &str) -> Result<[u64; 2]> {
    let mut save = lab.exec("minikube-m02", [&format!("{tool}-save"), "-c", "-t", "filter"])?;
    let rules = command::text(&command::run(&mut save)?);
    let count = |name: &str| -> Result<u64> {
        let chain = format!("-A cali-pi-np/default/{name} ");
        let mut lines = rules.lines();
        let line = lines
            .find(|line| line.contains(&chain) && line.ends_with("-j DROP"))
            .with_context(|| format!("{name} has no rule that drops"))?;
        // `[PACKETS:BYTES] -A CHAIN …`
        let (packets, _) = line[1..].split_once(':').context("counters")?;
        Ok(packets.parse()?)
    };
    Ok([count("front")?, count("back")?])
}

/// Where functions of the kernel are not observed, the rules tell all the same, and by the prefixes in them the rule's number.
fn by_rules() -> Result<()> {
    let lab = Lab::up(&Options {
        flow_logs: FlowLogs::Kinds,
        ipv6: false,
        ..Options::default()
    })?;
    lab.set_policy("pod2", Policy::Deny)?;
    let watch = Watch::start(&with(&lab, &["-o", "json", "--hooks", "tc"]))?;
    for pod in ["pod2", "pod4"] {
        lab.ping("pod1", lab.pod(pod)?.ip(), 2, &[])?;
    }
    let packets = watch.stop()?.packets()?;
    let denied = going(&packets, "icmp", POD2);
    ensure!(denied.len() == 2, "{} packets were dropped", denied.len());
    for packet in denied {
        let drop = &packet["drop"];
        ensure!(drop["policy"] == "default/deny-all", "{packet:#}");
        ensure!(drop["culprits"][0]["rule"] == 0, "{packet:#}");
        ensure!(logged(packet).is_empty(), "{packet:#}");
    }
    for packet in going(&packets, "icmp", POD4) {
        ensure!(arrived(packet), "{packet:#}");
    }
    Ok(())
}
