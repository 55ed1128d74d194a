//! A thousand packets of one pod, delivered, rejected and dropped for eleven causes in any order: each verdict is right, each
//! cause has its name, and the rules' own counters are the numbers of drops. Beside it the twin: the same packets without the
//! faults.

mod changing;
mod kinds;
mod rules;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

use anyhow::{Result, ensure};
use calitrace_tests::{Lab, Need, lab::netfilter::Backend};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, with},
    test,
};
use kinds::{Expected, Kind, OPEN};

pub(crate) const TESTS: &[Test] = &[
    test("a_thousand_packets_of_many_fates", || thousand(Backend::Nft)),
    test("a_thousand_packets_with_iptables_legacy", || {
        thousand(Backend::Legacy)
    }),
    test("a_thousand_packets_with_nftables", || thousand(Backend::Native)).needs(&[Need::Program("nft")]),
    test("the_first_drop_after_a_change_is_named", || {
        changing::first_drop(Backend::Nft)
    }),
    test("the_first_drop_after_a_change_of_nftables_is_named", || {
        changing::first_drop(Backend::Native)
    })
    .needs(&[Need::Program("nft")]),
    test("rules_that_are_rewritten_all_the_time", || {
        changing::rewritten(Backend::Nft)
    }),
    test("rules_of_nftables_that_are_rewritten_all_the_time", || {
        changing::rewritten(Backend::Native)
    })
    .needs(&[Need::Program("nft")]),
];

/// Sends a packet of each number's kind, in the order of the numbers, and returns how many of each kind went.
fn send(lab: &Lab, kinds: &[Kind], numbers: impl Iterator<Item = usize>) -> Result<Vec<u64>> {
    let sockets: Vec<UdpSocket> = lab.namespace("pod1")?.within(|| {
        kinds
            .iter()
            .map(|kind| {
                let socket = UdpSocket::bind((kind.src.unwrap_or(Ipv4Addr::UNSPECIFIED), 0))?;
                if let Some(ttl) = kind.ttl {
                    socket.set_ttl(ttl)?;
                }
                Ok(socket)
            })
            .collect()
    })?;
    let mut sent = vec![0; kinds.len()];
    for (count, number) in numbers.enumerate() {
        // An ICMP error that came meanwhile is told by the next call, which then sends nothing.
        let mut datagram = [0; 64];
        datagram[..8].copy_from_slice(&count.to_be_bytes());
        let mut left = 3;
        while let Err(error) = sockets[number].send_to(&datagram, kinds[number].to) {
            left -= 1;
            ensure!(left > 0, "cannot send to {}: {error}", kinds[number].to);
        }
        sent[number] += 1;
        // As many errors a second as the kernel sends (`net.ipv4.icmp_msgs_per_sec`: 1000).
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(sent)
}

/// The traces of each kind.
fn by_kind<'a>(packets: &'a [Value], kinds: &[Kind], pod: Ipv4Addr) -> Vec<Vec<&'a Value>> {
    let is_of = |packet: &Value, kind: &Kind| {
        let flow = &packet["flow"];
        flow["proto"] == "udp"
            && flow["src"] == kind.src.unwrap_or(pod).to_string()
            && flow["dst"] == kind.to.ip().to_string()
            && flow["dst_port"] == kind.to.port()
    };
    kinds
        .iter()
        .map(|kind| packets.iter().filter(|packet| is_of(packet, kind)).collect())
        .collect()
}

fn thousand(backend: Backend) -> Result<()> {
    const COUNT: usize = 1_000;
    let lab = kinds::lab(backend)?;
    let (kinds, pod) = (kinds::kinds(&lab)?, lab.pod("pod1")?.address);
    let servers = kinds::RECEIVERS.map(|pod| lab.udp_server(pod, OPEN, false));
    let servers: Vec<_> = servers.into_iter().collect::<Result<_>>()?;
    // The twin: what is dropped by faults arrives where there are none.
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    send(
        &lab,
        &kinds,
        (0..3 * kinds.len()).map(|number| number % kinds.len()),
    )?;
    let packets = watch.stop()?.packets()?;
    for (kind, traces) in kinds.iter().zip(by_kind(&packets, &kinds, pod)) {
        ensure!(traces.len() == 3, "{}: {} traces", kind.name, traces.len());
        for trace in traces {
            ensure!(
                trace["verdict"]
                    .as_str()
                    .is_some_and(|verdict| kind.verdict_without.split('|').any(|one| one == verdict)),
                "{} without the faults: {trace:#}",
                kind.name
            );
        }
    }

    rules::break_it(&lab)?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let counts_before = rules::counts(&lab, &kinds)?;
    // Any order, the same each time (Knuth, MMIX).
    let mut state = 1_u64;
    let numbers = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % kinds.len()
    });
    let sent = send(&lab, &kinds, numbers.take(COUNT))?;
    let packets = watch.stop()?.packets()?;
    let counts_after = rules::counts(&lab, &kinds)?;
    servers
        .into_iter()
        .try_for_each(|server| server.stop().map(drop))?;
    let mut wrong: BTreeMap<&str, (usize, &Value)> = BTreeMap::new();
    for (index, traces) in by_kind(&packets, &kinds, pod).into_iter().enumerate() {
        let kind = &kinds[index];
        ensure!(
            traces.len() as u64 == sent[index],
            "{}: {} packets, {} traces",
            kind.name,
            sent[index],
            traces.len()
        );
        for trace in traces {
            if !is_right(trace, &kind.expected) {
                wrong.entry(kind.name).or_insert((0, trace)).0 += 1;
            }
        }
        let counted = counts_after[index] - counts_before[index];
        ensure!(
            kind.expected.rule.is_none() || counted == sent[index],
            "{}: {} packets, {counted} by the rule's counter",
            kind.name,
            sent[index]
        );
    }
    ensure!(
        wrong.is_empty(),
        "how many are wrong, and one of each: {wrong:#?}"
    );
    Ok(())
}

fn is_right(trace: &Value, expected: &Expected) -> bool {
    let drop = &trace["drop"];
    let named = expected.cause.is_none_or(|(cause, name)| {
        let culprits = drop["culprits"].as_array().map(Vec::as_slice).unwrap_or_default();
        drop["node"] == expected.node
            && culprits.len() == 1
            && culprits[0]["cause"] == cause
            && culprits[0]["name"].as_str() == name
    });
    trace["verdict"] == expected.verdict && named
}
