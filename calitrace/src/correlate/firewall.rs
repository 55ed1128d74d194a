//! What is known of a node's netfilter rules, by all tools that show some.

use std::collections::BTreeMap;

use crate::{
    event::{IpSets, Rules},
    netfilter::{Asked, Culprit, Hook, Ruleset, Sets},
};

/// The rules of one node.
#[derive(Debug, Default)]
pub(super) struct Firewall {
    /// By the tool that shows them: whether they are IPv6's, and what they are.
    tools: BTreeMap<String, (bool, Ruleset)>,
    /// What they look into.
    sets: Sets,
}

impl Firewall {
    pub(super) fn learn(&mut self, rules: &Rules) {
        self.tools
            .insert(rules.tool.clone(), (rules.ipv6, Ruleset::parse(&rules.text)));
    }

    pub(super) fn learn_sets(&mut self, sets: &IpSets) {
        self.sets = Sets::parse(&sets.text);
    }

    /// The rules that may have dropped the packet at one of `hooks`.
    pub(super) fn culprits(&self, packet: &Asked<'_>, hooks: &[Hook]) -> Vec<Culprit> {
        let ipv6 = packet.src.is_ipv6();
        let mut culprits: Vec<Culprit> = Vec::new();
        for (_, rules) in self.tools.values().filter(|(of, _)| *of == ipv6) {
            for culprit in rules.culprits(packet, hooks, &self.sets) {
                if culprits.iter().all(|known| known.cause != culprit.cause) {
                    culprits.push(culprit);
                }
            }
        }
        culprits
    }
}
