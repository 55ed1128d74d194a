//! What Calico made of a namespace: whether it is a node, which devices belong to which pods, its blocks, tunnels and
//! neighbours. Reads tables through [`crate::route`] and files in the node's own root; knows nothing of packets.

mod anatomy;
mod cluster;
pub mod doctor;
mod identity;
pub mod names;
mod root;
pub mod topology;
mod view;

use std::sync::Arc;

use anyhow::{Context as _, Result};
use ipnet::IpNet;

pub use names::workload_interface;
pub use view::{NodeView, add_services, facts_changed, facts_gone};

use crate::{
    error::NoPermission,
    netns::{self, Found, Handle},
    route,
};

/// The interface prefix of a Calico that nobody configured.
pub const DEFAULT_PREFIX: &str = "cali";

/// Where to look, and for what.
#[derive(Clone, Debug)]
pub struct Options {
    /// Felix's `interfacePrefix`: what the names of workload interfaces begin with.
    pub interface_prefixes: Vec<String>,
    /// Namespaces to look at, by name, inode number or path; all if empty.
    pub netns: Vec<String>,
    /// Names of the nodes wanted; all if empty.
    pub nodes: Vec<String>,
    /// Service prefixes, where they are not to be found out.
    pub service_cidrs: Vec<IpNet>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            interface_prefixes: vec![DEFAULT_PREFIX.to_owned()],
            netns: Vec::new(),
            nodes: Vec::new(),
            service_cidrs: Vec::new(),
        }
    }
}

/// The Calico nodes on this host, by cluster and name. A namespace that vanishes while
/// it is looked at is none.
pub fn discover(options: &Options) -> Result<Vec<NodeView>> {
    let found = netns::list()?;
    let handles: Vec<Handle> = found.iter().map(|namespace| namespace.handle.clone()).collect();
    let wanted: Vec<Found> = if options.netns.is_empty() {
        found
    } else {
        options
            .netns
            .iter()
            .map(|name| netns::resolve(name, &found))
            .collect::<Result<_>>()?
    };
    let options = Arc::new(options.clone());
    let mut nodes: Vec<NodeView> = Vec::new();
    for namespace in &wanted {
        if nodes.iter().any(|node| node.netns() == namespace.inode()) {
            continue;
        }
        match look_at(namespace, &handles, &options) {
            Ok(Some(node)) if options.nodes.is_empty() || options.nodes.contains(&node.node.name) => {
                nodes.push(node);
            }
            Ok(_) => {}
            Err(error) if error.is::<NoPermission>() => return Err(error),
            // With everything to choose from, one namespace in a bad state must not hide the others.
            Err(error) if options.netns.is_empty() => {
                log::warn!(
                    "the network namespace {} is passed over: {error:#}",
                    namespace.inode()
                );
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("look at the network namespace {}", namespace.inode()));
            }
        }
    }
    cluster::assign(&mut nodes, &handles)?;
    nodes.sort_by_key(|node| (node.node.cluster, node.node.name.clone(), node.netns()));
    Ok(nodes)
}

fn look_at(namespace: &Found, all: &[Handle], options: &Arc<Options>) -> Result<Option<NodeView>> {
    let links = route::links(&namespace.handle)?;
    if !anatomy::may_be_node(&links, &options.interface_prefixes) {
        return Ok(None);
    }
    NodeView::read(namespace, all, options)
}
