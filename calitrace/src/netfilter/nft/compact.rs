//! Of a table's list what matters: without counters, handles and times, which change, and where drops alone are asked for,
//! without what only translates addresses.

use anyhow::{Context as _, Result};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use super::{Object, SetObject, hook, only};

#[derive(Deserialize)]
struct List {
    nftables: Vec<Listed>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Listed {
    Object(Object),
    Other(IgnoredAny),
}

/// The objects of the list of one table, one a line: its base chains that are no `nat` chains, and what those lead to. Empty if there
/// is none.
pub fn compact(list: &str) -> Result<String> {
    objects(list, |kind| kind != Some("nat"))
}

/// The same, with `nat` chains.
pub fn compact_with_nat(list: &str) -> Result<String> {
    objects(list, |_| true)
}

fn objects(list: &str, is_wanted: fn(Option<&str>) -> bool) -> Result<String> {
    let list: List = serde_json::from_str(list).context("read nft's list of a table")?;
    let mut objects: Vec<Object> = list
        .nftables
        .into_iter()
        .filter_map(|listed| match listed {
            Listed::Object(object) => Some(object),
            Listed::Other(_) => None,
        })
        .collect();
    for object in &mut objects {
        strip(object);
    }
    let needed = needed(&objects, is_wanted);
    let mut text = String::new();
    for object in &objects {
        let is_needed = match object {
            Object::Chain(chain) => needed.contains(chain.name.as_str()),
            Object::Rule(rule) => needed.contains(rule.chain.as_str()),
            Object::Set(set) | Object::Map(set) => needed.contains(format!("@{}", set.name).as_str()),
        };
        if is_needed {
            text.push_str(&serde_json::to_string(object).context("write an object of nftables")?);
            text.push('\n');
        }
    }
    Ok(text)
}

fn strip(object: &mut Object) {
    match object {
        Object::Chain(_) => {}
        Object::Rule(rule) => {
            rule.expr
                .retain(|statement| !matches!(only(statement), Some(("counter" | "last", _))));
            for statement in &mut rule.expr {
                if let Some(quota) = statement.get_mut("quota").and_then(Value::as_object_mut) {
                    quota.remove("used");
                }
            }
        }
        Object::Set(set) | Object::Map(set) => {
            if set.changes() {
                set.elem.clear();
            }
            for member in &mut set.elem {
                unwrap(member);
                if let Some(key) = member.as_array_mut().and_then(|pair| pair.first_mut()) {
                    unwrap(key);
                }
            }
        }
    }
}

/// A member without its counter and comment.
fn unwrap(member: &mut Value) {
    let value = member.get_mut("elem").and_then(|elem| elem.get_mut("val"));
    if let Some(value) = value.map(Value::take) {
        *member = value;
    }
}

/// The names of chains, and with an `@` of sets and maps, that packets come to from a hook by base chains of these types.
fn needed(objects: &[Object], is_wanted: fn(Option<&str>) -> bool) -> FxHashSet<&str> {
    let mut leads_to: FxHashMap<&str, Vec<&str>> = FxHashMap::default();
    let mut maps: FxHashMap<&str, &SetObject> = FxHashMap::default();
    let mut open = Vec::new();
    for object in objects {
        match object {
            Object::Chain(chain) => {
                let hook = chain.hook.as_deref().and_then(hook);
                if hook.is_some() && is_wanted(chain.r#type.as_deref()) {
                    open.push(chain.name.as_str());
                }
            }
            Object::Rule(rule) => {
                let named = leads_to.entry(&rule.chain).or_default();
                for statement in &rule.expr {
                    names(statement, named);
                }
            }
            Object::Set(set) | Object::Map(set) => {
                maps.insert(&set.name, set);
            }
        }
    }
    let mut needed = FxHashSet::default();
    while let Some(name) = open.pop() {
        if !needed.insert(name) {
            continue;
        }
        match name.strip_prefix('@').map(|name| maps.get(name)) {
            Some(Some(map)) => {
                for member in &map.elem {
                    names(member, &mut open);
                }
            }
            Some(None) => {}
            None => open.extend(leads_to.get(name).into_iter().flatten()),
        }
    }
    needed
}

/// Chains that are jumped to, and sets.
fn names<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::String(text) if text.starts_with('@') => found.push(text),
        Value::Array(values) => values.iter().for_each(|value| names(value, found)),
        Value::Object(members) => {
            for (name, value) in members {
                match (name.as_str(), value) {
                    ("target", Value::String(chain)) => found.push(chain),
                    _ => names(value, found),
                }
            }
        }
        _ => {}
    }
}
