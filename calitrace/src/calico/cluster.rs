//! Which nodes are of one cluster: one's gateway is an address of the other, and they share a link. So two labs with the same
//! addresses are two clusters, because no link joins them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use anyhow::Result;

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
        Self {
            netns: view.netns(),
            addresses: view.node.addresses.clone(),
            gateways: remote
                .flat_map(|route| [route.gateway, route.remote_node])
                .flatten()
                .collect(),
            segments: on,
        }
    }

    fn leads_to(&self, other: &Self) -> bool {
        self.gateways
            .iter()
            .any(|gateway| other.addresses.contains(gateway))
    }
}

/// The cluster number of each node.
fn clusters(nodes: &[Description]) -> Vec<u32> {
    let mut groups = Groups::default();
    for (one, node) in nodes.iter().enumerate() {
        groups.find(one);
        for (other, peer) in nodes.iter().enumerate().skip(one + 1) {
            let related = node.leads_to(peer) || peer.leads_to(node);
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

/// Devices that hear each other's frames.
#[derive(Debug, Default)]
struct Segments {
    numbers: HashMap<Device, usize>,
}

impl Segments {
    /// Follows the links from the nodes' uplinks: from a veth to its peer, from a port to its bridge, from a macvlan, ipvlan
    /// or VLAN to the device below, through all namespaces that they lead to.
    fn explore(nodes: &[NodeView], all: &[Handle]) -> Result<Self> {
        let mut known: HashMap<Netns, (Vec<Link>, PeerNamespaces)> = HashMap::new();
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
            known.insert(handle.inode(), (links, peers));
        }
        Ok(Self::join(&known))
    }

    fn join(known: &HashMap<Netns, (Vec<Link>, PeerNamespaces)>) -> Self {
        let mut segments = Self::default();
        let mut groups = Groups::default();
        for (&netns, (links, peers)) in known {
            for link in links {
                let own = segments.index((netns, link.ifindex, None));
                groups.find(own);
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
