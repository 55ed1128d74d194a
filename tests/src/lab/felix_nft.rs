//! A node's rules in Calico's nftables mode: the table `ip calico` as Felix writes it, in place of its iptables chains. Pure
//! text for `nft -f`.
//!
//! Base chains, names and the form of rules and comments follow `felix/nftables/{table,table_layer,renderer,maps}.go` and
//! `felix/nftables/nftrender`, the rules themselves `felix/rules/{static,endpoints,dispatch,policy}.go`, as they were between
//! v3.32 and v3.33. Left out as in [`super::netfilter`]: host endpoints (their chains are empty) and flow logs; and the digests
//! in the comments are others.

#![expect(
    clippy::format_push_string,
    reason = "`write!` would add an error that cannot happen to each line"
)]

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::netfilter::{EGRESS, FlowLogs, INGRESS, Policy, Rules};
use super::plan::{Encapsulation, FLOATING, FLOATING_POD, POOL, Pod, VXLAN};

/// Base chains: name, type, hook, priority.
const BASES: [(&str, &str, &str, i32); 14] = [
    ("raw-PREROUTING", "filter", "prerouting", -300),
    ("raw-OUTPUT", "filter", "output", -300),
    ("mangle-PREROUTING", "filter", "prerouting", -150),
    ("mangle-INPUT", "filter", "input", -150),
    ("mangle-FORWARD", "filter", "forward", -150),
    ("mangle-OUTPUT", "route", "output", -150),
    ("mangle-POSTROUTING", "filter", "postrouting", -150),
    ("nat-PREROUTING", "nat", "prerouting", -100),
    ("nat-INPUT", "nat", "input", -100),
    ("filter-INPUT", "filter", "input", 0),
    ("filter-FORWARD", "filter", "forward", 0),
    ("filter-OUTPUT", "filter", "output", 0),
    ("nat-OUTPUT", "nat", "output", 100),
    ("nat-POSTROUTING", "nat", "postrouting", 100),
];

/// Chains without rules on nodes that need none there.
const EMPTY: [&str; 6] = [
    "raw-cali-rpf-skip",
    "nat-cali-fip-dnat",
    "nat-cali-fip-snat",
    "filter-cali-from-hep-forward",
    "filter-cali-to-hep-forward",
    "filter-cali-cidr-block",
];

/// Mark bits, from Felix's default mask 0xffff0000 (`felix/dataplane/driver.go`).
const ACCEPT: u32 = 0x1_0000;
const PASS: u32 = 0x2_0000;
const DROP: u32 = 0x4_0000;
const FROM_WORKLOAD: u32 = 0x8_0000;
const SCRATCH: u32 = 0x10_0000;
/// Those that Felix clears: not that of denied packets (`allCalicoMarkBits`, `felix/rules/static.go`).
const ALL: u32 = ACCEPT | PASS | FROM_WORKLOAD | SCRATCH;

/// Calico's table, and that of the lab's own rules. Each replaces the one before.
pub(super) fn text(rules: &Rules<'_>) -> String {
    let mut table = Table::default();
    table.sets(rules);
    table.raw(rules);
    table.nat(rules);
    table.filter(rules);
    for (pod, policy) in &rules.pods {
        table.workload(pod, *policy, rules.flow_logs);
    }
    table.finish() + &blocked(rules.block_time_exceeded)
}

/// What nodes drop that Calico would not.
fn blocked(blocked: bool) -> String {
    let mut text = "add table ip lab\ndelete table ip lab\n".to_owned();
    if blocked {
        text += "table ip lab {\n\
             chain output {\ntype filter hook output priority -1;\nicmp type time-exceeded drop\n}\n\
             chain forward {\ntype filter hook forward priority -1;\nicmp type time-exceeded drop\n}\n}\n";
    }
    text
}

/// The table while it is made: chains have to be there before rules that lead to them.
#[derive(Default)]
struct Table {
    sets: String,
    chains: Vec<String>,
    rules: String,
    elements: String,
}

impl Table {
    fn finish(self) -> String {
        let mut text = "add table ip calico\ndelete table ip calico\nadd table ip calico\n".to_owned();
        for (name, kind, hook, priority) in BASES {
            text +=
                &format!("add chain ip calico {name} {{ type {kind} hook {hook} priority {priority}; }}\n");
        }
        for name in EMPTY.into_iter().chain(self.chains.iter().map(String::as_str)) {
            text += &format!("add chain ip calico {name}\n");
        }
        text + &self.sets + &self.rules + &self.elements
    }

    /// A rule at the end of a chain. Felix counts what each of them does.
    fn rule(&mut self, chain: &str, matches: &str, action: &str) {
        self.commented(chain, matches, action, "");
    }

    /// A rule that logs what meets these conditions; none without a prefix.
    fn log(&mut self, chain: &str, matches: &str, group: u16, prefix: Option<&str>) {
        if let Some(prefix) = prefix {
            let action = format!("log prefix \"{prefix}\" group {group} snaplen 80");
            self.rule(chain, matches, &action);
        }
    }

    fn commented(&mut self, chain: &str, matches: &str, action: &str, comment: &str) {
        if !self.chains.iter().any(|known| known == chain) && !BASES.iter().any(|base| base.0 == chain) {
            self.chains.push(chain.to_owned());
        }
        let mut hasher = DefaultHasher::new();
        (chain, self.rules.len()).hash(&mut hasher);
        let digest = hasher.finish();
        let words = ["counter", action];
        let words = match action {
            "" => &words[..0],
            _ => &words,
        };
        let rule = [&[matches], words].concat().join(" ");
        let comment = format!("cali:{digest:016x}; {comment}");
        self.rules += &format!(
            "add rule ip calico {chain} {rule} comment \"{}\"\n",
            comment.trim_end()
        );
    }

    fn sets(&mut self, rules: &Rules<'_>) {
        let mut set = |name: &str, flags: &str, elements: &[String]| {
            self.sets += &format!("add set ip calico {name} {{ type ipv4_addr; {flags}}}\n");
            if !elements.is_empty() {
                self.elements += &format!("add element ip calico {name} {{ {} }}\n", elements.join(", "));
            }
        };
        let peers: Vec<String> = rules.peers.iter().map(|peer| peer.address.to_string()).collect();
        set("cali40all-vxlan-net", "flags interval; ", &peers);
        set("cali40all-hosts-net", "flags interval; ", &peers);
        set("cali40all-ipam-pools", "flags interval; ", &[POOL.to_owned()]);
        set("cali40masq-ipam-pools", "flags interval; ", &[POOL.to_owned()]);
        for name in ["filter-cali-from-wl-dispatch", "filter-cali-to-wl-dispatch"] {
            self.sets += &format!("add map ip calico {name} {{ type ifname : verdict; }}\n");
        }
    }

    fn raw(&mut self, rules: &Rules<'_>) {
        let chain = "raw-cali-PREROUTING";
        self.rule("raw-PREROUTING", "", &format!("jump {chain}"));
        self.rule(chain, "", &clear(ALL));
        if rules.encapsulation == Encapsulation::Vxlan {
            let vxlan = format!("meta l4proto udp udp dport {}", VXLAN.1);
            self.rule(chain, &vxlan, "notrack");
            self.rule("raw-OUTPUT", "", "jump raw-cali-OUTPUT");
            self.rule("raw-cali-OUTPUT", &vxlan, "notrack");
        }
        self.rule(chain, "iifname cali*", &set(FROM_WORKLOAD));
        self.rule(chain, &is_set(FROM_WORKLOAD), "jump raw-cali-rpf-skip");
        let failed = format!("{} fib saddr . mark . iif oif 0", is_set(FROM_WORKLOAD));
        self.rule(chain, &failed, "drop");
        self.rule(chain, &is_set(ACCEPT), "accept");
    }

    fn nat(&mut self, rules: &Rules<'_>) {
        self.rule("nat-PREROUTING", "", "jump nat-cali-PREROUTING");
        self.rule("nat-OUTPUT", "", "jump nat-cali-OUTPUT");
        self.rule("nat-POSTROUTING", "", "jump nat-cali-POSTROUTING");
        self.rule("nat-cali-PREROUTING", "", "jump nat-cali-fip-dnat");
        self.rule("nat-cali-OUTPUT", "", "jump nat-cali-fip-dnat");
        self.rule("nat-cali-POSTROUTING", "", "jump nat-cali-fip-snat");
        for (pod, _) in rules.pods.iter().filter(|(pod, _)| pod.id == FLOATING_POD) {
            let address = pod.address;
            let (dnat, snat) = (format!("dnat to {address}"), format!("snat to {FLOATING}"));
            self.rule("nat-cali-fip-dnat", &format!("ip daddr {FLOATING}"), &dnat);
            let itself = format!("ip daddr {address} ip saddr {address}");
            self.rule("nat-cali-fip-snat", &itself, &snat);
        }
        self.rule("nat-cali-POSTROUTING", "", "jump nat-cali-nat-outgoing");
        let outgoing = "ip saddr @cali40masq-ipam-pools ip daddr != @cali40all-ipam-pools";
        self.rule("nat-cali-nat-outgoing", outgoing, "masquerade");
        if let Some(device) = rules.encapsulation.device() {
            let foreign = format!("oifname {device} fib saddr . oif type != local fib saddr type local");
            self.rule("nat-cali-POSTROUTING", &foreign, "masquerade");
        }
    }

    fn filter(&mut self, rules: &Rules<'_>) {
        for hook in ["INPUT", "FORWARD", "OUTPUT"] {
            self.rule(&format!("filter-{hook}"), "", &format!("jump filter-cali-{hook}"));
        }
        let accepted = "Policy explicitly accepted packet.";
        self.commented("filter-FORWARD", &is_set(ACCEPT), "accept", accepted);
        self.rule("filter-FORWARD", "", &set(ACCEPT));

        let input = "filter-cali-INPUT";
        self.encapsulated_input(rules.encapsulation);
        self.rule(input, "iifname cali*", "goto filter-cali-wl-to-host");
        self.rule(input, &is_set(ACCEPT), "accept");
        self.rule(input, "", &clear(ALL));
        let to_host = "filter-cali-wl-to-host";
        self.rule(to_host, "", "jump filter-cali-from-wl-dispatch");
        self.commented(to_host, "", "accept", "Configured DefaultEndpointToHostAction");

        let forward = "filter-cali-FORWARD";
        self.rule(forward, "", &clear(ALL & !ACCEPT));
        self.rule(forward, &is_clear(ACCEPT), "jump filter-cali-from-hep-forward");
        self.rule(forward, "iifname cali*", "jump filter-cali-from-wl-dispatch");
        self.rule(forward, "oifname cali*", "jump filter-cali-to-wl-dispatch");
        self.rule(forward, "", "jump filter-cali-to-hep-forward");
        self.rule(forward, "", "jump filter-cali-cidr-block");

        self.rule("filter-cali-OUTPUT", &is_set(ACCEPT), "accept");
        self.rule("filter-cali-OUTPUT", "oifname cali*", "return");
        self.rule("filter-cali-OUTPUT", "", &clear(ALL));

        for (way, name) in [("iifname", "from"), ("oifname", "to")] {
            let chain = format!("filter-cali-{name}-wl-dispatch");
            self.rule(&chain, &format!("{way} vmap @{chain}"), "");
            self.commented(&chain, "", "drop", "Unknown interface");
        }
        for (chain, way) in [
            ("filter-cali-pri-kns.default", "ingress"),
            ("filter-cali-pro-kns.default", "egress"),
        ] {
            let title = format!("Profile kns.default {way}");
            self.commented(chain, "", &set(ACCEPT), &title);
            let (group, prefix) = match way {
                "ingress" => (INGRESS, "ARI0|kns.default"),
                _ => (EGRESS, "ARE0|kns.default"),
            };
            self.log(chain, &is_set(ACCEPT), group, rules.flow_logs.plain(prefix));
            self.rule(chain, &is_set(ACCEPT), "return");
        }
        for policy in [Policy::Deny, Policy::EndOfTier] {
            if rules.pods.iter().any(|(_, of_pod)| *of_pod == policy) {
                self.policy(policy, rules.flow_logs);
            }
        }
    }

    /// Encapsulated packets are taken from the other nodes of the cluster, and from nobody else.
    fn encapsulated_input(&mut self, encapsulation: Encapsulation) {
        let local = "fib daddr type local";
        let (packets, set, allow, drop) = match encapsulation {
            Encapsulation::Vxlan => (
                format!("meta l4proto 17 udp dport {{ {} }}", VXLAN.1),
                "cali40all-vxlan-net",
                "Allow IPv4 VXLAN packets from allowed hosts",
                "Drop IPv4 VXLAN packets from non-allowed hosts",
            ),
            Encapsulation::Ipip => (
                "meta l4proto 4".to_owned(),
                "cali40all-hosts-net",
                "Allow IPIP packets from Calico hosts",
                "Drop IPIP packets from non-Calico hosts",
            ),
            Encapsulation::None | Encapsulation::Wireguard => return,
        };
        let chain = "filter-cali-INPUT";
        let known = format!("{packets} ip saddr @{set} {local}");
        self.commented(chain, &known, "accept", allow);
        self.commented(chain, &format!("{packets} {local}"), "drop", drop);
    }

    fn policy(&mut self, policy: Policy, logs: FlowLogs) {
        let Some(chain) = chain(policy) else { return };
        if policy == Policy::Deny {
            self.commented(&chain, "", &set(DROP), &logs.title("deny-all"));
            let prefix = logs.prefix("DPI0", "deny-all");
            self.log(&chain, &is_set(DROP), INGRESS, prefix.as_deref());
            self.rule(&chain, &is_set(DROP), "drop");
        } else {
            // What it would allow is from an address that nobody has.
            let title = logs.title("no-match");
            self.commented(&chain, "ip saddr 198.51.100.1/32", &set(ACCEPT), &title);
            let prefix = logs.prefix("API0", "no-match");
            self.log(&chain, &is_set(ACCEPT), INGRESS, prefix.as_deref());
        }
    }

    /// The chains of one workload interface: `cali-tw-` for what goes to the pod, `cali-fw-` for what it sends.
    fn workload(&mut self, pod: &Pod, policy: Policy, logs: FlowLogs) {
        let interface = &pod.interface;
        for (to, chain) in [
            (true, format!("filter-cali-tw-{interface}")),
            (false, format!("filter-cali-fw-{interface}")),
        ] {
            let map = if to { "to" } else { "from" };
            self.elements += &format!(
                "add element ip calico filter-cali-{map}-wl-dispatch {{ \"{interface}\" : goto {chain} }}\n"
            );
            self.rule(&chain, "ct state related,established", "accept");
            self.rule(&chain, "ct state invalid", "drop");
            self.rule(&chain, "", &clear(ACCEPT | PASS));
            if !to {
                let vxlan = format!("meta l4proto 17 udp dport {{ {} }}", VXLAN.1);
                let drop = "Drop VXLAN encapped packets originating in workloads";
                self.commented(&chain, &vxlan, "drop", drop);
                let drop = "Drop IPinIP encapped packets originating in workloads";
                self.commented(&chain, "meta l4proto 4", "drop", drop);
            }
            if let Some(policy) = self::chain(policy).filter(|_| to) {
                self.commented(&chain, "", &clear(PASS), "Start of tier default");
                self.rule(&chain, &is_clear(PASS), &format!("jump {policy}"));
                self.commented(&chain, &is_set(ACCEPT), "return", "Return if policy accepted");
                self.log(&chain, &is_clear(PASS), INGRESS, logs.plain("DPI|default"));
                let end = "End of tier default. Drop if no policies passed packet";
                self.commented(&chain, &is_clear(PASS), "drop", end);
            }
            let profile = if to { "pri" } else { "pro" };
            self.rule(&chain, "", &format!("jump filter-cali-{profile}-kns.default"));
            self.commented(&chain, &is_set(ACCEPT), "return", "Return if profile accepted");
            let (group, prefix) = if to { (INGRESS, "DRI") } else { (EGRESS, "DRE") };
            self.log(&chain, "", group, logs.plain(prefix));
            self.commented(&chain, "", "drop", "Drop if no profiles matched");
        }
    }
}

fn chain(policy: Policy) -> Option<String> {
    policy.chain().map(|chain| format!("filter-{chain}"))
}

fn is_set(bit: u32) -> String {
    format!("meta mark & {bit:#x} == {bit:#x}")
}

fn is_clear(bits: u32) -> String {
    format!("meta mark & {bits:#x} == 0")
}

fn set(bits: u32) -> String {
    format!("meta mark set mark or {bits:#x}")
}

fn clear(bits: u32) -> String {
    format!("meta mark set mark & {:#x}", !bits)
}

#[cfg(test)]
mod tests {
    use super::super::plan;
    use super::super::services::Proxy;
    use super::*;

    fn rules(policy: Policy) -> String {
        let nodes = plan::nodes("7", &plan::Options::default());
        let pods = plan::pods("7", &nodes).unwrap();
        text(&Rules {
            peers: vec![&nodes[0]],
            encapsulation: Encapsulation::Vxlan,
            pods: vec![(&pods[1], policy), (&pods[3], Policy::Allow)],
            backend: Some(&pods[1]),
            proxy: Proxy::Nftables,
            flow_logs: FlowLogs::Off,
            block_time_exceeded: false,
        })
    }

    #[test]
    fn a_policy_is_asked_only_for_its_pod() {
        let jump = "add rule ip calico filter-cali-tw-cali79f33e4263e meta mark & 0x20000 == 0 counter \
                    jump filter-cali-pi-np/default/deny-all";
        assert!(rules(Policy::Deny).contains(jump));
        assert_eq!(rules(Policy::Deny).matches("jump filter-cali-pi-").count(), 1);
        assert!(!rules(Policy::Allow).contains("filter-cali-pi-"));
    }

    #[test]
    fn every_chain_is_there_before_what_leads_to_it() {
        for policy in [Policy::Allow, Policy::Deny, Policy::EndOfTier] {
            let text = rules(policy);
            for (place, _) in text.match_indices(" jump ").chain(text.match_indices(" goto ")) {
                let chain = text[place + 6..].split_whitespace().next().unwrap();
                let declared = format!("add chain ip calico {chain}\n");
                assert!(text[..place].contains(&declared), "{chain} is not declared");
            }
        }
    }

    #[test]
    fn comments_fit() {
        let text = rules(Policy::EndOfTier);
        let comments: Vec<&str> = text.split(" comment \"").skip(1).collect();
        assert!(comments.len() > 40, "{}", comments.len());
        for comment in comments {
            // Felix cuts off what is longer (`CommentLengthMax` of knftables).
            assert!(comment.split('"').next().unwrap().len() <= 128, "{comment}");
        }
    }
}
