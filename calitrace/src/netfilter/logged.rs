//! What Felix's rules log of a packet where flow logs are on: the action, the direction, and the rule and policy that took
//! it, all in the prefix of `NFLOG`.
//!
//! The grammar is that of `felix/rules/nflogprefix.go`: `APE0|np/default/allow` is (A)llow, (D)eny or (P)ass, by a (P)olicy
//! or p(R)ofile, for (I)ngress or (E)gress, the index of the rule, and the policy. Without an index it is the end of a tier
//! (`DPI|default`), a staged policy of which no rule matched (`DPI|snp/default/draft`), or that no profile allows the packet
//! (`DRI`). Policies have their kind before their name from v3.32 on (`felix/types/policy_id.go`), as in names of chains;
//! before, Kubernetes' have `knp.default.` and others their tier. One of 63 bytes is cut: its first and last ten are left,
//! and between them is a digest.

use std::fmt;

use serde::Serialize;

use super::{
    Cause, Culprit, Direction, PolicyName, Ruleset, meaning,
    rules::{Chain, Target},
};

/// What a rule did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The packet is allowed, as far as the tier is concerned.
    Allow,
    /// It is denied.
    Deny,
    /// The next tier decides.
    Pass,
}

/// Whose rule it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// A policy's.
    Policy(PolicyName),
    /// A profile's.
    Profile(String),
    /// None of the tier's policies took it.
    EndOfTier(String),
    /// No profile took it.
    NoProfile,
}

/// What Felix logs with a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// What the rule did, of a staged policy what it would do.
    pub action: Action,
    /// Of ingress or egress policies.
    pub direction: Direction,
    /// Index of the rule, from 0; none where no rule matched.
    pub rule: Option<u32>,
    /// Whose rule it was.
    pub by: By,
    /// The policy is only tried out: it does nothing.
    pub staged: bool,
    /// Of the name there is but the beginning and the end.
    pub cut: bool,
}

/// A rule that logs with a prefix that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logger {
    /// What the rule behind it means: it does what is logged.
    pub next: Culprit,
    /// It drops.
    pub drops: bool,
}

/// Length of a prefix that was cut, and where the digest and the end begin with a `_`.
const CUT: usize = 63;
const DIGEST: usize = 10;
const END: usize = 52;
/// Stands before the names of staged policies up to v3.31 (`libcalico-go/lib/backend/model/policy.go`).
const STAGED: &str = "staged:";

impl Logged {
    /// Reads a prefix; none where it is not Felix's.
    #[must_use]
    pub fn parse(prefix: &str) -> Option<Self> {
        let mut letters = prefix.bytes();
        let action = match letters.next()? {
            b'A' => Action::Allow,
            b'D' => Action::Deny,
            b'P' => Action::Pass,
            _ => return None,
        };
        let of_policy = match letters.next()? {
            b'P' => true,
            b'R' => false,
            _ => return None,
        };
        let direction = match letters.next()? {
            b'I' => Direction::Ingress,
            b'E' => Direction::Egress,
            _ => return None,
        };
        let rest = &prefix[3..];
        if rest.is_empty() && !of_policy && action == Action::Deny {
            return Some(Self {
                action,
                direction,
                rule: None,
                by: By::NoProfile,
                staged: false,
                cut: false,
            });
        }
        let (index, id) = rest.split_once('|')?;
        let rule = match index {
            "" => None,
            index if index.bytes().all(|digit| digit.is_ascii_digit()) => Some(index.parse().ok()?),
            _ => return None,
        };
        let cut = prefix.is_ascii()
            && prefix.len() == CUT
            && [DIGEST, END]
                .iter()
                .all(|place| prefix.as_bytes()[*place] == b'_')
            && index.len() + 4 <= DIGEST;
        let id = if cut {
            format!("{}…{}", &prefix[index.len() + 4..DIGEST], &prefix[END + 1..])
        } else {
            id.to_owned()
        };
        let (by, staged) = match (of_policy, rule) {
            (false, None) => return None,
            (false, Some(_)) => (By::Profile(id), false),
            // Names of tiers have no namespace.
            (true, None) if !id.contains('/') && !id.starts_with(STAGED) => (By::EndOfTier(id), false),
            (true, _) => {
                let (policy, staged) = policy(&id);
                (By::Policy(policy), staged)
            }
        };
        Some(Self {
            action,
            direction,
            rule,
            by,
            staged,
            cut,
        })
    }

    /// Whether the packet is dropped behind this.
    #[must_use]
    pub fn drops(&self) -> bool {
        self.action == Action::Deny && !self.staged
    }

    /// One word for whose rule it was.
    #[must_use]
    pub fn cause(&self) -> &'static str {
        match &self.by {
            By::Policy(_) => "policy",
            By::Profile(_) => "profile",
            By::EndOfTier(_) => "end_of_tier",
            By::NoProfile => "no_profile",
        }
    }

    /// The name of the policy, profile or tier.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match &self.by {
            By::Policy(policy) => Some(&policy.name),
            By::Profile(name) | By::EndOfTier(name) => Some(name),
            By::NoProfile => None,
        }
    }

    /// The whole name in place of one that is cut, if the rules that log so have one and the same.
    pub fn complete(&mut self, loggers: &[Logger]) {
        let mut named = loggers.iter().filter_map(|logger| self.by_of(&logger.next.cause));
        let Some(name) = named.next().filter(|_| self.cut) else {
            return;
        };
        if named.all(|other| other == name) {
            self.by = name;
            self.cut = false;
        }
    }

    /// Whose rule that is, if it is one of this kind.
    fn by_of(&self, cause: &Cause) -> Option<By> {
        match (&self.by, cause) {
            (By::Policy(_), Cause::Policy { policy, .. }) => Some(By::Policy(policy.clone())),
            (By::Profile(_), Cause::Profile { profile, .. }) => Some(By::Profile(profile.clone())),
            (By::EndOfTier(_), Cause::EndOfTier { tier, .. }) => Some(By::EndOfTier(tier.clone())),
            _ => None,
        }
    }

    /// Names the rule that dropped the packet behind this: one of `culprits`, which may have, or of those that log so; `None` if
    /// by the rules it was none of them.
    #[must_use]
    pub fn culprit(&self, culprits: &[Culprit], loggers: &[Logger]) -> Option<Culprit> {
        if !self.drops() {
            return None;
        }
        let fitting = culprits.iter().find(|culprit| self.is(&culprit.cause));
        let logging = || {
            let mut dropping = loggers.iter().filter(|logger| logger.drops);
            // Several chains end with the same tier.
            let one = dropping.next().filter(|_| dropping.next().is_none());
            one.map(|logger| &logger.next)
        };
        let found = fitting.or_else(logging).cloned();
        // Felix can be told not to drop what it logs as denied (`DropActionOverride`).
        if found.is_none() && !loggers.is_empty() && loggers.iter().all(|logger| !logger.drops) {
            return None;
        }
        let tier = found.as_ref().and_then(|known| match &known.cause {
            Cause::Policy { tier, .. } => tier.clone(),
            _ => None,
        });
        let (table, chain, rejects) = found.map_or_else(Default::default, |known| {
            (known.table, known.chain, known.rejects)
        });
        let direction = Some(self.direction);
        let cause = match self.by.clone() {
            By::Policy(policy) => Cause::Policy {
                policy,
                tier,
                direction,
                rule: self.rule,
            },
            By::Profile(profile) => Cause::Profile { profile, direction },
            By::EndOfTier(tier) => Cause::EndOfTier { tier, direction },
            By::NoProfile => Cause::NoProfile { direction },
        };
        Some(Culprit {
            cause,
            table,
            chain,
            rejects,
        })
    }

    /// Whether it can be what the rules say.
    fn is(&self, cause: &Cause) -> bool {
        let same = |direction: &Option<Direction>| direction.is_none_or(|way| way == self.direction);
        match (&self.by, cause) {
            (
                By::Policy(own),
                Cause::Policy {
                    policy,
                    direction,
                    rule,
                    ..
                },
            ) => {
                own.name == policy.name
                    && (own.kind.is_none() || policy.kind.is_none() || own.kind == policy.kind)
                    && same(direction)
                    && (rule.is_none() || *rule == self.rule)
            }
            (By::Profile(own), Cause::Profile { profile, direction }) => own == profile && same(direction),
            (By::EndOfTier(own), Cause::EndOfTier { tier, direction }) => own == tier && same(direction),
            (By::NoProfile, Cause::NoProfile { direction }) => same(direction),
            _ => false,
        }
    }
}

/// A policy by its id, and whether it is staged.
fn policy(id: &str) -> (PolicyName, bool) {
    let named = meaning::of_id(id);
    if let Some(kind) = &named.kind {
        let staged = kind.starts_with("Staged");
        return (named, staged);
    }
    match id.split_once(STAGED) {
        Some((namespace, own)) if namespace.is_empty() || namespace.ends_with('/') => {
            let named = meaning::before_kinds(&format!("{namespace}{own}"));
            (named, true)
        }
        _ => (meaning::before_kinds(id), false),
    }
}

impl fmt::Display for Logged {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let staged = if self.staged { "staged " } else { "" };
        let direction = match (self.direction, self.cut) {
            (Direction::Ingress, false) => "ingress",
            (Direction::Ingress, true) => "ingress, name cut",
            (Direction::Egress, false) => "egress",
            (Direction::Egress, true) => "egress, name cut",
        };
        match &self.by {
            By::Policy(policy) => write!(formatter, "{staged}policy {} ({direction})", policy.name)?,
            By::Profile(name) => write!(formatter, "profile {name} ({direction})")?,
            By::EndOfTier(tier) => write!(formatter, "end of tier {tier} ({direction})")?,
            By::NoProfile => write!(formatter, "no profile ({direction})")?,
        }
        match (self.rule, &self.by) {
            (Some(rule), _) => write!(formatter, ", rule {rule}")?,
            (None, By::Policy(_)) => formatter.write_str(", no rule of it")?,
            (None, By::NoProfile) => return formatter.write_str(" allows the packet"),
            (None, _) => {}
        }
        formatter.write_str(match (self.action, self.staged, self.rule) {
            (Action::Deny, true, None) => " matches: it would deny",
            (Action::Allow, true, _) => " would allow",
            (Action::Deny, true, _) => " would deny",
            (Action::Pass, true, _) => " would pass",
            (Action::Deny, false, None) if matches!(self.by, By::Policy(_)) => " matches: it denies",
            (Action::Allow, false, _) => " allows",
            (Action::Deny, false, _) => " denies",
            (Action::Pass, false, _) => " passes it on",
        })
    }
}

impl Ruleset {
    /// The rules that log with this prefix, in the order of their chains' names.
    #[must_use]
    pub fn loggers(&self, prefix: &str) -> Vec<Logger> {
        let mut found = Vec::new();
        for (table, chains) in &self.tables {
            for (name, chain) in chains {
                let logging = chain.rules.iter().enumerate();
                let logging =
                    logging.filter(|(_, rule)| matches!(&rule.target, Target::Log(own) if own == prefix));
                found.extend(logging.filter_map(|(index, _)| logger(table, name, chain, index)));
            }
        }
        found.sort_by(|one, other| {
            let order = |logger: &Logger| (logger.next.table.clone(), logger.next.chain.clone());
            order(one).cmp(&order(other))
        });
        found
    }
}

/// The rule behind the log rule at `index`, and behind others that log.
fn logger(table: &str, name: &str, chain: &Chain, index: usize) -> Option<Logger> {
    let behind = chain.rules.get(index + 1..)?;
    let next = index
        + 1
        + behind
            .iter()
            .position(|rule| !matches!(rule.target, Target::Log(_)))?;
    Some(Logger {
        next: meaning::of_rule(table, name, chain, next),
        drops: matches!(chain.rules[next].target, Target::Drop | Target::Reject),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(prefix: &str) -> String {
        Logged::parse(prefix).map_or_else(|| "-".to_owned(), |logged| logged.to_string())
    }

    #[test]
    fn both_grammars_are_read() {
        for (prefix, text) in [
            (
                "API0|np/default/web",
                "policy default/web (ingress), rule 0 allows",
            ),
            (
                "DPE12|knp/default/web",
                "policy default/web (egress), rule 12 denies",
            ),
            ("PPI1|gnp/web", "policy web (ingress), rule 1 passes it on"),
            (
                "DPI0|default/knp.default.web",
                "policy default/web (ingress), rule 0 denies",
            ),
            (
                "API3|default/default.web",
                "policy default/web (ingress), rule 3 allows",
            ),
            ("DPE0|security.web", "policy security.web (egress), rule 0 denies"),
            (
                "DPI0|snp/default/web",
                "staged policy default/web (ingress), rule 0 would deny",
            ),
            (
                "DPI|snp/default/web",
                "staged policy default/web (ingress), no rule of it matches: it would deny",
            ),
            (
                "DPI|default/staged:knp.default.web",
                "staged policy default/web (ingress), no rule of it matches: it would deny",
            ),
            (
                "API1|staged:default.web",
                "staged policy web (ingress), rule 1 would allow",
            ),
            ("DPI|default", "end of tier default (ingress) denies"),
            ("PPE|security", "end of tier security (egress) passes it on"),
            ("ARI0|kns.default", "profile kns.default (ingress), rule 0 allows"),
            ("DRE", "no profile (egress) allows the packet"),
        ] {
            assert_eq!(said(prefix), text);
        }
    }

    #[test]
    fn what_is_not_felix_s_is_none() {
        for prefix in [
            "",
            "calico-packet: ",
            "DPI",
            "ARI",
            "ARI|kns.default",
            "DPX0|np/default/web",
            "DPIx|np/default/web",
            "DPI99999999999|np/default/web",
            "DROP: ",
            "DÜ",
        ] {
            assert_eq!(said(prefix), "-", "{prefix}");
        }
    }

    /// As in Felix's own tests (`felix/rules/nflogprefix_test.go`, v3.32).
    const LONG: &str = "DPE1|gnp/t_FSGxA9eGa6t_A5Rj2agPvl4aq8-eohq0An6xEW4n7_olicy-name";

    #[test]
    fn a_name_that_is_cut_is_said_to_be() {
        assert_eq!(
            said(LONG),
            "policy t…olicy-name (egress, name cut), rule 1 denies"
        );
        let tier = "DPI|tier-0_phEfG4Vhbq2xh4TQsePNa2X9YRj5peCVw1FgaNSbd_4567890123";
        assert_eq!(
            said(tier),
            "end of tier tier-0…4567890123 (ingress, name cut) denies"
        );
        // One byte shorter nothing is cut.
        let whole = "DPI|tier-01234567890123456789012345678901234567890123456789012";
        assert!(said(whole).starts_with("end of tier tier-01234567890123456789"));
    }

    fn rules(prefix: &str, action: &str) -> Ruleset {
        Ruleset::parse(&format!(
            "*filter\n:FORWARD ACCEPT\n:cali-po-_x -\n-A FORWARD -j cali-po-_x\n\
             -A cali-po-_x -m comment --comment \"GlobalNetworkPolicy tier.a-long-policy-name egress\" -j MARK --set-xmark 0x40000/0x40000\n\
             -A cali-po-_x -m mark --mark 0x40000/0x40000 -j NFLOG --nflog-prefix \"{prefix}\" --nflog-group 2\n\
             -A cali-po-_x -m mark --mark 0x40000/0x40000 -j {action}\nCOMMIT\n"
        ))
    }

    #[test]
    fn the_rule_that_logs_so_has_the_whole_name() {
        let loggers = rules(LONG, "DROP").loggers(LONG);
        let mut logged = Logged::parse(LONG).unwrap();
        logged.complete(&loggers);
        assert!(!logged.cut);
        let culprit = logged.culprit(&[], &loggers).unwrap();
        assert_eq!(
            culprit.to_string(),
            "policy tier.a-long-policy-name (egress), rule 1"
        );
        assert_eq!(
            (culprit.table.as_str(), culprit.chain.as_str()),
            ("filter", "cali-po-_x")
        );
        assert!(rules(LONG, "DROP").loggers("DPE0|gnp/web").is_empty());
    }

    #[test]
    fn what_is_logged_and_let_through_drops_nothing() {
        let prefix = "DPE0|gnp/tier.a-long-policy-name";
        let logged = Logged::parse(prefix).unwrap();
        assert!(
            logged
                .culprit(&[], &rules(prefix, "DROP").loggers(prefix))
                .is_some()
        );
        assert!(
            logged
                .culprit(&[], &rules(prefix, "ACCEPT").loggers(prefix))
                .is_none()
        );
        assert!(logged.culprit(&[], &[]).is_some(), "the rules are not known");
        let staged = Logged::parse("DPI0|snp/default/web").unwrap();
        assert!(staged.culprit(&[], &[]).is_none());
    }

    #[test]
    fn one_of_several_is_the_one_that_was_logged() {
        let of = |name: &str, rule| Culprit {
            cause: Cause::Policy {
                policy: PolicyName {
                    kind: Some("NetworkPolicy".to_owned()),
                    name: name.to_owned(),
                },
                tier: None,
                direction: Some(Direction::Ingress),
                rule,
            },
            table: "filter".to_owned(),
            chain: name.to_owned(),
            rejects: true,
        };
        let several = [
            of("default/front", Some(1)),
            of("default/back", Some(0)),
            of("default/back", Some(2)),
        ];
        let logged = Logged::parse("DPI2|np/default/back").unwrap();
        assert_eq!(logged.culprit(&several, &[]), Some(several[2].clone()));
        let old = Logged::parse("DPI1|default/default.front").unwrap();
        let named = old.culprit(&several, &[]).unwrap();
        assert_eq!(named.chain, "default/front");
    }
}
