//! `calitrace topology`: what the tables of the nodes say, as text or JSON.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};

use super::plan;
use crate::{
    calico::{self, topology::Topology},
    error::NothingToTrace,
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
    let topology = Topology::of(&nodes)?;
    let mut output = Output::stdout();
    if plan.json {
        serde_json::to_writer(&mut output, &topology).map_err(io::Error::from)?;
        output.write_all(b"\n")?;
    } else {
        topology.write_text(&mut output)?;
    }
    output.flush().context("show the topology")
}
