//! The netfilter rules of a node: Calico's chains as Felix writes them, with kube-proxy's among them. Pure text, and the
//! choice of the tool that loads it.
//!
//! Chain names, their order and the verdicts follow `felix/rules/{static,endpoints,dispatch,policy}.go`
//! (v3.32). Left out: the hash in each rule's comment, address sets (addresses are written out, so that no
//! `ipset` is needed) and host endpoints.

#![expect(
    clippy::format_push_string,
    reason = "`write!` would add an error that cannot happen to each line"
)]

use std::sync::OnceLock;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::felix_nft;
use super::plan::{Encapsulation, FLOATING_POD, Node, POOL, Pod, VXLAN};
use super::services::{self, Proxy};
use crate::command;
use crate::namespace::Namespace;

/// Which netfilter interface the rules are written with. A drop's kernel location tells them apart:
/// `nf_hook_slow` for legacy tables, `nft_do_chain` for nftables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Legacy where it works, else nftables.
    #[default]
    Any,
    /// `iptables-legacy-restore`.
    Legacy,
    /// `iptables-nft-restore`.
    Nft,
    /// Calico's nftables mode: a table of its own, loaded with `nft`. Kube-proxy is in its nftables mode then, too, as Calico
    /// wants it.
    Native,
}

/// What a pod's ingress policies say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// No policy selects it: its namespace's profile allows everything.
    #[default]
    Allow,
    /// Calico's `NetworkPolicy` `default/deny-all` denies everything.
    Deny,
    /// Calico's `NetworkPolicy` `default/no-match` selects it and matches nothing: the end of the tier
    /// drops.
    EndOfTier,
}

/// Whether Felix's rules log what policies and profiles do (`FlowLogsEnabled` in `felix/config/config_params.go`), and how
/// it calls policies in the prefix (`felix/rules/nflogprefix.go`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowLogs {
    /// They do not.
    #[default]
    Off,
    /// With the kind before the name, from v3.32 on.
    Kinds,
    /// With the tier before the name, up to v3.31.
    Tiers,
}

impl FlowLogs {
    /// The prefix of a rule, by what it does and for whom.
    pub(super) fn prefix(self, head: &str, policy: &str) -> Option<String> {
        match self {
            Self::Off => None,
            Self::Kinds => Some(format!("{head}|np/default/{policy}")),
            Self::Tiers => Some(format!("{head}|default/default.{policy}")),
        }
    }

    /// What says in a comment whose chain it is.
    pub(super) fn title(self, policy: &str) -> String {
        match self {
            Self::Off | Self::Kinds => format!("NetworkPolicy default/{policy} ingress"),
            Self::Tiers => format!("Policy default/default.{policy} ingress"),
        }
    }

    /// A prefix that is the same in both.
    pub(super) fn plain(self, prefix: &str) -> Option<&str> {
        (self != Self::Off).then_some(prefix)
    }
}

/// The groups that Felix listens to (`NFLOGInboundGroup`, `felix/rules/rule_defs.go`), by direction.
pub(super) const INGRESS: u16 = 1;
pub(super) const EGRESS: u16 = 2;

/// A rule that logs what meets these conditions; nothing without a prefix.
fn log(chain: &str, matches: &str, group: u16, prefix: Option<&str>) -> String {
    prefix.map_or_else(String::new, |prefix| {
        format!("-A {chain} {matches} -j NFLOG --nflog-group {group} --nflog-prefix \"{prefix}\" --nflog-size 80\n")
    })
}

impl Policy {
    /// The policy's chain, or none: `cali-pi-` and its id, which is short enough not to be hashed
    /// (`libcalico-go/lib/hash/unique_id.go`).
    pub fn chain(self) -> Option<&'static str> {
        match self {
            Self::Allow => None,
            Self::Deny => Some("cali-pi-np/default/deny-all"),
            Self::EndOfTier => Some("cali-pi-np/default/no-match"),
        }
    }
}

/// What the rules of a node depend on.
pub(super) struct Rules<'a> {
    /// The other nodes.
    pub(super) peers: Vec<&'a Node>,
    pub(super) encapsulation: Encapsulation,
    /// The pods of this node, each with its policy.
    pub(super) pods: Vec<(&'a Pod, Policy)>,
    /// The pod behind the service, if it is there.
    pub(super) backend: Option<&'a Pod>,
    /// How kube-proxy translates the service.
    pub(super) proxy: Proxy,
    pub(super) flow_logs: FlowLogs,
    /// The node neither sends nor forwards ICMP time exceeded.
    pub(super) block_time_exceeded: bool,
}

/// Mark bits, from Felix's default mask 0xffff0000 (`felix/dataplane/driver.go`).
const ACCEPT: &str = "0x10000/0x10000";
const PASS: &str = "0x20000/0x20000";
const DENY: &str = "0x40000/0x40000";
const FROM_WORKLOAD: &str = "0x80000/0x80000";

impl Rules<'_> {
    /// Everything, as `iptables-restore` reads it. Each table is replaced as a whole.
    fn text(&self) -> String {
        [self.raw(), self.nat(), self.filter()].concat()
    }

    fn raw(&self) -> String {
        let port = VXLAN.1;
        let mut text = "*raw\n:cali-PREROUTING -\n:cali-OUTPUT -\n:cali-rpf-skip -\n\
             -A PREROUTING -j cali-PREROUTING\n-A OUTPUT -j cali-OUTPUT\n\
             -A cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000\n"
            .to_owned();
        if self.encapsulation == Encapsulation::Vxlan {
            text += &format!(
                "-A cali-PREROUTING -p udp -m udp --dport {port} -j NOTRACK\n\
                 -A cali-OUTPUT -p udp -m udp --dport {port} -j NOTRACK\n"
            );
        }
        text += &format!(
            "-A cali-PREROUTING -i cali+ -j MARK --set-xmark {FROM_WORKLOAD}\n\
             -A cali-PREROUTING -m mark --mark {FROM_WORKLOAD} -j cali-rpf-skip\n\
             -A cali-PREROUTING -m mark --mark {FROM_WORKLOAD} -m rpfilter --validmark --invert -j DROP\n\
             COMMIT\n"
        );
        text
    }

    fn nat(&self) -> String {
        let mut text = "*nat\n:cali-PREROUTING -\n:cali-POSTROUTING -\n:cali-OUTPUT -\n\
             :cali-fip-dnat -\n:cali-fip-snat -\n:cali-nat-outgoing -\n\
             -A PREROUTING -j cali-PREROUTING\n\
             -A OUTPUT -j cali-OUTPUT\n\
             -A POSTROUTING -j cali-POSTROUTING\n\
             -A cali-PREROUTING -j cali-fip-dnat\n\
             -A cali-OUTPUT -j cali-fip-dnat\n\
             -A cali-POSTROUTING -j cali-fip-snat\n\
             -A cali-POSTROUTING -j cali-nat-outgoing\n"
            .to_owned();
        text += &format!("-A cali-nat-outgoing -s {POOL} ! -d {POOL} -j MASQUERADE\n");
        if let Some(device) = self.encapsulation.device() {
            text += &format!(
                "-A cali-POSTROUTING -o {device} -m addrtype ! --src-type LOCAL --limit-iface-out \
                 -m addrtype --src-type LOCAL -j MASQUERADE\n"
            );
        }
        for (pod, _) in &self.pods {
            if pod.id == FLOATING_POD {
                text += &services::floating_ip(pod);
            }
        }
        text + &services::iptables(self.proxy, self.backend) + "COMMIT\n"
    }

    fn filter(&self) -> String {
        let mut text = "*filter\n:cali-INPUT -\n:cali-FORWARD -\n:cali-OUTPUT -\n:cali-wl-to-host -\n\
             :cali-from-wl-dispatch -\n:cali-to-wl-dispatch -\n\
             :cali-pri-kns.default -\n:cali-pro-kns.default -\n"
            .to_owned();
        if self.block_time_exceeded {
            text += "-A OUTPUT -p icmp -m icmp --icmp-type time-exceeded -j DROP\n\
                     -A FORWARD -p icmp -m icmp --icmp-type time-exceeded -j DROP\n";
        }
        text += "-A INPUT -j cali-INPUT\n-A FORWARD -j cali-FORWARD\n-A OUTPUT -j cali-OUTPUT\n";
        text += &format!(
            "-A FORWARD -m comment --comment \"Policy explicitly accepted packet.\" \
             -m mark --mark {ACCEPT} -j ACCEPT\n\
             -A FORWARD -j MARK --set-xmark {ACCEPT}\n"
        );
        text += &self.encapsulated_input();
        text += &format!(
            "-A cali-INPUT -i cali+ -g cali-wl-to-host\n\
             -A cali-INPUT -m mark --mark {ACCEPT} -j ACCEPT\n\
             -A cali-wl-to-host -j cali-from-wl-dispatch\n\
             -A cali-wl-to-host -m comment --comment \"Configured DefaultEndpointToHostAction\" -j ACCEPT\n\
             -A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000\n\
             -A cali-FORWARD -i cali+ -j cali-from-wl-dispatch\n\
             -A cali-FORWARD -o cali+ -j cali-to-wl-dispatch\n\
             -A cali-OUTPUT -m mark --mark {ACCEPT} -j ACCEPT\n\
             -A cali-OUTPUT -o cali+ -j RETURN\n\
             -A cali-pri-kns.default -j MARK --set-xmark {ACCEPT}\n\
             -A cali-pro-kns.default -j MARK --set-xmark {ACCEPT}\n"
        );
        let accepted = format!("-m mark --mark {ACCEPT}");
        for (chain, group, prefix) in [
            ("cali-pri-kns.default", INGRESS, "ARI0|kns.default"),
            ("cali-pro-kns.default", EGRESS, "ARE0|kns.default"),
        ] {
            text += &log(chain, &accepted, group, self.flow_logs.plain(prefix));
        }
        for policy in [Policy::Deny, Policy::EndOfTier] {
            if self.pods.iter().any(|(_, of_pod)| *of_pod == policy) {
                text += &policy_chain(policy, self.flow_logs);
            }
        }
        for (pod, policy) in &self.pods {
            text += &workload_chains(pod, *policy, self.flow_logs);
        }
        text += "-A cali-from-wl-dispatch -m comment --comment \"Unknown interface\" -j DROP\n\
                 -A cali-to-wl-dispatch -m comment --comment \"Unknown interface\" -j DROP\n\
                 COMMIT\n";
        text
    }

    /// Encapsulated packets are taken from the other nodes of the cluster, and from nobody else.
    fn encapsulated_input(&self) -> String {
        let (packets, name) = match self.encapsulation {
            Encapsulation::Vxlan => (format!("-p udp -m udp --dport {}", VXLAN.1), "IPv4 VXLAN"),
            Encapsulation::Ipip => ("-p 4".to_owned(), "IPIP"),
            Encapsulation::None | Encapsulation::Wireguard => return String::new(),
        };
        let mut text = String::new();
        for peer in &self.peers {
            text += &format!(
                "-A cali-INPUT {packets} -m comment --comment \"Allow {name} packets from allowed hosts\" \
                 -s {}/32 -m addrtype --dst-type LOCAL -j ACCEPT\n",
                peer.address
            );
        }
        text += &format!(
            "-A cali-INPUT {packets} -m comment --comment \"Drop {name} packets from non-allowed hosts\" \
             -m addrtype --dst-type LOCAL -j DROP\n"
        );
        text
    }
}

fn policy_chain(policy: Policy, logs: FlowLogs) -> String {
    let Some(chain) = policy.chain() else {
        return String::new();
    };
    let (name, matches, mark, head) = match policy {
        Policy::Deny => ("deny-all", "", DENY, "DPI0"),
        // What it would allow is from an address that nobody has.
        _ => ("no-match", "-s 198.51.100.1/32 ", ACCEPT, "API0"),
    };
    let first = format!(
        "-A {chain} {matches}-m comment --comment \"{}\"",
        logs.title(name)
    );
    let marked = format!("-m mark --mark {mark}");
    let behind = log(chain, &marked, INGRESS, logs.prefix(head, name).as_deref());
    match policy {
        // Two rules in one, where there is none between them.
        Policy::Deny if logs == FlowLogs::Off => format!(":{chain} -\n{first} -j DROP\n"),
        Policy::Deny => {
            format!(":{chain} -\n{first} -j MARK --set-xmark {mark}\n{behind}-A {chain} {marked} -j DROP\n")
        }
        _ => format!(":{chain} -\n{first} -j MARK --set-xmark {mark}\n{behind}"),
    }
}

/// The chains of one workload interface: `cali-tw-` for what goes to the pod, `cali-fw-` for what it sends.
fn workload_chains(pod: &Pod, policy: Policy, logs: FlowLogs) -> String {
    let interface = &pod.interface;
    let (to, from) = (format!("cali-tw-{interface}"), format!("cali-fw-{interface}"));
    let mut text = format!(
        ":{to} -\n:{from} -\n\
         -A cali-to-wl-dispatch -o {interface} -g {to}\n\
         -A cali-from-wl-dispatch -i {interface} -g {from}\n"
    );
    for (chain, profile) in [(&to, "cali-pri-kns.default"), (&from, "cali-pro-kns.default")] {
        text += &format!(
            "-A {chain} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
             -A {chain} -m conntrack --ctstate INVALID -j DROP\n\
             -A {chain} -j MARK --set-xmark 0x0/0x30000\n"
        );
        if chain == &from {
            text += &format!(
                "-A {chain} -p udp -m udp --dport {} -m comment \
                 --comment \"Drop VXLAN encapped packets originating in workloads\" -j DROP\n\
                 -A {chain} -p 4 -m comment \
                 --comment \"Drop IPinIP encapped packets originating in workloads\" -j DROP\n",
                VXLAN.1
            );
        }
        if let Some(policy) = policy.chain().filter(|_| chain == &to) {
            text += &format!(
                "-A {chain} -m comment --comment \"Start of tier default\" -j MARK --set-xmark 0x0/0x20000\n\
                 -A {chain} -m mark --mark 0x0/0x20000 -j {policy}\n\
                 -A {chain} -m comment --comment \"Return if policy accepted\" \
                 -m mark --mark {ACCEPT} -j RETURN\n"
            );
            let not_passed = format!("-m mark ! --mark {PASS}");
            text += &log(chain, &not_passed, INGRESS, logs.plain("DPI|default"));
            text += &format!(
                "-A {chain} -m comment \
                 --comment \"End of tier default. Drop if no policies passed packet\" \
                 -m mark ! --mark {PASS} -j DROP\n"
            );
        }
        text += &format!(
            "-A {chain} -j {profile}\n\
             -A {chain} -m comment --comment \"Return if profile accepted\" -m mark --mark {ACCEPT} -j RETURN\n"
        );
        let (group, prefix) = if chain == &to {
            (INGRESS, "DRI")
        } else {
            (EGRESS, "DRE")
        };
        text += &log(chain, "", group, logs.plain(prefix));
        text += &format!("-A {chain} -m comment --comment \"Drop if no profiles matched\" -j DROP\n");
    }
    text
}

/// Loads rules in a node's namespace.
pub(super) fn load(namespace: &Namespace, backend: Backend, rules: &Rules<'_>) -> Result<()> {
    let failed = || format!("cannot load Calico's rules in namespace {}", namespace.name());
    let tool = match backend {
        Backend::Native => {
            let mut nft = namespace.command("nft");
            command::run_with_input(nft.args(["-f", "-"]), &felix_nft::text(rules)).with_context(failed)?;
            return Ok(());
        }
        Backend::Legacy => "iptables-legacy-restore",
        Backend::Nft => "iptables-nft-restore",
        Backend::Any => any_tool(namespace)?,
    };
    // Both wait for each other through one lock file of the machine.
    command::run_with_input(namespace.command(tool).args(["-w", "10"]), &rules.text())
        .with_context(failed)?;
    Ok(())
}

/// The first tool that can load a rule here; asked once.
fn any_tool(namespace: &Namespace) -> Result<&'static str> {
    static TOOL: OnceLock<&str> = OnceLock::new();
    if let Some(tool) = TOOL.get() {
        return Ok(tool);
    }
    let probe = "*filter\n-A OUTPUT -m mark --mark 0x1/0x1 -j ACCEPT\nCOMMIT\n";
    let legacy = "iptables-legacy-restore";
    let tool = match command::run_with_input(namespace.command(legacy).args(["-w", "10"]), probe) {
        Ok(_) => legacy,
        Err(_) => "iptables-nft-restore",
    };
    if tool != legacy {
        command::run_with_input(namespace.command(tool).args(["-w", "10"]), probe)
            .context("neither iptables-legacy nor iptables-nft works here")?;
    }
    Ok(TOOL.get_or_init(|| tool))
}

#[cfg(test)]
mod tests {
    use super::super::plan;
    use super::*;

    fn rules(policy: Policy, blocked: bool) -> String {
        let nodes = plan::nodes("7", &plan::Options::default());
        let pods = plan::pods("7", &nodes).unwrap();
        let rules = Rules {
            peers: vec![&nodes[0]],
            encapsulation: Encapsulation::Vxlan,
            pods: vec![(&pods[1], policy), (&pods[3], Policy::Allow)],
            backend: Some(&pods[1]),
            proxy: Proxy::Iptables,
            flow_logs: FlowLogs::Off,
            block_time_exceeded: blocked,
        };
        rules.text()
    }

    #[test]
    fn a_policy_is_asked_only_for_its_pod() {
        let jump = "-A cali-tw-cali79f33e4263e -m mark --mark 0x0/0x20000 -j cali-pi-np/default/deny-all";
        assert!(rules(Policy::Deny, false).contains(jump));
        assert_eq!(rules(Policy::Deny, false).matches("-j cali-pi-").count(), 1);
        assert!(!rules(Policy::Allow, false).contains("cali-pi-"));
    }

    #[test]
    fn every_chain_that_is_jumped_to_is_declared() {
        for policy in [Policy::Allow, Policy::Deny, Policy::EndOfTier] {
            let text = rules(policy, true);
            for table in text.split("COMMIT\n").filter(|table| !table.is_empty()) {
                let mut words = table.split_whitespace().peekable();
                while let Some(word) = words.next() {
                    let target = words.peek().copied().unwrap_or_default();
                    let ours = target.starts_with("cali-") || target.starts_with("KUBE-");
                    if matches!(word, "-j" | "-g" | "-A") && ours {
                        assert!(
                            table.contains(&format!(":{target} -\n")),
                            "{target} is not declared"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn chain_names_fit_the_kernel() {
        for policy in [Policy::Deny, Policy::EndOfTier] {
            assert!(
                policy.chain().unwrap().len() <= 28,
                "XT_EXTENSION_MAXNAMELEN is 29 with its end"
            );
        }
    }
}
