//! Which tier each policy belongs to. Chains of policies do not say it; those of endpoints do, which ask the policies of one tier
//! after those of another, and begin each with a comment (`felix/rules/endpoints.go`, from v3.29 on).

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::{
    meaning,
    rules::{Chain, Table, Target},
};

/// Tells each policy's chain its tier. A policy is of one tier, whoever it is asked for.
pub(super) fn tell(tables: &mut FxHashMap<String, Table>) {
    for table in tables.values_mut() {
        let mut tiers: Vec<(String, Arc<str>)> = Vec::new();
        for (name, chain) in &*table {
            if meaning::is_of_endpoint(name) {
                of_endpoint(chain, table, &mut tiers);
            }
        }
        for (policy, tier) in tiers {
            if let Some(chain) = table.get_mut(&policy) {
                chain.tier = Some(tier);
            }
        }
    }
}

fn of_endpoint(chain: &Chain, table: &Table, tiers: &mut Vec<(String, Arc<str>)>) {
    let mut tier: Option<Arc<str>> = None;
    for rule in &chain.rules {
        let begins = rule
            .comments
            .iter()
            .find_map(|comment| meaning::begun_tier(comment));
        if let Some(name) = begins {
            tier = Some(name.into());
        }
        let (Some(tier), Some(asked)) = (&tier, chain_of(&rule.target)) else {
            continue;
        };
        if meaning::is_policy(asked) {
            tiers.push((asked.to_owned(), Arc::clone(tier)));
        } else if meaning::is_of_group(asked)
            && let Some(group) = table.get(asked)
        {
            let policies = group.rules.iter().filter_map(|rule| chain_of(&rule.target));
            tiers.extend(policies.map(|policy| (policy.to_owned(), Arc::clone(tier))));
        }
    }
}

fn chain_of(target: &Target) -> Option<&str> {
    match target {
        Target::Chain { name, .. } => Some(name),
        _ => None,
    }
}
