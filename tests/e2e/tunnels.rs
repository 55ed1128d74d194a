//! What tunnels do to packets: outer headers beside those that `tcpdump` captured, and drops beyond a tunnel.

use std::{collections::BTreeMap, fs, net::Ipv4Addr, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Encapsulation, Lab, Options, Policy};
use serde_json::Value;

use crate::{
    Test,
    support::{IPIP, WIREGUARD, Watch, goes, quiet, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("outer_headers_of_vxlan_are_what_tcpdump_captured", || {
        outer_headers(Encapsulation::Vxlan)
    }),
    test("outer_headers_of_tunl0_are_what_tcpdump_captured", || {
        outer_headers(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("drops_beyond_tunl0_have_place_and_reason", || {
        drops(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("drops_beyond_wireguard_have_place_and_reason", || {
        drops(Encapsulation::Wireguard)
    })
    .needs(WIREGUARD),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";

/// Source, destination, TTL, identification and total length of an outer header.
type Outer = (Ipv4Addr, Ipv4Addr, u8, u16, u16);

/// Every outer header of both directions, at the uplink of the first node: as often in traces as in the capture.
fn outer_headers(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    lab.offloads(false)?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let file = folder.path().join("eth0.pcap");
    let filter = match encapsulation {
        Encapsulation::Vxlan => "udp port 4789",
        _ => "ip proto 4",
    };
    let two = lab.pod("pod2")?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let capture = lab.tcpdump("minikube", "eth0", &file, filter)?;
    let mut sent = 0;
    for (ttl, size) in [("64", "56"), ("17", "900"), ("2", "10"), ("200", "1200")] {
        sent += lab.ping("pod1", two.ip(), 3, &["-t", ttl, "-s", size])?.sent;
    }
    let echo = lab.udp_server("pod2", 5353, true)?;
    sent += lab
        .udp_exchange("pod1", SocketAddr::from((two.address, 5353)), 10, 300)?
        .sent;
    echo.stop()?;
    capture.stop()?;
    let packets = watch.stop()?.packets()?;

    let mut traced: BTreeMap<Outer, usize> = BTreeMap::new();
    for packet in &packets {
        for seen in packet["observations"].as_array().context("observations")? {
            let uplink = ["uplink_ingress", "uplink_egress"]
                .map(Value::from)
                .contains(&seen["hook"]);
            if uplink && seen["node"] == "minikube" && seen["encap"].is_object() {
                *traced.entry(told(&seen["encap"])?).or_default() += 1;
            }
        }
    }
    let mut captured: BTreeMap<Outer, usize> = BTreeMap::new();
    for header in read(&file)? {
        *captured.entry(header).or_default() += 1;
    }
    let all: usize = captured.values().sum();
    // Each was answered, if only by an ICMP error of the second node.
    ensure!(all as u64 == 2 * sent, "{all} captured, {sent} sent");
    ensure!(
        traced == captured,
        "traced:\n{traced:?}\ncaptured by tcpdump:\n{captured:?}"
    );
    // tunl0 takes the inner TTL over, lowered by the node; VXLAN has its own.
    let ttls = |from: Ipv4Addr| {
        let mut ttls: Vec<u8> = captured.keys().filter(|h| h.0 == from).map(|h| h.2).collect();
        ttls.dedup();
        ttls.sort_unstable();
        ttls.dedup();
        ttls
    };
    let expected: &[u8] = match encapsulation {
        Encapsulation::Vxlan => &[64],
        _ => &[1, 16, 63, 199],
    };
    let from = lab.node("minikube")?.address;
    ensure!(
        ttls(from) == expected,
        "TTLs {:?}, expected {expected:?}",
        ttls(from)
    );
    Ok(())
}

fn told(encap: &Value) -> Result<Outer> {
    let address = |name: &str| -> Result<Ipv4Addr> {
        let text = encap[name]
            .as_str()
            .with_context(|| format!("{name} in {encap:#}"))?;
        text.parse().with_context(|| format!("{name} in {encap:#}"))
    };
    let number = |name: &str| {
        let number = encap[name].as_u64();
        number.with_context(|| format!("{name} in {encap:#}"))
    };
    Ok((
        address("src")?,
        address("dst")?,
        u8::try_from(number("ttl")?)?,
        u16::try_from(number("id")?)?,
        u16::try_from(number("length")?)?,
    ))
}

/// The IPv4 headers of a capture's Ethernet frames (pcap(5): savefile-format, byte order of the machine).
fn read(file: &Path) -> Result<Vec<Outer>> {
    let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    ensure!(
        bytes.get(20..24) == Some(&1_u32.to_ne_bytes()),
        "{} is no capture of Ethernet frames",
        file.display()
    );
    let mut headers = Vec::new();
    let mut rest = &bytes[24..];
    while rest.len() > 16 {
        let length = u32::from_ne_bytes(rest[8..12].try_into()?) as usize;
        let frame = rest.get(16..16 + length).context("a whole frame")?;
        let ip = frame.get(14..34).context("a whole IPv4 header")?;
        let word = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
        let address = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
        headers.push((address(12), address(16), ip[8], word(4), word(2)));
        rest = &rest[16 + length..];
    }
    Ok(headers)
}

/// A policy, an unused address, a TTL that runs out: each on the second node, behind the tunnel.
fn drops(encapsulation: Encapsulation) -> Result<()> {
    let device = encapsulation.device().context("a tunnel device")?;
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    let unused = lab.node("minikube-m02")?.unused_address;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    lab.ping("pod1", POD2.parse()?, 3, &[])?;
    lab.ping("pod1", POD2.parse()?, 2, &["-t", "2"])?;
    lab.ping("pod1", unused.into(), 2, &[])?;
    // What was sent before must not meet the policy.
    watch.until("the traces before the policy", |watch| {
        watch
            .packets()
            .iter()
            .filter(|packet| packet["flow"]["src"] == POD1)
            .count()
            >= 7
    })?;
    lab.set_policy("pod2", Policy::Deny)?;
    lab.ping("pod1", POD2.parse()?, 4, &[])?;
    let packets = watch.stop()?.packets()?;
    let of = |verdict: &str, to: &str| -> Vec<&Value> {
        let wanted = |packet: &&Value| goes(packet, "icmp", POD1, to) && packet["verdict"] == verdict;
        packets.iter().filter(wanted).collect()
    };
    let counts = [
        of("delivered", POD2).len(),
        of("expired", POD2).len(),
        of("dropped", POD2).len(),
        of("dropped", &unused.to_string()).len(),
    ];
    ensure!(counts == [3, 2, 4, 2], "verdicts {counts:?} of {packets:#?}");
    for packet in of("expired", POD2) {
        ensure!(packet["drop"]["location"] == "ip_forward", "{packet:#}");
        ensure!(packet["answer"]["address"] == "10.244.205.192", "{packet:#}");
    }
    let denied = of("dropped", POD2);
    let blackholed = of("dropped", &unused.to_string());
    for (packets, locations, reason) in [
        (
            denied,
            &["nf_hook_slow", "nft_do_chain"][..],
            Some("NETFILTER_DROP"),
        ),
        (blackholed, &["ip_error"], None),
    ] {
        for packet in packets {
            let drop = &packet["drop"];
            ensure!(
                drop["node"] == "minikube-m02" && drop["interface"] == device,
                "{packet:#}"
            );
            let location = drop["location"].as_str().context("a location")?;
            ensure!(locations.contains(&location), "{packet:#}");
            // Kernels before 5.17 give no reason.
            let said = drop["reason"].as_str();
            ensure!(said.is_none() || reason.is_none() || said == reason, "{packet:#}");
        }
    }
    Ok(())
}
