//! Which nodes are of one cluster: one's gateway is an address of the other, and they share a link. So two labs with the same
//! addresses are two clusters, because no link joins them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use anyhow::Result;
use ipnet::IpNet;

use super::view::NodeView;
use crate::{
    event::{Netns, Role},
    netns::Handle,
    route::{Link, PeerNamespaces, links, peer_namespaces},
};

/// A device of a namespace; with a VLAN identifier, that VLAN on it.
type Device = (Netns, u32, Option<u16>);

/// The number of a cluster: its smallest namespace inode number, which the kernel keeps within 32 bits (`inum` of
/// `struct ns_common`, `include/linux/ns_common.h`). So a node alone is the cluster of its own number.
pub(super) fn number(netns: Netns) -> u32 {
    u32::try_from(netns).unwrap_or(u32::MAX)
}

/// Sets the cluster of each node.
pub(super) fn assign(nodes: &mut [NodeView], all: &[Handle]) -> Result<()> {
    let segments = Segments::explore(nodes, all)?;
    let descriptions: Vec<_> = nodes
        .iter()
        .map(|node| Description::of(node, &segments))
        .collect();
    for (node, cluster) in nodes.iter_mut().zip(clusters(&descriptions)) {
        node.node.cluster = cluster;
    }
    Ok(())
}

/// What decides a node's cluster.
#[derive(Clone, Debug, Default)]
struct Description {
    netns: Netns,
    addresses: Vec<IpAddr>,
    /// Tunnel and route gateways, and nodes behind them.
    gateways: Vec<IpAddr>,
    /// Its IPAM blocks.
    local_blocks: Vec<IpNet>,
    /// Blocks of others that are reached without encapsulation, and the gateways.
    routed: Vec<(IpNet, IpAddr)>,
    /// The links that its uplinks are on.
    segments: BTreeSet<usize>,
}

impl Description {
    fn of(view: &NodeView, segments: &Segments) -> Self {
        let uplinks = view
            .interfaces
            .iter()
            .filter(|interface| interface.role == Role::Uplink);
        let on = uplinks
            .filter_map(|uplink| segments.of((view.netns(), uplink.ifindex, None)))
            .collect();
        let remote = view
            .routes
            .iter()
            .filter(|route| route.remote_node.is_some() || route.encap.is_some());
        let plain = view
            .routes
            .iter()
            .filter(|route| route.encap.is_none() && view.remote_blocks.contains(&route.prefix));
        Self {
            netns: view.netns(),
            addresses: view.node.addresses.clone(),
            gateways: remote
                .flat_map(|route| [route.gateway, route.remote_node])
                .flatten()
                .collect(),
            local_blocks: view.local_blocks.clone(),
            routed: plain
                .filter_map(|route| Some((route.prefix, route.gateway?)))
                .collect(),
            segments: on,
        }
    }

    /// Without encapsulation the gateway may be a router, which is no node: then the block tells.
    fn leads_to(&self, other: &Self, addresses: &BTreeSet<IpAddr>) -> bool {
        let mut gateways = self.gateways.iter();
        let mut routed = self.routed.iter();
        gateways.any(|gateway| other.addresses.contains(gateway))
            || routed
                .any(|(block, gateway)| !addresses.contains(gateway) && other.local_blocks.contains(block))
    }
}

/// The cluster number of each node.
fn clusters(nodes: &[Description]) -> Vec<u32> {
    let addresses: BTreeSet<IpAddr> = nodes.iter().flat_map(|node| &node.addresses).copied().collect();
    let mut groups = Groups::default();
    for (one, node) in nodes.iter().enumerate() {
        groups.find(one);
        for (other, peer) in nodes.iter().enumerate().skip(one + 1) {
            let related = node.leads_to(peer, &addresses) || peer.leads_to(node, &addresses);
            if related && !node.segments.is_disjoint(&peer.segments) {
                groups.join(one, other);
            }
        }
    }
    let mut smallest: BTreeMap<usize, Netns> = BTreeMap::new();
    for (at, node) in nodes.iter().enumerate() {
        let least = smallest.entry(groups.find(at)).or_insert(node.netns);
        *least = node.netns.min(*least);
    }
    (0..nodes.len())
        .map(|at| number(smallest[&groups.find(at)]))
        .collect()
}

/// Devices that hear each other's frames, or that a router connects.
#[derive(Debug, Default)]
struct Segments {
    numbers: HashMap<Device, usize>,
}

impl Segments {
    /// Follows the links from the nodes' uplinks: from a veth to its peer, from a port to its bridge, from a macvlan, ipvlan
    /// or VLAN to the device below, through all namespaces that they lead to.
    fn explore(nodes: &[NodeView], all: &[Handle]) -> Result<Self> {
        let mut known: HashMap<Netns, Known> = HashMap::new();
        let mut waiting: Vec<Handle> = nodes.iter().map(|node| node.handle.clone()).collect();
        while let Some(handle) = waiting.pop() {
            if known.contains_key(&handle.inode()) {
                continue;
            }
            let view = nodes.iter().find(|node| node.netns() == handle.inode());
            let links = match view {
                Some(view) => view.snapshot.links.clone(),
                None => links(&handle)?,
            };
            let peers = peer_namespaces(&handle, all)?;
            // Pods hang on nodes' workload devices; no way between nodes leads through them.
            let is_workload = |link: &&Link| {
                view.and_then(|view| view.interface(link.ifindex))
                    .is_some_and(|i| i.role == Role::Workload)
            };
            let beyond = links
                .iter()
                .filter(|link| !is_workload(link))
                .filter_map(|link| link.link_netnsid);
            let inodes: BTreeSet<Netns> = beyond.filter_map(|id| peers.get(&id).copied()).collect();
            waiting.extend(
                all.iter()
                    .filter(|other| inodes.contains(&other.inode()))
                    .cloned(),
            );
            // A router between the nodes has one way to an address, so what it connects is one network. A node is none:
            // it forwards for its pods.
            let router = view.is_none() && forwards(&handle);
            known.insert(handle.inode(), Known { links, peers, router });
        }
        Ok(Self::join(&known))
    }

    fn join(known: &HashMap<Netns, Known>) -> Self {
        let mut segments = Self::default();
        let mut groups = Groups::default();
        for (&netns, Known { links, peers, router }) in known {
            let mut first = None;
            for link in links {
                let own = segments.index((netns, link.ifindex, None));
                groups.find(own);
                if *router && !link.loopback() {
                    groups.join(own, *first.get_or_insert(own));
                }
                if let Some(other) = below(netns, link, peers) {
                    groups.join(own, segments.index(other));
                }
                if let Some(master) = link.master {
                    groups.join(own, segments.index((netns, master, None)));
                }
            }
        }
        segments
            .numbers
            .values_mut()
            .for_each(|number| *number = groups.find(*number));
        segments
    }

    fn index(&mut self, device: Device) -> usize {
        let next = self.numbers.len();
        *self.numbers.entry(device).or_insert(next)
    }

    fn of(&self, device: Device) -> Option<usize> {
        self.numbers.get(&device).copied()
    }
}

/// What is known of a namespace that the nodes' uplinks lead to.
#[derive(Debug)]
struct Known {
    links: Vec<Link>,
    peers: PeerNamespaces,
    /// It is no node and forwards.
    router: bool,
}

/// Whether a namespace forwards IPv4 packets.
fn forwards(handle: &Handle) -> bool {
    let read = handle.run(|| Ok(std::fs::read("/proc/sys/net/ipv4/ip_forward")?));
    read.is_ok_and(|setting| setting.starts_with(b"1"))
}

/// The device at the other end of, or under, a device.
fn below(netns: Netns, link: &Link, peers: &PeerNamespaces) -> Option<Device> {
    let other = link.link?;
    let namespace = match link.link_netnsid {
        Some(id) => *peers.get(&id)?,
        None => netns,
    };
    match link.kind.as_deref()? {
        "veth" | "netkit" | "macvlan" | "macvtap" | "ipvlan" | "ipvtap" => Some((namespace, other, None)),
        "vlan" => Some((namespace, other, link.vlan)),
        _ => None,
    }
}

/// Disjoint sets.
#[derive(Debug, Default)]
struct Groups {
    parents: Vec<usize>,
}

impl Groups {
    fn find(&mut self, at: usize) -> usize {
        while self.parents.len() <= at {
            self.parents.push(self.parents.len());
        }
        let mut root = at;
        while self.parents[root] != root {
            self.parents[root] = self.parents[self.parents[root]];
            root = self.parents[root];
        }
        root
    }

    fn join(&mut self, one: usize, other: usize) {
        let (one, other) = (self.find(one), self.find(other));
        self.parents[one.max(other)] = one.min(other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(netns: Netns, address: &str, gateways: &[&str], segments: &[usize]) -> Description {
        Description {
            netns,
            addresses: vec![address.parse().unwrap()],
            gateways: gateways.iter().map(|gateway| gateway.parse().unwrap()).collect(),
            segments: segments.iter().copied().collect(),
            ..Description::default()
        }
    }

    #[test]
    fn a_block_behind_a_router_makes_a_cluster() {
        let routed = |netns, address, block: &str, other: &str, gateway: &str| Description {
            local_blocks: vec![block.parse().unwrap()],
            routed: vec![(other.parse().unwrap(), gateway.parse().unwrap())],
            ..node(netns, address, &[gateway], &[1])
        };
        let (one, two) = ("10.244.120.64/26", "10.244.205.192/26");
        let nodes = [
            routed(1, "192.168.49.2", one, two, "192.168.49.1"),
            routed(2, "192.168.50.3", two, one, "192.168.50.1"),
            // Another cluster with the same blocks: its gateways are its nodes.
            routed(3, "192.168.51.2", one, two, "192.168.51.3"),
            routed(4, "192.168.51.3", two, one, "192.168.51.2"),
        ];
        assert_eq!(clusters(&nodes[..2]), [1, 1]);
        assert_eq!(clusters(&nodes[2..]), [3, 3]);
    }

    #[test]
    fn a_gateway_and_a_common_link_make_a_cluster() {
        // The third is known to nobody, the fourth to the first by one side only.
        let nodes = [
            node(30, "192.168.49.2", &["192.168.49.3"], &[1]),
            node(20, "192.168.49.3", &["192.168.49.2"], &[1, 2]),
            node(10, "192.168.49.4", &[], &[1]),
            node(40, "192.168.49.5", &["192.168.49.2"], &[1]),
        ];
        assert_eq!(clusters(&nodes), [20, 20, 10, 20]);
    }

    #[test]
    fn equal_addresses_on_other_links_are_another_cluster() {
        let nodes = [
            node(1, "192.168.49.2", &["192.168.49.3"], &[1]),
            node(2, "192.168.49.3", &["192.168.49.2"], &[1]),
            node(3, "192.168.49.2", &["192.168.49.3"], &[2]),
            node(4, "192.168.49.3", &["192.168.49.2"], &[2]),
            node(5, "192.168.49.3", &["192.168.49.2"], &[]),
        ];
        assert_eq!(clusters(&nodes), [1, 1, 3, 3, 5]);
    }

    fn link(ifindex: u32, kind: &str, other: Option<(u32, Option<i32>)>) -> Link {
        Link {
            ifindex,
            name: format!("eth{ifindex}"),
            kind: Some(kind.to_owned()),
            mtu: 1500,
            flags: 1,
            address: Vec::new(),
            master: None,
            link: other.map(|(link, _)| link),
            link_netnsid: other.and_then(|(_, id)| id),
            vlan: None,
            vxlan: None,
            ipip: None,
            xdp: false,
        }
    }

    #[test]
    fn segments_follow_veths_bridges_and_lower_devices() {
        let bridged = |index, peer, id| Link {
            master: Some(9),
            ..link(index, "veth", Some((peer, Some(id))))
        };
        let vlan = |index, vid| Link {
            vlan: Some(vid),
            ..link(index, "vlan", Some((9, None)))
        };
        let end = |links: Vec<Link>, peers: &[(i32, Netns)]| Known {
            links,
            peers: peers.iter().copied().collect(),
            router: false,
        };
        let veth = |peer, id| link(2, "veth", Some((peer, Some(id))));
        let mut known = HashMap::from([
            (1, end(vec![veth(5, 0)], &[(0, 100)])),
            (2, end(vec![veth(6, 0)], &[(0, 100)])),
            (3, end(vec![link(2, "macvlan", Some((9, Some(0))))], &[(0, 100)])),
            // Its number leads to a namespace that nobody knows.
            (4, end(vec![veth(6, 7)], &[])),
            (
                100,
                end(
                    vec![
                        bridged(5, 2, 1),
                        bridged(6, 2, 2),
                        link(9, "bridge", None),
                        vlan(10, 7),
                        vlan(11, 8),
                    ],
                    &[(1, 1), (2, 2)],
                ),
            ),
            (101, end(vec![veth(12, 0), link(3, "veth", None)], &[(0, 100)])),
        ]);
        let segments = Segments::join(&known);
        let of = |netns, ifindex| segments.of((netns, ifindex, None)).unwrap();
        assert_eq!(of(1, 2), of(2, 2));
        assert_eq!(of(1, 2), of(3, 2));
        assert_ne!(of(1, 2), of(4, 2));
        assert_ne!(of(100, 10), of(100, 11), "two VLANs of one device are two links");
        assert_ne!(of(100, 10), of(100, 9));
        assert_ne!(of(101, 2), of(101, 3));
        known.get_mut(&101).unwrap().router = true;
        let segments = Segments::join(&known);
        let of = |netns, ifindex| segments.of((netns, ifindex, None)).unwrap();
        assert_eq!(of(101, 2), of(101, 3), "a router between");
        assert_ne!(of(101, 2), of(1, 2));
    }
}
