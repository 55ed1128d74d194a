//! The netfilter rules of a node, as iptables and Calico's nftables mode have them, and the sets that they look into.

use std::net::IpAddr;

use anyhow::{Context as _, Result};

use crate::{
    iptables::{self, Shown},
    netfilter::{Asked, Ruleset, Sets, Sources},
    nftables::{self, Table},
};

/// Felix' table in Calico's nftables mode, of each family (`felix/dataplane/linux/int_dataplane.go`, Calico 3.34).
const CALICO: &str = "calico";

/// Whether a table of nftables is Felix'.
pub(in crate::calico) fn is_calico(table: &Table) -> bool {
    table.name == CALICO && matches!(table.family, "ip" | "ip6")
}

/// The rules of a node and the sets that they look into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// IPv4's rules of all tables, as `iptables-save` writes them.
    pub v4: String,
    /// IPv6's.
    pub v6: String,
    /// The members of IP sets; none if no rule looks into one.
    pub sets: Option<Sets>,
    /// IPv4's rules and sets of Calico's nftables mode, as [`crate::netfilter::compact_nft_with_nat`] writes them.
    pub native_v4: String,
    /// IPv6's.
    pub native_v6: String,
}

impl Firewall {
    /// Of the namespace that the calling thread is in.
    pub(in crate::calico) fn read() -> Result<Self> {
        let mut firewall = Self::default();
        if nftables::are_there() {
            for table in nftables::tables()?.iter().filter(|table| is_calico(table)) {
                let text = if table.family == "ip" {
                    &mut firewall.native_v4
                } else {
                    &mut firewall.native_v6
                };
                *text = nftables::list_with_nat(table)?.context("nft is not on the path")?;
            }
        }
        let is_native = !firewall.native_v4.is_empty();
        for tool in iptables::tools() {
            match iptables::rules(tool)? {
                Shown::Rules(_, text) if tool.ipv6 => firewall.v6.push_str(&text),
                Shown::Rules(_, text) => firewall.v4.push_str(&text),
                Shown::Nothing => {}
                // Felix' rules are elsewhere.
                Shown::Missing if is_native && tool.is_for_nftables() => {}
                Shown::Missing => return Err(tool.is_missing()),
            }
        }
        if [&firewall.v4, &firewall.v6]
            .into_iter()
            .any(|rules| iptables::look_into_sets(rules))
        {
            firewall.sets = Some(Sets::parse(&iptables::sets()?));
        }
        Ok(firewall)
    }

    /// Whether Felix gives any packet of a pod the node's address; none if there are no rules of its for that.
    pub(super) fn has_masquerading(&self, ipv6: bool) -> Option<bool> {
        let rules = self.rules(ipv6);
        either(rules.iter().filter_map(Ruleset::has_masquerading).map(Some))
    }

    /// Whether Felix gives the packet another source; none if there are no rules of its for that, or they leave it open.
    pub(in crate::calico) fn masquerades(&self, packet: &Asked<'_>) -> Option<bool> {
        let rules = self.rules(packet.src.is_ipv6());
        let unread = Sets::default();
        let sets = self.sets.as_ref().unwrap_or(&unread);
        let of_felix = rules.iter().filter(|rules| rules.has_masquerading().is_some());
        either(of_felix.map(|rules| rules.masquerades(packet, sets)))
    }

    /// The rules of one family: iptables', and those of Calico's nftables mode. Where both have some, packets go through both.
    fn rules(&self, ipv6: bool) -> [Ruleset; 2] {
        let (iptables, native) = self.texts(ipv6);
        [Ruleset::parse(iptables), Ruleset::parse_nft(native, ipv6)]
    }

    /// The sets of this name in which rules of one family look for where packets come from. A set that no rule looks into
    /// forbids nothing.
    pub(super) fn sources<'a>(&'a self, set: &'a str, ipv6: bool) -> impl Iterator<Item = Known<'a>> {
        let (iptables, native) = self.texts(ipv6);
        let is_asked = iptables.contains(&format!(" --match-set {set} src"));
        let of_iptables = self.sets.as_ref().filter(|_| is_asked);
        let of_native = Sources::parse(native, set);
        of_iptables
            .map(|sets| Known::Set(sets, set))
            .into_iter()
            .chain(of_native.map(Known::Native))
    }

    fn texts(&self, ipv6: bool) -> (&str, &str) {
        if ipv6 {
            (&self.v6, &self.native_v6)
        } else {
            (&self.v4, &self.native_v4)
        }
    }
}

/// Whether one of them does it; none if that is open, or there is none.
fn either(answers: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    let answers: Vec<Option<bool>> = answers.collect();
    if answers.contains(&Some(true)) {
        return Some(true);
    }
    (!answers.is_empty() && !answers.contains(&None)).then_some(false)
}

/// Whom packets are taken from.
pub(super) enum Known<'a> {
    Set(&'a Sets, &'a str),
    Native(Sources),
}

impl Known<'_> {
    /// Whether the address is among them; none if that is not known.
    pub(super) fn holds(&self, address: IpAddr) -> Option<bool> {
        match self {
            Self::Set(sets, name) => sets.holds(name, address),
            Self::Native(sources) => sources.holds(address),
        }
    }

    /// Those that are single addresses.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        match self {
            Self::Set(sets, name) => sets.addresses(name).collect(),
            Self::Native(sources) => sources.addresses().collect(),
        }
    }
}
