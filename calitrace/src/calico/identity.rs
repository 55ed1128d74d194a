//! Names of a node and its pods, looked up in the node's own root. Which files, and in which order; their meaning is
//! [`super::names`]', their safe reading [`super::root`]'s.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::Result;
use ipnet::IpNet;

use super::{names, names::Named, root::Root};
use crate::netns::{self, Found, Handle};

const NODE_NAME: &str = "var/lib/calico/nodename";
const ENDPOINT_STATUS: &str = "var/run/calico/endpoint-status";
const CNI_RESULTS: &str = "var/lib/cni/results";
const POD_LOGS: &str = "var/log/pods";
const API_SERVER_MANIFEST: &str = "etc/kubernetes/manifests/kube-apiserver.yaml";

/// Where a node's files lie.
#[derive(Debug)]
pub(super) struct Home {
    root: Option<Root>,
    /// The process that led there: it has the node's host name, too.
    process: Option<i32>,
}

impl Home {
    /// The root of the node in that namespace: the host's for the host's own, else that of a process in it.
    ///
    /// On a node in a container all kinds of processes share the namespace: the container's own, those of pods with host
    /// network (their root is their image's), and debuggers from outside (their root is ours). The container's own are those
    /// with another root than ours in the outermost PID namespace; the eldest of them is its init.
    pub(super) fn find(found: &Found) -> Result<Self> {
        let host = Root::open(Path::new("/"))?;
        let ours = Handle::open(Path::new("/proc/self/ns/net"))?;
        if found.inode() == ours.inode() {
            return Ok(Self {
                root: host,
                process: None,
            });
        }
        let host_identity = host.as_ref().map(Root::identity).transpose()?;
        let mut best: Option<(usize, i32, Root)> = None;
        for &pid in &found.pids {
            let Some(root) = Root::open(Path::new(&format!("/proc/{pid}/root")))? else {
                continue;
            };
            if Some(root.identity()?) == host_identity {
                continue;
            }
            let key = (pid_depth(pid), pid);
            if best.as_ref().is_none_or(|(depth, pid, _)| key < (*depth, *pid)) {
                best = Some((key.0, pid, root));
            }
        }
        let process = best
            .as_ref()
            .map(|(_, pid, _)| *pid)
            .or_else(|| found.pids.first().copied());
        Ok(Self {
            root: best.map(|(.., root)| root),
            process,
        })
    }

    /// It has a root: what is written there later will be found.
    pub(super) fn is_complete(&self) -> bool {
        self.root.is_some()
    }

    /// The node's name: Calico's own file, else its host name if it has one of its own.
    pub(super) fn node_name(&self) -> Result<Option<String>> {
        if let Some(root) = &self.root
            && let Some(name) = root
                .read(Path::new(NODE_NAME))?
                .as_deref()
                .and_then(names::node_name)
        {
            return Ok(Some(name));
        }
        let name = match self.process {
            Some(pid) => netns::host_name(pid)?,
            None if self.root.is_some() => nix::unistd::gethostname()?.into_string().ok(),
            None => None,
        };
        Ok(name.filter(|name| names::host_label(name)))
    }

    /// The service prefixes, where the node runs the API server.
    pub(super) fn service_ranges(&self) -> Result<Vec<IpNet>> {
        let Some(root) = &self.root else {
            return Ok(Vec::new());
        };
        let manifest = root.read(Path::new(API_SERVER_MANIFEST))?;
        Ok(manifest.as_deref().map(names::service_ranges).unwrap_or_default())
    }

    /// The pods behind workload interfaces: `namespace/name` by interface name. Each source is asked only for what the
    /// better ones before it did not tell: Felix, the CNI plugin, the kubelet.
    pub(super) fn pod_names(
        &self,
        interfaces: &[&str],
        prefixes: &[String],
    ) -> Result<BTreeMap<String, String>> {
        let mut wanted = Wanted {
            interfaces: interfaces.to_vec(),
            prefixes,
            known: BTreeMap::new(),
        };
        let Some(root) = &self.root else {
            return Ok(wanted.known);
        };
        for (directory, source) in [
            (ENDPOINT_STATUS, Source::Felix),
            (CNI_RESULTS, Source::Cni),
            (POD_LOGS, Source::Kubelet),
        ] {
            if wanted.interfaces.is_empty() {
                break;
            }
            let directory = Path::new(directory);
            for name in root.list(directory)? {
                let Some(name) = name.to_str() else { continue };
                let text = || root.read(&directory.join(name)).map(Option::unwrap_or_default);
                let named = match source {
                    Source::Felix => names::endpoint_status(name, &text()?),
                    Source::Cni => names::cni_result(&text()?),
                    Source::Kubelet => names::pod_log_directory(name),
                };
                if let Some(named) = named {
                    wanted.offer(&named);
                }
            }
        }
        Ok(wanted.known)
    }
}

#[derive(Clone, Copy)]
enum Source {
    Felix,
    Cni,
    Kubelet,
}

struct Wanted<'a> {
    interfaces: Vec<&'a str>,
    prefixes: &'a [String],
    known: BTreeMap<String, String>,
}

impl Wanted<'_> {
    fn offer(&mut self, named: &Named) {
        let candidates = named.interfaces(self.prefixes);
        if let Some(at) = self
            .interfaces
            .iter()
            .position(|wanted| candidates.iter().any(|name| name == wanted))
        {
            self.known
                .insert(self.interfaces.swap_remove(at).to_owned(), named.full_name());
        }
    }
}

/// How many PID namespaces deep a process is, as seen from here (`NSpid` in `/proc/PID/status`).
fn pid_depth(pid: i32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.map_or(usize::MAX, |pids| pids.split_ascii_whitespace().count())
}
