//! What makes a namespace a Calico node, and what its devices and routes are for: pure, from its tables alone.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    event::{self, EncapKind, RouteKind},
    route::{Entry, Link, Snapshot, TABLE_LOCAL, Type},
};

/// Calico's tunnel devices by name (`felix/dataplane/linux/dataplanedefs/dataplane_defs.go`, Calico 3.34).
const TUNNEL_NAMES: [&str; 5] = [
    "tunl0",
    "vxlan.calico",
    "vxlan-v6.calico",
    "wireguard.cali",
    "wg-v6.cali",
];

/// Makers of routes that are never an IPAM block's (`RTPROT_…`): redirect, kernel, static, router advertisement, DHCP.
/// Blocks come from BIRD (12), another BGP daemon, or Felix (80, or as configured).
const NEVER_A_BLOCK: [u8; 5] = [1, 2, 4, 9, 16];

/// A workload interface: a device of the right name with a route to one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Workload {
    pub(super) ifindex: u32,
    /// The pod's addresses, sorted.
    pub(super) addresses: Vec<IpAddr>,
}

/// The parts of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Anatomy {
    pub(super) workloads: Vec<Workload>,
    /// Indices of the tunnel devices.
    pub(super) tunnels: Vec<u32>,
    /// The routes that matter, IPv4's first, and of each family the most specific first.
    pub(super) routes: Vec<event::Route>,
    /// IPAM blocks of this node.
    pub(super) local_blocks: Vec<IpNet>,
    /// IPAM blocks (and borrowed addresses) of other nodes.
    pub(super) remote_blocks: Vec<IpNet>,
}

impl Anatomy {
    /// The parts of the namespace if it is a Calico node: it has workload interfaces, or a tunnel device with an address
    /// and a local block. Who made the routes does not matter (BIRD up to 3.32, Felix since), nor the kind of the workload
    /// devices (veth or netkit). A pod has neither: its `tunl0`, if it has one, has no address, and no block is its own.
    pub(super) fn of(snapshot: &Snapshot, prefixes: &[String]) -> Option<Self> {
        let workloads = workloads(snapshot, prefixes);
        let tunnels: Vec<u32> = snapshot
            .links
            .iter()
            .filter(|link| is_tunnel(link, snapshot))
            .map(|link| link.ifindex)
            .collect();
        let local_blocks: Vec<IpNet> = forwarding_routes(snapshot)
            .filter(|entry| entry.kind == Type::Blackhole && block_sized(entry.destination))
            .map(|entry| entry.destination)
            .collect();
        let addressed = tunnels
            .iter()
            .any(|&tunnel| snapshot.addresses_of(tunnel).any(|a| global(a.address)));
        let has_block = addressed && !local_blocks.is_empty();
        if workloads.is_empty() && !has_block {
            return None;
        }
        let remote_blocks = forwarding_routes(snapshot)
            .filter(|entry| is_remote_block(entry, &tunnels))
            .map(|entry| entry.destination)
            .collect();
        let mut anatomy = Self {
            workloads,
            tunnels,
            routes: Vec::new(),
            local_blocks: sorted(local_blocks),
            remote_blocks: sorted(remote_blocks),
        };
        anatomy.routes = anatomy.event_routes(snapshot);
        Some(anatomy)
    }

    /// The addresses of the nodes behind remote blocks.
    pub(super) fn remote_nodes(&self) -> Vec<IpAddr> {
        sorted(self.routes.iter().filter_map(|route| route.remote_node).collect())
    }

    fn event_routes(&self, snapshot: &Snapshot) -> Vec<event::Route> {
        let mut entries: Vec<_> = forwarding_routes(snapshot).filter(|entry| shown(entry)).collect();
        entries.sort_by_key(|entry| {
            // WireGuard's rule comes before the main table's, so its route for the same block does, too.
            let tunnel = entry.oif.and_then(|oif| encap_of(snapshot.link(oif)?));
            let rank = u8::from(tunnel != Some(EncapKind::Wireguard));
            (
                entry.destination.addr().is_ipv6(),
                std::cmp::Reverse(entry.destination.prefix_len()),
                entry.destination,
                rank,
                entry.metric,
            )
        });
        let mut routes: Vec<event::Route> = entries
            .into_iter()
            .filter_map(|entry| self.event_route(snapshot, entry))
            .collect();
        // WireGuard's routes name no peer; where the device's peers are not known, the main table's route for the same block
        // does.
        let named: Vec<(IpNet, IpAddr)> = routes
            .iter()
            .filter_map(|route| Some((route.prefix, route.remote_node?)))
            .collect();
        for route in routes
            .iter_mut()
            .filter(|route| route.encap == Some(EncapKind::Wireguard) && route.remote_node.is_none())
        {
            route.remote_node = named
                .iter()
                .find(|(prefix, _)| *prefix == route.prefix)
                .map(|(_, node)| *node);
        }
        routes.dedup();
        routes
    }

    fn event_route(&self, snapshot: &Snapshot, entry: &Entry) -> Option<event::Route> {
        let kind = match entry.kind {
            Type::Unicast => RouteKind::Unicast,
            Type::Blackhole => RouteKind::Blackhole,
            Type::Unreachable => RouteKind::Unreachable,
            Type::Prohibit => RouteKind::Prohibit,
            Type::Local | Type::Other => return None,
        };
        let encap = entry.oif.and_then(|oif| encap_of(snapshot.link(oif)?));
        let remote_node = match (encap, entry.gateway) {
            (Some(EncapKind::Wireguard), _) => behind_wireguard(snapshot, entry),
            (_, None) => None,
            (Some(EncapKind::Vxlan), Some(gateway)) => behind_vxlan(snapshot, entry.oif, gateway),
            (Some(EncapKind::Ipip), gateway) => gateway,
            (None, gateway) => gateway.filter(|_| is_remote_block(entry, &self.tunnels)),
        };
        Some(event::Route {
            prefix: entry.destination,
            kind,
            gateway: entry.gateway,
            ifindex: entry.oif,
            encap,
            remote_node,
        })
    }
}

/// The encapsulation that a device does.
pub(super) fn encap_of(link: &Link) -> Option<EncapKind> {
    match (link.kind.as_deref(), link.name.as_str()) {
        // User-space implementations use TUN devices under Calico's names.
        (Some("ipip"), _) | (Some("tun"), "tunl0") => Some(EncapKind::Ipip),
        (Some("wireguard"), _) | (Some("tun"), "wireguard.cali" | "wg-v6.cali") => Some(EncapKind::Wireguard),
        (Some("vxlan"), _) => Some(EncapKind::Vxlan),
        _ => None,
    }
}

/// What a tunnel adds to a packet, in bytes (`felix/dataplane/linux/int_dataplane.go`, Calico 3.34).
pub(super) fn overhead(link: &Link) -> Option<u32> {
    let v6 = link.name.contains("v6");
    Some(match encap_of(link)? {
        EncapKind::Ipip => 20,
        EncapKind::Vxlan if v6 => 70,
        EncapKind::Vxlan => 50,
        EncapKind::Wireguard if v6 => 80,
        EncapKind::Wireguard => 60,
    })
}

/// Neither loopback, link-local, multicast nor unspecified.
pub(super) fn global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || v4.is_multicast())
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast())
        }
    }
}

/// Whether a look at the devices alone says that the namespace may be a node.
pub(super) fn may_be_node(links: &[Link], prefixes: &[String]) -> bool {
    links
        .iter()
        .any(|link| has_prefix(link, prefixes) || encap_of(link).is_some())
}

/// Named as a workload interface, and no tunnel.
pub(super) fn has_prefix(link: &Link, prefixes: &[String]) -> bool {
    prefixes
        .iter()
        .any(|prefix| link.name.starts_with(prefix.as_str()))
        && encap_of(link).is_none()
}

fn workloads(snapshot: &Snapshot, prefixes: &[String]) -> Vec<Workload> {
    snapshot
        .links
        .iter()
        .filter(|link| has_prefix(link, prefixes))
        .filter_map(|link| {
            let to_pod = |entry: &&Entry| {
                entry.oif == Some(link.ifindex)
                    && entry.kind == Type::Unicast
                    && entry.gateway.is_none()
                    && entry.destination.prefix_len() == entry.destination.max_prefix_len()
                    && global(entry.destination.addr())
            };
            let addresses: Vec<_> = forwarding_routes(snapshot)
                .filter(to_pod)
                .map(|entry| entry.destination.addr())
                .collect();
            (!addresses.is_empty()).then(|| Workload {
                ifindex: link.ifindex,
                addresses: sorted(addresses),
            })
        })
        .collect()
}

/// A tunnel of the node's: of a tunnel's kind or name, with an address of its own or routes through it.
fn is_tunnel(link: &Link, snapshot: &Snapshot) -> bool {
    let in_use = || {
        snapshot
            .addresses_of(link.ifindex)
            .any(|address| global(address.address))
            || forwarding_routes(snapshot).any(|entry| {
                entry.oif == Some(link.ifindex)
                    && entry.kind == Type::Unicast
                    && block_sized(entry.destination)
            })
    };
    (encap_of(link).is_some() || TUNNEL_NAMES.contains(&link.name.as_str())) && in_use()
}

/// Calico's block sizes: /20 to /32 and /116 to /128 (`IPPool.spec.blockSize`).
fn block_sized(prefix: IpNet) -> bool {
    let least = if matches!(prefix, IpNet::V4(_)) { 20 } else { 116 };
    prefix.prefix_len() >= least && global(prefix.addr())
}

fn is_remote_block(entry: &Entry, tunnels: &[u32]) -> bool {
    if entry.kind != Type::Unicast || !block_sized(entry.destination) {
        return false;
    }
    let tunnelled = entry.oif.is_some_and(|oif| tunnels.contains(&oif));
    tunnelled && entry.protocol != 2 || entry.gateway.is_some() && !NEVER_A_BLOCK.contains(&entry.protocol)
}

/// All tables but the node's own addresses.
fn forwarding_routes(snapshot: &Snapshot) -> impl Iterator<Item = &Entry> {
    snapshot.routes.iter().filter(|entry| entry.table != TABLE_LOCAL)
}

/// Link-local and multicast routes say nothing about pods.
fn shown(entry: &Entry) -> bool {
    let address = entry.destination.addr();
    entry.destination.prefix_len() == 0 || global(address)
}

/// VXLAN: the gateway is the remote tunnel's address; its hardware address leads to the node.
fn behind_vxlan(snapshot: &Snapshot, device: Option<u32>, gateway: IpAddr) -> Option<IpAddr> {
    let device = device?;
    let neighbour = snapshot
        .neighbours
        .iter()
        .find(|entry| entry.ifindex == device && entry.address == gateway)?;
    let forward = snapshot
        .forwards
        .iter()
        .find(|entry| entry.ifindex == device && entry.mac == neighbour.mac)?;
    Some(forward.destination)
}

/// `WireGuard`: the peer that may have the route's addresses, and where it is.
fn behind_wireguard(snapshot: &Snapshot, entry: &Entry) -> Option<IpAddr> {
    let may_have = |allowed: &IpNet| allowed.contains(&entry.destination);
    let peers = snapshot
        .peers
        .iter()
        .filter(|peer| Some(peer.ifindex) == entry.oif);
    let mut peers = peers.filter(|peer| peer.allowed.iter().any(may_have));
    peers.next()?.endpoint
}

pub(super) fn sorted<T: Ord>(mut values: Vec<T>) -> Vec<T> {
    values.sort_unstable();
    values.dedup();
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::{Address, Forward, Neighbour, TABLE_MAIN};

    fn link(ifindex: u32, name: &str, kind: &str) -> Link {
        Link {
            ifindex,
            name: name.to_owned(),
            kind: Some(kind.to_owned()),
            mtu: 1500,
            flags: 1,
            ..Link::default()
        }
    }

    fn address(ifindex: u32, address: &str) -> Address {
        Address {
            ifindex,
            address: address.parse().unwrap(),
            prefix_len: 32,
            scope: 0,
            secondary: false,
        }
    }

    fn entry(prefix: &str, oif: Option<u32>, gateway: Option<&str>) -> Entry {
        Entry {
            destination: prefix.parse().unwrap(),
            kind: Type::Unicast,
            table: TABLE_MAIN,
            protocol: 80,
            scope: 0,
            metric: 0,
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            oif,
            source: None,
            onlink: false,
            mtu: None,
        }
    }

    fn blackhole(prefix: &str) -> Entry {
        Entry {
            kind: Type::Blackhole,
            ..entry(prefix, None, None)
        }
    }

    fn anatomy(snapshot: &Snapshot) -> Option<Anatomy> {
        Anatomy::of(snapshot, &["cali".to_owned()])
    }

    /// A node with IPIP as the seed's: one pod, a remote block, a default route.
    fn ipip_node() -> Snapshot {
        Snapshot {
            links: vec![
                link(2, "tunl0", "ipip"),
                link(3, "eth0", "veth"),
                link(4, "cali8d02ed71817", "netkit"),
            ],
            addresses: vec![address(2, "10.244.120.64"), address(3, "192.168.49.2")],
            routes: vec![
                entry("0.0.0.0/0", Some(3), Some("192.168.49.1")),
                blackhole("10.244.120.64/26"),
                entry("10.244.205.192/26", Some(2), Some("192.168.49.3")),
                entry("10.244.120.67/32", Some(4), None),
            ],
            ..Snapshot::default()
        }
    }

    #[test]
    fn the_seeds_node() {
        let anatomy = anatomy(&ipip_node()).unwrap();
        assert_eq!(
            anatomy.workloads,
            [Workload {
                ifindex: 4,
                addresses: vec!["10.244.120.67".parse().unwrap()]
            }]
        );
        assert_eq!(anatomy.tunnels, [2]);
        assert_eq!(anatomy.local_blocks, ["10.244.120.64/26".parse().unwrap()]);
        assert_eq!(anatomy.remote_blocks, ["10.244.205.192/26".parse().unwrap()]);
        assert_eq!(
            anatomy.remote_nodes(),
            ["192.168.49.3".parse::<IpAddr>().unwrap()]
        );
        let prefixes: Vec<u8> = anatomy
            .routes
            .iter()
            .map(|route| route.prefix.prefix_len())
            .collect();
        assert_eq!(prefixes, [32, 26, 26, 0], "the most specific first");
        let remote = &anatomy.routes[2];
        assert_eq!(
            (remote.encap, remote.remote_node),
            (Some(EncapKind::Ipip), remote.gateway)
        );
    }

    #[test]
    fn a_node_without_pods_needs_tunnel_address_and_block() {
        let mut node = ipip_node();
        node.routes.retain(|entry| entry.oif != Some(4));
        assert!(anatomy(&node).is_some());
        let mut unaddressed = node.clone();
        unaddressed.addresses.retain(|address| address.ifindex != 2);
        assert!(anatomy(&unaddressed).is_none());
        node.routes.retain(|entry| entry.kind != Type::Blackhole);
        assert!(anatomy(&node).is_none());
    }

    #[test]
    fn a_pod_is_no_node() {
        // With ipip loaded, each new namespace has a tunl0 of its own.
        let pod = Snapshot {
            links: vec![
                link(1, "lo", "loopback"),
                link(2, "tunl0", "ipip"),
                link(3, "eth0", "veth"),
            ],
            addresses: vec![address(3, "10.244.120.67")],
            routes: vec![
                entry("169.254.1.1/32", Some(3), None),
                entry("0.0.0.0/0", Some(3), Some("169.254.1.1")),
                Entry {
                    kind: Type::Local,
                    table: TABLE_LOCAL,
                    ..entry("10.244.120.67/32", Some(3), None)
                },
            ],
            ..Snapshot::default()
        };
        assert!(anatomy(&pod).is_none());
    }

    #[test]
    fn a_name_alone_makes_no_workload() {
        let mut node = ipip_node();
        for odd in [
            entry("10.244.120.64/26", Some(4), None),
            entry("10.244.120.67/32", Some(4), Some("10.0.0.1")),
            entry("10.244.120.67/32", Some(3), None),
            entry("169.254.1.1/32", Some(4), None),
            Entry {
                kind: Type::Local,
                table: TABLE_LOCAL,
                ..entry("10.244.120.67/32", Some(4), None)
            },
        ] {
            *node.routes.last_mut().unwrap() = odd.clone();
            assert!(anatomy(&node).unwrap().workloads.is_empty(), "{odd:?}");
        }
    }

    #[test]
    fn behind_vxlan_the_forwarding_database_names_the_node() {
        let mut node = ipip_node();
        node.links[0] = link(2, "vxlan.calico", "vxlan");
        node.routes[2].gateway = Some("10.244.205.192".parse().unwrap());
        let remote = |node: &Snapshot| anatomy(node).unwrap().routes[2].remote_node;
        assert_eq!(remote(&node), None, "nothing known is nothing said");
        let mac = vec![0x66, 0, 0, 0, 0, 1];
        node.neighbours = vec![Neighbour {
            ifindex: 2,
            address: "10.244.205.192".parse().unwrap(),
            mac: mac.clone(),
        }];
        node.forwards = vec![
            Forward {
                ifindex: 2,
                mac: vec![0x66, 0, 0, 0, 0, 2],
                destination: "192.168.49.4".parse().unwrap(),
            },
            Forward {
                ifindex: 2,
                mac,
                destination: "192.168.49.3".parse().unwrap(),
            },
        ];
        assert_eq!(remote(&node), Some("192.168.49.3".parse().unwrap()));
    }

    #[test]
    fn without_encapsulation_bgp_routes_are_blocks_and_an_administrators_are_not() {
        let mut node = ipip_node();
        node.routes[2].oif = Some(3);
        let blocks = |node: &Snapshot| anatomy(node).unwrap().remote_blocks.len();
        for protocol in [3, 12, 80, 186] {
            node.routes[2].protocol = protocol;
            assert_eq!(blocks(&node), 1, "protocol {protocol}");
        }
        for protocol in NEVER_A_BLOCK {
            node.routes[2].protocol = protocol;
            assert_eq!(blocks(&node), 0, "protocol {protocol}");
        }
        node.routes[2].protocol = 80;
        node.routes[2].destination = "10.0.0.0/8".parse().unwrap();
        assert_eq!(blocks(&node), 0, "no block is that large");
    }

    #[test]
    fn wireguard_goes_first_and_learns_its_node_from_the_route_below() {
        let mut node = ipip_node();
        node.links.push(link(5, "wireguard.cali", "wireguard"));
        node.addresses.push(address(5, "10.244.120.65"));
        node.routes.push(Entry {
            table: 1,
            ..entry("10.244.205.192/26", Some(5), None)
        });
        let anatomy = anatomy(&node).unwrap();
        let routes: Vec<_> = anatomy
            .routes
            .iter()
            .filter(|route| route.prefix.to_string() == "10.244.205.192/26")
            .collect();
        assert_eq!(routes[0].encap, Some(EncapKind::Wireguard));
        assert_eq!(routes[0].remote_node, Some("192.168.49.3".parse().unwrap()));
        assert_eq!(routes[1].encap, Some(EncapKind::Ipip));
    }
}
