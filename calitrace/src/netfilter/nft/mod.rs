//! Reads what `nft -j -n -s list` writes (1.0.6, JSON schema 1; `libnftables-json(5)`), one object a line: the tables of
//! nftables' own, as Calico has them in its nftables mode.
//!
//! What is not understood becomes a condition that may hold or not, as in [`super::save`]. Not looked at are chains of the
//! type `nat`, which drop nothing unless somebody tells them to, and those of other families than IP's (bridge, netdev, arp).

mod compact;
mod conditions;
mod show;
mod sources;
mod values;

use std::{cell::RefCell, sync::Arc};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    elements::Elements,
    marks,
    rules::{Base, Chain, Match, Rule, Ruleset, Table, Target, Verdicts, What},
    tiers,
    walk::Hook,
};

pub use compact::{compact, compact_with_nat};
pub use sources::Sources;

/// An object of the list; of others nothing is wanted.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Object {
    Chain(ChainObject),
    Rule(RuleObject),
    Set(SetObject),
    Map(SetObject),
}

#[derive(Debug, Deserialize, Serialize)]
struct ChainObject {
    family: String,
    table: String,
    name: String,
    /// Of base chains: `filter`, `route`, `nat`.
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hook: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prio: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
struct RuleObject {
    family: String,
    table: String,
    chain: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    comment: Option<String>,
    #[serde(default)]
    expr: Vec<Value>,
}

/// A set or a map.
#[derive(Debug, Deserialize, Serialize)]
struct SetObject {
    family: String,
    table: String,
    name: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    flags: Value,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    elem: Vec<Value>,
}

impl SetObject {
    /// Packets put members in, or time takes them out.
    fn changes(&self) -> bool {
        let is = |flag: &Value| matches!(flag.as_str(), Some("dynamic" | "timeout"));
        match &self.flags {
            Value::Array(flags) => flags.iter().any(is),
            flag => is(flag),
        }
    }
}

/// Sets and maps by table and name.
type Sets = FxHashMap<(String, String), SetObject>;

/// The table's name as `nft` wants it.
fn table_name(family: &str, table: &str) -> String {
    format!("{family} {table}")
}

impl Ruleset {
    /// The rules of a text, for packets of IPv4 or IPv6. Lines that are no objects are passed over.
    #[must_use]
    pub fn parse_nft(text: &str, ipv6: bool) -> Self {
        let own = if ipv6 { "ip6" } else { "ip" };
        let is_ours = |family: &str| family == own || family == "inet";
        let mut ruleset = Self::default();
        let mut sets = Sets::default();
        let mut rules = Vec::new();
        for line in text.lines() {
            match serde_json::from_str(line) {
                Ok(Object::Chain(chain)) if is_ours(&chain.family) => ruleset.add_chain(chain),
                Ok(Object::Rule(rule)) if is_ours(&rule.family) => rules.push(rule),
                Ok(Object::Set(set) | Object::Map(set)) if is_ours(&set.family) => {
                    sets.insert((table_name(&set.family, &set.table), set.name.clone()), set);
                }
                _ => {}
            }
        }
        ruleset.bases.sort_by_key(|base| base.priority);
        let objects = Objects {
            ipv6,
            sets: &sets,
            elements: RefCell::default(),
            verdicts: RefCell::default(),
        };
        for rule in &rules {
            let table = table_name(&rule.family, &rule.table);
            let read = Reader::of(&objects, &table, rule).read();
            let table = ruleset.tables.entry(table).or_default();
            table.entry(rule.chain.clone()).or_default().rules.extend(read);
        }
        ruleset.unset = marks::of_denied(&ruleset.tables);
        tiers::tell(&mut ruleset.tables);
        ruleset
    }

    fn add_chain(&mut self, chain: ChainObject) {
        let table = table_name(&chain.family, &chain.table);
        let hook = chain.hook.as_deref().and_then(hook);
        let hook = hook.filter(|_| chain.r#type.as_deref() != Some("nat"));
        if let Some(hook) = hook {
            self.bases.push(Base {
                hook,
                priority: chain.prio.unwrap_or_default(),
                table: table.clone(),
                chain: chain.name.clone(),
            });
        }
        let chains: &mut Table = self.tables.entry(table).or_default();
        chains.insert(
            chain.name,
            Chain {
                drops: chain.policy.as_deref() == Some("drop"),
                ..Chain::default()
            },
        );
    }
}

fn hook(name: &str) -> Option<Hook> {
    Hook::ALL
        .into_iter()
        .find(|hook| hook.name().eq_ignore_ascii_case(name))
}

/// What rules refer to.
struct Objects<'a> {
    ipv6: bool,
    sets: &'a Sets,
    /// Sets that were looked into.
    elements: RefCell<FxHashMap<(String, String), Arc<Elements>>>,
    verdicts: RefCell<FxHashMap<(String, String), Arc<Verdicts>>>,
}

/// Reads one rule. It may become several, as each of those does one thing.
struct Reader<'a> {
    objects: &'a Objects<'a>,
    table: &'a str,
    rule: &'a RuleObject,
    matches: Vec<Match>,
    read: Vec<Rule>,
}

/// The rule's further words do not matter.
struct Ends;

impl<'a> Reader<'a> {
    fn of(objects: &'a Objects<'a>, table: &'a str, rule: &'a RuleObject) -> Self {
        Self {
            objects,
            table,
            rule,
            matches: Vec::new(),
            read: Vec::new(),
        }
    }

    fn read(mut self) -> Vec<Rule> {
        let statements = self.rule.expr.iter();
        let ended = statements
            .map(|statement| self.statement(statement))
            .any(|end| end.is_some());
        if !ended && self.read.is_empty() {
            self.emit(Target::Next);
        }
        self.read
    }

    fn emit(&mut self, target: Target) {
        let drops = matches!(target, Target::Drop | Target::Reject | Target::Map(..));
        self.read.push(Rule {
            comments: self
                .rule
                .comment
                .as_deref()
                .and_then(comment)
                .into_iter()
                .collect(),
            matches: self.matches.clone(),
            target,
            text: drops.then(|| show::rule(&self.rule.expr, self.rule.comment.as_deref()).into()),
        });
    }

    fn unknown(&mut self) {
        self.matches.push(Match {
            not: false,
            what: What::Unknown,
        });
    }

    fn statement(&mut self, statement: &Value) -> Option<Ends> {
        let Some((word, body)) = only(statement) else {
            // What has no form in JSON is written as text: `jump { … }`.
            let text = statement.as_str().unwrap_or_default();
            self.unknown();
            if text.contains("drop") || text.contains("reject") {
                self.emit(Target::Drop);
            }
            return None;
        };
        if let Some(target) = verdict(word, body) {
            let ends = !matches!(target, Target::Next);
            if ends {
                self.emit(target);
            }
            return ends.then_some(Ends);
        }
        match word {
            "match" => match self.objects.conditions(self.table, body) {
                Some(conditions) => self.matches.extend(conditions),
                // It never holds.
                None => return Some(Ends),
            },
            "vmap" => {
                let (keys, implied) = self.objects.keys(&body["key"]);
                let Some(implied) = implied else { return Some(Ends) };
                self.matches.extend(implied);
                let verdicts = self.objects.verdicts(self.table, &keys, &body["data"]);
                self.emit(match verdicts {
                    Some(verdicts) => Target::Map(keys, verdicts),
                    None => elsewhere(word),
                });
                return Some(Ends);
            }
            "mangle" => {
                if values::is_mark(&body["key"]) {
                    let (value, mask) = values::new_mark(&body["value"]);
                    self.emit(Target::Mark { value, mask });
                    // They were about the mark as it was.
                    for condition in &mut self.matches {
                        if matches!(condition.what, What::Mark { .. }) {
                            condition.what = What::Unknown;
                        }
                    }
                }
            }
            "log" => {
                let prefix = body["prefix"].as_str().unwrap_or_default();
                self.emit(Target::Log(prefix.to_owned()));
            }
            "counter" | "notrack" | "dup" | "flow" | "tproxy" | "ct helper" | "ct timeout"
            | "ct expectation" | "last" => {}
            // A match of iptables', which holds whatever it says.
            "xt" if body["name"] == "comment" => {}
            // Puts the packet's values into a set, if they find room; a limit may be kept with each of them.
            "set" => {
                let element = &body["elem"];
                let element = element.get("elem").map_or(element, |wrapped| &wrapped["val"]);
                let (_, implied) = self.objects.keys(element);
                let Some(implied) = implied else { return Some(Ends) };
                self.matches.extend(implied);
                self.unknown();
            }
            // Others say what becomes of it.
            "queue" | "fwd" | "synproxy" | "snat" | "dnat" | "masquerade" | "redirect" => {
                self.emit(elsewhere(word));
                return Some(Ends);
            }
            _ => self.unknown(),
        }
        None
    }
}

/// No chain: whoever it is may accept a packet, or let it go on.
fn elsewhere(word: &str) -> Target {
    Target::Chain {
        name: format!("{{{word}}}"),
        goto: false,
    }
}

/// The one member of an object, as most of nftables' have.
fn only(value: &Value) -> Option<(&str, &Value)> {
    let (name, body) = value.as_object()?.iter().next()?;
    Some((name, body))
}

/// A verdict; none if it is something else.
fn verdict(word: &str, body: &Value) -> Option<Target> {
    let chain = |goto| Target::Chain {
        name: body["target"].as_str().unwrap_or_default().to_owned(),
        goto,
    };
    Some(match word {
        "accept" => Target::Accept,
        "drop" => Target::Drop,
        "reject" => Target::Reject,
        "return" => Target::Return,
        "continue" => Target::Next,
        "jump" => chain(false),
        "goto" => chain(true),
        _ => return None,
    })
}

/// What Felix says in a comment: all of a rule's comments in one, after the rule's digest (`cali:HASH; …`,
/// `felix/nftables/renderer.go`). Others' comments are as they are.
fn comment(comment: &str) -> Option<String> {
    let said = match comment.strip_prefix("cali:") {
        Some(felix) => felix.split_once(';').map_or("", |(_, said)| said),
        None => comment,
    };
    let said = said.trim();
    (!said.is_empty()).then(|| said.to_owned())
}

#[cfg(test)]
mod tests;
