//! `calitrace watch` agrees with `traceroute`.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail, ensure};
use calitrace_tests::{
    DeviceOrder, Encapsulation, Lab, Options,
    traffic::traceroute::{self, Hop, Kind, Traceroute},
};
use serde_json::Value;

use crate::{
    Test,
    support::{IPIP, WIREGUARD, Watch, arrived, goes, path, quiet, run, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("real_traffic_is_traced_before_any_traceroute_ran", || {
        real_traffic_first(Encapsulation::Vxlan)?;
        the_tunnel_gets_another_address()
    }),
    test("real_traffic_over_tunl0_is_traced_as_in_the_seed", || {
        real_traffic_first(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("real_traffic_over_wireguard_is_traced", || {
        real_traffic_first(Encapsulation::Wireguard)
    })
    .needs(WIREGUARD),
    test(
        "every_traceroute_in_every_mode_prints_what_calitrace_prints",
        || {
            every_traceroute(Encapsulation::Vxlan)?;
            every_traceroute(Encapsulation::None)
        },
    ),
    test("every_traceroute_over_tunl0_prints_what_calitrace_prints", || {
        every_traceroute(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test(
        "every_traceroute_over_wireguard_prints_what_calitrace_prints",
        || every_traceroute(Encapsulation::Wireguard),
    )
    .needs(WIREGUARD),
];

const ORDERS: [DeviceOrder; 2] = [DeviceOrder::TunnelFirst, DeviceOrder::UplinkFirst];

/// Ping, HTTP and UDP are traced while no time exceeded can reach anybody; the log is closed; only then traceroute runs.
fn real_traffic_first(encapsulation: Encapsulation) -> Result<()> {
    for order in ORDERS {
        let lab = Lab::up(&Options {
            order,
            encapsulation,
            ..Options::default()
        })?;
        let folder = tempfile::tempdir().context("make a folder for the log")?;
        let log = folder.path().join("real.jsonl");
        let log = log.to_str().context("a path in UTF-8")?;
        lab.block_time_exceeded(true)?;
        let watch = Watch::start(&with(&lab, &["-o", "json", "-w", log]))?;
        real_traffic(&lab)?;
        let seen = watch.stop()?.packets()?;
        lab.block_time_exceeded(false)?;
        let expected = hop_lists(&lab)?;
        // What the founding story shows, and the same with the uplink before the tunnel.
        let first = match order {
            DeviceOrder::TunnelFirst => "10.244.120.64",
            DeviceOrder::UplinkFirst => "192.168.49.2",
        };
        ensure!(
            expected[0].2 == [first, "10.244.205.192", "10.244.205.193"],
            "{encapsulation:?}, {order:?}: traceroute printed {:?}",
            expected[0].2
        );
        compare(&seen, &expected).with_context(|| format!("{encapsulation:?}, {order:?}"))?;

        let read = run(&["read", log, "-o", "json"])?;
        ensure!(read.status.success(), "calitrace read: {}", read.stderr);
        compare(&read.packets()?, &expected)?;
    }
    Ok(())
}

/// Again, with the address of a tunnel changed while watching.
fn the_tunnel_gets_another_address() -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation: Encapsulation::Vxlan,
        ..Options::default()
    })?;
    lab.block_time_exceeded(true)?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    real_traffic(&lab)?;
    watch.until("the packets before the change", |watch| {
        !watch.packets().is_empty()
    })?;
    lab.set_tunnel_address("minikube-m02", "10.244.205.250".parse()?)?;
    // The change is noticed through netlink and settles within some ten milliseconds; then all packets show it.
    let receiver = lab.pod("pod2")?.ip().to_string();
    let fresh = |packet: &Value| {
        packet["flow"]["dst"] == receiver && path(packet).get(1).map(String::as_str) == Some("10.244.205.250")
    };
    watch.until("the new address in a trace", |watch| {
        lab.ping("pod1", lab.pod("pod2").expect("the lab has it").ip(), 1, &[])
            .is_ok()
            && watch.packets().iter().any(fresh)
    })?;
    let before = watch.packets().len();
    real_traffic(&lab)?;
    let seen = watch.stop()?.packets()?;
    lab.block_time_exceeded(false)?;
    let expected = hop_lists(&lab)?;
    ensure!(
        expected
            .iter()
            .any(|(_, _, path)| path.contains(&"10.244.205.250".to_owned())),
        "{expected:?}"
    );
    compare(&seen[before..], &expected)
}

/// Ping, an HTTP transfer and UDP from pod 1 to the pod of the other node and to the one of its own.
fn real_traffic(lab: &Lab) -> Result<()> {
    for receiver in ["pod2", "pod3"] {
        let address = lab.pod(receiver)?.ip();
        let ping = lab.ping("pod1", address, 5, &[])?;
        ensure!(ping.received == 5, "ping: {ping:?}");
        let http = lab.http_server(receiver, 8080)?;
        lab.http_get("pod1", (address, 8080).into(), 20_000)?;
        http.stop()?;
        let udp = lab.udp_server(receiver, 5353, true)?;
        lab.udp_exchange("pod1", (address, 5353).into(), 5, 100)?;
        udp.stop()?;
    }
    Ok(())
}

/// What traceroute prints: sender, receiver, path.
type HopList = (String, String, Vec<String>);

fn hop_lists(lab: &Lab) -> Result<Vec<HopList>> {
    let mut lists = Vec::new();
    for (from, to) in [
        ("pod1", "pod2"),
        ("pod2", "pod1"),
        ("pod1", "pod3"),
        ("pod3", "pod1"),
    ] {
        let (sender, receiver) = (lab.pod(from)?.ip(), lab.pod(to)?.ip());
        let trace = lab.traceroute(from, receiver, Kind::Udp, &[])?;
        lists.push((sender.to_string(), receiver.to_string(), trace.path()));
    }
    Ok(lists)
}

fn compare(seen: &[Value], expected: &[HopList]) -> Result<()> {
    for (from, to, hops) in expected {
        for proto in ["icmp", "tcp", "udp"] {
            let packets: Vec<&Value> = seen
                .iter()
                .filter(|packet| goes(packet, proto, from, to))
                .collect();
            ensure!(
                !packets.is_empty(),
                "no {proto} packet from {from} to {to} among {}",
                seen.len()
            );
            for packet in packets {
                ensure!(
                    path(packet) == *hops,
                    "traceroute: {hops:?}\ncalitrace: {packet:#}"
                );
                ensure!(arrived(packet), "{packet:#}");
            }
        }
    }
    Ok(())
}

/// UDP, ICMP and TCP traceroute and busybox's, one after the other, in both device orders, on one node and between two,
/// with and without encapsulation: a block for each, with the same addresses, and round trips that are not longer than
/// the ones traceroute measured.
fn every_traceroute(encapsulation: Encapsulation) -> Result<()> {
    for order in ORDERS {
        let lab = Lab::up(&Options {
            order,
            encapsulation,
            ..quiet()
        })?;
        let watch = watch_probes(&lab)?;
        let mut runs = Vec::new();
        for kind in [
            Kind::Udp,
            Kind::Icmp,
            Kind::Tcp(9),
            Kind::Busybox,
            Kind::BusyboxIcmp,
        ] {
            for receiver in ["pod2", "pod3"] {
                runs.push((kind, lab.traceroute("pod1", lab.pod(receiver)?.ip(), kind, &[])?));
            }
        }
        compare_blocks(&watch.stop()?.stdout, &runs)
            .with_context(|| format!("{order:?}, {encapsulation:?}"))?;
    }
    Ok(())
}

/// Traceroute from pod 1 and what calitrace prints for it.
pub(crate) fn one_traceroute(lab: &Lab, kind: Kind, receiver: &str, extra: &[&str]) -> Result<()> {
    let watch = watch_probes(lab)?;
    let said = lab.traceroute("pod1", lab.pod(receiver)?.ip(), kind, extra)?;
    compare_blocks(&watch.stop()?.stdout, &[(kind, said)])
}

fn watch_probes(lab: &Lab) -> Result<Watch> {
    Watch::start(&with(
        lab,
        &["-o", "traceroute", "--from", "default/busybox-f5945bfb5-mw26t"],
    ))
}

/// Whether calitrace printed a block for each run of traceroute that says the same, and no other.
fn compare_blocks(printed: &str, runs: &[(Kind, Traceroute)]) -> Result<()> {
    let mut blocks = printed
        .trim_end()
        .split("\n\n")
        .map(|block| traceroute::parse(block).with_context(|| format!("calitrace printed:\n{block}")))
        .collect::<Result<Vec<_>>>()?;
    for (kind, said) in runs {
        // A run ends when nothing more of it can come, so that blocks may change places.
        let Some(place) = blocks.iter().position(|block| agree(block, *kind, said)) else {
            bail!(
                "{kind:?} is missing\ntraceroute:\n{}\ncalitrace:\n{printed}",
                said.raw
            );
        };
        blocks.remove(place);
    }
    ensure!(
        blocks.is_empty(),
        "{} runs of traceroute, and {} blocks more:\n{printed}",
        runs.len(),
        blocks.len()
    );
    Ok(())
}

/// Busybox's times are not compared: it starts its clock after `sendto` returned (`networking/traceroute.c`), and between
/// namespaces of one kernel the answer is there by then.
fn agree(ours: &[Hop], kind: Kind, said: &Traceroute) -> bool {
    let late_clock = matches!(kind, Kind::Busybox | Kind::BusyboxIcmp);
    let same = |our: &Option<(IpAddr, f64)>, their: &Option<(IpAddr, f64)>| match (our, their) {
        (Some((our, our_time)), Some((their, their_time))) => {
            our == their && (our_time <= their_time || late_clock)
        }
        (None, None) => true,
        _ => false,
    };
    ours.len() == said.hops.len()
        && ours.iter().zip(&said.hops).all(|(our, their)| {
            our.ttl == their.ttl
                && our.probes.len() == their.probes.len()
                && our
                    .probes
                    .iter()
                    .zip(&their.probes)
                    .all(|(our, their)| same(our, their))
        })
}
