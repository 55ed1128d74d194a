//! Reads the netfilter rules and IP sets of a node, and tells what of them is new.
//!
//! Rules are read by `iptables-save` and its like, and by `nft` where there are tables that those do not show, as in Calico's
//! nftables mode. What nftables has is read again only after a change, which the kernel counts.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    iter::zip,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use super::{clock, rules::Wanted};
use crate::{
    event::{Fact, IpSets, Netns, Rules, RulesRead},
    iptables::{self, SETS, Shown},
    netfilter::translated,
    nftables,
};

/// What is lost without the rules of iptables.
const NOT_NAMED: &str = "policies that drop are not named";

/// What was handed on already.
#[derive(Default)]
pub(super) struct Told {
    /// By node, tool, and whether they are IPv6's.
    texts: HashMap<(Netns, &'static str, bool), String>,
    /// Addresses that lead to pods, by what they were read from.
    translated: HashMap<(Netns, &'static str, bool), BTreeSet<IpNet>>,
    /// Of nodes whose rules of nftables were all read: their generation then, and whether they look into IP sets.
    generations: HashMap<Netns, (u32, bool)>,
    warned: HashSet<&'static str>,
}

impl Told {
    /// Forgets a node: one that comes later may have the same inode.
    pub(super) fn forget(&mut self, netns: Netns) {
        self.texts.retain(|(of, _, _), _| *of != netns);
        self.translated.retain(|(of, _, _), _| *of != netns);
        self.generations.remove(&netns);
    }

    /// All addresses that lead to pods by rules of the nodes.
    pub(super) fn translated(&self) -> BTreeSet<IpNet> {
        self.translated.values().flatten().copied().collect()
    }

    /// What is new of a node's rules, and that they were read, if all of them were: what could not be read may have changed.
    pub(super) fn read(&mut self, node: &Wanted) -> Vec<Fact> {
        let begun = clock::monotonic();
        let mut facts = Vec::new();
        let (mut look_into_sets, mut is_all) = if nftables::are_there() {
            self.read_nftables(node, &mut facts)
        } else {
            (false, true)
        };
        for tool in &iptables::LEGACY {
            let time = clock::monotonic();
            match node.handle.run(|| iptables::rules(tool)) {
                Ok(Shown::Rules(name, text)) => {
                    look_into_sets |= iptables::look_into_sets(&text);
                    facts.extend(self.of_iptables(node, time, (name, tool.ipv6), &text));
                }
                Ok(Shown::Nothing) => {}
                Ok(Shown::Missing) => self.warn(NOT_NAMED, node, &tool.is_missing()),
                Err(error) => {
                    is_all = false;
                    self.warn(NOT_NAMED, node, &error);
                }
            }
        }
        if look_into_sets {
            match self.read_sets(node) {
                Ok(fact) => facts.extend(fact),
                Err(error) => {
                    // Those that were never read are not known, and change nothing that is.
                    is_all &= !self.texts.contains_key(&(node.handle.inode(), SETS, false));
                    self.warn("which of several policies drops may stay open", node, &error);
                }
            }
        }
        if is_all {
            facts.push(Fact::RulesRead(RulesRead {
                time: begun,
                netns: node.handle.inode(),
            }));
        }
        facts
    }

    /// What is new of a node's rules in nftables, of iptables and of others. Whether they look into IP sets, and whether all
    /// were read.
    fn read_nftables(&mut self, node: &Wanted, facts: &mut Vec<Fact>) -> (bool, bool) {
        let netns = node.handle.inode();
        let generation = node.handle.run(nftables::generation);
        match (&generation, self.generations.get(&netns)) {
            (Ok(now), Some((before, look_into_sets))) if now == before => return (*look_into_sets, true),
            (Ok(_), _) => {}
            (Err(error), _) => log::debug!("node {}: {error:#}", node.name),
        }
        let (mut shown, mut missing) = (Vec::new(), Vec::new());
        let (mut look_into_sets, mut is_all) = (false, true);
        for tool in &iptables::NFT {
            let time = clock::monotonic();
            match node.handle.run(|| iptables::rules(tool)) {
                Ok(Shown::Rules(name, text)) => {
                    look_into_sets |= iptables::look_into_sets(&text);
                    if iptables::is_of_nftables(name, &text) {
                        shown.extend(tables_of(tool, &text));
                    }
                    facts.extend(self.of_iptables(node, time, (name, tool.ipv6), &text));
                }
                Ok(Shown::Nothing) => {}
                Ok(Shown::Missing) => missing.push(tool),
                Err(error) => {
                    is_all = false;
                    self.warn(NOT_NAMED, node, &error);
                }
            }
        }
        let time = clock::monotonic();
        match node.handle.run(|| own_tables(&shown)) {
            // Tables that a missing tool would have shown are among them.
            Ok(texts) => {
                for (text, ipv6) in zip(texts, [false, true]) {
                    facts.extend(self.rules(node, time, (Rules::NFT, ipv6), text));
                }
            }
            Err(error) => {
                is_all = false;
                let error = error.context("read the tables of nftables");
                self.warn("drops by rules that only nft shows are not named", node, &error);
                for tool in missing {
                    self.warn(NOT_NAMED, node, &tool.is_missing());
                }
            }
        }
        if let Some(generation) = generation.ok().filter(|_| is_all) {
            self.generations.insert(netns, (generation, look_into_sets));
        }
        (look_into_sets, is_all)
    }

    /// The members of a node's IP sets, if there are other ones.
    fn read_sets(&mut self, node: &Wanted) -> Result<Option<Fact>> {
        let (time, netns) = (clock::monotonic(), node.handle.inode());
        let text = members(&node.handle.run(iptables::sets)?);
        let is_new = self.is_new((netns, SETS, false), &text);
        Ok(is_new.then_some(Fact::IpSets(IpSets { time, netns, text })))
    }

    /// What a tool of iptables shows, if that is new.
    fn of_iptables(
        &mut self,
        node: &Wanted,
        time: u64,
        (name, ipv6): (&'static str, bool),
        text: &str,
    ) -> Option<Fact> {
        self.translated
            .insert((node.handle.inode(), name, ipv6), translated(text));
        self.rules(node, time, (name, ipv6), without_counters(text))
    }

    /// What a tool shows, if that is new.
    fn rules(
        &mut self,
        node: &Wanted,
        time: u64,
        (tool, ipv6): (&'static str, bool),
        text: String,
    ) -> Option<Fact> {
        let netns = node.handle.inode();
        self.is_new((netns, tool, ipv6), &text).then(|| {
            Fact::Rules(Rules {
                time,
                netns,
                tool: tool.to_owned(),
                ipv6,
                text,
            })
        })
    }

    fn is_new(&mut self, of: (Netns, &'static str, bool), text: &str) -> bool {
        let before = self.texts.entry(of).or_default();
        let is_new = before != text;
        if is_new {
            text.clone_into(before);
        }
        is_new
    }

    /// Once is enough: what fails is asked for after every drop.
    fn warn(&mut self, what: &'static str, node: &Wanted, error: &anyhow::Error) {
        let text = format!("{what} (node {}): {error:#}", node.name);
        if self.warned.insert(what) {
            log::warn!("{text}");
        } else {
            log::debug!("{text}");
        }
    }
}

/// The tables that a tool shows.
fn tables_of(tool: &iptables::Tool, text: &str) -> impl Iterator<Item = nftables::Table> {
    let family = if tool.ipv6 { "ip6" } else { "ip" };
    let names = text.lines().filter_map(|line| line.strip_prefix('*'));
    names.map(move |name| nftables::Table {
        family,
        name: name.to_owned(),
    })
}

/// What nftables' tables have that were not shown yet: for IPv4, and for IPv6.
fn own_tables(shown: &[nftables::Table]) -> Result<[String; 2]> {
    let mut texts = [String::new(), String::new()];
    for table in nftables::tables()? {
        if shown.contains(&table) {
            continue;
        }
        let text = nftables::list(&table)?.context("nft is not on the path")?;
        let [ipv4, ipv6] = &mut texts;
        if table.family != "ip6" {
            ipv4.push_str(&text);
        }
        if table.family != "ip" {
            ipv6.push_str(&text);
        }
    }
    Ok(texts)
}

/// The rules alone: counters change with every packet, and comment lines have the time.
fn without_counters(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut is_nat = false;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(table) = line.strip_prefix('*') {
            is_nat = table == "nat";
        }
        if is_nat {
            continue;
        }
        let line = match line.strip_prefix(':') {
            Some(_) => line.split_once(" [").map_or(line, |(chain, _)| chain),
            None => line,
        };
        kept.push_str(line);
        kept.push('\n');
    }
    kept
}

/// Sets and members alone: timeouts run down, and comments say nothing.
fn members(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    for line in text.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        if let ["create" | "add", _, _, ..] = words[..] {
            kept.push_str(&words[..3].join(" "));
            let options = words.get(3).unwrap_or(&"");
            // What changes whom a member stands for.
            for option in options.split(' ') {
                if ["nomatch", "netmask", "bitmask"].contains(&option) {
                    kept.push(' ');
                    kept.push_str(option);
                }
            }
            kept.push('\n');
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_with_every_packet_is_left_out() {
        let text = "# Generated at noon\n*nat\n:PREROUTING ACCEPT [1:2]\n-A PREROUTING -j X\nCOMMIT\n\
                    *filter\n:FORWARD DROP [3:4]\n:cali-FORWARD - [0:0]\n-A FORWARD -j cali-FORWARD\nCOMMIT\n";
        assert_eq!(
            without_counters(text),
            "*filter\n:FORWARD DROP\n:cali-FORWARD -\n-A FORWARD -j cali-FORWARD\nCOMMIT\n"
        );
    }

    #[test]
    fn of_sets_the_members_are_kept() {
        let text = "create front hash:net family inet hashsize 1024 maxelem 65536 timeout 600\n\
                    add front 10.0.0.0/8 timeout 599\nadd front 10.1.0.0/16 timeout 5 nomatch\n\
                    create nets hash:ip family inet hashsize 1024 maxelem 65536 netmask 24 bucketsize 12\n";
        assert_eq!(
            members(text),
            "create front hash:net\nadd front 10.0.0.0/8\nadd front 10.1.0.0/16 nomatch\ncreate nets hash:ip netmask\n"
        );
    }
}
