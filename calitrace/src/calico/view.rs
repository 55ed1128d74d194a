//! One node as it stands: built from its tables and files, compared with an earlier look to tell what changed.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use super::{
    Options,
    anatomy::{Anatomy, global, has_prefix, sorted},
    identity::Home,
};
use crate::{
    event::{self, Fact, Netns, Role},
    netns::{self, Found, Handle},
    route::{self, Link, Lookup, Snapshot, Type, peer_namespaces},
};

/// Kubeadm's default service prefix, taken where nothing tells better.
const DEFAULT_SERVICES: &str = "10.96.0.0/12";

/// A node: what is known of it at one moment. Facts in it have time 0; whoever hands them on stamps them.
#[derive(Clone, Debug)]
pub struct NodeView {
    /// Its namespace.
    pub handle: Handle,
    /// Its name, cluster and addresses.
    pub node: event::Node,
    /// Workload, tunnel and uplink devices, and others with an address.
    pub interfaces: Vec<event::Interface>,
    /// The routes that matter for pods, IPv4's first, and of each family the most specific first.
    pub routes: Vec<event::Route>,
    /// The pods behind its workload interfaces.
    pub pods: Vec<event::Pod>,
    /// Service prefixes.
    pub services: Vec<IpNet>,
    /// Where a packet's innermost address must lie to be a pod's affair: local and remote blocks, workload addresses,
    /// service prefixes.
    pub scope: Vec<IpNet>,
    /// IPAM blocks of this node.
    pub local_blocks: Vec<IpNet>,
    /// IPAM blocks of other nodes, and addresses they borrowed.
    pub remote_blocks: Vec<IpNet>,
    /// The tables it was read from.
    pub snapshot: Snapshot,
    /// Asks this node's kernel for routes and hop addresses.
    pub lookup: Arc<Lookup>,
    home: Arc<Home>,
    /// Names of the namespace under `/run/netns`.
    mount_names: Vec<String>,
    options: Arc<Options>,
}

impl NodeView {
    /// The node in that namespace; `None` if it is none.
    pub(super) fn read(found: &Found, all: &[Handle], options: &Arc<Options>) -> Result<Option<Self>> {
        let snapshot = Snapshot::read(&found.handle)?;
        let Some(anatomy) = Anatomy::of(&snapshot, &options.interface_prefixes) else {
            return Ok(None);
        };
        let home = Home::find(found)?;
        let lookup = Arc::new(Lookup::open(&found.handle)?);
        let node = event::Node {
            time: 0,
            netns: found.inode(),
            name: String::new(),
            cluster: super::cluster::number(found.inode()),
            addresses: Vec::new(),
        };
        let mut view = Self {
            handle: found.handle.clone(),
            node,
            interfaces: Vec::new(),
            routes: Vec::new(),
            pods: Vec::new(),
            services: Vec::new(),
            scope: Vec::new(),
            local_blocks: Vec::new(),
            remote_blocks: Vec::new(),
            snapshot,
            lookup,
            home: Arc::new(home),
            mount_names: found.names.clone(),
            options: Arc::clone(options),
        };
        view.fill(anatomy, &[], Some(all))?;
        Ok(Some(view))
    }

    /// Looks at the same node again; `None` if it is none any more. Pods that have a name keep it and no file is read for
    /// them, so this may run at every notice of change. The cluster stays as it is.
    pub fn refresh(&self) -> Result<Option<Self>> {
        let snapshot = Snapshot::read(&self.handle)?;
        let Some(anatomy) = Anatomy::of(&snapshot, &self.options.interface_prefixes) else {
            return Ok(None);
        };
        let mut view = self.clone();
        view.snapshot = snapshot;
        if !self.home.is_complete() {
            // The node's first process may have come after its devices.
            let found = netns::list()?
                .into_iter()
                .find(|found| found.inode() == self.netns());
            if let Some(found) = found {
                view.home = Arc::new(Home::find(&found)?);
            }
        }
        view.fill(anatomy, &self.pods, None)?;
        Ok(Some(view))
    }

    /// Inode number of its namespace: the node's key.
    pub fn netns(&self) -> Netns {
        self.node.netns
    }

    /// Some pod has no name yet: Felix and the CNI plugin write their files after the interface is up, and no notice tells
    /// of them, so another look is worth while.
    pub fn has_unnamed_pods(&self) -> bool {
        self.pods.iter().any(|pod| pod.name.is_none())
    }

    /// Devices with the name of a workload interface to which no route leads: no pod can use them.
    pub(super) fn devices_without_pod(&self) -> impl Iterator<Item = &Link> {
        let links = self.snapshot.links.iter();
        let named = links.filter(|link| has_prefix(link, &self.options.interface_prefixes));
        named.filter(|link| !self.pods.iter().any(|pod| pod.ifindex == link.ifindex))
    }

    /// The pod's own end of its interface, where its namespace is on this host and among `all`.
    pub(super) fn pod_end(&self, pod: &event::Pod, all: &[Found]) -> Result<Option<Link>> {
        let peer = self.snapshot.link(pod.ifindex).and_then(|link| link.link);
        let Some((netns, peer)) = pod.pod_netns.zip(peer) else {
            return Ok(None);
        };
        let Some(found) = all.iter().find(|found| found.inode() == netns) else {
            return Ok(None);
        };
        let links = route::links(&found.handle)
            .with_context(|| format!("look at the pod behind interface {}", pod.ifindex))?;
        Ok(links.into_iter().find(|link| link.ifindex == peer))
    }

    /// The interface with that index.
    pub fn interface(&self, ifindex: u32) -> Option<&event::Interface> {
        self.interfaces
            .iter()
            .find(|interface| interface.ifindex == ifindex)
    }

    fn fill(&mut self, anatomy: Anatomy, known: &[event::Pod], all: Option<&[Handle]>) -> Result<()> {
        self.node.addresses = addresses(&self.snapshot);
        self.node.name = self.read_name()?;
        self.services = services(&self.options, &self.home)?;
        self.pods = self.read_pods(&anatomy, known, all)?;
        let uplinks = self.uplinks(&anatomy)?;
        self.interfaces = self.read_interfaces(&anatomy, &uplinks);
        let workloads = self
            .pods
            .iter()
            .flat_map(|pod| &pod.addresses)
            .map(|&address| IpNet::from(address));
        let blocks = anatomy
            .local_blocks
            .iter()
            .chain(&anatomy.remote_blocks)
            .chain(&self.services);
        self.scope = sorted(blocks.copied().chain(workloads).collect());
        self.routes = anatomy.routes;
        self.local_blocks = anatomy.local_blocks;
        self.remote_blocks = anatomy.remote_blocks;
        Ok(())
    }

    /// Its own name, else that of its namespace, else its first address.
    fn read_name(&self) -> Result<String> {
        let address = || self.node.addresses.first().map(ToString::to_string);
        let name = self
            .home
            .node_name()?
            .or_else(|| self.mount_names.first().cloned())
            .or_else(address);
        Ok(name.unwrap_or_else(|| self.netns().to_string()))
    }

    fn read_pods(
        &self,
        anatomy: &Anatomy,
        known: &[event::Pod],
        all: Option<&[Handle]>,
    ) -> Result<Vec<event::Pod>> {
        let netns = self.node.netns;
        let link_name = |ifindex| self.snapshot.link(ifindex).map(|link| link.name.as_str());
        let mut pods: Vec<event::Pod> = anatomy
            .workloads
            .iter()
            .map(|workload| {
                // The same index is the same device: its pod's name and namespace cannot have changed.
                let old = known.iter().find(|pod| pod.ifindex == workload.ifindex);
                event::Pod {
                    time: 0,
                    netns,
                    ifindex: workload.ifindex,
                    addresses: workload.addresses.clone(),
                    name: old.and_then(|pod| pod.name.clone()),
                    pod_netns: old.and_then(|pod| pod.pod_netns),
                    gone: false,
                }
            })
            .collect();
        let unnamed: Vec<&str> = pods
            .iter()
            .filter(|pod| pod.name.is_none())
            .filter_map(|pod| link_name(pod.ifindex))
            .collect();
        if !unnamed.is_empty() {
            let names = self.home.pod_names(&unnamed, &self.options.interface_prefixes)?;
            for pod in pods.iter_mut().filter(|pod| pod.name.is_none()) {
                pod.name = link_name(pod.ifindex).and_then(|name| names.get(name).cloned());
            }
        }
        let is_new = |pod: &event::Pod| !known.iter().any(|old| old.ifindex == pod.ifindex);
        if pods.iter().any(is_new) {
            let listed;
            let all = if let Some(all) = all {
                all
            } else {
                listed = netns::list()?
                    .into_iter()
                    .map(|found| found.handle)
                    .collect::<Vec<_>>();
                &listed
            };
            let peers = peer_namespaces(&self.handle, all)?;
            for pod in pods.iter_mut().filter(|pod| is_new(pod)) {
                let id = self.snapshot.link(pod.ifindex).and_then(|link| link.link_netnsid);
                pod.pod_netns = id.and_then(|id| peers.get(&id).copied());
            }
        }
        Ok(pods)
    }

    /// The output devices of the routes to other nodes and of the default routes.
    fn uplinks(&self, anatomy: &Anatomy) -> Result<Vec<u32>> {
        let default = self
            .snapshot
            .routes
            .iter()
            .filter(|entry| entry.destination.prefix_len() == 0 && entry.kind == Type::Unicast);
        let mut uplinks: Vec<u32> = default.filter_map(|entry| entry.oif).collect();
        for remote in anatomy.remote_nodes() {
            let decision = self
                .lookup
                .route_to(remote)
                .with_context(|| format!("look for the uplink to {remote}"))?;
            uplinks.extend(
                decision
                    .filter(|decision| decision.kind == Type::Unicast)
                    .and_then(|d| d.oif),
            );
        }
        uplinks.retain(|ifindex| {
            let loopback = self.snapshot.link(*ifindex).is_none_or(Link::loopback);
            let workload = anatomy
                .workloads
                .iter()
                .any(|workload| workload.ifindex == *ifindex);
            !loopback && !workload && !anatomy.tunnels.contains(ifindex)
        });
        Ok(sorted(uplinks))
    }

    fn read_interfaces(&self, anatomy: &Anatomy, uplinks: &[u32]) -> Vec<event::Interface> {
        let links = self.snapshot.links.iter();
        let interface = |link: &Link| {
            let role = if anatomy
                .workloads
                .iter()
                .any(|workload| workload.ifindex == link.ifindex)
            {
                Role::Workload
            } else if anatomy.tunnels.contains(&link.ifindex) {
                Role::Tunnel
            } else if uplinks.contains(&link.ifindex) {
                Role::Uplink
            } else {
                Role::Other
            };
            let addresses: Vec<IpAddr> = self
                .snapshot
                .addresses_of(link.ifindex)
                .map(|address| address.address)
                .collect();
            let wanted = role != Role::Other || addresses.iter().any(|&address| global(address));
            wanted.then(|| event::Interface {
                time: 0,
                netns: self.node.netns,
                ifindex: link.ifindex,
                name: link.name.clone(),
                role,
                mtu: link.mtu,
                addresses,
                xdp: link.xdp,
                gone: false,
            })
        };
        links.filter_map(interface).collect()
    }
}

/// What is to be told anew after a look at a node: everything for a new node, else what changed. What is gone is told
/// with `gone`. All facts carry `time`.
pub fn facts_changed(old: Option<&NodeView>, new: &NodeView, time: u64) -> Vec<Fact> {
    let mut facts = Vec::new();
    if old.is_none_or(|old| old.node != new.node) {
        facts.push(Fact::Node(event::Node {
            time,
            ..new.node.clone()
        }));
    }
    let empty = (Vec::new(), Vec::new());
    let (interfaces, pods) = old.map_or((&empty.0, &empty.1), |old| (&old.interfaces, &old.pods));
    // First what is gone: an index may be used again.
    for pod in pods
        .iter()
        .filter(|pod| !new.pods.iter().any(|other| same_pod(pod, other)))
    {
        facts.push(Fact::Pod(event::Pod {
            time,
            gone: true,
            ..pod.clone()
        }));
    }
    for interface in interfaces
        .iter()
        .filter(|old| !new.interfaces.iter().any(|i| same_interface(old, i)))
    {
        facts.push(Fact::Interface(event::Interface {
            time,
            gone: true,
            ..interface.clone()
        }));
    }
    for interface in new
        .interfaces
        .iter()
        .filter(|interface| !interfaces.contains(interface))
    {
        facts.push(Fact::Interface(event::Interface {
            time,
            ..interface.clone()
        }));
    }
    for pod in new.pods.iter().filter(|pod| !pods.contains(pod)) {
        facts.push(Fact::Pod(event::Pod { time, ..pod.clone() }));
    }
    if old.is_none_or(|old| old.routes != new.routes) {
        facts.push(Fact::Routes {
            time,
            netns: new.node.netns,
            routes: new.routes.clone(),
        });
    }
    if old.is_none_or(|old| old.services != new.services) {
        facts.push(Fact::Services {
            time,
            prefixes: new.services.clone(),
        });
    }
    facts
}

/// Makes addresses that lead to pods services' of all nodes. Not those of the nodes: what goes to them is mostly for the nodes
/// themselves.
pub fn add_services(nodes: &mut [NodeView], translated: &BTreeSet<IpNet>) {
    if translated.is_empty() {
        return;
    }
    let own = nodes.iter().flat_map(|node| node.node.addresses.clone());
    let remote = nodes.iter().flat_map(|node| &node.routes);
    let remote = remote.filter_map(|route| route.remote_node);
    let of_nodes: BTreeSet<IpAddr> = own.chain(remote).collect();
    for node in nodes {
        let is_new = |prefix: &&IpNet| {
            !of_nodes.contains(&prefix.addr())
                && !node.services.iter().any(|known| known.contains(&prefix.addr()))
        };
        let new: Vec<IpNet> = translated.iter().filter(is_new).copied().collect();
        node.services.extend(&new);
        node.scope = sorted(node.scope.iter().chain(&new).copied().collect());
    }
}

/// What is to be told of a node that is gone altogether.
pub fn facts_gone(old: &NodeView, time: u64) -> Vec<Fact> {
    let pods = old.pods.iter().map(|pod| {
        Fact::Pod(event::Pod {
            time,
            gone: true,
            ..pod.clone()
        })
    });
    let interfaces = old.interfaces.iter().map(|i| {
        Fact::Interface(event::Interface {
            time,
            gone: true,
            ..i.clone()
        })
    });
    let routes = std::iter::once(Fact::Routes {
        time,
        netns: old.node.netns,
        routes: Vec::new(),
    });
    pods.chain(interfaces).chain(routes).collect()
}

fn same_pod(one: &event::Pod, other: &event::Pod) -> bool {
    one.ifindex == other.ifindex
}

fn same_interface(one: &event::Interface, other: &event::Interface) -> bool {
    one.ifindex == other.ifindex && one.name == other.name
}

fn services(options: &Options, home: &Home) -> Result<Vec<IpNet>> {
    if !options.service_cidrs.is_empty() {
        return Ok(sorted(options.service_cidrs.clone()));
    }
    let found = home.service_ranges()?;
    Ok(if found.is_empty() {
        DEFAULT_SERVICES.parse().into_iter().collect()
    } else {
        sorted(found)
    })
}

/// The node's own addresses, as the kernel lists them.
fn addresses(snapshot: &Snapshot) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for address in snapshot.addresses.iter().map(|address| address.address) {
        if global(address) && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}
