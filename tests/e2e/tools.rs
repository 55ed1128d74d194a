//! Traffic of real programs, counted: as many traces as their sockets, their own reports and `tcpdump` say.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Lab, Need, command,
    lab::plan::{SERVICE, SERVICE_PORTS},
    traffic::tcpdump,
};
use serde_json::Value;

use crate::{
    Test,
    counts::{payload, same, segments},
    support::{Watch, goes, quiet, was_received, with},
    test,
};

const IPERF: &[Need] = &[Need::Program("iperf3")];

pub(crate) const TESTS: &[Test] = &[
    test("iperf3_over_tcp_with_offloads_is_counted", || tcp(true)).needs(IPERF),
    test("iperf3_over_tcp_without_offloads_is_counted", || tcp(false)).needs(IPERF),
    test("iperf3_over_udp_is_counted", udp).needs(IPERF),
    test("dns_through_a_service_is_counted", dns).needs(&[Need::Program("dnsmasq")]),
    test("curl_through_a_service_is_counted", curl).needs(&[Need::Program("curl")]),
];

/// Captures at the node's ends of two pods' interfaces; what one sends to the other is counted where it enters.
struct Captures<'a> {
    folder: tempfile::TempDir,
    running: Vec<tcpdump::Capture>,
    pods: [&'a str; 2],
}

impl<'a> Captures<'a> {
    fn start(lab: &Lab, pods: [&'a str; 2], filter: &str) -> Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let running = pods
            .iter()
            .map(|pod| {
                let pod = lab.pod(pod)?;
                lab.tcpdump(&pod.node, &pod.interface, &file(folder.path(), &pod.id), filter)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            folder,
            running,
            pods,
        })
    }

    /// How many packets each of the pods sent.
    fn stop(self, lab: &Lab) -> Result<[u64; 2]> {
        Ok(self.stop_with_bytes(lab)?.0)
    }

    /// How many packets each of the pods sent, and how many bytes of data these had.
    fn stop_with_bytes(self, lab: &Lab) -> Result<([u64; 2], [u64; 2])> {
        for capture in self.running {
            capture.stop()?;
        }
        let (mut packets, mut bytes) = ([0; 2], [0; 2]);
        for (index, pod) in self.pods.into_iter().enumerate() {
            let filter = format!("src {}", lab.pod(pod)?.address);
            for line in tcpdump::read(&file(self.folder.path(), pod), &filter)? {
                // `… Flags [P.], seq 1:38, ack 1, win 502, options […], length 37: HTTP: GET / HTTP/1.1`
                let length = line.split(", length ").nth(1);
                let length = length.and_then(|length| length.split(':').next()?.trim().parse::<u64>().ok());
                packets[index] += 1;
                bytes[index] += length.unwrap_or_default();
            }
        }
        Ok((packets, bytes))
    }
}

fn file(folder: &Path, pod: &str) -> std::path::PathBuf {
    folder.join(pod).with_extension("pcap")
}

fn between<'a>(packets: &'a [Value], proto: &str, from: &str, to: &str) -> Vec<&'a Value> {
    let wanted = |packet: &&Value| goes(packet, proto, from, to);
    packets.iter().filter(wanted).collect()
}

fn all_arrived(packets: &[Value]) -> Result<()> {
    for packet in packets {
        ensure!(was_received(packet), "not delivered: {packet:#}");
    }
    Ok(())
}

/// Two megabytes: packets as `tcpdump` captured them at the sender, bytes as `iperf3` says.
fn tcp(offloads: bool) -> Result<()> {
    let lab = Lab::up(&quiet())?;
    lab.offloads(offloads)?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "tcp"]))?;
    let captures = Captures::start(&lab, ["pod1", "pod2"], "tcp")?;
    let said = lab.iperf("pod1", ("pod2", two.ip()), &["-n", "2M"])?;
    let (captured, [captured_bytes, _]) = captures.stop_with_bytes(&lab)?;
    let packets = watch.stop()?.packets()?;
    let (a, b) = (one.address.to_string(), two.address.to_string());
    let there = between(&packets, "tcp", &a, &b);
    same("packets captured there", there.len() as u64, captured[0])?;
    let back = between(&packets, "tcp", &b, &a).len();
    same("packets captured back", back as u64, captured[1])?;
    let bytes: u64 = there
        .iter()
        .filter_map(|packet| packet["length"].as_u64())
        .map(payload)
        .sum();
    same("bytes captured", bytes, captured_bytes)?;
    println!(
        "{} packets there, {back} back; {bytes} bytes, {} of them received",
        there.len(),
        said.received
    );
    // What was sent again is traced again; what was not sent any more when the server ended is not.
    ensure!(bytes >= said.received, "{said:?}, {bytes} bytes traced");
    // The server may end with data unread, and its TCP resets the rest; what crosses that is invalid to conntrack.
    for packet in &packets {
        let crossed = packet["drop"]["culprits"][0]["cause"] == "invalid";
        ensure!(
            was_received(packet) || packet["answer"]["kind"] == "reset" || crossed,
            "not delivered: {packet:#}"
        );
    }
    Ok(())
}

/// Datagrams as fast as they go: what the server missed was dropped at its socket.
fn udp() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let two = lab.pod("pod2")?;
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "udp"]))?;
    let captures = Captures::start(&lab, ["pod1", "pod2"], "udp")?;
    let said = lab.iperf(
        "pod1",
        ("pod2", two.ip()),
        &["-u", "-b", "0", "-l", "400", "-k", "3000"],
    )?;
    let captured = captures.stop(&lab)?;
    let packets = watch.stop()?.packets()?;
    let (a, b) = (lab.pod("pod1")?.address.to_string(), two.address.to_string());
    let there = between(&packets, "udp", &a, &b);
    let dropped = there
        .iter()
        .filter(|packet| packet["verdict"] == "dropped")
        .count();
    // One datagram each way opens the stream.
    same("datagrams", there.len() as u64, said.packets + 1)?;
    same("datagrams captured", there.len() as u64, captured[0])?;
    same(
        "datagrams back",
        between(&packets, "udp", &b, &a).len() as u64,
        captured[1],
    )?;
    // The server cannot tell what it missed at the end, nor the kernel what it left unread.
    let (dropped, read) = (dropped as u64, said.received / 400);
    ensure!(
        said.lost <= dropped && dropped + read <= said.packets,
        "{said:?}: {dropped} traces end at the socket, {read} datagrams were read"
    );
    for packet in there.iter().filter(|packet| packet["verdict"] != "dropped") {
        ensure!(was_received(packet), "not delivered: {packet:#}");
    }
    Ok(())
}

fn dns() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let (_, port, target) = SERVICE_PORTS[1];
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "udp"]))?;
    let captures = Captures::start(&lab, ["pod1", "pod2"], "udp")?;
    let server = lab.name_server("pod2", target)?;
    for _ in 0..5 {
        lab.look_up("pod1", &SERVICE.to_string())?;
    }
    let queries = server.stop()?;
    let captured = captures.stop(&lab)?;
    let packets = watch.stop()?.packets()?;
    let (a, b) = (one.address.to_string(), two.address.to_string());
    let asked = between(&packets, "udp", &a, &SERVICE.to_string());
    let answered = between(&packets, "udp", &b, &a);
    ensure!(queries >= 10, "{queries} queries: two families, five times");
    same("queries by the server's log", asked.len() as u64, queries)?;
    same("queries captured", asked.len() as u64, captured[0])?;
    same("answers captured", answered.len() as u64, captured[1])?;
    same("answers", answered.len() as u64, queries)?;
    let target = SocketAddr::from((two.address, target));
    for packet in &asked {
        let step = &packet["nat"][0];
        ensure!(
            packet["flow"]["dst_port"] == port
                && step["kind"] == "dnat"
                && step["to"]["address"] == target.ip().to_string()
                && step["to"]["port"] == target.port(),
            "{packet:#}"
        );
    }
    for packet in &answered {
        let step = &packet["nat"][0];
        ensure!(
            step["kind"] == "snat" && step["to"]["address"] == SERVICE.to_string(),
            "{packet:#}"
        );
    }
    all_arrived(&packets)
}

/// Without offloads, so that a segment is a packet: the server's socket counts what the wire would carry.
fn curl() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    lab.offloads(false)?;
    let (one, two) = (lab.pod("pod1")?, lab.pod("pod2")?);
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "tcp"]))?;
    let captures = Captures::start(&lab, ["pod1", "pod2"], "tcp")?;
    let server = lab.http_server("pod2", SERVICE_PORTS[0].2)?;
    let url = format!("http://{SERVICE}/200000");
    let words = ["curl", "-sS", "-o", "/dev/null", "-w", "%{size_download}", &url];
    let said = command::text(&command::run(&mut lab.exec("pod1", words)?)?);
    ensure!(said == "200000", "curl downloaded {said} bytes");
    let served = server.stop()?;
    let counts = served.first().context("a connection")?.segments;
    let captured = captures.stop(&lab)?;
    let packets = watch.stop()?.packets()?;
    let (a, b) = (one.address.to_string(), two.address.to_string());
    let there = between(&packets, "tcp", &a, &SERVICE.to_string()).len() as u64;
    let back = between(&packets, "tcp", &b, &a).len() as u64;
    same("packets captured there", there, captured[0])?;
    same("packets captured back", back, captured[1])?;
    // What curl's socket sent again is not known.
    let resent = counts.retransmitted;
    segments("the server received", there, counts.segments_in, resent)?;
    // The SYN+ACK was sent before the socket was.
    segments("the server sent", back, counts.segments_out + 1, resent)?;
    all_arrived(&packets)
}
