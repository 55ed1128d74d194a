//! The set of a table in which rules look for where packets come from, as Felix' do for other nodes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

use super::{Object, RuleObject, SetObject, values::range};
use crate::netfilter::{
    elements::{Key, Range, address},
    rules::End,
};

/// What such a set has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    ipv6: bool,
    /// None if that is not known: packets change it, or it has something that is not understood.
    members: Option<Vec<Range>>,
}

impl Sources {
    /// The set of this name in a text as [`super::compact`] writes it; none if no rule there looks for sources in it.
    #[must_use]
    pub fn parse(text: &str, name: &str) -> Option<Self> {
        let mut sources = None;
        let mut is_asked = false;
        for line in text.lines().filter(|line| line.contains(name)) {
            match serde_json::from_str(line) {
                Ok(Object::Set(set)) if set.name == name => {
                    sources = Some(Self {
                        ipv6: set.family == "ip6",
                        members: members(&set),
                    });
                }
                Ok(Object::Rule(rule)) => is_asked |= asks(&rule, name),
                _ => {}
            }
        }
        sources.filter(|_| is_asked)
    }

    /// Whether it has the address; none if that is not known.
    #[must_use]
    pub fn holds(&self, one: IpAddr) -> Option<bool> {
        let has = |(first, last): &Range| (*first..=*last).contains(&address(one));
        let members = self.members.as_ref()?;
        Some(one.is_ipv6() == self.ipv6 && members.iter().any(has))
    }

    /// Its members that are single addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let single = self
            .members
            .iter()
            .flatten()
            .filter(|(first, last)| first == last);
        single.filter_map(|(value, _)| {
            Some(if self.ipv6 {
                Ipv6Addr::from(*value).into()
            } else {
                Ipv4Addr::from(u32::try_from(*value).ok()?).into()
            })
        })
    }
}

fn members(set: &SetObject) -> Option<Vec<Range>> {
    let member = |value: &Value| range(Key::Address(End::Source), value);
    let known = (!set.changes()).then_some(&set.elem)?;
    known.iter().map(member).collect()
}

/// `ip saddr @NAME`.
fn asks(rule: &RuleObject, name: &str) -> bool {
    rule.expr.iter().any(|statement| {
        let condition = &statement["match"];
        matches!(condition["op"].as_str(), Some("==" | "in"))
            && condition["left"]["payload"]["field"] == "saddr"
            && condition["right"]
                .as_str()
                .and_then(|right| right.strip_prefix('@'))
                == Some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = r#"{"rule":{"family":"ip","table":"calico","chain":"filter-cali-INPUT","expr":[{"match":{"op":"==","left":{"payload":{"protocol":"ip","field":"saddr"}},"right":"@cali40all-hosts-net"}},{"accept":null}]}}"#;

    fn set(rest: &str) -> String {
        let set =
            format!(r#"{{"set":{{"family":"ip","table":"calico","name":"cali40all-hosts-net",{rest}}}}}"#);
        format!("{set}\n{RULE}\n")
    }

    fn parse(text: &str) -> Option<Sources> {
        Sources::parse(text, "cali40all-hosts-net")
    }

    #[test]
    fn addresses_networks_and_ranges_are_members() {
        let text = set(
            r#""elem":["192.168.49.2",{"prefix":{"addr":"10.0.0.0","len":8}},{"range":["192.168.50.2","192.168.50.4"]}]"#,
        );
        let sources = parse(&text).unwrap();
        for (one, is_member) in [
            ("192.168.49.2", true),
            ("192.168.49.3", false),
            ("10.7.7.7", true),
            ("192.168.50.3", true),
            ("192.168.50.5", false),
            ("::192.168.49.2", false),
        ] {
            assert_eq!(sources.holds(one.parse().unwrap()), Some(is_member), "{one}");
        }
        let single: Vec<IpAddr> = sources.addresses().collect();
        assert_eq!(single, ["192.168.49.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            parse(&set(r#""flags":"interval""#)).unwrap().holds(single[0]),
            Some(false)
        );
    }

    #[test]
    fn what_is_not_understood_or_changes_is_not_known() {
        for rest in [r#""elem":["192.168.49.2",{"else":1}]"#, r#""flags":["dynamic"]"#] {
            let sources = parse(&set(rest)).unwrap();
            assert_eq!(sources.holds("192.168.49.2".parse().unwrap()), None, "{rest}");
            assert_eq!(sources.addresses().count(), 0, "{rest}");
        }
    }

    #[test]
    fn a_set_in_which_nobody_looks_for_sources_is_none() {
        let text = set(r#""elem":[]"#);
        assert!(parse(&text).is_some());
        assert_eq!(parse(text.lines().next().unwrap()), None);
        assert_eq!(parse(&text.replace("saddr", "daddr")), None);
        assert_eq!(parse(&text.replace(r#""op":"==""#, r#""op":"!=""#)), None);
        assert_eq!(Sources::parse(&text, "cali40all-hosts"), None);
    }
}
