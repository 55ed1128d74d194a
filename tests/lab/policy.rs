//! What nodes do to packets: policies, service translation, blackholes, missing routes.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use calitrace_tests::command;
use calitrace_tests::lab::netfilter::{Backend, Policy};
use calitrace_tests::lab::plan::SERVICE;
use calitrace_tests::{Lab, Options, wait_until};

/// Sends three echo requests to a pod and requires this many replies.
fn ping(lab: &Lab, to: &str, replies: u64) -> Result<()> {
    let ping = lab.ping("pod1", lab.pod(to)?.ip(), 3, &[])?;
    ensure!(
        (ping.sent, ping.received) == (3, replies),
        "to {to}:\n{}",
        ping.raw
    );
    Ok(())
}

/// Packets that matched the DROP rules of a chain on node 2.
fn dropped(lab: &Lab, tool: &str, chain: &str) -> Result<u64> {
    if tool == "nft" {
        return dropped_by_nftables(lab, &format!("filter-{chain}"));
    }
    let list = command::run(&mut lab.exec("minikube-m02", [tool, "-c", "-t", "filter"])?)?;
    let rules = command::text(&list);
    let rules = rules
        .lines()
        .filter(|line| line.contains(&format!("-A {chain} ")) && line.ends_with("-j DROP"));
    // `[PACKETS:BYTES] -A CHAIN …`
    Ok(rules
        .filter_map(|line| line[1..].split(':').next()?.parse::<u64>().ok())
        .sum())
}

fn dropped_by_nftables(lab: &Lab, chain: &str) -> Result<u64> {
    let list = ["nft", "list", "chain", "ip", "calico", chain];
    let list = command::run(&mut lab.exec("minikube-m02", list)?)?;
    let rules = command::text(&list);
    // `… counter packets PACKETS bytes BYTES drop comment "…"`
    let packets = rules.lines().filter_map(|line| {
        let (_, counted) = line.split_once("counter packets ")?;
        let mut words = counted.split(' ');
        let packets: u64 = words.next()?.parse().ok()?;
        (words.nth(2)? == "drop").then_some(packets)
    });
    Ok(packets.sum())
}

fn drops(netfilter: Backend, tool: &str) -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter,
        ..Options::default()
    })?;
    ping(&lab, "pod2", 3)?;
    lab.set_policy("pod2", Policy::Deny)?;
    ping(&lab, "pod2", 0)?;
    ping(&lab, "pod4", 3)?;
    ensure!(dropped(&lab, tool, "cali-pi-np/default/deny-all")? == 3);
    lab.set_policy("pod2", Policy::EndOfTier)?;
    ping(&lab, "pod2", 0)?;
    ensure!(dropped(&lab, tool, "cali-tw-cali79f33e4263e")? == 3);
    lab.set_policy("pod2", Policy::Allow)?;
    ping(&lab, "pod2", 3)
}

pub(crate) fn deny_and_end_of_tier() -> Result<()> {
    drops(Backend::Legacy, "iptables-legacy-save")
}

pub(crate) fn nft() -> Result<()> {
    drops(Backend::Nft, "iptables-nft-save")
}

pub(crate) fn nftables_mode() -> Result<()> {
    drops(Backend::Native, "nft")
}

pub(crate) fn blackhole() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    for node in lab.nodes() {
        let ping = lab.ping("pod1", IpAddr::V4(node.unused_address), 2, &[])?;
        // A blackhole is silent: neither a reply nor an ICMP error.
        ensure!(ping.received == 0 && !ping.raw.contains("error"), "{}", ping.raw);
    }
    Ok(())
}

pub(crate) fn service(netfilter: Backend) -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter,
        ..Options::default()
    })?;
    let server = lab.http_server("pod2", 8080)?;
    for (client, size) in [("pod1", 100_000), ("pod3", 1), ("pod4", 20)] {
        lab.http_get(client, SocketAddr::from((SERVICE, 80)), size)?;
    }
    let curl = [
        "curl",
        "-sS",
        "-o",
        "/dev/null",
        "-w",
        "%{size_download}",
        "http://10.96.0.10/12345",
    ];
    let said = command::text(&command::run(&mut lab.exec("pod1", curl)?)?);
    ensure!(said == "12345", "curl downloaded {said} bytes");
    let mut clients: Vec<String> = server
        .stop()?
        .iter()
        .map(|transfer| transfer.peer.ip().to_canonical().to_string())
        .collect();
    clients.sort();
    // Translated to the pod, and by nobody to another sender.
    ensure!(
        clients
            == [
                "10.244.120.67",
                "10.244.120.67",
                "10.244.120.68",
                "10.244.205.194"
            ],
        "{clients:?}"
    );

    let server = lab.udp_server("pod2", 5353, true)?;
    let counts = lab.udp_exchange("pod1", SocketAddr::from((SERVICE, 53)), 5, 100)?;
    ensure!((counts.sent, counts.received) == (5, 5), "{counts:?}");
    ensure!(server.stop()?.received == 5);
    Ok(())
}

pub(crate) fn no_default_route() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    lab.delete_default_route("minikube")?;
    // Nobody answers for 169.254.1.1 now.
    ping(&lab, "pod2", 0)?;
    lab.restore_default_route("minikube")?;
    // The pod asks again for the gateway a second after it last did.
    wait_until("answers over the restored route", || {
        Ok(ping(&lab, "pod2", 3).ok())
    })
}
