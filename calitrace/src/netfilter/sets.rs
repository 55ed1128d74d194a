//! The members of IP sets, as `ipset save` writes them (ipset 7, protocol 7). Felix keeps in them whom its policies'
//! selectors mean.

use std::{cmp::Reverse, collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use rustc_hash::{FxHashMap, FxHashSet};

use super::{Asked, rules::End, save::protocol};

/// The IP sets of a node, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets(FxHashMap<String, Set>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Set {
    /// `hash:net` and `hash:ip`.
    Nets(Nets),
    /// `hash:ip,port`.
    Ports(FxHashSet<(IpAddr, u8, u16)>),
    /// Of a type that is not looked into.
    Other,
}

/// Networks; the longest prefix that holds an address decides (`mtype_test_cidrs`, `net/netfilter/ipset/ip_set_hash_gen.h`,
/// 6.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Nets {
    /// Of all members, the longest first.
    lengths: BTreeSet<Reverse<u8>>,
    /// Whether it is one; `nomatch` excepts a network from a larger one.
    members: FxHashMap<IpNet, bool>,
}

impl Nets {
    fn add(&mut self, net: IpNet, is_member: bool) {
        self.lengths.insert(Reverse(net.prefix_len()));
        self.members.insert(net.trunc(), is_member);
    }

    fn has(&self, address: IpAddr) -> bool {
        let member_of = |Reverse(length): &Reverse<u8>| {
            let net = IpNet::new(address, *length).ok()?;
            self.members.get(&net.trunc()).copied()
        };
        self.lengths.iter().find_map(member_of).unwrap_or(false)
    }
}

impl Sets {
    /// The sets of a text. Lines that are none are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut sets = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next(), words.next()) {
                (Some("create"), Some(name), Some(kind)) => {
                    // With a mask its addresses stand for others, too.
                    let is_masked = words.any(|word| matches!(word, "netmask" | "bitmask"));
                    let set = match kind {
                        _ if is_masked => Set::Other,
                        "hash:net" | "hash:ip" => Set::Nets(Nets::default()),
                        "hash:ip,port" => Set::Ports(FxHashSet::default()),
                        _ => Set::Other,
                    };
                    sets.0.insert(name.to_owned(), set);
                }
                (Some("add"), Some(name), Some(member)) => {
                    let Some(set) = sets.0.get_mut(name) else { continue };
                    if set.add(member, !words.any(|word| word == "nomatch")).is_none() {
                        // What is in it is not known, then.
                        *set = Set::Other;
                    }
                }
                _ => {}
            }
        }
        sets
    }

    /// Whether a set of networks or addresses has an address; none if there is no such set, or it is not known.
    #[must_use]
    pub fn holds(&self, name: &str, address: IpAddr) -> Option<bool> {
        match self.0.get(name)? {
            Set::Nets(nets) => Some(nets.has(address)),
            Set::Ports(_) | Set::Other => None,
        }
    }

    /// The members of a set that are single addresses.
    pub fn addresses(&self, name: &str) -> impl Iterator<Item = IpAddr> {
        let nets = match self.0.get(name) {
            Some(Set::Nets(nets)) => Some(nets),
            _ => None,
        };
        let members = nets.into_iter().flat_map(|nets| &nets.members);
        members
            .filter(|(net, is_member)| **is_member && net.prefix_len() == net.max_prefix_len())
            .map(|(net, _)| net.addr())
    }

    /// Whether the set has what these ends of the packet say; none if that is not known.
    pub(super) fn has(&self, name: &str, ends: &[End], packet: &Asked<'_>) -> Option<bool> {
        let address = |end: &End| match end {
            End::Source => packet.src,
            End::Destination => packet.dst,
        };
        match (self.0.get(name)?, ends) {
            (Set::Nets(nets), [end, ..]) => Some(nets.has(address(end))),
            (Set::Ports(members), [end, port, ..]) => {
                let port = packet.port(*port)?;
                Some(members.contains(&(address(end), packet.proto, port)))
            }
            _ => None,
        }
    }
}

impl Set {
    /// `10.0.0.0/8` or `10.0.0.1`; `10.0.0.1,tcp:80`. None if it is neither.
    fn add(&mut self, member: &str, is_member: bool) -> Option<()> {
        match self {
            Self::Nets(nets) => {
                let net = member
                    .parse()
                    .or_else(|_| member.parse::<IpAddr>().map(IpNet::from));
                nets.add(net.ok()?, is_member);
            }
            Self::Ports(members) => {
                let (address, rest) = member.split_once(',')?;
                let (proto, port) = rest.split_once(':')?;
                members.insert((address.parse().ok()?, protocol(proto)?, port.parse().ok()?));
            }
            Self::Other => {}
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netfilter::{Device, States};

    /// As `ipset save` (7.17) wrote it, of sets like Felix's and one of another kind.
    const SAVED: &str = "\
create cali40s:front hash:net family inet hashsize 1024 maxelem 1048576 bucketsize 12 initval 0xde1c071f
add cali40s:front 10.244.120.67
add cali40s:front 10.244.0.0/16
add cali40s:front 10.244.120.0/24 nomatch
create cali60s:front hash:net family inet6 hashsize 1024 maxelem 1048576 bucketsize 12 initval 0x8bc617ef
add cali60s:front fd00:10:244::/48
create cali40n:ports hash:ip,port family inet hashsize 1024 maxelem 1048576 bucketsize 12 initval 0xda920579
add cali40n:ports 10.244.205.193,tcp:8080
add cali40n:ports 10.244.205.193,sctp:3868
add cali40n:ports 10.244.205.193,udp:53
create other hash:net,port family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x914fc07b
add other 10.0.0.0/8,tcp:80
";

    fn packet(src: &str, proto: u8, ports: Option<(u16, u16)>) -> Asked<'static> {
        Asked {
            src: src.parse().unwrap(),
            dst: "10.244.205.193".parse().unwrap(),
            proto,
            ports: ports.map(|(source, destination)| (Some(source), destination)),
            icmp: None,
            input: Device::Unknown,
            output: Device::Unknown,
            states: States::ANY,
            is_from_there: false,
            local: &[],
        }
    }

    #[test]
    fn the_longest_network_decides() {
        let sets = Sets::parse(SAVED);
        let has = |name, src| sets.has(name, &[End::Source], &packet(src, 6, None));
        assert_eq!(has("cali40s:front", "10.244.1.1"), Some(true));
        assert_eq!(has("cali40s:front", "10.244.120.66"), Some(false));
        assert_eq!(has("cali40s:front", "10.244.120.67"), Some(true));
        assert_eq!(has("cali40s:front", "10.245.0.1"), Some(false));
        assert_eq!(has("cali60s:front", "fd00:10:244:7::9"), Some(true));
        assert_eq!(has("cali60s:front", "10.244.1.1"), Some(false));
    }

    #[test]
    fn named_ports_have_address_protocol_and_port() {
        let sets = Sets::parse(SAVED);
        let ends = [End::Destination, End::Destination];
        let has = |proto, ports| sets.has("cali40n:ports", &ends, &packet("10.0.0.1", proto, ports));
        assert_eq!(has(6, Some((40_000, 8080))), Some(true));
        assert_eq!(has(17, Some((40_000, 8080))), Some(false));
        assert_eq!(has(132, Some((40_000, 3868))), Some(true));
        assert_eq!(has(6, Some((8080, 40_000))), Some(false));
        assert_eq!(has(6, None), None);
    }

    #[test]
    fn single_addresses_are_told() {
        let sets = Sets::parse(&format!("{SAVED}add cali40s:front 10.244.7.7 nomatch\n"));
        let told: Vec<IpAddr> = sets.addresses("cali40s:front").collect();
        assert_eq!(told, ["10.244.120.67".parse::<IpAddr>().unwrap()]);
        assert_eq!(sets.addresses("cali40n:ports").count(), 0);
        assert_eq!(sets.addresses("nowhere").count(), 0);
    }

    #[test]
    fn what_is_not_understood_is_not_known() {
        let sets = Sets::parse(&format!(
            "{SAVED}create bad hash:net family inet\nadd bad 10.0.0.0/99\n\
             create masked hash:ip family inet netmask 24\nadd masked 10.0.0.0\n"
        ));
        let asked = packet("10.0.0.1", 6, None);
        assert_eq!(sets.has("other", &[End::Source], &asked), None);
        assert_eq!(sets.has("bad", &[End::Source], &asked), None);
        assert_eq!(sets.has("masked", &[End::Source], &asked), None);
        assert_eq!(sets.has("nowhere", &[End::Source], &asked), None);
        assert_eq!(
            sets.has("cali40s:front", &[], &asked),
            None,
            "no direction, which the kernel refuses"
        );
    }
}
