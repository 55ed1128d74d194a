//! What a packet of each kind costs at a TC hook, in nanoseconds: the loaded programs, run by `BPF_PROG_TEST_RUN`, with
//! the ring drained as `watch` drains it. Printed, never judged; but what was measured is made sure of by the counters.
//!
//! The rounds of all kinds take turns, so that they share what else the machine does, and a program that only returns is
//! among them: what a run costs in any case.
#![expect(clippy::print_stdout, reason = "a command that prints its results")]

use std::{
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use calitrace::{
    event::Hook,
    kernel::{Attached, Config, Drain, Kernel},
    netns,
};
use calitrace_ebpf::shared::Counters;
use nix::sched::{CloneFlags, unshare};

/// Runs of a program in one round: what they record is a part of the ring.
const RUNS: u32 = 20_000;
const ROUNDS: usize = 31;
/// `lo` in a new namespace.
const LO: u32 = 1;

/// What the counters must say became of a packet.
#[derive(Clone, Copy)]
enum Comes {
    NonIp,
    OutOfScope,
    Recorded,
}

struct Kind {
    name: &'static str,
    /// None: the program that only returns.
    hook: Option<Hook>,
    frame: Vec<u8>,
    comes: Comes,
    nanoseconds: Vec<u128>,
}

fn kind(name: &'static str, hook: impl Into<Option<Hook>>, frame: Vec<u8>, comes: Comes) -> Kind {
    Kind {
        name,
        hook: hook.into(),
        frame,
        comes,
        nanoseconds: Vec::new(),
    }
}

fn ethernet(ether_type: u16, packet: &[u8]) -> Vec<u8> {
    [&[2; 12], &ether_type.to_be_bytes()[..], packet].concat()
}

fn ipv4(protocol: u8, src: [u8; 4], dst: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len())
        .expect("a small packet")
        .to_be_bytes();
    let head = [
        0x45, 0, length[0], length[1], 0x12, 0x34, 0x40, 0, 63, protocol, 0, 0,
    ];
    [&head[..], &src, &dst, payload].concat()
}

fn ipv6(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len())
        .expect("a small packet")
        .to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], protocol, 63];
    let (mut src, mut dst) = ([0; 16], [0; 16]);
    (src[0], src[15], dst[0], dst[15]) = (0xfd, 1, 0xfd, 2);
    [&head[..], &src, &dst, payload].concat()
}

fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("a small packet");
    let words = [40_000, port, length, 0].map(u16::to_be_bytes);
    [words.as_flattened(), payload].concat()
}

/// With the options that Linux sends with every segment of an established connection.
fn tcp(payload: &[u8]) -> Vec<u8> {
    let head = [
        0x9c, 0x40, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8, 0x80, 0x10, 1, 0xf5, 0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4,
        5, 6, 7, 8,
    ];
    [&head[..], payload].concat()
}

fn kinds() -> Vec<Kind> {
    const IP: u16 = 0x0800;
    const POD: [u8; 4] = [10, 244, 0, 67];
    const OTHER: [u8; 4] = [10, 244, 1, 67];
    const NODE: [u8; 4] = [192, 168, 49, 2];
    const AWAY: [u8; 4] = [192, 168, 49, 3];
    let large = tcp(&[7; 1400]);
    let dns = udp(53, &[7; 40]);
    let echo = [&[8, 0, 0, 0, 0, 7, 0, 1], &[7; 56][..]].concat();
    let vxlan = [
        &[8, 0, 0, 0, 0, 0x10, 0, 0][..],
        &ethernet(IP, &ipv4(6, POD, OTHER, &large)),
    ]
    .concat();
    let between_pods = |protocol, payload: &[u8]| ethernet(IP, &ipv4(protocol, POD, OTHER, payload));
    let between_nodes = |protocol, payload: &[u8]| ethernet(IP, &ipv4(protocol, NODE, AWAY, payload));
    vec![
        kind("nothing at all", None, between_pods(6, &large), Comes::NonIp),
        kind(
            "no IP packet (ARP), uplink",
            Hook::UplinkIngress,
            ethernet(0x0806, &[0; 28]),
            Comes::NonIp,
        ),
        kind(
            "TCP, out of scope, uplink in",
            Hook::UplinkIngress,
            between_nodes(6, &large),
            Comes::OutOfScope,
        ),
        kind(
            "TCP, out of scope, uplink out",
            Hook::UplinkEgress,
            between_nodes(6, &large),
            Comes::OutOfScope,
        ),
        kind(
            "UDP, out of scope, uplink in",
            Hook::UplinkIngress,
            between_nodes(17, &dns),
            Comes::OutOfScope,
        ),
        kind(
            "TCP, recorded, pod",
            Hook::WorkloadIngress,
            between_pods(6, &large),
            Comes::Recorded,
        ),
        kind(
            "TCP over IPv6, recorded, pod",
            Hook::WorkloadIngress,
            ethernet(0x86dd, &ipv6(6, &large)),
            Comes::Recorded,
        ),
        kind(
            "UDP, recorded, pod",
            Hook::WorkloadEgress,
            between_pods(17, &dns),
            Comes::Recorded,
        ),
        kind(
            "ICMP echo, recorded, pod",
            Hook::WorkloadEgress,
            between_pods(1, &echo),
            Comes::Recorded,
        ),
        kind(
            "TCP, recorded, tunnel",
            Hook::TunnelEgress,
            between_pods(6, &large),
            Comes::Recorded,
        ),
        kind(
            "TCP in IPIP, recorded, uplink",
            Hook::UplinkEgress,
            between_nodes(4, &ipv4(6, POD, OTHER, &large)),
            Comes::Recorded,
        ),
        kind(
            "TCP in VXLAN, recorded, uplink",
            Hook::UplinkEgress,
            between_nodes(17, &udp(4789, &vxlan)),
            Comes::Recorded,
        ),
    ]
}

fn main() -> Result<()> {
    // In a namespace of its own the attached programs see nothing but what they are given.
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
    let netns = netns::Handle::open(Path::new("/proc/thread-self/ns/net"))?;
    let start = Instant::now();
    let mut kernel = Kernel::load(&Config::default())?;
    println!(
        "maps and types of the kernel: {:.1} ms",
        milliseconds(start.elapsed())
    );
    let scope = ["10.244.0.0/16", "10.96.0.0/12", "fd00::/64"];
    kernel.set_scope(&scope.map(|prefix| prefix.parse().expect("a prefix")))?;
    let mut kinds = kinds();
    for hook in Hook::ALL.into_iter().filter(|hook| *hook < Hook::KfreeSkb) {
        let start = Instant::now();
        let attached = kernel.attach_tc(&netns, "lo", LO, hook)?;
        ensure!(attached == Attached::Yes, "no interface lo");
        let time = milliseconds(start.elapsed());
        let walked = kernel.verified_instructions(&netns, hook)?;
        let walked = walked.map_or("?".to_owned(), |walked| walked.to_string());
        println!("{hook:?}: loaded and attached in {time:.1} ms, {walked} instructions verified");
    }

    let (sender, receiver) = mpsc::sync_channel(64);
    let drain = Drain::start(kernel.take_ring()?, Duration::from_millis(10), sender)?;
    let consumer = thread::spawn(move || receiver.iter().map(|batch| batch.len() as u64).sum::<u64>());
    for round in 0..=ROUNDS {
        for kind in &mut kinds {
            let before = counters(&kernel, kind.hook)?;
            let time = kernel.trial(&netns, kind.hook, &kind.frame, RUNS)?;
            if kind.hook.is_some() {
                let after = counters(&kernel, kind.hook)?;
                let (before, after) = (came(&before, kind.comes), came(&after, kind.comes));
                let (name, count) = (kind.name, after - before);
                ensure!(count == u64::from(RUNS), "{name}: {count} of {RUNS} came to that");
            }
            // The first round warms up.
            if round > 0 {
                kind.nanoseconds.push(time.as_nanos());
            }
        }
    }
    kernel.detach_all()?;
    drain.stop()?;
    let records = consumer.join().ok().context("the consumer of the ring failed")?;
    println!("{records} records were drained meanwhile\n");

    println!(
        "{:32} {:>8} {:>8} {:>8} {:>10}",
        "nanoseconds a packet", "least", "median", "most", "of its own"
    );
    let bare = median(&mut kinds[0].nanoseconds);
    for kind in &mut kinds {
        let median = median(&mut kind.nanoseconds);
        let (least, most) = (kind.nanoseconds[0], kind.nanoseconds[ROUNDS - 1]);
        let own = median.saturating_sub(bare);
        println!("{:32} {least:>8} {median:>8} {most:>8} {own:>10}", kind.name);
    }
    println!(
        "\nEach is the mean of {RUNS} runs, {ROUNDS} times; of its own: the medians, less that of nothing at all."
    );
    Ok(())
}

/// Sorts, too.
fn median(values: &mut [u128]) -> u128 {
    values.sort_unstable();
    values[values.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn counters(kernel: &Kernel, hook: Option<Hook>) -> Result<Counters> {
    let counts = kernel.counters()?;
    let count = counts
        .iter()
        .find(|count| Some(count.hook) == hook && count.ifindex == LO);
    Ok(count.map(|count| count.counters).unwrap_or_default())
}

fn came(counters: &Counters, comes: Comes) -> u64 {
    match comes {
        Comes::NonIp => counters.non_ip,
        Comes::OutOfScope => counters.out_of_scope,
        Comes::Recorded => counters.recorded,
    }
}
