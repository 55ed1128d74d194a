//! What is to be done, validated: all that the rest of the program learns of the command line.

use std::{num::NonZeroU64, path::PathBuf, time::Duration};

use ipnet::IpNet;

use crate::{
    calico::topology::Place,
    filter::Filter,
    kernel::Probes,
    sink::{FileFormat, Format},
};

/// A command with all it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What to do.
    pub command: Command,
    /// How much to log on standard error: 0 warnings, 1 information, 2 and above the kernel side's debug logs too.
    pub verbose: u8,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Trace live traffic.
    Watch(Watch),
    /// Trace what event logs hold.
    Read(Read),
    /// Show the nodes of this machine.
    Topology(Topology),
    /// Show what works on this machine.
    Doctor(Doctor),
}

/// Trace live traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Where to trace.
    pub nodes: Nodes,
    /// What is shown, and how.
    pub view: View,
    /// Stop after this time.
    pub duration: Option<Duration>,
    /// Wait for Calico nodes where there are none yet.
    pub wait: bool,
    /// By what to observe functions of the kernel, beside interfaces and drops.
    pub functions: Probes,
    /// BTF of the running kernel, instead of `/sys/kernel/btf/vmlinux`.
    pub btf: Option<PathBuf>,
    /// Attach by TCX where the kernel has it; otherwise always by clsact.
    pub tcx: bool,
    /// Size of the ring buffer in bytes, a power of two.
    pub ring_size: u32,
    /// UDP port by which VXLAN is recognised.
    pub vxlan_port: u16,
}

/// Trace what event logs hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// The logs, merged in order of time.
    pub files: Vec<PathBuf>,
    /// What is shown, and how.
    pub view: View,
}

/// Show the nodes of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Which nodes.
    pub nodes: Nodes,
    /// As JSON.
    pub json: bool,
    /// Only the path between these two.
    pub between: Option<(Place, Place)>,
}

/// Show what works on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doctor {
    /// Remove what killed runs left behind, instead.
    pub clean: bool,
    /// Which nodes.
    pub nodes: Nodes,
}

/// Which namespaces are nodes, and which of them count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// Only these network namespaces: names, inode numbers or paths; all without.
    pub netns: Vec<String>,
    /// Only nodes with these names; all without.
    pub names: Vec<String>,
    /// Prefixes of service addresses; found out without.
    pub service_cidrs: Vec<IpNet>,
    /// What names of workload interfaces begin with.
    pub interface_prefixes: Vec<String>,
}

impl Nodes {
    /// That there are none, as the end of a sentence.
    #[must_use]
    pub fn absent(&self) -> String {
        let prefixes: Vec<String> = self
            .interface_prefixes
            .iter()
            .map(|prefix| format!("{prefix}*"))
            .collect();
        let place = match (self.netns.as_slice(), self.names.as_slice()) {
            ([], []) => "in any network namespace of this machine".to_owned(),
            (netns, []) => format!("in the network namespace {}", netns.join(", ")),
            (_, names) => format!("named {}", names.join(", ")),
        };
        format!(
            "no Calico node {place} (it would have interfaces {} with routes to pods, or a tunnel device and an \
             address block)",
            prefixes.join(", ")
        )
    }
}

impl From<Nodes> for crate::calico::Options {
    fn from(nodes: Nodes) -> Self {
        Self {
            interface_prefixes: nodes.interface_prefixes,
            netns: nodes.netns,
            nodes: nodes.names,
            service_cidrs: nodes.service_cidrs,
        }
    }
}

/// What is shown, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Which packet traces.
    pub filter: Filter,
    /// Their form on standard output.
    pub format: Format,
    /// Files written beside it.
    pub files: Vec<OutputFile>,
    /// Stop after so many packet traces.
    pub count: Option<NonZeroU64>,
    /// Packet traces that may be open at once, at least one.
    pub max_open: usize,
}

/// A file to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputFile {
    /// Its path.
    pub path: PathBuf,
    /// What is written, as its ending says.
    pub format: FileFormat,
}
