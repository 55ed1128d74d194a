//! The faults as rules in both languages, and what the rules' own counters say.

use anyhow::{Context as _, Result};
use calitrace_tests::{Lab, Policy, command, lab::netfilter::Backend};

use super::kinds::{DISABLED, Kind, ONE, TWO, UNKNOWN};
use crate::support::{change_nftables, change_rules};

/// Loads the rules that drop what is dropped for a fault.
pub(super) fn break_it(lab: &Lab) -> Result<()> {
    lab.set_policy("pod4", Policy::EndOfTier)?;
    let interface = |pod: &str| lab.pod(pod).map(|pod| pod.interface);
    let without_profile = interface("pod3")?;
    let picky = interface("pod2")?;
    let (disabled, unknown) = (interface(DISABLED.0)?, interface(UNKNOWN.0)?);
    if lab.options().netfilter == Backend::Native {
        change_nftables(lab, ONE, &nftables_of_one(&without_profile))?;
        change_nftables(lab, TWO, &nftables_of_two(&picky, &disabled, &unknown))
    } else {
        change(lab, ONE, &iptables_of_one(&without_profile))?;
        change(lab, TWO, &iptables_of_two(&picky, &disabled, &unknown))
    }
}

/// Changes the table `filter` of iptables on a node.
pub(super) fn change(lab: &Lab, node: &str, filter: &str) -> Result<()> {
    change_rules(lab, node, &format!("*filter\n{filter}COMMIT\n"))
}

fn iptables_of_one(without_profile: &str) -> String {
    format!(
        ":cali-cidr-block -\n\
         -A cali-cidr-block -d 10.96.0.0/12 -j DROP\n\
         -A cali-FORWARD -j cali-cidr-block\n\
         -R cali-wl-to-host 2 -m comment --comment \"Configured DefaultEndpointToHostAction\" -j DROP\n\
         -D cali-tw-{without_profile} -j cali-pri-kns.default\n"
    )
}

fn iptables_of_two(picky: &str, disabled: &str, unknown: &str) -> String {
    let denies = |port: u16, target: &str| {
        format!(
            "-A cali-pi-np/default/picky -p udp -m udp --dport {port} \
             -m comment --comment \"NetworkPolicy default/picky ingress\" -j {target}\n"
        )
    };
    format!(
        ":cali-pi-np/default/picky -\n{}{}\
         -I cali-tw-{picky} 4 -j cali-pi-np/default/picky\n\
         -F cali-tw-{disabled}\n\
         -A cali-tw-{disabled} -m comment --comment \"Endpoint admin disabled\" -j DROP\n\
         -D cali-to-wl-dispatch -o {unknown} -g cali-tw-{unknown}\n",
        denies(1001, "DROP"),
        denies(1003, "REJECT"),
    )
}

fn nftables_of_one(without_profile: &str) -> String {
    format!(
        "add rule ip calico filter-cali-cidr-block ip daddr 10.96.0.0/12 counter drop\n\
         flush chain ip calico filter-cali-wl-to-host\n\
         add rule ip calico filter-cali-wl-to-host counter jump filter-cali-from-wl-dispatch\n\
         add rule ip calico filter-cali-wl-to-host counter drop \
             comment \"cali:1; Configured DefaultEndpointToHostAction\"\n\
         flush chain ip calico filter-cali-tw-{without_profile}\n\
         add rule ip calico filter-cali-tw-{without_profile} ct state related,established counter accept\n\
         add rule ip calico filter-cali-tw-{without_profile} ct state invalid counter drop\n\
         add rule ip calico filter-cali-tw-{without_profile} counter meta mark set mark & 0xfffcffff\n\
         add rule ip calico filter-cali-tw-{without_profile} counter drop \
             comment \"cali:2; Drop if no profiles matched\"\n"
    )
}

/// With the bit for denied packets, as Felix has it (`CombineMatchAndActionsForProtoRule`, `felix/rules/policy.go`).
fn nftables_of_two(picky: &str, disabled: &str, unknown: &str) -> String {
    let chain = "ip calico filter-cali-pi-np/default/picky";
    let denies = |port: u16, verdict: &str| {
        format!(
            "add rule {chain} meta l4proto udp udp dport {{ {port} }} counter meta mark set mark or 0x40000 \
             comment \"cali:{port}; NetworkPolicy default/picky ingress\"\n\
             add rule {chain} meta mark & 0x40000 == 0x40000 counter {verdict} comment \"cali:{port};\"\n"
        )
    };
    format!(
        "add chain {chain}\n{}{}\
         add rule ip calico filter-cali-tw-{picky} index 2 counter jump filter-cali-pi-np/default/picky\n\
         flush chain ip calico filter-cali-tw-{disabled}\n\
         add rule ip calico filter-cali-tw-{disabled} counter drop comment \"cali:3; Endpoint admin disabled\"\n\
         delete element ip calico filter-cali-to-wl-dispatch {{ \"{unknown}\" }}\n",
        denies(1001, "drop"),
        denies(1003, "reject"),
    )
}

/// The counters of the kinds' rules; 0 where there is none.
pub(super) fn counts(lab: &Lab, kinds: &[Kind]) -> Result<Vec<u64>> {
    let rules = [ONE, TWO].map(|node| counted(lab, node).map(|rules| (node, rules)));
    let rules: Vec<(&str, Vec<Counted>)> = rules.into_iter().collect::<Result<_>>()?;
    let count = |kind: &Kind| {
        let Some((chain, text)) = &kind.expected.rule else {
            return Ok(0);
        };
        let of_node = rules.iter().find(|(node, _)| *node == kind.expected.node);
        let all = of_node.map_or(&[][..], |(_, rules)| rules);
        let mut fitting = all
            .iter()
            .filter(|rule| rule.chain.starts_with(chain) && rule.text.contains(text))
            .peekable();
        fitting
            .peek()
            .with_context(|| format!("{} has no rule {chain} … {text}", kind.expected.node))?;
        Ok(fitting.map(|rule| rule.packets).sum())
    };
    kinds.iter().map(count).collect()
}

/// A rule that drops or rejects, with its counter.
struct Counted {
    /// In nftables without the layer before it.
    chain: String,
    text: String,
    packets: u64,
}

fn counted(lab: &Lab, node: &str) -> Result<Vec<Counted>> {
    let command: &[&str] = match lab.options().netfilter {
        Backend::Native => &["nft", "list", "table", "ip", "calico"],
        Backend::Legacy => &["iptables-legacy-save", "-c"],
        _ => &["iptables-nft-save", "-c"],
    };
    let shown = command::text(&command::run(&mut lab.exec(node, command)?)?);
    let rules = match lab.options().netfilter {
        Backend::Native => of_nftables(&shown),
        _ => of_iptables(&shown),
    };
    rules.with_context(|| format!("counters of {node}: {shown}"))
}

/// `[3:252] -A cali-tw-cali1 … -j DROP`.
fn of_iptables(shown: &str) -> Result<Vec<Counted>> {
    let mut rules = Vec::new();
    for line in shown.lines() {
        let Some((counters, rule)) = line.strip_prefix('[').and_then(|line| line.split_once("] -A ")) else {
            continue;
        };
        if !rule.ends_with("-j DROP") && !rule.contains("-j REJECT") {
            continue;
        }
        let (packets, _) = counters.split_once(':').context("a rule without counters")?;
        let (chain, text) = rule.split_once(' ').context("a rule without a chain")?;
        rules.push(Counted {
            chain: chain.to_owned(),
            text: text.to_owned(),
            packets: packets.parse()?,
        });
    }
    Ok(rules)
}

/// `chain filter-cali-tw-cali1 {`, and in it `… counter packets 3 bytes 252 drop comment "…"`.
fn of_nftables(shown: &str) -> Result<Vec<Counted>> {
    let mut rules = Vec::new();
    let mut chain = "";
    for line in shown.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix("chain ")
            .and_then(|rest| rest.strip_suffix(" {"))
        {
            chain = name.split_once('-').map_or(name, |(_, name)| name);
        }
        let Some((_, counter)) = line.split_once("counter packets ") else {
            continue;
        };
        let mut words = counter.split(' ');
        let packets = words.next().context("a counter without a number")?.parse()?;
        // `bytes`, a number, and what becomes of the packet.
        if matches!(words.nth(2), Some("drop" | "reject")) {
            rules.push(Counted {
                chain: chain.to_owned(),
                text: line.to_owned(),
                packets,
            });
        }
    }
    Ok(rules)
}
