//! Functions of the kernel in a trace: between the interfaces, in order, and without changing what is said of the packet.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Encapsulation, Lab, Need, Options, Policy, Test, test};
use serde_json::Value;

use crate::support::{Watch, arrived, goes, path, quiet, with};

pub(crate) const TESTS: &[Test] = &[
    test("functions_are_seen_between_interfaces_vxlan", || {
        between_interfaces(Encapsulation::Vxlan)
    })
    .needs(&[Need::Kprobes]),
    test("functions_are_seen_between_interfaces_ipip", || {
        between_interfaces(Encapsulation::Ipip)
    })
    .needs(&[Need::Kprobes, Need::Encapsulation(Encapsulation::Ipip)]),
    test("a_drop_names_its_netfilter_hook", netfilter).needs(&[Need::Kprobes]),
    test("the_kernel_s_icmp_error_is_told_at_the_packet", icmp).needs(&[Need::Kprobes]),
    test("a_translation_of_no_service_is_one_trace", translation).needs(&[Need::Kprobes]),
    test("hooks_tc_leaves_functions_out", only_tc),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";

/// The packets from pod 1 to `to` with this protocol that were traced while `traffic` ran.
fn traced(
    lab: &Lab,
    more: &[&str],
    (proto, to): (&str, &str),
    traffic: impl FnOnce(&Lab) -> Result<()>,
) -> Result<Vec<Value>> {
    let watch = Watch::start(&with(lab, &[&["-o", "json"], more].concat()))?;
    traffic(lab)?;
    let finished = watch.stop()?;
    let found: Vec<Value> = finished
        .packets()?
        .into_iter()
        .filter(|packet| goes(packet, proto, POD1, to))
        .collect();
    ensure!(!found.is_empty(), "nothing was traced: {finished:?}");
    Ok(found)
}

fn observations(packet: &Value) -> &[Value] {
    packet["observations"].as_array().map_or(&[], Vec::as_slice)
}

/// Node and hook of each observation.
fn hooks(packet: &Value) -> String {
    observations(packet).iter().fold(String::new(), |mut all, seen| {
        let (node, hook) = (seen["node"].as_str(), seen["hook"].as_str());
        // Writing to a string does not fail.
        let _ = writeln!(all, "{} {}", node.unwrap_or("-"), hook.unwrap_or("-"));
        all
    })
}

fn between_interfaces(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    let (wraps, unwraps): (&[&str], &str) = match encapsulation {
        Encapsulation::Vxlan => (&["vxlan_xmit", "iptunnel_xmit"], "vxlan_rcv"),
        _ => (&["iptunnel_xmit"], "ip_tunnel_rcv"),
    };
    let mut expected: Vec<(&str, &str)> = vec![
        ("minikube", "workload_ingress"),
        ("minikube", "ip_forward"),
        ("minikube", "tunnel_egress"),
    ];
    expected.extend(wraps.iter().map(|hook| ("minikube", *hook)));
    expected.extend([
        ("minikube", "uplink_egress"),
        ("minikube-m02", "uplink_ingress"),
        ("minikube-m02", unwraps),
        ("minikube-m02", "tunnel_ingress"),
        ("minikube-m02", "ip_forward"),
        ("minikube-m02", "workload_egress"),
    ]);
    let found = traced(&lab, &[], ("icmp", POD2), |lab| {
        lab.ping("pod1", POD2.parse()?, 5, &[]).map(drop)
    })?;
    for packet in &found {
        ensure!(arrived(packet), "{packet:#}");
        ensure!(
            path(packet) == ["10.244.120.64", "10.244.205.192", POD2],
            "{packet:#}"
        );
        // Copies of the buffer or of its descriptor may come anywhere.
        let seen: Vec<(&str, &str)> = observations(packet)
            .iter()
            .filter_map(|seen| Some((seen["node"].as_str()?, seen["hook"].as_str()?)))
            .filter(|(_, hook)| !["skb_clone", "pskb_expand_head"].contains(hook))
            .collect();
        ensure!(seen == expected, "{}", hooks(packet));
        // The TTL is still as it came where the node forwards.
        let forwarded: Vec<&Value> = observations(packet)
            .iter()
            .filter(|seen| seen["hook"] == "ip_forward")
            .map(|seen| &seen["ttl"])
            .collect();
        ensure!(forwarded == [64, 63], "{packet:#}");
        outer_headers(packet, encapsulation)?;
    }
    Ok(())
}

/// The header that the tunnel said it makes is the one that left the uplink.
fn outer_headers(packet: &Value, encapsulation: Encapsulation) -> Result<()> {
    let of = |hook: &str| {
        observations(packet)
            .iter()
            .find(|seen| seen["hook"] == hook)
            .map(|seen| &seen["encap"])
            .with_context(|| format!("no {hook}: {packet:#}"))
    };
    let (made, left) = (of("iptunnel_xmit")?, of("uplink_egress")?);
    for field in ["kind", "src", "dst", "ttl", "vni"] {
        ensure!(made[field] == left[field], "{field}: {made} {left}");
    }
    let kind = if encapsulation == Encapsulation::Ipip {
        "ipip"
    } else {
        "vxlan"
    };
    ensure!(made["kind"] == kind, "{made}");
    ensure!(
        made["src"] == "192.168.49.2" && made["dst"] == "192.168.49.3",
        "{made}"
    );
    Ok(())
}

fn netfilter() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    lab.set_policy("pod2", Policy::Deny)?;
    let found = traced(&lab, &[], ("icmp", POD2), |lab| {
        lab.ping("pod1", POD2.parse()?, 3, &[]).map(drop)
    })?;
    for packet in found {
        ensure!(packet["verdict"] == "dropped", "{packet:#}");
        ensure!(packet["drop"]["netfilter"] == "FORWARD", "{packet:#}");
        let last = observations(&packet).last().context("observations")?;
        ensure!(last["hook"] == "nf_hook_slow", "{packet:#}");
        ensure!(last["detail"] == "netfilter FORWARD: dropped", "{packet:#}");
        ensure!(last["node"] == "minikube-m02", "{packet:#}");
    }
    Ok(())
}

/// Nobody sees the answer, for it is dropped on the way; that it was made is told all the same.
fn icmp() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    lab.block_time_exceeded(true)?;
    let found = traced(&lab, &[], ("icmp", POD2), |lab| {
        lab.ping("pod1", POD2.parse()?, 2, &["-t", "1"]).map(drop)
    })?;
    for packet in found {
        ensure!(packet["verdict"] == "expired", "{packet:#}");
        let told = observations(&packet)
            .iter()
            .find(|seen| seen["hook"] == "icmp_send")
            .with_context(|| hooks(&packet))?;
        ensure!(told["detail"] == "answered with ICMP type 11 code 0", "{told}");
        ensure!(told["node"] == "minikube", "{told}");
    }
    Ok(())
}

/// An address that no service range has is translated by a rule: what conntrack says of it is the evidence.
fn translation() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let address = "172.31.0.10";
    let rule =
        format!("-t nat -I PREROUTING -d {address} -p tcp --dport 80 -j DNAT --to-destination {POD2}:8080");
    let output = lab
        .exec("minikube", ["iptables"].into_iter().chain(rule.split(' ')))?
        .output()
        .context("run iptables")?;
    ensure!(output.status.success(), "{output:?}");
    let found = traced(&lab, &[], ("tcp", address), |lab| {
        let http = lab.http_server("pod2", 8080)?;
        lab.http_get("pod1", format!("{address}:80").parse()?, 1000)?;
        http.stop().map(drop)
    })?;
    for packet in &found {
        ensure!(arrived(packet), "{packet:#}");
        let step = &packet["nat"][0];
        ensure!(step["kind"] == "dnat", "{packet:#}");
        ensure!(
            step["from"]["address"] == address && step["to"]["address"] == POD2,
            "{packet:#}"
        );
    }
    Ok(())
}

fn only_tc() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let found = traced(&lab, &["--hooks", "tc"], ("icmp", POD2), |lab| {
        lab.ping("pod1", POD2.parse()?, 2, &[]).map(drop)
    })?;
    for packet in found {
        ensure!(arrived(&packet), "{packet:#}");
        ensure!(
            observations(&packet)
                .iter()
                .all(|seen| !seen["direction"].is_null()),
            "{}",
            hooks(&packet)
        );
    }
    Ok(())
}
