//! What the facts say: nodes, interfaces, pods, routes, hop addresses, translations. Answers questions about places and
//! addresses; knows nothing of packets and traces.

use std::net::IpAddr;

use calitrace_ebpf::shared::NODE_PORTS;
use ipnet::IpNet;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::{
    Name,
    firewall::Firewall,
    ledger::Ledgers,
    node::{Device, NodeTables},
};
use crate::event::{
    Clock, Encap, EncapKind, Fact, Flow, HopAddress, Interface, Netns, Node, Pod, Route, RouteKind,
    machine_of,
};

/// The cluster of namespaces that belong to no known node. Packets there are joined with nothing but themselves.
pub(super) const NO_CLUSTER: u32 = u32::MAX;

/// Where an observation was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The node's namespace; the observation's own if it is no node's.
    pub(super) node: Netns,
    /// The node's cluster, or [`NO_CLUSTER`].
    pub(super) cluster: u32,
    /// It was in the own namespace of a pod of the node.
    pub(super) in_pod: bool,
}

/// Who owns an address.
#[derive(Clone, Debug)]
pub(super) struct Owner {
    pub(super) node: Netns,
    pub(super) name: Option<Name>,
}

/// Where a packet goes from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// To a node that is observed.
    Node(Netns),
    /// Out of sight.
    Unobserved,
}

/// What a route says about the way beyond a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Beyond {
    /// The gateway; none when the destination is on the link.
    pub(super) gateway: Option<IpAddr>,
    /// The encapsulation of the output device.
    pub(super) encap: Option<EncapKind>,
    /// The address of the node behind it; none for a route out of the cluster.
    pub(super) remote_node: Option<IpAddr>,
}

#[derive(Debug)]
struct PodInfo {
    node: Netns,
    ifindex: u32,
    name: Option<Name>,
    gone: bool,
}

/// Former hop addresses kept for packets that passed before a change.
const HISTORY: usize = 4;

/// Hop addresses with the times since when they hold, the oldest first.
type History = SmallVec<[(u64, Option<IpAddr>); 1]>;

/// The tables.
#[derive(Debug, Default)]
pub(super) struct Topology {
    nodes: FxHashMap<Netns, NodeTables>,
    clusters: SmallVec<[u32; 4]>,
    pods: FxHashMap<IpAddr, SmallVec<[PodInfo; 1]>>,
    pod_namespaces: FxHashMap<Netns, (Netns, u32)>,
    node_addresses: FxHashMap<IpAddr, SmallVec<[Netns; 1]>>,
    hop_addresses: FxHashMap<(Netns, IpAddr), History>,
    learned: FxHashMap<(Netns, IpAddr), IpAddr>,
    routers: FxHashMap<(Netns, Netns), u8>,
    services: Vec<IpNet>,
    clock: Option<Clock>,
    /// By machine: how exact the moved times are. Of others they are exact.
    clock_bounds: FxHashMap<u64, Option<u64>>,
    /// What was observed and what was lost.
    pub(super) ledgers: Ledgers,
}

impl Topology {
    /// Takes a fact. It holds at once: what it says came before the observations that need it.
    pub(super) fn learn(&mut self, fact: &Fact) {
        match fact {
            Fact::Node(node) => self.node(node),
            Fact::Interface(interface) => self.interface(interface),
            Fact::Pod(pod) => self.pod(pod),
            Fact::Routes { netns, routes, .. } => {
                self.nodes.entry(*netns).or_default().set_routes(routes);
            }
            Fact::HopAddress(hop) => self.hop(hop),
            Fact::Services { prefixes, .. } => self.services.clone_from(prefixes),
            Fact::Clock(clock) => self.clock = Some(*clock),
            Fact::ClockOffset(offset) => {
                self.clock_bounds
                    .insert(machine_of(offset.netns), offset.bound_ns);
            }
            Fact::Attachment(attachment) => self.ledgers.attachment(attachment),
            Fact::Rules(rules) => self.nodes.entry(rules.netns).or_default().firewall.learn(rules),
            Fact::RulesRead(read) => {
                let node = self.nodes.entry(read.netns).or_default();
                node.firewall.were_read(read.time);
            }
            Fact::IpSets(sets) => self
                .nodes
                .entry(sets.netns)
                .or_default()
                .firewall
                .learn_sets(sets),
        }
    }

    fn node(&mut self, node: &Node) {
        let info = self.nodes.entry(node.netns).or_default();
        for address in &info.addresses {
            if let Some(owners) = self.node_addresses.get_mut(address) {
                owners.retain(|owner| *owner != node.netns);
            }
        }
        for address in &node.addresses {
            let owners = self.node_addresses.entry(*address).or_default();
            if !owners.contains(&node.netns) {
                owners.push(node.netns);
            }
        }
        info.name = Some(node.name.as_str().into());
        info.cluster = Some(node.cluster);
        info.addresses.clone_from(&node.addresses);
        self.clusters = self.nodes.values().filter_map(|info| info.cluster).collect();
        self.clusters.sort_unstable();
        self.clusters.dedup();
    }

    /// A name outlives its interface, for the packets that are still under way.
    fn interface(&mut self, interface: &Interface) {
        if !interface.gone {
            let node = self.nodes.entry(interface.netns).or_default();
            node.interfaces.insert(interface.ifindex, Device::of(interface));
        }
    }

    /// A pod's name outlives it, too, until the address has another owner.
    fn pod(&mut self, pod: &Pod) {
        for address in &pod.addresses {
            let owners = self.pods.entry(*address).or_default();
            let known = owners.iter_mut().find(|owner| owner.node == pod.netns);
            if pod.gone {
                if let Some(owner) = known.filter(|owner| owner.ifindex == pod.ifindex) {
                    owner.gone = true;
                }
                continue;
            }
            let info = PodInfo {
                node: pod.netns,
                ifindex: pod.ifindex,
                name: pod.name.as_deref().map(Name::from),
                gone: false,
            };
            match known {
                Some(owner) => *owner = info,
                None => owners.push(info),
            }
        }
        if let Some(namespace) = pod.pod_netns
            && !pod.gone
        {
            self.pod_namespaces.insert(namespace, (pod.netns, pod.ifindex));
        }
    }

    fn hop(&mut self, hop: &HopAddress) {
        let history = self.hop_addresses.entry((hop.netns, hop.towards)).or_default();
        if history.last().is_some_and(|(_, address)| *address == hop.address) {
            return;
        }
        if history.len() >= HISTORY {
            history.remove(0);
        }
        history.push((hop.time, hop.address));
    }

    /// Where an observation in `netns` belongs.
    pub(super) fn place(&self, netns: Netns) -> Place {
        if let Some(cluster) = self.nodes.get(&netns).and_then(|info| info.cluster) {
            return Place {
                node: netns,
                cluster,
                in_pod: false,
            };
        }
        if let Some((node, _)) = self.pod_namespaces.get(&netns) {
            return Place {
                node: *node,
                cluster: self.cluster(*node),
                in_pod: true,
            };
        }
        Place {
            node: netns,
            cluster: NO_CLUSTER,
            in_pod: false,
        }
    }

    /// The cluster of a node.
    pub(super) fn cluster(&self, node: Netns) -> u32 {
        self.nodes
            .get(&node)
            .and_then(|info| info.cluster)
            .unwrap_or(NO_CLUSTER)
    }

    /// All clusters.
    pub(super) fn clusters(&self) -> &[u32] {
        &self.clusters
    }

    /// All nodes.
    pub(super) fn nodes(&self) -> impl Iterator<Item = Netns> {
        self.nodes.keys().copied()
    }

    /// The node's name.
    pub(super) fn name(&self, node: Netns) -> Option<&Name> {
        self.nodes.get(&node)?.name.as_ref()
    }

    /// The name of an interface of a node. In a pod's own namespace: of the workload interface at its other end.
    pub(super) fn interface_name(&self, netns: Netns, ifindex: u32) -> Option<&Name> {
        if self.nodes.contains_key(&netns) {
            return self.device(netns, ifindex).map(|device| &device.name);
        }
        let (node, workload) = self.pod_namespaces.get(&netns)?;
        self.device(*node, *workload).map(|device| &device.name)
    }

    /// An interface of a node.
    pub(super) fn device(&self, node: Netns, ifindex: u32) -> Option<&Device> {
        self.nodes.get(&node)?.interfaces.get(&ifindex)
    }

    /// The uplink by which the node gets what is sent to this address of it, or its only one. None where it may be several.
    pub(super) fn uplink(&self, node: Netns, address: Option<IpAddr>) -> Option<&Device> {
        self.nodes.get(&node)?.uplink(address)
    }

    /// The pod that has `address` in `cluster`: a living one before one that is gone.
    pub(super) fn owner(&self, cluster: u32, address: IpAddr) -> Option<Owner> {
        let owner = self
            .pods
            .get(&address)?
            .iter()
            .filter(|owner| self.cluster(owner.node) == cluster)
            .min_by_key(|owner| owner.gone)?;
        Some(Owner {
            node: owner.node,
            name: owner.name.clone(),
        })
    }

    /// Whether a packet to `address` that leaves `node` at the workload interface `ifindex` has reached its pod.
    pub(super) fn is_delivery(&self, cluster: u32, node: Netns, ifindex: u32, address: IpAddr) -> bool {
        let owners = self
            .pods
            .get(&address)
            .map_or(&[][..], |owners| owners.as_slice());
        let mut known = false;
        for owner in owners
            .iter()
            .filter(|owner| !owner.gone && self.cluster(owner.node) == cluster)
        {
            if (owner.node, owner.ifindex) == (node, ifindex) {
                return true;
            }
            known = true;
        }
        // Where no pod is known by that address (it just came), the route to the interface tells.
        !known
            && self
                .route(node, address)
                .is_none_or(|route| route.ifindex.is_none_or(|to| to == ifindex))
    }

    /// Whether `node` sends to `address` by the workload interface `ifindex`, so that reverse path filters let pass what comes
    /// from that address there.
    ///
    /// Routes decide before what is known of pods. A pod's block is a blackhole on its own node, so an address in it without
    /// a route of its own leads nowhere, and those filters take unicast routes alone (`rpfilter_lookup_reverse`,
    /// `net/ipv4/netfilter/ipt_rpfilter.c`, 3.7, and so 6.18 was seen to do; `rpfilter_lookup_reverse6`,
    /// `net/ipv6/netfilter/ip6t_rpfilter.c`, which takes none with `RTF_REJECT`, 6.x).
    pub(super) fn leads_back(&self, cluster: u32, node: Netns, ifindex: u32, address: IpAddr) -> bool {
        match self.route(node, address) {
            Some(route) => route.kind == RouteKind::Unicast && route.ifindex.is_none_or(|to| to == ifindex),
            None => self.is_delivery(cluster, node, ifindex, address),
        }
    }

    /// Whether `node` itself has `address`, or it never leaves a link, so that the node at its end is meant.
    pub(super) fn is_own(&self, node: Netns, address: IpAddr) -> bool {
        is_link_scope(address)
            || self
                .node_addresses
                .get(&address)
                .is_some_and(|owners| owners.contains(&node))
    }

    /// The node of `cluster` that has `address`.
    pub(super) fn node_of(&self, cluster: u32, address: IpAddr) -> Option<Netns> {
        let owners = self.node_addresses.get(&address)?;
        owners.iter().copied().find(|node| self.cluster(*node) == cluster)
    }

    /// The netfilter rules of a node.
    pub(super) fn firewall(&self, node: Netns) -> Option<&Firewall> {
        self.nodes.get(&node).map(|info| &info.firewall)
    }

    /// The addresses of a node itself.
    pub(super) fn addresses(&self, node: Netns) -> &[IpAddr] {
        self.nodes.get(&node).map_or(&[], |info| &info.addresses)
    }

    /// The device by which `node` sends to `address`, where its pods and routes tell.
    pub(super) fn way_out(&self, node: Netns, address: IpAddr) -> Option<&Device> {
        let mut owners = self.pods.get(&address).into_iter().flatten();
        let pod = owners.find(|owner| owner.node == node && !owner.gone);
        let ifindex = pod.map(|pod| pod.ifindex).or_else(|| {
            let route = self.route(node, address)?;
            route.ifindex.filter(|_| route.kind == RouteKind::Unicast)
        })?;
        self.device(node, ifindex)
    }

    /// Whether `address` is a service's.
    pub(super) fn is_service(&self, address: IpAddr) -> bool {
        self.services.iter().any(|prefix| prefix.contains(&address))
    }

    /// The most specific route of `node` to `address`.
    pub(super) fn route(&self, node: Netns, address: IpAddr) -> Option<&Route> {
        self.nodes.get(&node)?.route(address)
    }

    /// What lies beyond `node` on the way to `address`; none without a route that sends on. Other nodes are on a link
    /// with it even where the facts name only the routes that matter for pods.
    pub(super) fn beyond(&self, node: Netns, address: IpAddr) -> Option<Beyond> {
        if self
            .nodes
            .get(&node)?
            .routes
            .iter()
            .any(|route| route.remote_node == Some(address))
        {
            return Some(Beyond {
                gateway: None,
                encap: None,
                remote_node: Some(address),
            });
        }
        let route = self
            .route(node, address)
            .filter(|route| route.kind == RouteKind::Unicast)?;
        let inside = route.prefix.prefix_len() > 0;
        Some(Beyond {
            gateway: route.gateway,
            encap: route.encap,
            remote_node: route.remote_node.filter(|_| inside),
        })
    }

    /// Whether the packet that leaves `node` for `address`, carried as `encap` says, goes to a node that is observed.
    pub(super) fn next(&self, node: Netns, encap: Option<&Encap>, address: IpAddr) -> Next {
        let cluster = self.cluster(node);
        let to = match encap {
            Some(encap) => Some(encap.dst),
            None => match self.beyond(node, address) {
                // The gateway may be a router that is no node; then whose the address is tells.
                Some(Beyond {
                    encap: None,
                    remote_node: Some(remote),
                    ..
                }) if self.node_of(cluster, remote).is_none() => return self.home(cluster, node, address),
                Some(Beyond {
                    remote_node: Some(remote),
                    ..
                }) => Some(remote),
                Some(Beyond {
                    gateway: Some(gateway),
                    ..
                }) if self.node_of(cluster, address).is_none() => Some(gateway),
                _ => Some(address),
            },
        };
        match to
            .and_then(|to| self.node_of(cluster, to))
            .filter(|next| *next != node)
        {
            Some(next) => Next::Node(next),
            None => Next::Unobserved,
        }
    }

    /// Whether an uplink's hooks record packets of `flow` on their way in: under the addresses of nodes alone, conntrack
    /// only tells a pod's, and that on their way out.
    pub(super) fn is_recorded(&self, cluster: u32, flow: &Flow) -> bool {
        let is_pods = |address| self.is_service(address) || self.owner(cluster, address).is_some();
        let in_block = |address: IpAddr| {
            let mut nodes = self.nodes.values();
            nodes.any(|info| info.cluster == Some(cluster) && info.has_block(address))
        };
        let is_node_port = |port| matches!(flow.proto, 6 | 17) && NODE_PORTS.contains(&port);
        is_pods(flow.src)
            || is_pods(flow.dst)
            || is_node_port(flow.src_port)
            || is_node_port(flow.dst_port)
            || in_block(flow.src)
            || in_block(flow.dst)
    }

    /// The other node of `cluster` whose pod or block has `address`.
    fn home(&self, cluster: u32, node: Netns, address: IpAddr) -> Next {
        let has_block = |(netns, info): (&Netns, &NodeTables)| {
            (info.cluster == Some(cluster) && info.has_block(address)).then_some(*netns)
        };
        let owner = self.owner(cluster, address).map(|owner| owner.node);
        let home = owner.or_else(|| self.nodes.iter().find_map(has_block));
        home.filter(|home| *home != node)
            .map_or(Next::Unobserved, Next::Node)
    }

    /// Whether what leaves `node` by that device is encrypted.
    pub(super) fn is_encrypted(&self, node: Netns, ifindex: u32) -> bool {
        self.nodes.get(&node).is_some_and(|info| {
            let mut routes = info.routes.iter();
            routes.any(|route| route.ifindex == Some(ifindex) && route.encap == Some(EncapKind::Wireguard))
        })
    }

    /// So many routers lowered the TTL of an outer header between two nodes.
    pub(super) fn count_routers(&mut self, from: Netns, to: Netns, routers: u8) {
        self.routers.insert((from, to), routers);
    }

    /// What [`Self::count_routers`] was told last.
    pub(super) fn routers_between(&self, from: Netns, to: Netns) -> Option<u8> {
        self.routers.get(&(from, to)).copied()
    }

    /// The address that ICMP errors of `node` towards `towards` carried at `time`.
    pub(super) fn hop_address(&self, node: Netns, towards: IpAddr, time: u64) -> Option<IpAddr> {
        let history = self.hop_addresses.get(&(node, towards))?;
        let then = history
            .iter()
            .rev()
            .find(|(since, _)| *since <= time)
            .or_else(|| history.first());
        then.and_then(|(_, address)| *address)
    }

    /// An ICMP time exceeded showed the address of the router on `remote`, as packets that `node` sends on meet it.
    pub(super) fn show(&mut self, node: Netns, remote: IpAddr, address: IpAddr) {
        self.learned.insert((node, remote), address);
    }

    /// What [`Self::show`] was told.
    pub(super) fn shown(&self, node: Netns, remote: IpAddr) -> Option<IpAddr> {
        self.learned.get(&(node, remote)).copied()
    }

    /// By how many nanoseconds a time on `node` may be wrong for the clock of `first`; none if that is not known.
    pub(super) fn clock_bound(&self, first: Netns, node: Netns) -> Option<u64> {
        let (one, two) = (machine_of(first), machine_of(node));
        if one == two {
            return Some(0);
        }
        let bound = |machine| self.clock_bounds.get(&machine).copied().unwrap_or(Some(0));
        Some(bound(one)? + bound(two)?)
    }

    /// The time since the Unix epoch of a time on the observations' clock.
    pub(super) fn realtime(&self, time: u64) -> u64 {
        match self.clock {
            Some(clock) => clock.realtime.wrapping_add(time).wrapping_sub(clock.time),
            None => time,
        }
    }
}

/// Whether packets to (or from) the address are never forwarded: RFC 4291 2.5.6 and 2.7, RFC 5771 4, RFC 919 7.
fn is_link_scope(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[..3] == [224, 0, 0],
        IpAddr::V6(v6) => v6.is_unicast_link_local() || (v6.is_multicast() && v6.octets()[1] & 0xf <= 2),
    }
}
