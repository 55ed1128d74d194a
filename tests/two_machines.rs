//! An event log of two nodes, as two captures would have made it on machines of their own: each with its own clock, its own
//! `sk_buff` addresses and namespaces, and what is known there only.

use std::{collections::HashMap, fs::File, path::PathBuf};

use anyhow::{Context as _, Result};
use calitrace::{
    event::{FORMAT, Fact, Header, Item, LogWriter, Netns, VERSION},
    source::file::Files,
};
use tempfile::TempDir;

/// The clock of the second machine shows this much more, and its time of day is wrong by half a second.
const AHEAD: u64 = 3_700_000_000;
const WRONG: u64 = 500_000_000;
/// The first machine had no time to write down its first observations for so long.
const STANDSTILL: u64 = 200_000_000;

/// The logs of the two machines.
#[derive(Debug)]
pub(crate) struct Logs {
    /// Goes with it.
    _folder: TempDir,
    paths: Vec<PathBuf>,
}

impl Logs {
    /// Reads them merged.
    pub(crate) fn read(&self) -> Result<Vec<Item>> {
        Files::open(&self.paths)?.collect()
    }
}

/// Cuts a log in two. None if its nodes are not two that a packet went between, whose clocks nothing could compare.
pub(crate) fn split(items: &[Item]) -> Result<Option<Logs>> {
    let mut nodes: Vec<Netns> = Vec::new();
    let mut pods: Vec<(Netns, Netns)> = Vec::new();
    for item in items {
        match item {
            Item::Fact(Fact::Node(node)) if !nodes.contains(&node.netns) => nodes.push(node.netns),
            Item::Fact(Fact::Pod(pod)) => pods.extend(pod.pod_netns.map(|netns| (netns, pod.netns))),
            _ => {}
        }
    }
    let machine_of = |netns: Netns| {
        let node = pods
            .iter()
            .find(|(pod, _)| *pod == netns)
            .map_or(netns, |(_, node)| *node);
        nodes.iter().position(|known| *known == node)
    };
    let mut seen = [false; 2];
    for item in items {
        if let Item::Observation(observation) = item
            && let Some(machine @ 0..2) = machine_of(observation.netns)
        {
            seen[machine] = true;
        }
    }
    if nodes.len() != 2 || seen != [true; 2] {
        return Ok(None);
    }
    let folder = TempDir::new().context("make a folder for the two logs")?;
    let paths: Vec<PathBuf> = (0..2)
        .map(|machine| folder.path().join(format!("{machine}.jsonl")))
        .collect();
    for (machine, path) in paths.iter().enumerate() {
        let mut log =
            LogWriter::new(File::create(path).with_context(|| format!("create {}", path.display()))?);
        let header = Header {
            format: FORMAT.into(),
            version: VERSION,
            program: "0.1.0".into(),
            boot_id: format!("machine {machine}"),
            host: format!("machine-{machine}"),
            kernel: "6.18.0".into(),
            hooks: Vec::new(),
            filter: None,
            drain_period: 10_000_000,
        };
        log.write(&Item::Header(header))?;
        // What no known namespace saw (the device is forgotten already) is seen where its `sk_buff` was seen last.
        let (mut skbs, mut stood_still) = (HashMap::new(), false);
        for item in items {
            let mut at = netns_of(item).map(|netns| machine_of(netns).unwrap_or(0));
            if let Item::Observation(observation) = item {
                match machine_of(observation.netns) {
                    Some(known) => drop(skbs.insert(observation.skb, known)),
                    None => at = skbs.get(&observation.skb).copied().or(at),
                }
            }
            if at.is_none_or(|at| at == machine) {
                if machine == 0
                    && let Item::Observation(observation) = item
                    && !std::mem::replace(&mut stood_still, true)
                {
                    log.write(&Item::Tick {
                        time: observation.time + STANDSTILL,
                    })?;
                }
                log.write(&if machine == 0 {
                    item.clone()
                } else {
                    moved(item.clone())
                })?;
            }
        }
        log.flush()?;
    }
    Ok(Some(Logs {
        _folder: folder,
        paths,
    }))
}

/// The namespace that an observation or a fact is about.
fn netns_of(item: &Item) -> Option<Netns> {
    let mut first = None;
    if matches!(item, Item::Observation(_) | Item::Fact(_)) {
        item.clone().namespaces_mut(|netns| {
            first.get_or_insert(*netns);
        });
    }
    first
}

/// An item as the second machine would have it: another clock, other numbers.
fn moved(mut item: Item) -> Item {
    if let Some(time) = item.time_mut() {
        *time += AHEAD;
    }
    // The first namespaces of each machine have the same numbers.
    item.namespaces_mut(|netns| *netns = netns.saturating_sub(1));
    match &mut item {
        Item::Observation(observation) if observation.skb != 0 => observation.skb ^= 0x7_0000,
        Item::Fact(Fact::Clock(clock)) => clock.realtime += WRONG,
        _ => {}
    }
    item
}
