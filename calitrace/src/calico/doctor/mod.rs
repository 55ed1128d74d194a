//! What is wrong with a node, as far as its tables and settings tell: each finding a sentence, and what would mend it.
//! [`check`] is pure; [`Evidence::read`] reads what it judges beside the tables, and changes nothing.
//!
//! A family of faults is a file with one function in [`FAMILIES`].

mod checksums;
mod conntrack;
mod evidence;
mod fallback;
mod firewall;
mod gateway;
mod mtu;
mod plugins;
mod reverse_path;
mod strangers;
#[cfg(test)]
mod testing;
mod tunnels;
mod workloads;

use ipnet::IpNet;

pub use evidence::{Conntrack, Evidence, Sysctls};
pub use fallback::FallbackTunnels;
pub use firewall::Firewall;
pub(super) use firewall::is_calico;

use super::view::NodeView;
use crate::{
    event::{self, Role},
    route::{Link, Snapshot},
};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Packets are lost.
    Problem,
    /// Packets may be lost, or less can be told of them.
    Note,
}

/// Something that is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Name of the node.
    pub node: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong and what follows from it: a sentence.
    pub what: String,
    /// What would mend it: a sentence.
    pub remedy: String,
}

/// All that is looked for.
const FAMILIES: [fn(&mut Findings<'_>); 9] = [
    gateway::check,
    reverse_path::check,
    tunnels::check,
    strangers::check,
    mtu::check,
    conntrack::check,
    checksums::check,
    plugins::check,
    workloads::check,
];

/// All that is wrong with a node, problems first.
pub fn check(view: &NodeView, evidence: &Evidence) -> Vec<Finding> {
    judge(Subject::of(view), evidence)
}

fn judge(node: Subject<'_>, evidence: &Evidence) -> Vec<Finding> {
    let mut findings = Findings {
        node,
        evidence,
        all: Vec::new(),
    };
    for family in FAMILIES {
        family(&mut findings);
    }
    findings.all.sort_by_key(|finding| finding.severity);
    findings.all
}

/// What of a node is looked at.
#[derive(Clone)]
struct Subject<'a> {
    name: &'a str,
    interfaces: &'a [event::Interface],
    routes: &'a [event::Route],
    pods: &'a [event::Pod],
    local_blocks: &'a [IpNet],
    remote_blocks: &'a [IpNet],
    /// Named as workload interfaces, but no pod's.
    without_pod: Vec<&'a Link>,
    snapshot: &'a Snapshot,
}

impl<'a> Subject<'a> {
    fn of(view: &'a NodeView) -> Self {
        Self {
            name: &view.node.name,
            interfaces: &view.interfaces,
            routes: &view.routes,
            pods: &view.pods,
            local_blocks: &view.local_blocks,
            remote_blocks: &view.remote_blocks,
            without_pod: view.devices_without_pod().collect(),
            snapshot: &view.snapshot,
        }
    }

    fn with(&self, role: Role) -> impl Iterator<Item = &'a event::Interface> {
        let interfaces: &'a [event::Interface] = self.interfaces;
        interfaces.iter().filter(move |interface| interface.role == role)
    }

    /// The routes to other nodes' blocks.
    fn to_blocks(&self) -> impl Iterator<Item = &'a event::Route> {
        let (routes, blocks): (&'a [event::Route], &'a [IpNet]) = (self.routes, self.remote_blocks);
        routes.iter().filter(|route| blocks.contains(&route.prefix))
    }

    /// The workload interfaces of which something holds.
    fn workload_names(&self, holds: impl Fn(&event::Interface) -> bool) -> Vec<String> {
        let workloads = self.with(Role::Workload).filter(|interface| holds(interface));
        workloads.map(|interface| interface.name.clone()).collect()
    }
}

struct Findings<'a> {
    node: Subject<'a>,
    evidence: &'a Evidence,
    all: Vec<Finding>,
}

impl Findings<'_> {
    fn problem(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(Severity::Problem, what, remedy);
    }

    fn note(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(Severity::Note, what, remedy);
    }

    fn add(&mut self, severity: Severity, what: impl Into<String>, remedy: impl Into<String>) {
        self.all.push(Finding {
            node: self.node.name.to_owned(),
            severity,
            what: what.into(),
            remedy: remedy.into(),
        });
    }
}

/// As many names as are worth reading, and how many more there are.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len() {
        0..=SHOWN => shown,
        all => format!("{shown} and {} more", all - SHOWN),
    }
}
