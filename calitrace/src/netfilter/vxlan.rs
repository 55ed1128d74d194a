//! Which UDP port the node's VXLAN has, by the rules that Felix has for it.

use super::{
    elements::Key,
    meaning,
    rules::{End, Rule, Ruleset, What},
};

impl Ruleset {
    /// The port (`vxlanPort`) that Felix' rules name for VXLAN; none where there are no such rules, or they name several.
    ///
    /// All that are about it have it as their only destination port, and say so in a comment: "Allow IPv4 VXLAN packets from
    /// allowed hosts", "Drop VXLAN encapped packets originating in workloads" (`felix/rules/{static,endpoints}.go`, v3.28 to
    /// v3.33, as `tests/felix` has them).
    pub(crate) fn vxlan_port(&self) -> Option<u16> {
        let chains = self.tables.values().flatten();
        let mut ports = chains
            .filter(|(name, _)| meaning::is_felix(name))
            .flat_map(|(_, chain)| &chain.rules)
            .filter_map(of_rule);
        let port = ports.next()?;
        ports.all(|other| other == port).then_some(port)
    }
}

fn of_rule(rule: &Rule) -> Option<u16> {
    let is_about_it = |comment: &String| comment.split(' ').any(|word| word == "VXLAN");
    if !rule.comments.iter().any(is_about_it) {
        return None;
    }
    let mut conditions = rule.matches.iter().filter(|condition| !condition.not);
    conditions.find_map(|condition| match &condition.what {
        What::Ports(End::Destination, ranges) => match ranges[..] {
            [(first, last)] if first == last => Some(first),
            _ => None,
        },
        // As nftables has it.
        What::Among(keys, elements) if keys[..] == [Key::Port(End::Destination)] => {
            elements.only().and_then(|port| u16::try_from(port).ok())
        }
        _ => None,
    })
}
