//! The netfilter rules and IP sets of the namespace that the calling thread is in, as `iptables-save` and `ipset` show them.
//! Knows the tools; not what the rules mean.
//!
//! These tools change nothing. Legacy tables are asked for only where there are some, those of nftables only where the kernel
//! has it, and sets only where rules look into some: asking would load their modules.

use std::{
    fs,
    io::ErrorKind,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::nftables;

/// A tool that shows rules.
pub(crate) struct Tool {
    /// Its name, and the one it has where there is but one backend.
    names: [&'static str; 2],
    /// It shows IPv6's rules.
    pub(crate) ipv6: bool,
    /// The list of its tables in a namespace; they are there only if it has lines.
    tables: Option<&'static str>,
}

/// Those that show what iptables has in tables of nftables. To be asked only where those are there.
pub(crate) const NFT: [Tool; 2] = [
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
];

/// And in tables of its own.
pub(crate) const LEGACY: [Tool; 2] = [
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

/// All that can be asked here.
pub(crate) fn tools() -> impl Iterator<Item = &'static Tool> {
    let nft = if nftables::are_there() { &NFT[..] } else { &[] };
    nft.iter().chain(&LEGACY)
}

/// Shows the members of IP sets.
pub(crate) const SETS: &str = "ipset";

impl Tool {
    /// It shows what iptables has in tables of nftables.
    pub(crate) fn is_for_nftables(&self) -> bool {
        self.tables.is_none()
    }

    pub(crate) fn is_missing(&self) -> anyhow::Error {
        anyhow!("neither {} is on the path", self.names.join(" nor "))
    }
}

/// What a tool shows.
pub(crate) enum Shown {
    /// With the name by which it was found.
    Rules(&'static str, String),
    /// There is nothing to show.
    Nothing,
    /// The tool is not on the path.
    Missing,
}

/// What the tool shows.
pub(crate) fn rules(tool: &Tool) -> Result<Shown> {
    if let Some(list) = tool.tables {
        match fs::read_to_string(list) {
            Ok(text) if text.trim().is_empty() => return Ok(Shown::Nothing),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Shown::Nothing),
            Err(error) => return Err(error).with_context(|| format!("read {list}")),
        }
    }
    for name in tool.names {
        if let Some(text) = output(&[name])? {
            return Ok(Shown::Rules(name, text));
        }
    }
    Ok(Shown::Missing)
}

/// Whether the tool's tables are nftables', by its name or what it says of itself in the first line.
pub(crate) fn is_of_nftables(name: &str, text: &str) -> bool {
    name.contains("-nft-") || text.lines().next().is_some_and(|line| line.contains("nf_tables"))
}

/// Whether rules look into IP sets, so that these may be asked for.
pub(crate) fn look_into_sets(rules: &str) -> bool {
    rules.contains(" --match-set ")
}

/// All IP sets with their members.
pub(crate) fn sets() -> Result<String> {
    output(&[SETS, "save"])?
        .context("it is not on the path")
        .with_context(|| format!("read the members of IP sets with {SETS}"))
}

/// What a command prints; `None` if it is not on the path.
pub(crate) fn output(words: &[&str]) -> Result<Option<String>> {
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
