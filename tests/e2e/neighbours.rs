//! Packets that wait for a neighbour's address, or die of it; both families side by side; and what goes to a group.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Encapsulation, Lab, Options, command,
    needs::has_drop_reasons,
    traffic::{http::TcpCounts, traceroute::Kind},
    wait_until,
};
use serde_json::Value;

use crate::{
    Test,
    counts::{same, segments},
    support::{Watch, arrived, goes, path, quiet, was_received, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("a_next_hop_that_does_not_answer", next_hop),
    test("a_pod_that_does_not_answer", pod),
    test("a_packet_waits_for_its_neighbour", waits),
    test("pods_with_two_families_are_counted_alike", two_families),
    test("multicast_and_broadcast_end_at_the_node", multicast),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";

/// Lets a device of a node ask for a neighbour's address so many times, 100 ms each (by default it is thrice, a second
/// each).
fn ask(lab: &Lab, node: &str, device: &str, times: &'static str) -> Result<()> {
    let setting = |name: &str| format!("net/ipv4/neigh/{device}/{name}");
    lab.namespace(node)?.sysctls([
        (setting("retrans_time_ms"), "100"),
        (setting("mcast_solicit"), times),
        (setting("ucast_solicit"), "0"),
    ])
}

fn pings(packets: &[Value]) -> Vec<&Value> {
    packets
        .iter()
        .filter(|packet| goes(packet, "icmp", POD1, POD2))
        .collect()
}

/// Whether a trace says that this router gave up asking for a neighbour, at its place in the path.
fn unreachable(packet: &Value, node: &str, router: &str, ttl: u64) -> Result<()> {
    let (answer, drop) = (&packet["answer"], &packet["drop"]);
    ensure!(
        packet["verdict"] == "rejected"
            && answer["kind"] == "unreachable"
            && answer["icmp"] == Value::from(vec![3, 1])
            && answer["address"] == router,
        "{packet:#}"
    );
    ensure!(drop["node"] == node, "{packet:#}");
    if has_drop_reasons() {
        ensure!(drop["reason"] == "NEIGH_FAILED", "{packet:#}");
    }
    let last = packet["hops"]
        .as_array()
        .and_then(|hops| hops.last())
        .context("hops")?;
    ensure!(
        last["ttl"] == ttl && last["address"] == router && last["certainty"] == "observed",
        "{packet:#}"
    );
    Ok(())
}

/// Pod 1 pings pod 2, and this router answers for the neighbour that does not.
fn pinged_in_vain(lab: &Lab, node: &str, router: &str, ttl: u64) -> Result<()> {
    let watch = Watch::start(&with(lab, &["-o", "json"]))?;
    // Longer than the kernel asks for a neighbour.
    let ping = lab.ping("pod1", POD2.parse()?, 2, &["-W", "10"])?;
    ensure!(ping.raw.contains("Destination Host Unreachable"), "{}", ping.raw);
    let packets = watch.stop()?.packets()?;
    let pings = pings(&packets);
    ensure!(pings.len() == 2, "{packets:#?}");
    for packet in pings {
        unreachable(packet, node, router, ttl)?;
    }
    Ok(())
}

/// The way to the other node leads to a gateway that nobody is. Asking for it takes as long as it does by default.
fn next_hop() -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation: Encapsulation::None,
        ..quiet()
    })?;
    lab.namespace("minikube")?
        .ip("route replace 10.244.205.192/26 via 192.168.49.77 dev eth0\n")?;
    pinged_in_vain(&lab, "minikube", "192.168.49.2", 1)
}

/// Takes away what the second node knows of pod 2, which then answers as it is told.
fn forget_pod(lab: &Lab, times: &'static str) -> Result<()> {
    let pod = lab.pod("pod2")?;
    ask(lab, &pod.node, &pod.interface, times)?;
    lab.namespace("pod2")?.ip("link set eth0 arp off\n")?;
    lab.namespace(&pod.node)?
        .ip(&format!("neighbour del {POD2} dev {}\n", pod.interface))
}

/// A pod that hangs: its node asks for it in vain, behind the tunnel.
fn pod() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    forget_pod(&lab, "3")?;
    pinged_in_vain(&lab, "minikube-m02", "10.244.205.192", 2)
}

/// One that answers late: the packet is held at its node meanwhile, and its trace says so.
fn waits() -> Result<()> {
    const SILENT: Duration = Duration::from_millis(500);
    let lab = Lab::up(&quiet())?;
    forget_pod(&lab, "100")?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    std::thread::scope(|scope| -> Result<()> {
        let ping = scope.spawn(|| lab.ping("pod1", POD2.parse()?, 1, &[]));
        wait_until("pod 2 to be asked for", || {
            let words = ["ip", "neighbour", "show", POD2];
            let said = command::run(&mut lab.exec("minikube-m02", words)?)?;
            Ok(command::text(&said).contains("INCOMPLETE").then_some(()))
        })?;
        std::thread::sleep(SILENT);
        lab.namespace("pod2")?.ip("link set eth0 arp on\n")?;
        let ping = ping.join().map_err(|_panic| anyhow::anyhow!("ping panicked"))??;
        ensure!(ping.received == 1, "{}", ping.raw);
        Ok(())
    })?;
    let packets = watch.stop()?.packets()?;
    let pings = pings(&packets);
    ensure!(pings.len() == 1, "{packets:#?}");
    let hops = pings[0]["hops"].as_array().context("hops")?;
    let time = |hop: usize, name: &str| {
        hops[hop][name]
            .as_u64()
            .with_context(|| format!("{name}: {:#}", pings[0]))
    };
    let held = time(1, "left_ns")? - time(1, "arrived_ns")?;
    println!("held for {} ms", held / 1_000_000);
    ensure!(
        pings[0]["verdict"] == "delivered" && u128::from(held) >= SILENT.as_nanos(),
        "{:#}",
        pings[0]
    );
    Ok(())
}

/// The same request over IPv4 and IPv6: as many traces as the sockets counted, with the hops that traceroute prints.
fn two_families() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    lab.offloads(false)?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "tcp"]))?;
    let server = lab.http_server("pod2", 8080)?;
    let families = [
        (one.address.into(), SocketAddr::from((two.address, 8080))),
        (IpAddr::from(one.address_v6), (two.address_v6, 8080).into()),
    ];
    let mut counted = Vec::new();
    for (_, to) in families {
        counted.push(lab.http_get("pod1", to, 20_000)?.segments);
    }
    let served = server.stop()?;
    let resent = |segments: &TcpCounts| {
        let there: u32 = served.iter().map(|served| served.segments.retransmitted).sum();
        segments.retransmitted + there
    };
    let packets = watch.stop()?.packets()?;
    for ((from, to), counts) in families.into_iter().zip(counted) {
        let said = [
            lab.traceroute("pod1", to.ip(), Kind::Udp, &[])?.path(),
            lab.traceroute("pod2", from, Kind::Udp, &[])?.path(),
        ];
        let ends = [from.to_string(), to.ip().to_string()];
        for (way, count) in [counts.segments_out, counts.segments_in].into_iter().enumerate() {
            let traces: Vec<&Value> = packets
                .iter()
                .filter(|packet| goes(packet, "tcp", &ends[way], &ends[1 - way]))
                .collect();
            let what = format!("from {}", ends[way]);
            segments(&what, traces.len() as u64, count, resent(&counts))?;
            for trace in traces {
                let is_there = arrived(trace) || (resent(&counts) > 0 && was_received(trace));
                ensure!(is_there, "{trace:#}");
                ensure!(path(trace) == said[way], "traceroute: {:?}: {trace:#}", said[way]);
            }
        }
    }
    Ok(())
}

/// Nobody forwards what pods send to a group, or to everybody: each datagram ends at the sender's node, and the trace says how.
fn multicast() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "udp"]))?;
    let groups = ["224.0.0.251", "255.255.255.255"];
    let send = |to: &str| lab.udp_flood("pod1", SocketAddr::from((to.parse::<IpAddr>()?, 5353)), 5, 60);
    let sent = groups.map(send);
    let packets = watch.stop()?.packets()?;
    for (to, sent) in groups.into_iter().zip(sent) {
        let traces: Vec<&Value> = packets
            .iter()
            .filter(|packet| goes(packet, "udp", POD1, to))
            .collect();
        same(&format!("datagrams to {to}"), traces.len() as u64, sent?)?;
        for trace in traces {
            ensure!(
                trace["verdict"] == "dropped" && trace["drop"]["node"] == "minikube",
                "{trace:#}"
            );
        }
    }
    Ok(())
}
