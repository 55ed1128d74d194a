//! What the lab looks like, before anything exists: names, addresses and options. Pure.
//!
//! The addresses, pod names and interface names are those of the project's founding story, a two-node
//! minikube cluster whose traceroute between two pods reads 10.244.120.64, 10.244.205.192,
//! 10.244.205.193.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use super::netfilter::{Backend, FlowLogs};
use super::services::Proxy;

/// The pools all blocks and pods are from.
pub const POOL: &str = "10.244.0.0/16";
/// The address of the underlay in the nodes' subnet: their default gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 49, 1);
/// The underlay's address in the other subnet, where a lab has one.
pub const OTHER_GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
/// An address outside of the cluster, behind the gateway.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The service's ClusterIP: TCP port 80 leads to port 8080 of pod 2, UDP port 53 to its port 5353.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The ports of the service and of the pod behind it.
pub const SERVICE_PORTS: [(&str, u16, u16); 2] = [("tcp", 80, 8080), ("udp", 53, 5353)];
/// The ports on every node that lead to each of [`SERVICE_PORTS`].
pub const NODE_PORTS: [u16; 2] = [30080, 30053];
/// The floating IP of [`FLOATING_POD`]: an address outside of the cluster that the pod's node translates.
pub const FLOATING: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
/// The pod with a floating IP, on the second node.
pub const FLOATING_POD: &str = "pod4";
/// The MAC address Calico gives every workload interface (`cni-plugin/pkg/dataplane/linux`).
pub const WORKLOAD_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// The VXLAN network identifier and port Felix uses by default (`felix/config/config_params.go`).
pub const VXLAN: (u32, u16) = (4096, 4789);
/// The port, routing table, priority of its rule and firewall mark that Felix uses for `WireGuard` by default
/// (`felix/config/config_params.go`; the table is the first of `RouteTableRanges`, the mark the lowest of
/// `IptablesMarkMask` that is free).
pub const WIREGUARD: Wireguard = Wireguard {
    port: 51820,
    table: 1,
    priority: 99,
    mark: 0x10_0000,
};

/// Numbers of Calico's `WireGuard`.
#[derive(Clone, Copy, Debug)]
pub struct Wireguard {
    /// UDP port.
    pub port: u16,
    /// Routing table of what goes through the device.
    pub table: u32,
    /// Priority of the rule that leads to the table.
    pub priority: u32,
    /// Mark of the device's own packets, which the rule leaves alone.
    pub mark: u32,
}

/// How pod traffic travels between the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encapsulation {
    /// `vxlan.calico`.
    #[default]
    Vxlan,
    /// `tunl0`; needs a kernel with the ipip device type.
    Ipip,
    /// Routed as it is, by the nodes' own addresses.
    None,
    /// `wireguard.cali`; needs a kernel with the wireguard device type. Below it, packets are routed as they are.
    Wireguard,
}

impl Encapsulation {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Vxlan, Self::Ipip, Self::None, Self::Wireguard];

    /// The tunnel device, if there is one.
    pub fn device(self) -> Option<&'static str> {
        match self {
            Self::Vxlan => Some("vxlan.calico"),
            Self::Ipip => Some("tunl0"),
            Self::Wireguard => Some("wireguard.cali"),
            Self::None => None,
        }
    }

    /// The MTU of tunnel and pods over an underlay of 1500 bytes.
    pub fn mtu(self) -> u16 {
        match self {
            Self::Vxlan => 1450,
            Self::Ipip => 1480,
            Self::Wireguard => 1440,
            Self::None => 1500,
        }
    }
}

/// Which of a node's devices was registered first. The kernel takes the source address of an ICMP error
/// towards a local pod from the first device that has one (`inet_select_addr` in `net/ipv4/devinet.c`),
/// so this decides what the first line of a traceroute shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceOrder {
    /// As in a minikube or kind node: hop 1 shows the tunnel's address.
    #[default]
    TunnelFirst,
    /// As on a virtual machine or a host: hop 1 shows the node's address.
    UplinkFirst,
}

/// How a lab is built.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct Options {
    /// How pod traffic travels between the nodes.
    pub encapsulation: Encapsulation,
    /// Which device of a node comes first.
    pub order: DeviceOrder,
    /// The second node is in another subnet than the first: a router is between them, which lowers the TTL of what
    /// travels there.
    pub routed: bool,
    /// Calico's `CrossSubnet`: only nodes of different subnets use the tunnel. The lab then has a third node,
    /// [`THIRD_NODE`], in another subnet, with one pod, `pod5`.
    pub cross_subnet: bool,
    /// Pods, nodes and routes have IPv6 addresses, too; IPv6 is never encapsulated.
    pub ipv6: bool,
    /// Each node's root has Felix's endpoint-status files.
    pub felix_files: bool,
    /// Each node's root has the CNI result cache.
    pub cni_files: bool,
    /// Which netfilter interface Calico's chains are written with.
    pub netfilter: Backend,
    /// How kube-proxy translates the service.
    pub proxy: Proxy,
    /// Whether Calico's rules log what policies do.
    pub flow_logs: FlowLogs,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            encapsulation: Encapsulation::default(),
            order: DeviceOrder::default(),
            routed: false,
            cross_subnet: false,
            ipv6: true,
            felix_files: true,
            cni_files: true,
            netfilter: Backend::default(),
            proxy: Proxy::default(),
            flow_logs: FlowLogs::default(),
        }
    }
}

impl Options {
    /// How kube-proxy translates beside these rules.
    pub(super) fn kube_proxy(&self) -> Proxy {
        match (self.netfilter, self.proxy) {
            (Backend::Native, Proxy::Iptables) => Proxy::Nftables,
            (_, proxy) => proxy,
        }
    }
}

/// The name of the third node of a lab with [`Options::cross_subnet`].
pub const THIRD_NODE: &str = "minikube-m03";

/// A Calico node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Its Kubernetes and Calico name.
    pub name: String,
    /// The name of its network namespace under `/run/netns`.
    pub namespace: String,
    /// Its address on the underlay, in a subnet of 24 bits.
    pub address: Ipv4Addr,
    /// Its IPv6 address on the underlay, in a subnet of 64 bits.
    pub address_v6: Ipv6Addr,
    /// The address of its tunnel device; without encapsulation no device has it.
    pub tunnel_address: Ipv4Addr,
    /// Its IPAM block.
    pub block: Ipv4Net,
    /// Its IPv6 IPAM block.
    pub block_v6: Ipv6Net,
    /// An address of the block that no pod has: what goes there ends in the blackhole route.
    pub unused_address: Ipv4Addr,
}

/// A pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// What the lab calls it: `pod1`.
    pub id: String,
    /// Its Kubernetes namespace.
    pub kube_namespace: String,
    /// Its Kubernetes name.
    pub name: String,
    /// The name of its network namespace under `/run/netns`.
    pub namespace: String,
    /// The name of its node.
    pub node: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address_v6: Ipv6Addr,
    /// The node's end of its interface.
    pub interface: String,
    /// The MAC address of its own end, `eth0`.
    pub mac: String,
}

impl Node {
    /// The MAC address of the node's VXLAN device: the SHA-1 of its name, as Felix makes it
    /// (`felix/calc/vxlan_resolver.go`), locally administered and unicast.
    pub fn tunnel_mac(&self) -> String {
        mac(&self.name)
    }

    /// The underlay's address in its subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.address.octets();
        Ipv4Addr::new(a, b, c, 1)
    }

    /// The underlay's IPv6 address in its subnet.
    pub fn gateway_v6(&self) -> Ipv6Addr {
        let mut segments = self.address_v6.segments();
        segments[7] = 1;
        Ipv6Addr::from(segments)
    }

    /// Whether a router is between it and the other.
    pub fn is_routed_to(&self, other: &Self) -> bool {
        self.gateway() != other.gateway()
    }
}

impl Pod {
    /// `namespace/name`, as Kubernetes and calitrace write it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.kube_namespace, self.name)
    }

    /// Its address, for places that take either family.
    pub fn ip(&self) -> IpAddr {
        IpAddr::V4(self.address)
    }
}

/// The nodes of the lab with this id: two, or three where a subnet is not to be crossed by some only.
pub(super) fn nodes(id: &str, options: &Options) -> Vec<Node> {
    let other = |here: bool| if here { (50, 0x50) } else { (49, 0x49) };
    let node = |name: &str, number: u8, elsewhere: bool, block: Ipv4Addr, block_v6: u16, unused: u8| Node {
        name: name.to_owned(),
        namespace: namespace_name(id, name),
        address: Ipv4Addr::new(192, 168, other(elsewhere).0, number),
        address_v6: Ipv6Addr::new(0xfd00, 0x192, 0x168, other(elsewhere).1, 0, 0, 0, number.into()),
        // IPAM hands out the tunnel's address before any pod's, so it is the block's first.
        tunnel_address: block,
        block: Ipv4Net::new_assert(block, 26),
        block_v6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, block_v6, 0, 0, 0, 0), 122),
        unused_address: Ipv4Addr::new(10, 244, block.octets()[2], unused),
    };
    let mut nodes = vec![
        node("minikube", 2, false, Ipv4Addr::new(10, 244, 120, 64), 0x120, 100),
        node(
            "minikube-m02",
            3,
            options.routed,
            Ipv4Addr::new(10, 244, 205, 192),
            0x205,
            200,
        ),
    ];
    if options.cross_subnet {
        nodes.push(node(
            THIRD_NODE,
            4,
            true,
            Ipv4Addr::new(10, 244, 33, 128),
            0x33,
            140,
        ));
    }
    nodes
}

/// Each node with each other one.
pub(super) fn pairs(nodes: &[Node]) -> impl Iterator<Item = (&Node, &Node)> {
    nodes
        .iter()
        .flat_map(|node| nodes.iter().map(move |peer| (node, peer)))
        .filter(|(node, peer)| node.name != peer.name)
}

/// The pods a lab starts with, two on each of the first two nodes, one on a third.
pub(super) fn pods(id: &str, nodes: &[Node]) -> Result<Vec<Pod>> {
    [
        ("pod1", "busybox-f5945bfb5-mw26t", 0, 67),
        ("pod2", "busybox-f5945bfb5-mwgr6", 1, 193),
        ("pod3", "busybox-f5945bfb5-x7k2p", 0, 68),
        ("pod4", "busybox-f5945bfb5-zq9dl", 1, 194),
        ("pod5", "busybox-f5945bfb5-v4c8n", 2, 129),
    ]
    .into_iter()
    .filter(|(_, _, node, _)| *node < nodes.len())
    .map(|(pod, name, node, last): (&str, &str, usize, u8)| {
        let octets = nodes[node].block.addr().octets();
        self::pod(
            id,
            pod,
            "default",
            name,
            &nodes[node],
            Ipv4Addr::new(octets[0], octets[1], octets[2], last),
        )
    })
    .collect()
}

/// A pod of the lab with this id, on `node`.
pub(super) fn pod(
    id: &str,
    pod: &str,
    kube_namespace: &str,
    name: &str,
    node: &Node,
    address: Ipv4Addr,
) -> Result<Pod> {
    ensure!(
        node.block.contains(&address),
        "{address} is not in block {} of node {}",
        node.block,
        node.name
    );
    let mut address_v6 = node.block_v6.addr().octets();
    address_v6[15] = address.octets()[3] & 0x3f;
    Ok(Pod {
        id: pod.to_owned(),
        kube_namespace: kube_namespace.to_owned(),
        name: name.to_owned(),
        namespace: namespace_name(id, pod),
        node: node.name.clone(),
        address,
        address_v6: Ipv6Addr::from(address_v6),
        interface: interface_name(kube_namespace, name),
        mac: mac(&format!("{id} {kube_namespace}/{name}")),
    })
}

/// The name under `/run/netns` of a part of the lab with this id.
pub(super) fn namespace_name(id: &str, part: &str) -> String {
    format!("{}{part}", namespace_prefix(id))
}

/// What the names of all namespaces of the lab with this id begin with.
pub(super) fn namespace_prefix(id: &str) -> String {
    format!("ct{id}-")
}

/// The name of a pod's workload interface: `cali` and the first 11 hexadecimal digits of the SHA-1 of
/// `namespace.name` (`VethNameForWorkload` in
/// `libcalico-go/lib/backend/k8s/conversion/workload_endpoint_default.go`).
pub fn interface_name(kube_namespace: &str, name: &str) -> String {
    let mut digits = hex(&Sha1::digest(format!("{kube_namespace}.{name}")));
    digits.truncate(11);
    format!("cali{digits}")
}

/// A locally administered unicast MAC address that is the same for the same seed.
fn mac(seed: &str) -> String {
    let digest = Sha1::digest(seed);
    let first = (digest[0] | 0x02) & 0xfe;
    format!(
        "{first:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}",
        digest[1], digest[2], digest[3], digest[4], digest[5]
    )
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_have_the_names_calico_gave_them() {
        let pods = pods("7", &nodes("7", &Options::default())).unwrap();
        assert_eq!(pods.len(), 4);
        assert_eq!(pods[0].interface, "cali8d02ed71817");
        assert_eq!(pods[1].interface, "cali79f33e4263e");
        // The vector of Calico's own unit test.
        assert_eq!(interface_name("namespace", "podname"), "cali82111e10a96");
    }

    #[test]
    fn an_address_outside_of_the_nodes_block_is_refused() {
        let nodes = nodes("7", &Options::default());
        let foreign = nodes[1].block.addr();
        assert!(pod("7", "pod5", "default", "web", &nodes[0], foreign).is_err());
    }

    #[test]
    fn two_labs_share_no_namespace_name() {
        let [first, second] = ["1n0", "1n1"].map(|id| nodes(id, &Options::default()).remove(0));
        assert_ne!(first.namespace, second.namespace);
        assert_eq!(first.address, second.address);
    }

    #[test]
    fn nodes_of_one_subnet_have_one_gateway() {
        let options = |routed, cross_subnet| Options {
            routed,
            cross_subnet,
            ..Options::default()
        };
        let one = nodes("7", &options(false, false));
        assert!(!one[0].is_routed_to(&one[1]));
        assert_eq!(one[1].gateway(), GATEWAY);
        let two = nodes("7", &options(true, false));
        assert!(two[0].is_routed_to(&two[1]));
        assert_eq!(two[1].gateway(), OTHER_GATEWAY);
        assert_eq!(two[1].gateway_v6().to_string(), "fd00:192:168:50::1");
        let three = nodes("7", &options(false, true));
        assert!(!three[0].is_routed_to(&three[1]) && three[0].is_routed_to(&three[2]));
        assert_eq!(pods("7", &three).unwrap()[4].node, THIRD_NODE);
    }
}
