//! Two captures, of one node alone each, are merged: the same traces as one capture of both nodes shows.
//!
//! The nodes of a lab share a kernel, so that an `sk_buff` lives on from node to node. No cluster's does: the second log is
//! rewritten as another machine would have made it, with `sk_buff` addresses and a clock of its own.

use std::{
    collections::BTreeMap,
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use calitrace::event::{Fact, Item, LogReader, LogWriter};
use calitrace_tests::{Encapsulation, Lab, Options};
use serde_json::{Map, Value};

use crate::{
    Test,
    log::mixed_traffic,
    support::{IPIP, Watch, at_interfaces, goes, only, run, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("two_captures_merged_are_one_over_vxlan", || {
        merged(Encapsulation::Vxlan)
    }),
    test("two_captures_merged_are_one_over_tunl0", || {
        merged(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("two_captures_merged_are_one_without_encapsulation", || {
        merged(Encapsulation::None)
    }),
];

/// By how much the second clock is ahead, and by how much more each second: one in so many.
const AHEAD: u64 = 3_700_000_000;
const DRIFT: u64 = 4_000;
/// What its time of day is wrong by.
const WRONG: u64 = 500_000_000;

fn merged(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..Options::default()
    })?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let [first, second, moved] =
        ["first", "second", "moved"].map(|name| folder.path().join(name).with_extension("jsonl"));
    let alone = |node: &str, log: &Path| {
        let mut arguments = only(&lab, &[node]);
        arguments.extend(["-w".to_owned(), log.display().to_string()]);
        Watch::start(&arguments)
    };
    let both = Watch::start(&with(&lab, &["-o", "json"]))?;
    let watches = [alone("minikube", &first)?, alone("minikube-m02", &second)?];
    mixed_traffic(&lab)?;
    lab.ping("pod2", lab.pod("pod1")?.ip(), 3, &[])?;
    for watch in watches {
        watch.stop()?;
    }
    let both = both.stop()?.packets()?;
    // Real machines tell their own boot id; the logs of this one, whose clock is one, tell the times that are true.
    move_to_another_machine(&second, &moved)?;
    let truth = read(&[&first, &second])?;
    same_traces("two captures with one clock", &both, &truth)?;
    for order in [[&first, &moved], [&moved, &first]] {
        let read = read(&order)?;
        same_traces("two captures with a clock each", &both, &read)?;
        within_the_bound(&truth, &read)?;
    }
    Ok(())
}

fn read(logs: &[&PathBuf]) -> Result<Vec<Value>> {
    let mut arguments = vec!["read".to_owned(), "-o".to_owned(), "json".to_owned()];
    arguments.extend(logs.iter().map(|log| log.display().to_string()));
    let finished = run(&arguments)?;
    ensure!(finished.status.success(), "{}", finished.stderr);
    finished.packets()
}

/// Writes a log as a machine with another clock, other `sk_buff` addresses and other numbers of namespaces would.
fn move_to_another_machine(from: &Path, to: &Path) -> Result<()> {
    let file = File::open(from).with_context(|| format!("open {}", from.display()))?;
    let mut log = LogWriter::new(File::create(to).with_context(|| format!("create {}", to.display()))?);
    let mut start = None;
    for item in LogReader::new(BufReader::new(file), from.display().to_string())? {
        let mut item = item?;
        if let Some(time) = item.time_mut() {
            let start = *start.get_or_insert(*time);
            *time += AHEAD + time.saturating_sub(start) / DRIFT;
        }
        item.namespaces_mut(|netns| {
            if *netns != 0 {
                *netns += 1;
            }
        });
        match &mut item {
            Item::Header(header) => "of another machine".clone_into(&mut header.boot_id),
            Item::Observation(observation) if observation.skb != 0 => observation.skb ^= 0x7_0000,
            Item::Fact(Fact::Clock(clock)) => clock.realtime += WRONG,
            _ => {}
        }
        log.write(&item)
            .with_context(|| format!("write {}", to.display()))?;
    }
    log.flush().with_context(|| format!("write {}", to.display()))
}

/// Whether the same packets have the same traces, but for ids and times.
fn same_traces(what: &str, both: &[Value], merged: &[Value]) -> Result<()> {
    let mut left: BTreeMap<String, i64> = BTreeMap::new();
    for (packets, count) in [(both, 1), (merged, -1)] {
        for packet in packets.iter().filter(|packet| is_ours(packet)) {
            *left.entry(timeless(packet).to_string()).or_default() += count;
        }
    }
    left.retain(|_, count| *count != 0);
    ensure!(
        both.iter().filter(|packet| is_ours(packet)).count() > 50,
        "{} packets",
        both.len()
    );
    ensure!(
        left.is_empty(),
        "{what}: more often (+) or less often (-) in one capture of both nodes: {left:#?}"
    );
    Ok(())
}

/// What the test sent: hosts announce themselves at any time, with one capture ended and another not.
fn is_ours(packet: &Value) -> bool {
    let flow = &packet["flow"];
    flow["proto"] == "tcp" || flow["proto"] == "udp" || flow["icmp_id"].is_u64()
}

/// What a trace says besides its id and times; of its observations those at interfaces.
fn timeless(packet: &Value) -> Value {
    let chosen = |value: &Value, names: &[&str]| -> Value {
        let fields = names.iter().map(|name| ((*name).to_owned(), value[name].clone()));
        Value::Object(fields.collect::<Map<_, _>>())
    };
    let each = |list: &Value, names: &[&str]| -> Value {
        let values = list.as_array().into_iter().flatten();
        values.map(|value| chosen(value, names)).collect()
    };
    let mut told = chosen(
        packet,
        &["flow", "length", "ttl", "verdict", "nat", "retransmit", "bypass"],
    );
    // Not by which rule: that is as the rules were read last, by each capture at its own time.
    let drop = &packet["drop"];
    if drop.is_object() {
        told["drop"] = chosen(
            drop,
            &["reason", "location", "node", "interface", "before", "netfilter"],
        );
    }
    told["answer"] = chosen(&packet["answer"], &["kind", "address"]);
    told["hops"] = each(
        &packet["hops"],
        &["ttl", "address", "node", "pod", "certainty", "reason"],
    );
    told["observations"] = each(
        &at_interfaces(packet).cloned().collect(),
        &["node", "interface", "hook", "direction", "ttl", "length", "encap"],
    );
    told
}

/// Whether the times of the merged view are wrong by no more than it says.
fn within_the_bound(truth: &[Value], merged: &[Value]) -> Result<()> {
    let mut compared = 0;
    for (from, to) in [
        ("10.244.120.67", "10.244.205.193"),
        ("10.244.205.193", "10.244.120.67"),
    ] {
        let of = |packets: &[Value]| -> Vec<Value> {
            let mut found: Vec<Value> = packets
                .iter()
                .filter(|packet| goes(packet, "icmp", from, to) && packet["ttl"] == 64)
                .cloned()
                .collect();
            found.sort_by_key(|packet| packet["start"].as_str().map(str::to_owned));
            found
        };
        let (truth, merged) = (of(truth), of(merged));
        ensure!(truth.len() == merged.len(), "{truth:#?}\n{merged:#?}");
        for (truth, merged) in truth.iter().zip(&merged) {
            let hops = [truth, merged].map(|packet| packet["hops"].as_array().cloned().unwrap_or_default());
            for (truth, merged) in hops[0].iter().zip(&hops[1]) {
                let (Some(truth), Some(read)) = (truth["arrived_ns"].as_u64(), merged["arrived_ns"].as_u64())
                else {
                    continue;
                };
                let bound = merged["clock_bound_ns"]
                    .as_u64()
                    .with_context(|| format!("how exact it is: {merged:#}"))?;
                // What a clock that runs fast gains within the node, and a nanosecond for each rounding.
                let gained = truth / DRIFT + 2;
                ensure!(
                    truth.abs_diff(read) <= bound + gained,
                    "arrived after {truth} ns; with clocks that disagree {merged:#}"
                );
                compared += usize::from(bound > 0);
            }
        }
    }
    ensure!(compared > 10, "{compared} times depended on the estimate");
    Ok(())
}
