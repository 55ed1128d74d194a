//! What the kernel's routing knows, read over netlink: links, addresses, routes, neighbours, the routes it would take,
//! and notices of change. Knows nothing of Calico, and changes nothing.

mod lookup;
mod monitor;
mod nsid;
mod snapshot;
mod wireguard;

use std::net::IpAddr;

use ipnet::IpNet;

pub use lookup::{Decision, Lookup};
pub use monitor::{Changes, Monitor};
pub use nsid::{PeerNamespaces, peer_namespaces};
pub use snapshot::{Snapshot, links};
pub use wireguard::Peer;

/// Routing table numbers (`enum rt_class_t`, include/uapi/linux/rtnetlink.h).
pub const TABLE_MAIN: u32 = 254;
/// The table of the node's own addresses.
pub const TABLE_LOCAL: u32 = 255;

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// Kind (`veth`, `vxlan`, `ipip`, …); none for physical devices and loopback.
    pub kind: Option<String>,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFF_…` flags (include/uapi/linux/if.h).
    pub flags: u32,
    /// Hardware address; four bytes or none for tunnels.
    pub address: Vec<u8>,
    /// Index of the bridge, bond or VRF it belongs to.
    pub master: Option<u32>,
    /// `IFLA_LINK`: the peer of a veth, the device under a VLAN, macvlan or ipvlan.
    pub link: Option<u32>,
    /// The namespace in which `link` lies, as this namespace numbers it; none if it is this one.
    pub link_netnsid: Option<i32>,
    /// Identifier of a VLAN device.
    pub vlan: Option<u16>,
    /// Settings of a VXLAN device.
    pub vxlan: Option<Vxlan>,
    /// Local and remote address of an IPIP device, unspecified addresses left out.
    pub ipip: Option<Ipip>,
    /// An XDP program runs there before there is an `sk_buff` (`IFLA_XDP_ATTACHED`).
    pub xdp: bool,
}

/// Settings of a VXLAN device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Source address of outer packets, if set.
    pub local: Option<IpAddr>,
    /// Device of outer packets, if set.
    pub device: Option<u32>,
    /// Destination and identifier come with each packet (`external`): there is no forwarding database.
    pub collect_metadata: bool,
}

/// Ends of an IPIP device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ipip {
    /// Local end.
    pub local: Option<IpAddr>,
    /// Remote end.
    pub remote: Option<IpAddr>,
}

impl Link {
    /// Administratively up (`IFF_UP`).
    pub fn up(&self) -> bool {
        self.flags & 0x1 != 0
    }

    /// The loopback device (`IFF_LOOPBACK`).
    pub fn loopback(&self) -> bool {
        self.flags & 0x8 != 0
    }
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The device.
    pub ifindex: u32,
    /// The address.
    pub address: IpAddr,
    /// Prefix length.
    pub prefix_len: u8,
    /// Scope (`enum rt_scope_t`): 0 global, 253 link, 254 host.
    pub scope: u8,
    /// Not the first of its subnet: never chosen as a source by itself.
    pub secondary: bool,
}

/// What a route does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Sends on.
    Unicast,
    /// Takes in: an address of the node itself.
    Local,
    /// Drops in silence.
    Blackhole,
    /// Answers with an ICMP unreachable.
    Unreachable,
    /// Answers with "administratively prohibited".
    Prohibit,
    /// Broadcast, multicast, anycast, throw and what else there may be.
    Other,
}

/// An entry of a routing table. A route with several next hops is as many entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Destination.
    pub destination: IpNet,
    /// What it does.
    pub kind: Type,
    /// Routing table.
    pub table: u32,
    /// Who made it (`RTPROT_…`): 2 kernel, 3 boot, 12 bird, 80 Felix.
    pub protocol: u8,
    /// Scope (`enum rt_scope_t`).
    pub scope: u8,
    /// Metric; smaller is preferred.
    pub metric: u32,
    /// Gateway, if any.
    pub gateway: Option<IpAddr>,
    /// Output device, if any.
    pub oif: Option<u32>,
    /// Preferred source address, if set.
    pub source: Option<IpAddr>,
    /// The gateway is taken to be on the link.
    pub onlink: bool,
    /// MTU of the route, if set.
    pub mtu: Option<u32>,
}

/// An entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The device.
    pub ifindex: u32,
    /// The neighbour's address.
    pub address: IpAddr,
    /// Its hardware address, if known.
    pub mac: Vec<u8>,
}

/// An entry of a VXLAN device's forwarding database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The VXLAN device.
    pub ifindex: u32,
    /// Inner destination.
    pub mac: Vec<u8>,
    /// Outer destination: a node.
    pub destination: IpAddr,
}
