//! `calitrace topology`: what the tables of the nodes say, or the path between two places, as text or JSON.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};

use super::plan;
use crate::{
    calico::{self, topology::Topology},
    error::NothingToTrace,
    kernel,
    sink::Output,
};

/// Carries it out.
pub(super) fn run(plan: &plan::Topology) -> Result<()> {
    let nodes = calico::discover(&plan.nodes.clone().into())?;
    if nodes.is_empty() {
        return Err(NothingToTrace {
            why: plan.nodes.absent(),
        }
        .into());
    }
    let topology = match &plan.between {
        Some((from, to)) => with_kernel(Topology::between(&nodes, from, to)?),
        None => with_kernel(Topology::of(&nodes)?),
    };
    let mut output = Output::stdout();
    if plan.json {
        serde_json::to_writer(&mut output, &topology).map_err(io::Error::from)?;
        output.write_all(b"\n")?;
    } else if plan.between.is_some() {
        topology.write_paths(&mut output)?;
    } else {
        topology.write_text(&mut output)?;
    }
    output.flush().context("show the topology")
}

/// With what this kernel keeps from being seen.
fn with_kernel(mut topology: Topology) -> Topology {
    if !kernel::has_kprobes() {
        let paths = topology.paths.iter_mut().map(|path| &mut path.not_seen);
        let nodes = topology.nodes.iter_mut().map(|node| &mut node.not_seen);
        for not_seen in paths.chain(nodes) {
            not_seen.push(
                "What happens between two interfaces of a node (netfilter's hooks, the tunnel at work): this kernel has no \
                 kprobes."
                    .to_owned(),
            );
        }
    }
    topology
}
