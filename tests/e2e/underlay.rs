//! Nodes in several subnets: routers between them, and Calico's `CrossSubnet`.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Encapsulation, Lab, Options, traffic::traceroute::Kind};
use serde_json::Value;

use crate::{
    Test,
    agree::one_traceroute,
    support::{IPIP, Watch, arrived, goes, only, path, quiet, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("a_router_between_the_nodes_is_no_hop_of_vxlan", || {
        behind_a_router(Encapsulation::Vxlan)
    }),
    test(
        "a_router_between_the_nodes_is_a_hop_without_encapsulation",
        || behind_a_router(Encapsulation::None),
    ),
    test("what_tunl0_swallows_has_its_reason", swallowed).needs(IPIP),
    test("cross_subnet_has_both_kinds_of_destination", || {
        cross_subnet(Encapsulation::Vxlan)
    }),
    test("cross_subnet_over_tunl0_has_both_kinds_of_destination", || {
        cross_subnet(Encapsulation::Ipip)
    })
    .needs(IPIP),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";
const POD5: &str = "10.244.33.129";

/// Traceroute and calitrace agree, in probes and in real traffic.
fn behind_a_router(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        routed: true,
        ..quiet()
    })?;
    one_traceroute(&lab, Kind::Icmp, "pod2", &[])?;
    let said = lab
        .traceroute("pod1", lab.pod("pod2")?.ip(), Kind::Icmp, &[])?
        .path();
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 3, &[])?;
    ensure!(ping.received == 3, "{ping:?}");
    let packets = watch.stop()?.packets()?;
    let requests: Vec<&Value> = packets
        .iter()
        .filter(|packet| goes(packet, "icmp", POD1, POD2))
        .collect();
    ensure!(requests.len() == 3, "{packets:#?}");
    for packet in requests {
        ensure!(arrived(packet), "{packet:#}");
        ensure!(
            path(packet) == said,
            "traceroute: {said:?}\ncalitrace: {packet:#}"
        );
    }
    Ok(())
}

/// The router between the nodes finds the TTL run out that `tunl0` took over, and ipip keeps its ICMP error to itself:
/// `*`, as traceroute prints it, and in the other views the reason. With both nodes observed, and with one alone.
fn swallowed() -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation: Encapsulation::Ipip,
        routed: true,
        ..quiet()
    })?;
    let reason = "the TTL ran out at underlay router 192.168.49.1; IPIP swallows that ICMP error";
    for kind in [Kind::Udp, Kind::Icmp] {
        one_traceroute(&lab, kind, "pod2", &["-w", "3"])?;
    }
    let to = lab.pod("pod2")?.ip();
    for nodes in [&[][..], &["minikube"]] {
        let watch_as = |format: &str| {
            let mut arguments = vec!["-o".to_owned(), format.to_owned()];
            arguments.extend(only(&lab, nodes));
            Watch::start(&arguments)
        };
        let (json, text) = (watch_as("json")?, watch_as("text")?);
        let said = lab.traceroute("pod1", to, Kind::Udp, &["-q", "1", "-w", "3"])?;
        ensure!(said.path() == ["10.244.120.64", "*", POD2], "{}", said.raw);
        let (json, text) = (json.stop()?.packets()?, text.stop()?.stdout);
        ensure!(
            text.lines()
                .any(|line| line.trim() == format!("no answer: {reason}")),
            "{text}"
        );
        let second: Vec<&Value> = json
            .iter()
            .filter(|packet| goes(packet, "udp", POD1, POD2) && packet["observations"][0]["ttl"] == 2)
            .collect();
        ensure!(second.len() == 1, "{json:#?}");
        let packet = second[0];
        ensure!(
            packet["verdict"] == "expired" && packet["answer"].is_null(),
            "{packet:#}"
        );
        let hops = packet["hops"].as_array().context("hops")?;
        ensure!(hops.len() == 2, "{packet:#}");
        ensure!(
            hops[1]["address"].is_null() && hops[1]["reason"] == reason && hops[1]["certainty"] == "observed",
            "{packet:#}"
        );
        ensure!(
            json.iter().all(|packet| packet["verdict"] != "lost"),
            "nothing is lost: {json:#?}"
        );
    }
    Ok(())
}

/// One node of the same subnet, reached as it is, and one of another, reached through the tunnel, at the same time.
fn cross_subnet(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        cross_subnet: true,
        ..quiet()
    })?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    for receiver in ["pod2", "pod5"] {
        let ping = lab.ping("pod1", lab.pod(receiver)?.ip(), 3, &[])?;
        ensure!(ping.received == 3, "{ping:?}");
    }
    let packets = watch.stop()?.packets()?;
    for (receiver, expected, carried) in [
        (POD2, ["10.244.120.64", "192.168.49.3", POD2], false),
        (POD5, ["10.244.120.64", "10.244.33.128", POD5], true),
    ] {
        let requests: Vec<&Value> = packets
            .iter()
            .filter(|packet| goes(packet, "icmp", POD1, receiver))
            .collect();
        ensure!(requests.len() == 3, "{receiver}: {packets:#?}");
        for packet in requests {
            ensure!(arrived(packet), "{packet:#}");
            ensure!(path(packet) == expected, "expected {expected:?}: {packet:#}");
            let mut seen = packet["observations"].as_array().into_iter().flatten();
            ensure!(
                seen.any(|seen| seen["encap"].is_object()) == carried,
                "carried {carried}: {packet:#}"
            );
        }
    }
    // What traceroute prints, `*` where ipip swallows.
    one_traceroute(&lab, Kind::Icmp, "pod2", &[])?;
    one_traceroute(&lab, Kind::Icmp, "pod5", &["-w", "3"])
}
