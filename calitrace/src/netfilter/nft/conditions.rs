//! Conditions of nftables' rules: which values are looked at, and what they are compared with.

use std::sync::Arc;

use serde_json::Value;

use super::{Objects, only, values, verdict};
use crate::netfilter::{
    elements::{Element, Elements, Key, Range, WHOLE},
    rules::{End, Match, Target, Verdicts, Way, What},
};

fn is(what: What) -> Match {
    Match { not: false, what }
}

/// `RTN_LOCAL` (`include/uapi/linux/rtnetlink.h`).
const LOCAL: u64 = 2;

impl Objects<'_> {
    /// What must hold; none if it never does.
    pub(super) fn conditions(&self, table: &str, body: &Value) -> Option<Vec<Match>> {
        let (left, right) = (&body["left"], &body["right"]);
        let operator = body["op"].as_str().unwrap_or_default();
        let not = operator == "!=";
        let same = not || matches!(operator, "==" | "in");
        if let Some((fib, flags)) = fib(left) {
            let what = fib_condition(fib, &flags, right).filter(|_| same);
            let not = not && what.is_some();
            return Some(vec![Match {
                not,
                what: what.unwrap_or(What::Unknown),
            }]);
        }
        if let Some(("meta", meta)) = only(left)
            && meta["key"] == "nfproto"
        {
            // Rules of the family `inet` are for both.
            let asked = match right.as_str() {
                Some("ipv4") => Some(false),
                Some("ipv6") => Some(true),
                _ => match right.as_u64() {
                    // `NFPROTO_IPV4` and `NFPROTO_IPV6` (`include/uapi/linux/netfilter.h`).
                    Some(2) => Some(false),
                    Some(10) => Some(true),
                    _ => None,
                },
            };
            return match asked {
                Some(ipv6) if same => ((ipv6 == self.ipv6) != not).then(Vec::new),
                _ => Some(vec![is(What::Unknown)]),
            };
        }
        if let Some(mask) = values::mark_mask(left) {
            let what = match right.as_u64().map(u32::try_from) {
                Some(Ok(value)) if same => What::Mark { value, mask },
                _ => return Some(vec![is(What::Unknown)]),
            };
            return Some(vec![Match { not, what }]);
        }
        let (keys, implied) = self.keys(left);
        let mut conditions = implied?;
        let what = self.among(table, &keys, operator, right);
        let not = not && what != What::Unknown;
        conditions.push(Match { not, what });
        Some(conditions)
    }

    fn among(&self, table: &str, keys: &[Key], operator: &str, right: &Value) -> What {
        if keys == [Key::State] {
            return values::states(operator, right).map_or(What::Unknown, What::State);
        }
        if keys.contains(&Key::Unknown) {
            return What::Unknown;
        }
        let among = |elements| What::Among(keys.to_vec(), elements);
        if let Some(name) = right.as_str().and_then(|text| text.strip_prefix('@')) {
            return among(self.named(table, name, keys));
        }
        let elements = match (operator, only(right)) {
            ("==" | "!=", Some(("set", members))) => {
                let members = members.as_array().map_or(&[][..], Vec::as_slice);
                Elements::of(members.iter().map(|member| element(keys, member)), false)
            }
            ("==" | "!=", _) => Elements::of([element(keys, right)].into_iter(), false),
            ("<" | ">" | "<=" | ">=", _) => {
                let range = match keys {
                    [key] => values::range(*key, right).and_then(|range| compared(operator, range)),
                    _ => None,
                };
                let element = range.map(|range| Box::new([range]) as Element);
                Elements::of([element].into_iter(), false)
            }
            _ => return What::Unknown,
        };
        among(Arc::new(elements))
    }

    /// The elements of a named set.
    fn named(&self, table: &str, name: &str, keys: &[Key]) -> Arc<Elements> {
        let id = (table.to_owned(), name.to_owned());
        if let Some(known) = self.elements.borrow().get(&id) {
            return Arc::clone(known);
        }
        let elements = match self.sets.get(&id) {
            Some(set) if set.changes() => Elements::of([].into_iter(), true),
            Some(set) => Elements::of(set.elem.iter().map(|member| element(keys, member)), false),
            None => Elements::of([].into_iter(), true),
        };
        let elements = Arc::new(elements);
        self.elements.borrow_mut().insert(id, Arc::clone(&elements));
        elements
    }

    /// The verdicts of a map: one by name, or one written into the rule. None if it is not known.
    pub(super) fn verdicts(&self, table: &str, keys: &[Key], data: &Value) -> Option<Arc<Verdicts>> {
        if let Some(pairs) = data["set"].as_array() {
            return Some(Arc::new(entries(keys, pairs)));
        }
        let name = data.as_str()?.strip_prefix('@')?;
        let id = (table.to_owned(), name.to_owned());
        if let Some(known) = self.verdicts.borrow().get(&id) {
            return Some(Arc::clone(known));
        }
        // What packets put into it is not told.
        let map = self.sets.get(&id).filter(|map| !map.changes())?;
        let verdicts = Arc::new(entries(keys, &map.elem));
        self.verdicts.borrow_mut().insert(id, Arc::clone(&verdicts));
        Some(verdicts)
    }

    /// The values that an expression means, and what must hold for a packet to have them: a TCP port is one of a TCP
    /// segment. None if no packet of the family has them.
    pub(super) fn keys(&self, expression: &Value) -> (Vec<Key>, Option<Vec<Match>>) {
        let parts = match only(expression) {
            Some(("concat", Value::Array(parts))) => parts.as_slice(),
            _ => std::slice::from_ref(expression),
        };
        let mut keys = Vec::new();
        let mut implied = Some(Vec::new());
        for part in parts {
            let (key, needs) = self.key(part);
            keys.push(key);
            match needs {
                Needs::Nothing => {}
                Needs::Protocol(number) => {
                    if let Some(implied) = &mut implied {
                        implied.push(is(What::Protocol(number)));
                    }
                }
                Needs::OtherFamily => implied = None,
            }
        }
        (keys, implied)
    }

    fn key(&self, expression: &Value) -> (Key, Needs) {
        let nothing = |key| (key, Needs::Nothing);
        match only(expression) {
            Some(("payload", payload)) => {
                let field = payload["field"].as_str().unwrap_or_default();
                self.payload(payload["protocol"].as_str().unwrap_or_default(), field)
            }
            Some(("meta", meta)) => nothing(match meta["key"].as_str() {
                Some("l4proto") => Key::Protocol,
                Some("iifname" | "iif") => Key::Device(Way::In),
                Some("oifname" | "oif") => Key::Device(Way::Out),
                _ => Key::Unknown,
            }),
            Some(("ct", ct)) if ct["key"] == "state" => nothing(Key::State),
            _ => nothing(Key::Unknown),
        }
    }

    fn payload(&self, protocol: &str, field: &str) -> (Key, Needs) {
        let port = || match field {
            "sport" => Key::Port(End::Source),
            "dport" => Key::Port(End::Destination),
            _ => Key::Unknown,
        };
        let icmp = || match field {
            "type" => Key::IcmpType,
            "code" => Key::IcmpCode,
            _ => Key::Unknown,
        };
        match protocol {
            "ip" | "ip6" if (protocol == "ip6") != self.ipv6 => (Key::Unknown, Needs::OtherFamily),
            "ip" | "ip6" => {
                let key = match field {
                    "saddr" => Key::Address(End::Source),
                    "daddr" => Key::Address(End::Destination),
                    "protocol" | "nexthdr" => Key::Protocol,
                    _ => Key::Unknown,
                };
                (key, Needs::Nothing)
            }
            "tcp" => (port(), Needs::Protocol(6)),
            "udp" => (port(), Needs::Protocol(17)),
            "dccp" => (port(), Needs::Protocol(33)),
            "sctp" => (port(), Needs::Protocol(132)),
            "udplite" => (port(), Needs::Protocol(136)),
            "th" => (port(), Needs::Nothing),
            "icmp" => (icmp(), Needs::Protocol(1)),
            "icmpv6" => (icmp(), Needs::Protocol(58)),
            _ => (Key::Unknown, Needs::Nothing),
        }
    }
}

/// What a packet must be to have a value.
enum Needs {
    Nothing,
    Protocol(u8),
    OtherFamily,
}

/// A lookup of routes: what is asked for, and by what.
fn fib(left: &Value) -> Option<(&str, Vec<&str>)> {
    let Some(("fib", fib)) = only(left) else {
        return None;
    };
    let flags = match &fib["flags"] {
        Value::Array(flags) => flags.iter().filter_map(Value::as_str).collect(),
        flag => flag.as_str().into_iter().collect(),
    };
    Some((fib["result"].as_str()?, flags))
}

fn fib_condition(result: &str, flags: &[&str], right: &Value) -> Option<What> {
    let end = if flags.contains(&"saddr") {
        End::Source
    } else {
        End::Destination
    };
    match result {
        "type" => {
            let is_local = right.as_str() == Some("local") || right.as_u64() == Some(LOCAL);
            is_local.then_some(What::Local(end))
        }
        // No device: the reverse path filter failed.
        "oif" | "oifname" | "check" => {
            let is_missing = match right {
                Value::Bool(found) => !found,
                Value::Number(number) => number.as_u64() == Some(0),
                Value::String(text) => matches!(text.as_str(), "" | "0" | "missing"),
                _ => false,
            };
            (is_missing && end == End::Source).then_some(What::Unreachable)
        }
        _ => None,
    }
}

fn compared(operator: &str, (first, last): Range) -> Option<Range> {
    Some(match operator {
        "<" => (0, first.checked_sub(1)?),
        "<=" => (0, last),
        ">" => (last.checked_add(1)?, u128::MAX),
        ">=" => (first, u128::MAX),
        _ => return None,
    })
}

/// A member of a set; none if it is not understood.
fn element(keys: &[Key], member: &Value) -> Option<Element> {
    match only(member) {
        Some(("elem", wrapped)) => element(keys, wrapped.get("val")?),
        Some(("concat", Value::Array(parts))) if parts.len() == keys.len() => {
            let ranges = keys
                .iter()
                .zip(parts)
                .map(|(key, part)| values::range(*key, part));
            ranges.collect()
        }
        // What no other element says.
        _ if member == "*" => Some(keys.iter().map(|_| WHOLE).collect()),
        _ => match keys {
            [key] => Some(Box::new([values::range(*key, member)?])),
            _ => None,
        },
    }
}

/// The entries of a map. What stands for all others comes last.
fn entries(keys: &[Key], pairs: &[Value]) -> Verdicts {
    let entry = |pair: &Value| -> Option<(Option<Element>, Target)> {
        let [member, says] = pair.as_array()?.as_slice() else {
            return None;
        };
        let (word, body) = only(says)?;
        Some((element(keys, member), verdict(word, body)?))
    };
    let mut entries: Verdicts = pairs.iter().filter_map(entry).collect();
    let is_others = |element: &Element| element.iter().all(|range| *range == WHOLE);
    entries.sort_by_key(|(element, _)| element.as_ref().is_some_and(is_others));
    entries
}
