//! Reads the netfilter rules of nodes, on a thread of its own: twelve thousand rules take 0.1 s (`iptables-nft-save`
//! 1.8.9), and another 30 ms to parse.
//!
//! Rules are read by `iptables-save` and its like, which change nothing. Legacy tables are asked for only where there are
//! some: asking would load their modules.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::ErrorKind,
    process::{Command, Stdio},
    sync::mpsc::{Receiver, Sender, channel},
};

use anyhow::{Context as _, Result, bail};
use tokio::sync::mpsc::UnboundedSender;

use super::{clock, control::Message};
use crate::{
    event::{Fact, IpSets, Netns, Rules},
    netns::Handle,
};

/// A tool that shows rules.
struct Tool {
    /// Its name, and the one it has where there is but one backend.
    names: [&'static str; 2],
    ipv6: bool,
    /// The list of its tables in a namespace; they are there only if it has lines.
    tables: Option<&'static str>,
}

const TOOLS: [Tool; 4] = [
    Tool {
        names: ["iptables-nft-save", "iptables-save"],
        ipv6: false,
        tables: None,
    },
    Tool {
        names: ["ip6tables-nft-save", "ip6tables-save"],
        ipv6: true,
        tables: None,
    },
    Tool {
        names: ["iptables-legacy-save", "iptables-save"],
        ipv6: false,
        tables: Some("/proc/thread-self/net/ip_tables_names"),
    },
    Tool {
        names: ["ip6tables-legacy-save", "ip6tables-save"],
        ipv6: true,
        tables: Some("/proc/thread-self/net/ip6_tables_names"),
    },
];

/// Shows the members of IP sets. Asked only where rules look into some: asking would load their module.
const SETS: &str = "ipset";

/// A node whose rules are wanted.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) handle: Handle,
    pub(super) name: String,
}

/// The reading thread. It ends when this is dropped, after what it is at: nobody has to wait for a tool that hangs.
#[derive(Debug)]
pub(super) struct Reader(Sender<Request>);

/// Nodes, and what is dropped when their rules were read.
type Request = (Vec<Wanted>, Sender<()>);

impl Reader {
    pub(super) fn start(messages: UnboundedSender<Message>) -> Result<Self> {
        let (requests, taken) = channel();
        std::thread::Builder::new()
            .name("rules".to_owned())
            .spawn(move || serve(&taken, &messages))
            .context("start the thread that reads netfilter rules")?;
        Ok(Self(requests))
    }

    /// Has the rules of these nodes read. What comes back is closed when that is done.
    pub(super) fn read(&self, nodes: Vec<Wanted>) -> Receiver<()> {
        let (done, waits) = channel();
        if self.0.send((nodes, done)).is_err() {
            log::debug!("the thread that reads netfilter rules is gone");
        }
        waits
    }
}

fn serve(requests: &Receiver<Request>, messages: &UnboundedSender<Message>) {
    let mut told = Told::default();
    while let Ok((nodes, _done)) = requests.recv() {
        for node in &nodes {
            for fact in told.read(node) {
                if messages.send(Message::Fact(fact)).is_err() {
                    return;
                }
            }
        }
    }
}

/// What was handed on already.
#[derive(Default)]
struct Told {
    texts: HashMap<(Netns, &'static str), String>,
    warned: HashSet<&'static str>,
}

impl Told {
    /// What is new of a node's rules.
    fn read(&mut self, node: &Wanted) -> Vec<Fact> {
        let mut facts = Vec::new();
        let netns = node.handle.inode();
        let mut look_into_sets = false;
        for tool in &TOOLS {
            let time = clock::monotonic();
            let (name, text) = match node.handle.run(|| rules(tool)) {
                Ok(Some(read)) => read,
                Ok(None) => continue,
                Err(error) => {
                    self.warn("policies that drop are not named", node, &error);
                    continue;
                }
            };
            look_into_sets |= text.contains(" --match-set ");
            if self.is_new(netns, name, &text) {
                facts.push(Fact::Rules(Rules {
                    time,
                    netns,
                    tool: name.to_owned(),
                    ipv6: tool.ipv6,
                    text,
                }));
            }
        }
        if look_into_sets {
            let time = clock::monotonic();
            match node
                .handle
                .run(|| output(&[SETS, "save"])?.context("it is not on the path"))
            {
                Ok(text) => {
                    let text = members(&text);
                    if self.is_new(netns, SETS, &text) {
                        facts.push(Fact::IpSets(IpSets { time, netns, text }));
                    }
                }
                Err(error) => {
                    let error = error.context(format!("read the members of IP sets with {SETS}"));
                    self.warn("which of several policies drops may stay open", node, &error);
                }
            }
        }
        facts
    }

    fn is_new(&mut self, netns: Netns, tool: &'static str, text: &str) -> bool {
        let before = self.texts.entry((netns, tool)).or_default();
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

/// What the tool shows in the namespace of this thread, and its name; `None` if there is nothing to show.
fn rules(tool: &Tool) -> Result<Option<(&'static str, String)>> {
    if let Some(list) = tool.tables {
        match fs::read_to_string(list) {
            Ok(text) if text.trim().is_empty() => return Ok(None),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {list}")),
        }
    }
    for name in tool.names {
        if let Some(text) = output(&[name])? {
            return Ok(Some((name, without_counters(&text))));
        }
    }
    bail!("neither {} is on the path", tool.names.join(" nor "));
}

/// What a command prints; `None` if it is not on the path.
fn output(words: &[&str]) -> Result<Option<String>> {
    let name = words[0];
    let output = match Command::new(name).args(&words[1..]).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("run {name}")),
    };
    if !output.status.success() {
        bail!(
            "{name} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
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
