//! The way through a node: the interfaces a packet passed there and the headers it was wrapped in.

use crate::correlate::{Name, PacketTrace, SightedEncap, Sighting};

/// A step of the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// An interface.
    Interface(Name),
    /// From here on the packet is carried in this outer header.
    Encapsulated(SightedEncap),
}

/// The ways of one packet.
#[derive(Debug)]
pub(super) struct Ways {
    hops: Vec<(u8, Vec<Step>)>,
    stray: Vec<Step>,
}

impl Ways {
    /// What it passed on the node of a hop.
    pub(super) fn of_hop(&self, ttl: u8) -> Vec<Step> {
        self.hops
            .iter()
            .find(|(number, _)| *number == ttl)
            .map(|(_, steps)| steps.clone())
            .unwrap_or_default()
    }

    /// What it passed on nodes that are no hop of it.
    pub(super) fn into_stray(self) -> Vec<Step> {
        self.stray
    }
}

/// Splits the sightings of a packet into those of one node after another, and gives each to the next hop on that node:
/// to the router where there is one, to the receiver where it is on the sender's own node.
pub(super) fn of(packet: &PacketTrace) -> Ways {
    let mut ways = Ways {
        hops: Vec::new(),
        stray: Vec::new(),
    };
    let mut hops = packet.hops.iter();
    let mut known = None;
    for stay in packet.observations.chunk_by(|one, next| one.node == next.node) {
        let steps = steps(stay, &mut known);
        let node = &stay[0].node;
        match hops
            .clone()
            .position(|hop| hop.node.is_some() && hop.node == *node)
        {
            Some(index) => ways.hops.extend(hops.nth(index).map(|hop| (hop.ttl, steps))),
            None => ways.stray.extend(steps),
        }
    }
    ways
}

fn steps(stay: &[Sighting], known: &mut Option<SightedEncap>) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for sighting in stay {
        if let Some(encap) = sighting.encap
            && known
                .is_none_or(|known| (known.src, known.dst, known.kind) != (encap.src, encap.dst, encap.kind))
        {
            *known = Some(encap);
            steps.push(Step::Encapsulated(encap));
        }
        let last = steps.iter().rev().find_map(|step| match step {
            Step::Interface(name) => Some(name),
            Step::Encapsulated(_) => None,
        });
        if let Some(interface) = &sighting.interface
            && last != Some(interface)
        {
            steps.push(Step::Interface(Name::clone(interface)));
        }
    }
    steps
}
