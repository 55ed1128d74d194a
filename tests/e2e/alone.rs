//! One node alone, the normal case on a real cluster: only what was seen is called seen.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Encapsulation, Lab, Options};
use serde_json::Value;

use crate::{
    Test,
    support::{IPIP, WIREGUARD, Watch, goes, only, path},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("one_node_alone_over_vxlan", || alone(Encapsulation::Vxlan)),
    test("one_node_alone_over_tunl0", || alone(Encapsulation::Ipip)).needs(IPIP),
    test("one_node_alone_over_wireguard", || {
        alone(Encapsulation::Wireguard)
    })
    .needs(WIREGUARD),
    test("one_node_alone_without_encapsulation", || {
        alone(Encapsulation::None)
    }),
];

/// What one node alone shows of a packet: the hops' addresses, which of them were seen, and the verdict.
struct Expected {
    path: [&'static str; 3],
    certainty: [&'static str; 3],
    verdict: &'static str,
}

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";
/// Sent from here: this node's hop was seen; beyond it is only what the routes say.
const SENT: [&str; 3] = ["observed", "inferred", "inferred"];
/// Arrived here: there was one router before, whose address this node does not know.
const ARRIVED: [&str; 3] = ["inferred", "observed", "observed"];

fn expected(encapsulation: Encapsulation, node: &str, to: &str) -> Expected {
    // What the other node's router shows to senders here, and this one's to those there.
    let beyond = |tunnel, node| match encapsulation {
        Encapsulation::Vxlan => tunnel,
        Encapsulation::None => node,
        // Neither a gateway tells it nor an answer has.
        Encapsulation::Ipip | Encapsulation::Wireguard => "*",
    };
    let here = |tunnel, node| match encapsulation {
        Encapsulation::None => node,
        _ => tunnel,
    };
    match (node, to) {
        ("minikube", POD2) => Expected {
            path: ["10.244.120.64", beyond("10.244.205.192", "192.168.49.3"), POD2],
            certainty: SENT,
            verdict: "left",
        },
        ("minikube", _) => Expected {
            path: ["*", here("10.244.120.64", "192.168.49.2"), POD1],
            certainty: ARRIVED,
            verdict: "delivered",
        },
        (_, POD2) => Expected {
            path: ["*", here("10.244.205.192", "192.168.49.3"), POD2],
            certainty: ARRIVED,
            verdict: "delivered",
        },
        _ => Expected {
            path: ["10.244.205.192", beyond("10.244.120.64", "192.168.49.2"), POD1],
            certainty: SENT,
            verdict: "left",
        },
    }
}

fn alone(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..Options::default()
    })?;
    for node in lab.nodes() {
        let mut arguments = vec!["-o".to_owned(), "json".to_owned()];
        arguments.extend(only(&lab, &[&node.name]));
        let watch = Watch::start(&arguments)?;
        let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 3, &[])?;
        let packets = watch.stop()?.packets()?;
        ensure!(ping.received == 3, "{ping:?}\n{packets:#?}");
        for (from, to) in [(POD1, POD2), (POD2, POD1)] {
            let seen: Vec<&Value> = packets
                .iter()
                .filter(|packet| goes(packet, "icmp", from, to))
                .collect();
            ensure!(
                seen.len() == 3,
                "{} packets from {from} to {to} on {}: {packets:#?}",
                seen.len(),
                node.name
            );
            for packet in seen {
                check(packet, &expected(encapsulation, &node.name, to))
                    .with_context(|| format!("{from} to {to} on {} alone: {packet:#}", node.name))?;
            }
        }
    }
    Ok(())
}

fn check(packet: &Value, expected: &Expected) -> Result<()> {
    let mut seen = path(packet);
    // Without the tunnel the first node's own address towards its pod is the first of its devices, in that order.
    if seen
        .first()
        .is_some_and(|first| first == "192.168.49.2" || first == "192.168.49.3")
    {
        let tunnel = expected.path[0];
        ensure!(tunnel != "*", "a hop that this node cannot know has an address");
        tunnel.clone_into(&mut seen[0]);
    }
    ensure!(
        seen == expected.path,
        "hops {seen:?}, expected {:?}",
        expected.path
    );
    let certainty: Vec<&str> = packet["hops"]
        .as_array()
        .context("hops")?
        .iter()
        .map(|hop| hop["certainty"].as_str().unwrap_or_default())
        .collect();
    ensure!(
        certainty == expected.certainty,
        "certainty {certainty:?}, expected {:?}",
        expected.certainty
    );
    ensure!(
        packet["verdict"] == expected.verdict,
        "verdict, expected {}",
        expected.verdict
    );
    Ok(())
}
