//! Bits of the mark that no packet has which comes to a hook.

use rustc_hash::FxHashMap;

use super::{
    meaning,
    rules::{Rule, Table, Target, What},
};

/// The bits by which Felix, from v3.29 on, tells the packets that a policy denies: one rule sets them, the next one drops what
/// has them (`CombineMatchAndActionsForProtoRule`, `felix/rules/policy.go`). They are not among those that Felix clears
/// (`allCalicoMarkBits`, `felix/rules/static.go`), so without this any rule that denies might have dropped any packet. What
/// other chains set is not among them.
pub(super) fn of_denied(tables: &FxHashMap<String, Table>) -> u32 {
    let (mut asked, mut set) = (0, 0);
    for (name, chain) in tables.values().flatten() {
        let rules = chain.rules.iter();
        if meaning::is_of_policy(name) {
            asked |= rules.filter_map(dropped).fold(0, |all, mask| all | mask);
        } else {
            set |= rules.map(set_by).fold(0, |all, bits| all | bits);
        }
    }
    asked & !set
}

/// The bits that a packet must have to be dropped by the rule.
fn dropped(rule: &Rule) -> Option<u32> {
    if !matches!(rule.target, Target::Drop | Target::Reject) {
        return None;
    }
    rule.matches.iter().find_map(|condition| match condition.what {
        What::Mark { value, mask } if value == mask && !condition.not => Some(mask),
        _ => None,
    })
}

/// What is taken from the connection's mark is not known, but a connection has none of a packet that was dropped.
fn set_by(rule: &Rule) -> u32 {
    match rule.target {
        Target::Mark { value, .. } => value.unwrap_or_default(),
        _ => 0,
    }
}
