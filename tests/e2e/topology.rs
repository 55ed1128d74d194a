//! `topology` beside `ip`.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{DeviceOrder, Lab, Need, Options, lab::netfilter::Backend, traffic::traceroute::Kind};
use serde_json::{Value, json};

use crate::{
    Test,
    support::{change_nftables, change_rules, run, with},
    test,
    traced::lab_with,
};

pub(crate) const TESTS: &[Test] = &[
    test("topology_says_what_ip_says", topology_is_ip),
    test("topology_expects_the_path_that_traceroute_prints", expected_path),
    test("topology_tells_the_dataplane", dataplane).needs(&[Need::Program("nft")]),
];

/// By the rules that are there, or the devices; and none where there are only others' rules.
fn dataplane() -> Result<()> {
    let told = |lab: &Lab| -> Result<Vec<Value>> {
        let finished = run(&with(lab, &["topology", "-o", "json"]))?;
        ensure!(finished.status.success(), "{}", finished.stderr);
        let topology: Value = serde_json::from_str(&finished.stdout).context("topology's JSON")?;
        let nodes = topology["nodes"].as_array().context("nodes")?;
        for node in nodes {
            let hides = node["not_seen"].as_array().context("what is not seen")?;
            ensure!(
                hides.iter().any(|what| what
                    .as_str()
                    .is_some_and(|what| what.contains("VXLAN's outer header"))),
                "{node:#}"
            );
        }
        Ok(nodes.iter().map(|node| node["dataplane"].clone()).collect())
    };
    for (netfilter, name) in [
        (Backend::Legacy, "iptables"),
        (Backend::Nft, "iptables"),
        (Backend::Native, "nftables"),
    ] {
        let lab = lab_with(netfilter)?;
        ensure!(told(&lab)? == [name, name], "{netfilter:?}");
        // On the second node there is nothing left of Felix, on the first one there is its eBPF dataplane's device.
        match netfilter {
            Backend::Legacy => change_rules(&lab, "minikube-m02", "*filter\n-F\n-X\nCOMMIT\n")?,
            Backend::Nft | Backend::Native => change_nftables(&lab, "minikube-m02", "flush ruleset\n")?,
            Backend::Any => {}
        }
        lab.namespace("minikube")?
            .ip("link add bpfin.cali type veth peer name bpfout.cali\n")?;
        ensure!(told(&lab)? == [json!("ebpf"), Value::Null], "{netfilter:?}");
    }
    Ok(())
}

fn topology_is_ip() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let finished = run(&with(&lab, &["topology", "-o", "json"]))?;
    ensure!(finished.status.success(), "{}", finished.stderr);
    let topology: Value = serde_json::from_str(&finished.stdout).context("topology's JSON")?;
    for node in lab.nodes() {
        let ours = topology["nodes"]
            .as_array()
            .and_then(|nodes| nodes.iter().find(|known| known["name"] == node.name.as_str()))
            .with_context(|| format!("{} in {topology:#}", node.name))?;
        let links = ip(&lab, &node.name, &["-d", "link"])?;
        let addresses = ip(&lab, &node.name, &["address"])?;
        for device in ours["devices"].as_array().context("devices")? {
            let name = device["name"].as_str().context("a name")?;
            let link = named(&links, name).with_context(|| format!("{name} in ip link"))?;
            ensure!(
                device["ifindex"] == link["ifindex"] && device["mtu"] == link["mtu"],
                "{device:#}\n{link:#}"
            );
            let mut theirs: Vec<String> = named(&addresses, name)
                .and_then(|link| link["addr_info"].as_array())
                .into_iter()
                .flatten()
                .filter_map(|address| {
                    Some(format!("{}/{}", address["local"].as_str()?, address["prefixlen"]))
                })
                .collect();
            theirs.sort_unstable();
            let mut mine: Vec<&str> = device["addresses"]
                .as_array()
                .context("addresses")?
                .iter()
                .filter_map(Value::as_str)
                .collect();
            mine.sort_unstable();
            ensure!(mine == theirs, "{name}: {mine:?}, ip says {theirs:?}");
        }
        let routes = ip(&lab, &node.name, &["-4", "route"])?;
        for route in routes.as_array().context("routes")? {
            let wanted = route["dst"].as_str().context("dst")?;
            if route["protocol"] == "kernel" {
                continue;
            }
            let wanted = match wanted {
                "default" => "0.0.0.0/0".to_owned(),
                single if !single.contains('/') => format!("{single}/32"),
                prefix => prefix.to_owned(),
            };
            let found = ours["routes"]
                .as_array()
                .and_then(|ours| ours.iter().find(|ours| ours["prefix"] == wanted.as_str()))
                .with_context(|| format!("{wanted} in {:#}", ours["routes"]))?;
            ensure!(
                found["gateway"].as_str() == route["gateway"].as_str()
                    && found["device"].as_str() == route["dev"].as_str(),
                "{found:#}\n{route:#}"
            );
        }
        let block = node.block.to_string();
        let blocks = ours["local_blocks"].as_array().context("local blocks")?;
        ensure!(
            blocks.iter().any(|known| *known == block.as_str()),
            "{block} in {blocks:?}"
        );
        for pod in lab.pods().iter().filter(|pod| pod.node == node.name) {
            let known = ours["pods"]
                .as_array()
                .and_then(|pods| {
                    pods.iter()
                        .find(|known| known["name"] == pod.full_name().as_str())
                })
                .with_context(|| format!("{} in {:#}", pod.full_name(), ours["pods"]))?;
            ensure!(known["interface"] == pod.interface.as_str(), "{known:#}");
            ensure!(
                known["addresses"]
                    .as_array()
                    .is_some_and(|all| all.contains(&pod.address.to_string().into())),
                "{known:#}"
            );
        }
    }
    Ok(())
}

fn ip(lab: &Lab, node: &str, words: &[&str]) -> Result<Value> {
    let output = lab
        .exec(node, [&["ip", "-j"], words].concat())?
        .output()
        .context("run ip")?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("ip -j {words:?}"))
}

fn named<'a>(list: &'a Value, name: &str) -> Option<&'a Value> {
    list.as_array()?.iter().find(|link| link["ifname"] == name)
}

fn expected_path() -> Result<()> {
    for order in [DeviceOrder::TunnelFirst, DeviceOrder::UplinkFirst] {
        let lab = Lab::up(&Options {
            order,
            ..Options::default()
        })?;
        let finished = run(&with(&lab, &["topology", "-o", "json"]))?;
        let topology: Value = serde_json::from_str(&finished.stdout).context("topology's JSON")?;
        for (from, to) in [("pod1", "pod2"), ("pod2", "pod1"), ("pod1", "pod3")] {
            let (from_pod, to_pod) = (lab.pod(from)?, lab.pod(to)?);
            let said = lab.traceroute(from, to_pod.ip(), Kind::Udp, &[])?.path();
            let path = topology["paths"]
                .as_array()
                .and_then(|paths| {
                    paths.iter().find(|path| {
                        path["from"]["pod"] == from_pod.full_name().as_str()
                            && path["to"]["pod"] == to_pod.full_name().as_str()
                    })
                })
                .with_context(|| format!("{from} to {to} in {:#}", topology["paths"]))?;
            let ours: Vec<&str> = path["hops"]
                .as_array()
                .context("hops")?
                .iter()
                .map(|hop| hop["address"].as_str().unwrap_or("*"))
                .collect();
            ensure!(
                ours == said,
                "{order:?} {from} to {to}: {ours:?}, traceroute {said:?}"
            );
        }
    }
    Ok(())
}
