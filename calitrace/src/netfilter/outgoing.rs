//! Felix' chain for `natOutgoing`, by which what pods send to outside the pools gets the node's address
//! (`felix/rules/static.go`, Calico 3.34): in the table `nat` of iptables, or in the table `calico` of nftables, where names of
//! chains begin with the table's (`felix/nftables/table_layer.go`).

use super::{
    packet::Asked,
    rules::{Chain, Rule, Ruleset, Target},
    sets::Sets,
    walk::{Truth, truth},
};

/// Tables, and what the chain is called there.
const CHAINS: [(&str, &str); 3] = [
    ("nat", "cali-nat-outgoing"),
    ("ip calico", "nat-cali-nat-outgoing"),
    ("ip6 calico", "nat-cali-nat-outgoing"),
];

impl Ruleset {
    /// Whether Felix gives any packet of a pod the node's address; none if its chain is not among these rules.
    #[must_use]
    pub fn has_masquerading(&self) -> Option<bool> {
        let mut rules = self.nat_outgoing()?.rules.iter();
        Some(rules.any(|rule| translates(rule) == Some(true)))
    }

    /// Whether Felix gives the packet another source; none if its chain is not among these rules, or they leave that open.
    /// Other chains that it leads to are not followed.
    #[must_use]
    pub fn masquerades(&self, packet: &Asked<'_>, sets: &Sets) -> Option<bool> {
        // What rules do that perhaps hold.
        let mut perhaps = Vec::new();
        let mut answer = false;
        for rule in &self.nat_outgoing()?.rules {
            let Some(translates) = translates(rule) else {
                continue;
            };
            match truth(rule, packet, sets) {
                Truth::Yes => {
                    answer = translates;
                    break;
                }
                Truth::Perhaps => perhaps.push(translates),
                Truth::No => {}
            }
        }
        perhaps
            .iter()
            .all(|translates| *translates == answer)
            .then_some(answer)
    }

    fn nat_outgoing(&self) -> Option<&Chain> {
        CHAINS
            .iter()
            .find_map(|(table, chain)| self.tables.get(*table)?.get(*chain))
    }
}

/// Whether what the rule holds for gets another source; none if the next rule decides.
fn translates(rule: &Rule) -> Option<bool> {
    match &rule.target {
        Target::Chain { name, .. } => {
            matches!(name.as_str(), "MASQUERADE" | "SNAT" | "{masquerade}" | "{snat}").then_some(true)
        }
        Target::Return | Target::Accept => Some(false),
        _ => None,
    }
}
