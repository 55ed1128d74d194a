//! Every packet is one trace, counted against `tcpdump` on the pod's interface and against the sockets themselves.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use calitrace_tests::{Encapsulation, Lab, Need, Options, command, lab::UNDERLAY, traffic::tcpdump};
use serde_json::Value;

use crate::{
    Test,
    support::{IPIP, WIREGUARD, Watch, arrived, at_interfaces, goes, quiet, was_received, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("each_packet_is_one_delivered_trace_without_offloads", || {
        without_offloads(Encapsulation::Vxlan)
    }),
    test("each_packet_over_tunl0_is_one_delivered_trace", || {
        without_offloads(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("with_offloads_every_byte_is_traced_once", || {
        with_offloads(Encapsulation::Vxlan)
    }),
    test("with_offloads_every_byte_over_tunl0_is_traced_once", || {
        with_offloads(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("with_offloads_every_byte_over_wireguard_is_traced_once", || {
        with_offloads(Encapsulation::Wireguard)
    })
    .needs(WIREGUARD),
    test("a_service_is_one_trace_with_a_nat_step", service),
    test("datagrams_that_the_receiver_merges_are_traced_once", merged).needs(&[Need::VethGro]),
];

const BODY: usize = 300_000;

fn without_offloads(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    lab.offloads(false)?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let capture_file = folder.path().join("pod1.pcap");
    let tunnel_file = folder.path().join("tunnel.pcap");
    let device = encapsulation.device().context("a tunnel device")?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let capture = lab.tcpdump("minikube", &one.interface, &capture_file, "ip")?;
    let tunnel_capture = lab.tcpdump("minikube", device, &tunnel_file, "ip")?;

    let ping = lab.ping("pod1", two.ip(), 20, &[])?;
    let echo = lab.udp_server("pod2", 5353, true)?;
    let udp = lab.udp_exchange("pod1", SocketAddr::from((two.address, 5353)), 50, 200)?;
    let udp_there = echo.stop()?;
    let server = lab.http_server("pod2", 8080)?;
    let http = lab.http_get("pod1", SocketAddr::from((two.address, 8080)), BODY)?;
    let served = server.stop()?;
    let [served] = &served[..] else {
        bail!("one connection, not {}", served.len());
    };
    let resent = http.segments.retransmitted + served.segments.retransmitted;

    capture.stop()?;
    tunnel_capture.stop()?;
    let packets = watch.stop()?.packets()?;
    let (a, b) = (one.address.to_string(), two.address.to_string());
    let count = |proto: &str, from: &str, to: &str| {
        packets
            .iter()
            .filter(|packet| goes(packet, proto, from, to))
            .count() as u64
    };
    // The sockets' own counts.
    ensure!(ping.sent == 20 && ping.received == 20, "{ping:?}");
    same("echo requests", count("icmp", &a, &b), ping.sent)?;
    same("echo replies", count("icmp", &b, &a), ping.received)?;
    same("datagrams", count("udp", &a, &b), udp.sent)?;
    same(
        "datagrams received there",
        count("udp", &a, &b),
        udp_there.received,
    )?;
    same("datagrams back", count("udp", &b, &a), udp.received)?;
    segments("out", count("tcp", &a, &b), http.segments.segments_out, resent)?;
    segments("in", count("tcp", &b, &a), http.segments.segments_in, resent)?;
    // What captures at the same interfaces count.
    for proto in ["icmp", "udp", "tcp"] {
        for (from, to) in [(&a, &b), (&b, &a)] {
            let filter = format!("{proto} and src {from} and dst {to}");
            for (interface, file) in [(&*one.interface, &capture_file), (device, &tunnel_file)] {
                let captured = tcpdump::read(file, &filter)?.len() as u64;
                let passed = |packet: &&Value| {
                    let mut seen = packet["observations"].as_array().into_iter().flatten();
                    goes(packet, proto, from, to)
                        && seen.any(|seen| seen["node"] == "minikube" && seen["interface"] == interface)
                };
                same(
                    &format!("packets captured by tcpdump at {interface} ({filter})"),
                    packets.iter().filter(passed).count() as u64,
                    captured,
                )?;
            }
        }
    }
    for packet in &packets {
        let there = arrived(packet) || (resent > 0 && was_received(packet));
        ensure!(there, "not delivered: {packet:#}");
    }
    Ok(())
}

pub(crate) fn same(what: &str, traced: u64, truth: u64) -> Result<()> {
    ensure!(traced == truth, "{what}: {truth}, but {traced} traces");
    Ok(())
}

/// As many traces as the socket counted segments, of which both sides sent `resent` again. On a machine that stands still TCP
/// does so with what was only late, and the second of two FINs is answered when the socket no longer counts (and that answer
/// by the kernel): then there may be more.
pub(crate) fn segments(what: &str, traced: u64, counted: u32, resent: u32) -> Result<()> {
    let is_right = match resent {
        0 => traced == u64::from(counted),
        _ => traced >= u64::from(counted),
    };
    ensure!(
        is_right,
        "segments {what}: {counted}, but {traced} traces; {resent} sent again"
    );
    Ok(())
}

/// Bytes of data in a segment of one side's data: its IPv4 and TCP headers are 20 bytes, and 20 with 12 of timestamps. What
/// has more options has no data: a SYN, and acknowledgements of one block out of order, two, or three.
pub(crate) fn payload(length: u64) -> u64 {
    match length {
        60 | 64 | 72 | 80 => 0,
        _ => length.saturating_sub(52),
    }
}

fn with_offloads(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..Options::default()
    })?;
    lab.offloads(true)?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let folder = tempfile::tempdir().context("make a folder")?;
    let capture_file = folder.path().join("pod2.pcap");
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "tcp"]))?;
    let capture = lab.tcpdump("minikube-m02", &two.interface, &capture_file, "tcp")?;
    let server = lab.http_server("pod2", 8080)?;
    let http = lab.http_get("pod1", SocketAddr::from((two.address, 8080)), BODY)?;
    let served = server.stop()?;
    let [served] = &served[..] else {
        bail!("one connection, not {}", served.len());
    };
    capture.stop()?;
    let packets = watch.stop()?.packets()?;
    for (sender, receiver, bytes) in [
        (&one, &two, http.segments.bytes_out),
        (&two, &one, served.segments.bytes_out),
    ] {
        let (from, to) = (sender.address.to_string(), receiver.address.to_string());
        let traces: Vec<&Value> = packets
            .iter()
            .filter(|packet| goes(packet, "tcp", &from, &to))
            .collect();
        // Pieces of a super-packet that are not joined to it would begin where it was cut.
        for trace in &traces {
            ensure!(
                trace["observations"][0]["interface"] == sender.interface.as_str(),
                "first seen elsewhere than at {}: {trace:#}",
                sender.interface
            );
        }
        let traced: u64 = traces
            .iter()
            .filter_map(|packet| packet["length"].as_u64())
            .map(payload)
            .sum();
        ensure!(
            traced == bytes,
            "{from} to {to}: the socket sent {bytes} bytes, {traced} traced"
        );
        for trace in &traces {
            ensure!(arrived(trace), "not delivered: {trace:#}");
        }
        // At the interface of the sending pod a capture sees the same super-packets.
        if from == two.address.to_string() {
            let captured = tcpdump::read(&capture_file, &format!("tcp and src {from}"))?.len();
            ensure!(
                traces.len() == captured,
                "{captured} packets captured, {} traced",
                traces.len()
            );
        }
    }
    Ok(())
}

/// What a receiver's NIC merges (`rx-udp-gro-forwarding`, off unless asked for) and the pod gets as one: every datagram has
/// its own trace, to the pod. IPv4 numbers them; of IPv6 their order tells.
fn merged() -> Result<()> {
    const COUNT: u64 = 100;
    let lab = Lab::up(&Options {
        encapsulation: Encapsulation::None,
        ..Options::default()
    })?;
    // Each datagram is a packet of its own up to there.
    lab.offloads(false)?;
    for (feature, value) in [("gro", "on"), ("rx-udp-gro-forwarding", "on")] {
        command::run(&mut lab.exec("minikube-m02", ["ethtool", "-K", "eth0", feature, value])?)?;
    }
    // What comes from a device that cuts super-packets itself is not merged (`veth_skb_is_eligible_for_gro`,
    // drivers/net/veth.c, 6.18).
    command::run(&mut lab.exec(UNDERLAY, ["ethtool", "-K", "minikube-m02", "tso", "off"])?)?;
    // Packets come one by one here; it waits for the next for so long (nanoseconds). A mount of its own shows its devices.
    let patient = "mount -t sysfs sysfs /sys && echo 500000 > /sys/class/net/eth0/gro_flush_timeout";
    command::run(&mut lab.exec("minikube-m02", ["unshare", "--mount", "sh", "-c", patient])?)?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    for (from, to) in [
        (IpAddr::from(one.address), IpAddr::from(two.address)),
        (one.address_v6.into(), two.address_v6.into()),
    ] {
        let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "udp"]))?;
        let server = lab.udp_server("pod2", 5353, false)?;
        let sent = lab.udp_flood("pod1", SocketAddr::from((to, 5353)), COUNT, 900)?;
        let received = server.stop()?.received;
        let packets = watch.stop()?.packets()?;
        let is_one = |packet: &&Value| goes(packet, "udp", &from.to_string(), &to.to_string());
        let traces: Vec<&Value> = packets.iter().filter(is_one).collect();
        ensure!(traces.len() == packets.len(), "others: {packets:#?}");
        same("datagrams", traces.len() as u64, sent)?;
        let delivered = traces.iter().filter(|packet| packet["verdict"] == "delivered");
        same("datagrams received", delivered.count() as u64, received)?;
        let is_merged = |packet: &&&Value| {
            at_interfaces(packet).any(|seen| {
                seen["node"] == "minikube-m02" && seen["length"].as_u64() > packet["length"].as_u64()
            })
        };
        let merged = traces.iter().filter(is_merged).count();
        ensure!(merged > 0, "nothing was merged of {sent} datagrams to {to}");
    }
    Ok(())
}

/// One trace from the service's address to the pod behind it, and the answer back.
fn service() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "tcp"]))?;
    let server = lab.http_server("pod2", 8080)?;
    lab.http_get("pod1", "10.96.0.10:80".parse()?, 5_000)?;
    server.stop()?;
    let packets = watch.stop()?.packets()?;
    let (a, b) = (one.address.to_string(), two.address.to_string());
    ensure!(!packets.is_empty(), "no packet of the service was traced");
    for packet in &packets {
        let flow = &packet["flow"];
        let nat = packet["nat"].as_array().context("nat")?;
        ensure!(nat.len() == 1, "one translation: {packet:#}");
        ensure!(
            nat[0]["node"] == "minikube",
            "translated at the client's node: {packet:#}"
        );
        ensure!(arrived(packet), "{packet:#}");
        let hops = packet["hops"].as_array().context("hops")?;
        if flow["src"] == a.as_str() {
            ensure!(
                flow["dst"] == "10.96.0.10" && flow["dst_port"] == 80,
                "{packet:#}"
            );
            ensure!(nat[0]["kind"] == "dnat", "{packet:#}");
            ensure!(
                nat[0]["to"]["address"] == b.as_str() && nat[0]["to"]["port"] == 8080,
                "{packet:#}"
            );
            ensure!(flow["dst_pod"] == two.full_name().as_str(), "{packet:#}");
            ensure!(
                hops.last().context("hops")?["address"] == "10.96.0.10",
                "{packet:#}"
            );
        } else {
            ensure!(
                flow["src"] == b.as_str() && flow["dst"] == a.as_str(),
                "{packet:#}"
            );
            ensure!(nat[0]["kind"] == "snat", "{packet:#}");
            ensure!(
                nat[0]["to"]["address"] == "10.96.0.10" && nat[0]["to"]["port"] == 80,
                "{packet:#}"
            );
        }
        ensure!(hops.len() == 3, "two routers and the receiver: {packet:#}");
    }
    Ok(())
}
