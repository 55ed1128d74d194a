//! What is judged beside the tables of [`crate::route`]: settings, counters, rules, and the pods' own ends of their
//! interfaces. Reads, and judges nothing.

use std::{collections::BTreeMap, fs, io, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    calico::view::NodeView,
    event::Role,
    netns::{self, Handle},
};

use super::{FallbackTunnels, Firewall, tunnels};

/// What [`super::check`] judges. What could not be read is not judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Settings.
    pub sysctls: Sysctls,
    /// The table of connections; none where the kernel has none.
    pub conntrack: Option<Conntrack>,
    /// UDP datagrams to the node whose checksum was wrong, since its namespace was made.
    pub bad_checksums: u64,
    /// MTUs of the pods' own ends of their interfaces, in bytes, by the index of the node's end.
    pub pod_mtus: BTreeMap<u32, u32>,
    /// Netfilter rules and IP sets; none where they cannot be read.
    pub firewall: Option<Firewall>,
    /// Which namespaces the kernel gives a `tunl0`; none where that does not matter, or cannot be seen from here.
    pub fallback_tunnels: Option<FallbackTunnels>,
}

impl Evidence {
    /// Reads what belongs to a node. A namespace of a pod that vanishes meanwhile is passed over.
    pub fn read(view: &NodeView) -> Result<Self> {
        let firewall = match view.handle.run(Firewall::read) {
            Ok(firewall) => Some(firewall),
            Err(error) => {
                log::warn!(
                    "rules and sets of the node {} are not judged: {error:#}",
                    view.node.name
                );
                None
            }
        };
        Ok(Self {
            sysctls: Sysctls::read(view)?,
            conntrack: view.handle.run(Conntrack::read)?,
            bad_checksums: view.handle.run(bad_checksums)?,
            pod_mtus: pod_mtus(view)?,
            fallback_tunnels: match &firewall {
                Some(firewall) if tunnels::lacks_ipip(&view.snapshot, firewall) => {
                    FallbackTunnels::read(&view.handle).unwrap_or_else(|error| {
                        log::warn!("which namespaces get a tunl0 is not judged: {error:#}");
                        None
                    })
                }
                _ => None,
            },
            firewall,
        })
    }
}

/// Settings of a node's namespace, by their names below `net` (`ipv4/ip_forward`). One that is not there is not judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sysctls(BTreeMap<String, String>);

impl Sysctls {
    /// Settings with these names below `net`, and values.
    pub fn new<'a>(settings: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let settings = settings.into_iter();
        Self(
            settings
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        )
    }

    fn read(view: &NodeView) -> Result<Self> {
        let mut names: Vec<String> = [
            "ipv4/ip_forward",
            "ipv4/conf/all/rp_filter",
            "ipv4/conf/default/rp_filter",
            "ipv6/conf/all/forwarding",
        ]
        .map(str::to_owned)
        .to_vec();
        for interface in &view.interfaces {
            let settings: &[&str] = match interface.role {
                Role::Workload => &["proxy_arp", "forwarding"],
                Role::Uplink | Role::Tunnel => &["rp_filter"],
                Role::Other => &[],
            };
            for setting in settings {
                names.push(format!("ipv4/conf/{}/{setting}", interface.name));
            }
        }
        Self::read_named(&view.handle, names)
    }

    fn read_named(handle: &Handle, names: Vec<String>) -> Result<Self> {
        handle.run(|| {
            let mut values = BTreeMap::new();
            for name in names {
                if let Some(value) = read(&Path::new("/proc/sys/net").join(&name))? {
                    values.insert(name, value.trim().to_owned());
                }
            }
            Ok(Self(values))
        })
    }

    pub(super) fn is(&self, name: &str, value: &str) -> bool {
        self.0.get(name).is_some_and(|set| set == value)
    }

    pub(super) fn number(&self, name: &str) -> Option<u32> {
        self.0.get(name)?.parse().ok()
    }
}

/// How full the table of connections is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    /// Connections of this namespace.
    pub count: u64,
    /// As many as there may be in it.
    pub max: u64,
    /// Connections thrown out to make room, since the namespace was made: the table was full then.
    pub evicted: u64,
}

impl Conntrack {
    /// Of the namespace that the calling thread is in.
    fn read() -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<u64>> {
            let text = read(&Path::new("/proc/sys/net/netfilter").join(name))?;
            Ok(text.and_then(|text| text.trim().parse().ok()))
        };
        let (Some(count), Some(max)) = (number("nf_conntrack_count")?, number("nf_conntrack_max")?) else {
            return Ok(None);
        };
        let statistics = read(Path::new("/proc/thread-self/net/stat/nf_conntrack"))?;
        Ok(Some(Self {
            count,
            max,
            evicted: statistics.map_or(0, |text| total(&text, "early_drop")),
        }))
    }
}

/// The sum of a column of a table with a line of names, then one line of hexadecimal numbers for each processor
/// (`ct_cpu_seq_show`, `net/netfilter/nf_conntrack_standalone.c`, Linux 5.10 to 6.18).
fn total(table: &str, column: &str) -> u64 {
    let mut lines = table.lines();
    let names = lines.next().unwrap_or_default();
    let Some(at) = names.split_whitespace().position(|name| name == column) else {
        return 0;
    };
    let numbers = lines.filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(at)?, 16).ok());
    numbers.sum()
}

/// `InCsumErrors` of UDP over both families (`net/ipv4/proc.c`, `net/ipv6/proc.c`, Linux 5.10 to 6.18), in the namespace that the
/// calling thread is in.
fn bad_checksums() -> Result<u64> {
    let text = |name: &str| -> Result<String> {
        Ok(read(&Path::new("/proc/thread-self/net").join(name))?.unwrap_or_default())
    };
    Ok(counter(&text("snmp")?, "Udp:", "InCsumErrors") + counter6(&text("snmp6")?, "Udp6InCsumErrors"))
}

/// A counter of a table in which a line of names comes before each line of numbers, and both begin with the protocol.
fn counter(table: &str, protocol: &str, name: &str) -> u64 {
    let mut lines = table.lines().filter(|line| line.starts_with(protocol));
    let (Some(names), Some(numbers)) = (lines.next(), lines.next()) else {
        return 0;
    };
    let mut both = names.split_whitespace().zip(numbers.split_whitespace());
    let found = both.find(|(known, _)| *known == name);
    found.and_then(|(_, number)| number.parse().ok()).unwrap_or(0)
}

/// A counter of a table with a name and a number in each line.
fn counter6(table: &str, name: &str) -> u64 {
    let mut lines = table
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace));
    let found = lines.find(|(known, _)| *known == name);
    found
        .and_then(|(_, number)| number.trim().parse().ok())
        .unwrap_or(0)
}

fn pod_mtus(view: &NodeView) -> Result<BTreeMap<u32, u32>> {
    let mut mtus = BTreeMap::new();
    if view.pods.is_empty() {
        return Ok(mtus);
    }
    let all = netns::list()?;
    for pod in &view.pods {
        if let Some(link) = view.pod_end(pod, &all)? {
            mtus.insert(pod.ifindex, link.mtu);
        }
    }
    Ok(mtus)
}

/// A file's text; none if it is not there.
pub(super) fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_found_by_its_name() {
        let table = "entries  insert_failed drop early_drop icmp_error\n\
                     00000000  00000000 00000003 0000000a 00000000\n\
                     00000000  00000000 00000000 00000010 00000000\n";
        assert_eq!(total(table, "early_drop"), 26);
        assert_eq!(total(table, "drop"), 3);
        assert_eq!(total(table, "chaintoolong"), 0);
        assert_eq!(total("", "drop"), 0);
    }

    #[test]
    fn counters_are_found_by_their_names() {
        let snmp = "Tcp: InSegs InCsumErrors\nTcp: 9 8\nUdp: InDatagrams NoPorts InCsumErrors\nUdp: 5 0 3\n";
        assert_eq!(counter(snmp, "Udp:", "InCsumErrors"), 3);
        assert_eq!(counter(snmp, "Udp:", "MemErrors"), 0);
        assert_eq!(counter("", "Udp:", "InCsumErrors"), 0);
        let snmp6 = "Udp6InDatagrams                 \t7\nUdp6InCsumErrors                \t4\n";
        assert_eq!(counter6(snmp6, "Udp6InCsumErrors"), 4);
        assert_eq!(counter6("", "Udp6InCsumErrors"), 0);
    }
}
