//! Path-MTU discovery, and `mtr` beside it: what the tools print is what the traces say.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Encapsulation, Lab, Need, Options, command, lab::UNDERLAY};
use serde_json::Value;

use crate::{
    Test,
    support::{IPIP, Watch, at_interfaces, goes, quiet, was_received, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("mtr_prints_the_hops_of_the_traces", || mtr(Encapsulation::Vxlan)).needs(&[Need::Program("mtr")]),
    test("mtr_over_tunl0_prints_the_hops_of_the_traces", || {
        mtr(Encapsulation::Ipip)
    })
    .needs(&[Need::Program("mtr"), Need::Encapsulation(Encapsulation::Ipip)]),
    test("path_mtu_discovery_across_vxlan", || {
        discovery(Encapsulation::Vxlan)
    }),
    test("path_mtu_discovery_across_tunl0", || {
        discovery(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("path_mtu_discovery_over_ipv6", discovery_v6),
    test("jumbo_frames_over_vxlan", || jumbo(Encapsulation::Vxlan)),
    test("jumbo_frames_over_tunl0", || jumbo(Encapsulation::Ipip)).needs(IPIP),
    test("tracepath_finds_the_mtu_of_the_traces", tracepath).needs(&[Need::Program("tracepath")]),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";

/// With ICMP, UDP and TCP: of each line as many probes, with the same TTL, answered from the same address.
fn mtr(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    for (proto, extra) in [("icmp", &[][..]), ("udp", &["-u"]), ("tcp", &["-T", "-P", "9"])] {
        let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", proto, "--from", POD1]))?;
        let said = lab.mtr("pod1", POD2.parse()?, extra)?;
        let packets = watch.stop()?.packets()?;
        let addresses: Vec<Option<String>> = said
            .hops
            .iter()
            .map(|hop| hop.address.map(|address| address.to_string()))
            .collect();
        let expected = ["10.244.120.64", "10.244.205.192", POD2].map(|address| Some(address.to_owned()));
        ensure!(addresses == expected, "{proto}: {}", said.raw);
        for (hop, address) in said.hops.iter().zip(expected) {
            let probes: Vec<&Value> = packets
                .iter()
                .filter(|packet| goes(packet, proto, POD1, POD2) && packet["ttl"] == hop.ttl)
                .collect();
            ensure!(
                probes.len() as u64 == hop.sent && hop.loss == 0.0,
                "{} probes with TTL {}: {}",
                probes.len(),
                hop.ttl,
                said.raw
            );
            for probe in probes {
                ensure!(
                    probe["answer"]["address"].as_str() == address.as_deref(),
                    "{}\n{probe:#}",
                    said.raw
                );
            }
        }
    }
    Ok(())
}

/// Gives pods and their interfaces an MTU beyond the tunnel's, as a Calico node has whose `mtu` setting is wrong.
fn enlarge(lab: &Lab, pods: &[&str]) -> Result<()> {
    for id in pods {
        let pod = lab.pod(id)?;
        lab.namespace(&pod.node)?
            .ip(&format!("link set {} mtu 1500\n", pod.interface))?;
        lab.namespace(id)?.ip("link set eth0 mtu 1500\n")?;
    }
    Ok(())
}

/// The MTU that the kernel of a part of the lab has learned for a destination.
fn learned(lab: &Lab, part: &str, to: &str) -> Result<Option<u64>> {
    let said = command::run(&mut lab.exec(part, ["ip", "route", "get", to])?)?;
    let said = command::text(&said);
    let mut words = said.split_whitespace();
    Ok(words
        .find(|word| *word == "mtu")
        .and_then(|_| words.next())
        .and_then(|mtu| mtu.parse().ok()))
}

/// The traces between two addresses that an answer with this MTU came to, and the others.
fn by_answer<'a>(
    packets: &'a [Value],
    (proto, from, to): (&str, &str, &str),
    mtu: u16,
) -> (Vec<&'a Value>, Vec<&'a Value>) {
    packets
        .iter()
        .filter(|packet| goes(packet, proto, from, to))
        .partition(|packet| packet["answer"]["mtu"] == mtu)
}

/// A packet that is larger than the tunnel takes has the first node's answer, which the sender learns from; then what
/// is smaller arrives.
fn discovery(encapsulation: Encapsulation) -> Result<()> {
    let mtu = encapsulation.mtu();
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    lab.offloads(false)?;
    enlarge(&lab, &["pod1", "pod2", "pod3"])?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let text = Watch::start(&with(&lab, &[]))?;
    // ping itself sends no second one: its kernel knows by then.
    let ping = lab.ping("pod3", POD2.parse()?, 2, &["-M", "do", "-s", "1472"])?;
    ensure!(ping.raw.contains(&format!("mtu = {mtu}")), "{}", ping.raw);
    let fits = (mtu - 28).to_string();
    let ping = lab.ping("pod3", POD2.parse()?, 3, &["-M", "do", "-s", &fits])?;
    ensure!(ping.received == 3, "{}", ping.raw);
    // TCP takes it up and sends again.
    let server = lab.http_server("pod1", 8080)?;
    lab.http_get("pod2", format!("{POD1}:8080").parse()?, 50_000)?;
    server.stop()?;
    for pod in ["pod3", "pod1"] {
        let learned = learned(&lab, pod, POD2)?;
        ensure!(learned == Some(mtu.into()), "{pod} learned {learned:?}");
    }
    let packets = watch.stop()?.packets()?;
    let text = text.stop()?.stdout;
    let pod3 = lab.pod("pod3")?.address.to_string();
    let (told, arrived) = by_answer(&packets, ("icmp", &pod3, POD2), mtu);
    ensure!(
        told.len() == 1 && arrived.len() == 3,
        "{} were too large, {} not: {packets:#?}",
        told.len(),
        arrived.len()
    );
    too_large(told[0], "10.244.120.64", [3, 4], 1500)?;
    for packet in arrived {
        ensure!(
            packet["verdict"] == "delivered" && packet["length"] == mtu,
            "{packet:#}"
        );
    }
    let (told, arrived) = by_answer(&packets, ("tcp", POD1, POD2), mtu);
    ensure!(!told.is_empty(), "TCP was told nothing: {packets:#?}");
    for packet in told {
        too_large(packet, "10.244.120.64", [3, 4], 1500)?;
    }
    for packet in arrived {
        ensure!(
            was_received(packet) && packet["length"].as_u64() <= Some(mtu.into()),
            "{packet:#}"
        );
    }
    let device = encapsulation.device().context("a tunnel device")?;
    let sentence = format!(
        "✗ rejected on node minikube before {device}: 1500 bytes with DF exceed the MTU of {mtu}; 10.244.120.64 sent ICMP \
         fragmentation needed to 10.244.120.68"
    );
    ensure!(text.lines().any(|line| line.trim() == sentence), "{text}");
    Ok(())
}

/// Whether a trace says that a router found its packet too large, and which.
fn too_large(packet: &Value, router: &str, icmp: [u8; 2], length: u16) -> Result<()> {
    let answer = &packet["answer"];
    ensure!(
        packet["verdict"] == "rejected"
            && answer["kind"] == "unreachable"
            && answer["icmp"] == Value::from(icmp.to_vec())
            && answer["address"] == router
            && packet["length"] == length,
        "{packet:#}"
    );
    let hops = packet["hops"].as_array().context("hops")?;
    ensure!(
        hops.len() == 1 && hops[0]["address"] == router && hops[0]["certainty"] == "observed",
        "it got to the router: {packet:#}"
    );
    Ok(())
}

/// IPv6 is not encapsulated here: the uplink takes less than the pods.
fn discovery_v6() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    lab.namespace("minikube")?.ip("link set eth0 mtu 1400\n")?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let (from, to) = (one.address_v6.to_string(), two.address_v6.to_string());
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "icmpv6"]))?;
    // 1450 bytes: what the pods' interfaces take.
    let ping = lab.ping("pod1", two.address_v6.into(), 2, &["-M", "do", "-s", "1402"])?;
    ensure!(ping.raw.contains("mtu=1400"), "{}", ping.raw);
    let ping = lab.ping("pod1", two.address_v6.into(), 3, &["-M", "do", "-s", "1352"])?;
    ensure!(ping.received == 3, "{}", ping.raw);
    let learned = learned(&lab, "pod1", &to)?;
    ensure!(learned == Some(1400), "learned {learned:?}");
    let packets = watch.stop()?.packets()?;
    let (told, arrived) = by_answer(&packets, ("icmpv6", &from, &to), 1400);
    ensure!(told.len() == 1 && arrived.len() == 3, "{packets:#?}");
    let router = told[0]["hops"][0]["address"]
        .as_str()
        .context("the router's address")?;
    ensure!(ping_router(&lab)? == router, "{:#}", told[0]);
    too_large(told[0], router, [2, 0], 1450)?;
    for packet in arrived {
        ensure!(
            packet["verdict"] == "delivered" && packet["length"] == 1400,
            "{packet:#}"
        );
    }
    Ok(())
}

/// Lets everything have frames of 9000 bytes, less for the tunnel and the pods by what it adds.
fn widen(lab: &Lab, encapsulation: Encapsulation) -> Result<()> {
    const WIDE: u16 = 9000;
    let inner = WIDE - (1500 - encapsulation.mtu());
    for node in lab.nodes() {
        lab.namespace(UNDERLAY)?
            .ip(&format!("link set {} mtu {WIDE}\n", node.name))?;
        let tunnel = encapsulation.device().map(|device| (device, inner));
        for (device, mtu) in tunnel.into_iter().chain([("eth0", WIDE)]) {
            lab.namespace(&node.name)?
                .ip(&format!("link set {device} mtu {mtu}\n"))?;
        }
    }
    for pod in lab.pods() {
        lab.namespace(&pod.node)?
            .ip(&format!("link set {} mtu {inner}\n", pod.interface))?;
        lab.namespace(&pod.id)?
            .ip(&format!("link set eth0 mtu {inner}\n"))?;
    }
    Ok(())
}

/// What no ordinary frame would hold is one packet, from pod to pod and on the wire.
fn jumbo(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    lab.offloads(false)?;
    widen(&lab, encapsulation)?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let ping = lab.ping("pod1", POD2.parse()?, 3, &["-s", "8000", "-M", "do"])?;
    ensure!(ping.received == 3, "{}", ping.raw);
    let packets = watch.stop()?.packets()?;
    for (from, to) in [(POD1, POD2), (POD2, POD1)] {
        let echoes: Vec<&Value> = packets
            .iter()
            .filter(|packet| goes(packet, "icmp", from, to))
            .collect();
        ensure!(echoes.len() == 3, "{packets:#?}");
        for echo in echoes {
            ensure!(
                echo["verdict"] == "delivered" && echo["length"] == 8028,
                "{echo:#}"
            );
            let outer: Vec<u64> = at_interfaces(echo)
                .filter_map(|seen| seen["encap"]["length"].as_u64())
                .collect();
            let wrapped = 8028 + u64::from(1500 - encapsulation.mtu());
            ensure!(outer == [wrapped; 2], "{outer:?}: {echo:#}");
        }
    }
    Ok(())
}

/// The address under which the first node answers IPv6 probes.
fn ping_router(lab: &Lab) -> Result<String> {
    let to = lab.pod("pod2")?.address_v6.into();
    let trace = lab.traceroute(
        "pod1",
        to,
        calitrace_tests::traffic::traceroute::Kind::Icmp,
        &["-m", "1"],
    )?;
    trace.path().first().cloned().context("a hop")
}

/// `tracepath` prints who answered each TTL, and the MTU where it changes.
fn tracepath() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    enlarge(&lab, &["pod1"])?;
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "udp", "--from", POD1]))?;
    let said = command::run(&mut lab.exec("pod1", ["tracepath", "-n", POD2])?)?;
    let said = command::text(&said);
    let packets = watch.stop()?.packets()?;
    // ` 1:  10.244.120.64  0.052ms pmtu 1450`; with a question mark, it is what the pod itself knows.
    let mut printed = Vec::new();
    for line in said.lines() {
        let Some((ttl, rest)) = line.split_once(':') else {
            continue;
        };
        let Ok(ttl) = ttl.trim().parse::<u64>() else {
            continue;
        };
        let mut words = rest.split_whitespace();
        let address = words.next().context("an address")?.to_owned();
        let mtu = words.find(|word| *word == "pmtu").and_then(|_| words.next());
        printed.push((ttl, address, mtu.map(str::parse).transpose()?));
    }
    let mut traced: Vec<(u64, String, Option<u64>)> = packets
        .iter()
        .filter_map(|packet| {
            let answer = &packet["answer"];
            let address = answer["address"].as_str()?.to_owned();
            Some((packet["ttl"].as_u64()?, address, answer["mtu"].as_u64()))
        })
        .collect();
    printed.sort();
    traced.sort();
    let told = printed.iter().any(|(_, _, mtu)| *mtu == Some(1450));
    ensure!(
        told && printed == traced && packets.len() == traced.len(),
        "{said}\n{packets:#?}"
    );
    Ok(())
}
