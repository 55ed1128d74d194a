//! Puts the fact that an observation needs before it: the address traceroute would print for the node that saw it.
//!
//! Facts are looked up when first needed and again after the node's links, addresses or routes changed, so that an
//! event log can be read on a machine that knows nothing of the node.

use std::{net::IpAddr, sync::Arc};

use rustc_hash::FxHashMap;

use crate::{
    event::{Fact, HopAddress, Netns, Observation},
    route::Lookup,
};

/// Remembered look-ups of one node. A flood of forged senders starts over instead of growing without bound.
const REMEMBERED: usize = 65_536;

/// Looks up hop addresses as observations need them.
#[derive(Debug, Default)]
pub(super) struct HopAddresses {
    nodes: FxHashMap<Netns, NodeLookups>,
}

#[derive(Debug)]
struct NodeLookups {
    lookup: Arc<Lookup>,
    /// Incremented when the node's routes changed: older answers are asked for again.
    generation: u32,
    known: FxHashMap<IpAddr, Known>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    generation: u32,
    address: Option<IpAddr>,
}

impl HopAddresses {
    /// A node whose kernel can be asked from now on.
    pub(super) fn add(&mut self, netns: Netns, lookup: Arc<Lookup>) {
        self.nodes.insert(
            netns,
            NodeLookups {
                lookup,
                generation: 0,
                known: FxHashMap::default(),
            },
        );
    }

    /// A node that is gone.
    pub(super) fn remove(&mut self, netns: Netns) {
        self.nodes.remove(&netns);
    }

    /// The node's links, addresses or routes changed.
    pub(super) fn invalidate(&mut self, netns: Netns) {
        if let Some(node) = self.nodes.get_mut(&netns) {
            node.generation = node.generation.wrapping_add(1);
        }
    }

    /// The fact that must stand before `observation`, if its node's answer is not known yet or has changed.
    pub(super) fn before(&mut self, observation: &Observation) -> Option<Fact> {
        let node = self.nodes.get_mut(&observation.netns)?;
        let towards = observation.packet.src;
        let former = node.known.get(&towards).copied();
        if former.is_some_and(|known| known.generation == node.generation) {
            return None;
        }
        let address = match node.lookup.hop_address(towards, None) {
            Ok(address) => address,
            Err(error) => {
                log::debug!(
                    "hop address of node {} towards {towards}: {error:#}",
                    observation.netns
                );
                None
            }
        };
        if node.known.len() >= REMEMBERED {
            node.known.clear();
        }
        node.known.insert(
            towards,
            Known {
                generation: node.generation,
                address,
            },
        );
        if former.is_some_and(|known| known.address == address) {
            return None;
        }
        Some(Fact::HopAddress(HopAddress {
            time: observation.time,
            netns: observation.netns,
            towards,
            address,
        }))
    }
}
