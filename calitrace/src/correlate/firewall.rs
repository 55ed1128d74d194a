//! What is known of a node's netfilter rules, by all tools that show some, and from when on.

use std::{collections::BTreeMap, mem, sync::Arc};

use crate::{
    event::{IpSets, Rules},
    netfilter::{Asked, Culprit, Hook, Logger, Ruleset, Sets},
};

/// The rules of one node.
#[derive(Debug, Default)]
pub(super) struct Firewall {
    now: State,
    /// As they were before they changed last, if they did.
    before: Option<State>,
    /// They are being read, and something has changed.
    changing: bool,
    /// When the reading began that showed the last change.
    changed: u64,
    /// When the reading before it began, which did not show it.
    unchanged: u64,
    /// When the last reading began; 0 without one.
    read: u64,
}

/// How the rules are.
#[derive(Clone, Debug, Default)]
struct State {
    /// By whether they are IPv6's, and the tool that shows them.
    tools: BTreeMap<(bool, String), Arc<Ruleset>>,
    /// What they look into.
    sets: Arc<Sets>,
}

impl Firewall {
    pub(super) fn learn(&mut self, rules: &Rules) {
        let ruleset = match rules.tool.as_str() {
            Rules::NFT => Ruleset::parse_nft(&rules.text, rules.ipv6),
            _ => Ruleset::parse(&rules.text),
        };
        self.change();
        self.now
            .tools
            .insert((rules.ipv6, rules.tool.clone()), Arc::new(ruleset));
    }

    pub(super) fn learn_sets(&mut self, sets: &IpSets) {
        self.change();
        self.now.sets = Arc::new(Sets::parse(&sets.text));
    }

    fn change(&mut self) {
        if !mem::replace(&mut self.changing, true) {
            self.before = (self.read > 0).then(|| self.now.clone());
        }
    }

    /// All that is known was read from `time` on.
    pub(super) fn were_read(&mut self, time: u64) {
        if mem::take(&mut self.changing) {
            (self.unchanged, self.changed) = (self.read, time);
        }
        self.read = time;
    }

    /// Whether the rules have been read, but not since `time`.
    pub(super) fn is_stale(&self, time: u64) -> bool {
        0 < self.read && self.read < time
    }

    /// The rules that may have dropped the packet at one of `hooks` at `time`.
    pub(super) fn culprits(&self, packet: &Asked<'_>, hooks: &[Hook], time: u64) -> Vec<Culprit> {
        let mut culprits: Vec<Culprit> = Vec::new();
        for state in self.at(time) {
            for rules in state.of_family(packet.src.is_ipv6()) {
                for culprit in rules.culprits(packet, hooks, &state.sets) {
                    if culprits.iter().all(|known| known.cause != culprit.cause) {
                        culprits.push(culprit);
                    }
                }
            }
        }
        culprits
    }

    /// The UDP port of the node's VXLAN, where Felix' rules of `time` name one. iptables-legacy shows them alone, while
    /// somebody else's rules are in iptables-nft, or the other way round.
    pub(super) fn vxlan_port(&self, ipv6: bool, time: u64) -> Option<u16> {
        let rulesets = self.at(time).flat_map(|state| state.of_family(ipv6));
        let mut ports = rulesets.filter_map(Ruleset::vxlan_port);
        let port = ports.next()?;
        ports.all(|other| other == port).then_some(port)
    }

    /// The rules that log with this prefix, by those of `time`.
    pub(super) fn loggers(&self, prefix: &str, ipv6: bool, time: u64) -> Vec<Logger> {
        let mut loggers: Vec<Logger> = Vec::new();
        for rules in self.at(time).flat_map(|state| state.of_family(ipv6)) {
            for logger in rules.loggers(prefix) {
                if !loggers.contains(&logger) {
                    loggers.push(logger);
                }
            }
        }
        loggers
    }

    /// As the rules were then: where they changed between two readings, the former and the new ones.
    fn at(&self, time: u64) -> impl Iterator<Item = &State> {
        let before = self.before.as_ref().filter(|_| time < self.changed);
        let now = Some(&self.now).filter(|_| before.is_none() || self.unchanged <= time);
        before.into_iter().chain(now)
    }
}

impl State {
    fn of_family(&self, ipv6: bool) -> impl Iterator<Item = &Ruleset> {
        let tools = self.tools.iter().filter(move |((of, _), _)| *of == ipv6);
        tools.map(|(_, rules)| &**rules)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::netfilter::{Device, States};

    fn rules(time: u64, rule: &str) -> Rules {
        Rules {
            time,
            netns: 1,
            tool: "iptables-nft-save".to_owned(),
            ipv6: false,
            text: format!("*filter\n:FORWARD ACCEPT\n:cali-pi-x -\n-A FORWARD -j cali-pi-x\n{rule}COMMIT\n"),
        }
    }

    fn denies(name: &str) -> String {
        format!("-A cali-pi-x -m comment --comment \"NetworkPolicy default/{name} ingress\" -j DROP\n")
    }

    fn named(firewall: &Firewall, time: u64) -> Vec<String> {
        let packet = Asked {
            src: Ipv4Addr::new(10, 244, 1, 1).into(),
            dst: Ipv4Addr::new(10, 244, 2, 2).into(),
            proto: 1,
            ports: None,
            icmp: Some((8, 0)),
            input: Device::Is("tunl0"),
            output: Device::Is("cali1"),
            states: States::OPENING,
            is_from_there: false,
            local: &[],
        };
        let culprits = firewall.culprits(&packet, &[Hook::Forward], time);
        culprits.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_drop_is_put_to_the_rules_of_its_time() {
        let mut firewall = Firewall::default();
        firewall.learn(&rules(100, &denies("one")));
        firewall.were_read(100);
        firewall.were_read(200);
        firewall.learn(&rules(300, &denies("two")));
        firewall.were_read(300);
        firewall.were_read(400);
        let (one, two) = ("policy default/one (ingress)", "policy default/two (ingress)");
        assert_eq!(named(&firewall, 150), [one]);
        assert_eq!(named(&firewall, 250), [one, two], "they changed in between");
        assert_eq!(named(&firewall, 350), [two]);
        assert_eq!(named(&firewall, 450), [two], "nothing else is known");
    }

    #[test]
    fn a_policy_that_comes_between_two_readings_is_named_alone() {
        let mut firewall = Firewall::default();
        firewall.learn(&rules(100, ""));
        firewall.were_read(100);
        firewall.learn(&rules(300, &denies("new")));
        firewall.were_read(300);
        assert_eq!(named(&firewall, 200), ["policy default/new (ingress)"]);
        assert!(firewall.is_stale(350));
        assert!(!firewall.is_stale(200));
        assert!(!Firewall::default().is_stale(200), "no rules are read here");
    }
}
