//! What `calitrace topology` tells: each node's devices, addresses, routes, blocks and pods as the kernel has them, and the
//! way a packet between pods is expected to take. Nothing here was observed; it is what the tables say.

mod dataplane;
mod pair;
mod passage;
mod path;
mod report;
mod service;
mod text;
mod unseen;

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use serde::Serialize;

pub use dataplane::Dataplane;
pub use pair::Place;
pub use passage::{Outer, Passage};
pub use path::{Certainty, End, Outcome, Path, Step, expected_path};
pub use service::{Service, ServicePort};

use super::view::NodeView;
use crate::{
    event::{EncapKind, Netns, Role, RouteKind},
    route::Link,
};

/// The version of the JSON form. Fields only ever get added.
pub const VERSION: u32 = 1;

/// The nodes of this machine and the ways between them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Topology {
    /// Always `topology`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// [`VERSION`].
    pub version: u32,
    /// The nodes, by cluster and name.
    pub nodes: Vec<Node>,
    /// The paths that were asked for. Without a question, for each node and address family: from its first pod to its
    /// second, and to the first pod of each other node of its cluster; to the first address of a remote block whose node
    /// is not looked at.
    pub paths: Vec<Path>,
}

/// What becomes of the source address of a packet that leaves a pool of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Masquerade {
    /// The first node gives the packet another source.
    pub applies: bool,
    /// That source; null where there is none, or it is not known.
    pub address: Option<IpAddr>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Inode number of its namespace.
    pub netns: Netns,
    /// Nodes with the same number are of one cluster.
    pub cluster: u32,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// What carries out policies; null where nothing of Felix is seen, or its rules cannot be read.
    pub dataplane: Option<Dataplane>,
    /// Its devices that have a part in pods' traffic or an address.
    pub devices: Vec<Device>,
    /// The routes that matter for pods, IPv4's first, and of each family the most specific first.
    pub routes: Vec<Route>,
    /// IPAM blocks of this node.
    pub local_blocks: Vec<IpNet>,
    /// IPAM blocks of other nodes, with how they are reached.
    pub remote_blocks: Vec<Route>,
    /// The pods.
    pub pods: Vec<Pod>,
    /// Service prefixes.
    pub services: Vec<IpNet>,
    /// What calitrace would not see there: each a sentence.
    pub not_seen: Vec<String>,
}

/// A device of a node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Device {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// The kernel's kind of device (`veth`, `vxlan`, …); null for physical ones.
    pub kind: Option<String>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Hardware address, as `ip` prints it; null if it has none.
    pub mac: Option<String>,
    /// Addresses with the prefix length that they were given with.
    pub addresses: Vec<IpNet>,
    /// VXLAN network identifier; null for others.
    pub vni: Option<u32>,
    /// UDP port of VXLAN; null for others.
    pub port: Option<u16>,
}

/// A route of a node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Route {
    /// Destination.
    pub prefix: IpNet,
    /// What it does.
    pub kind: RouteKind,
    /// Gateway; null without.
    pub gateway: Option<IpAddr>,
    /// Output device; null without.
    pub device: Option<String>,
    /// Encapsulation done by that device; null without.
    pub encap: Option<EncapKind>,
    /// Address of the node behind it; null where it is none or not known.
    pub remote_node: Option<IpAddr>,
    /// Name of that node; null where it is not looked at.
    pub remote_name: Option<String>,
}

/// A pod of a node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pod {
    /// `namespace/name`; null where nothing names it.
    pub name: Option<String>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// The workload interface on the node.
    pub interface: Option<String>,
    /// Its index.
    pub ifindex: u32,
    /// Inode number of the pod's own namespace; null where it is not known.
    pub netns: Option<Netns>,
}

impl Topology {
    /// Gathers it, asking each node's kernel for the ways.
    pub fn of(nodes: &[NodeView]) -> Result<Self> {
        Ok(Self {
            kind: "topology",
            version: VERSION,
            nodes: nodes.iter().map(|view| Node::of(view, nodes)).collect(),
            paths: path::representative(nodes)?,
        })
    }

    /// Gathers it with the paths between two places alone. An end that is not known, or is more than one pod, is an error
    /// that says what there is.
    pub fn between(nodes: &[NodeView], from: &Place, to: &Place) -> Result<Self> {
        Ok(Self {
            kind: "topology",
            version: VERSION,
            nodes: nodes.iter().map(|view| Node::of(view, nodes)).collect(),
            paths: pair::paths(nodes, from, to)?,
        })
    }

    /// Writes its paths, with the devices on them, for people to read.
    pub fn write_paths(&self, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        report::write(&self.paths, out)
    }

    /// Writes it for people to read.
    pub fn write_text(&self, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        text::write(self, out)
    }
}

impl Node {
    fn of(view: &NodeView, all: &[NodeView]) -> Self {
        let device_name = |ifindex: u32| view.snapshot.link(ifindex).map(|link| link.name.clone());
        let routes: Vec<Route> = view
            .routes
            .iter()
            .map(|route| Route {
                prefix: route.prefix,
                kind: route.kind,
                gateway: route.gateway,
                device: route.ifindex.and_then(device_name),
                encap: route.encap,
                remote_node: route.remote_node,
                remote_name: route
                    .remote_node
                    .and_then(|address| path::owner(all, view.node.cluster, address))
                    .map(|node| node.node.name.clone()),
            })
            .collect();
        let remote_blocks = routes
            .iter()
            .filter(|route| route.kind == RouteKind::Unicast && view.remote_blocks.contains(&route.prefix));
        Self {
            name: view.node.name.clone(),
            netns: view.netns(),
            cluster: view.node.cluster,
            addresses: view.node.addresses.clone(),
            dataplane: Dataplane::of(view),
            devices: view
                .interfaces
                .iter()
                .filter_map(|interface| {
                    Some(Device::of(
                        view,
                        interface.role,
                        view.snapshot.link(interface.ifindex)?,
                    ))
                })
                .collect(),
            remote_blocks: remote_blocks.cloned().collect(),
            routes,
            local_blocks: view.local_blocks.clone(),
            pods: view
                .pods
                .iter()
                .map(|pod| Pod {
                    name: pod.name.clone(),
                    addresses: pod.addresses.clone(),
                    interface: device_name(pod.ifindex),
                    ifindex: pod.ifindex,
                    netns: pod.pod_netns,
                })
                .collect(),
            services: view.services.clone(),
            not_seen: unseen::at(view),
        }
    }
}

impl Device {
    fn of(view: &NodeView, role: Role, link: &Link) -> Self {
        let addresses = view.snapshot.addresses_of(link.ifindex);
        Self {
            ifindex: link.ifindex,
            name: link.name.clone(),
            role,
            kind: link.kind.clone(),
            mtu: link.mtu,
            up: link.up(),
            mac: mac(&link.address),
            addresses: addresses
                .filter_map(|a| IpNet::new(a.address, a.prefix_len).ok())
                .collect(),
            vni: link.vxlan.map(|vxlan| vxlan.vni),
            port: link.vxlan.map(|vxlan| vxlan.port),
        }
    }
}

/// Six bytes as `ee:ee:ee:ee:ee:ee`, an IPIP device's four as its local address, like `ip` does.
fn mac(bytes: &[u8]) -> Option<String> {
    match bytes {
        [] => None,
        &[a, b, c, d] => Some(IpAddr::from([a, b, c, d]).to_string()),
        bytes => Some(
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<Vec<_>>()
                .join(":"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_read_as_ip_prints_them() {
        assert_eq!(mac(&[0xee; 6]).as_deref(), Some("ee:ee:ee:ee:ee:ee"));
        assert_eq!(mac(&[0, 0, 0, 0]).as_deref(), Some("0.0.0.0"));
        assert_eq!(mac(&[]), None);
    }
}
