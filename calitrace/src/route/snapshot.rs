//! The tables of one namespace as they stand at one moment. Knows how netlink messages say it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{
        InfoData, InfoIpTunnel, InfoVlan, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, LinkXdp,
        XdpAttached,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHopFlags, RouteType,
        RouteVia,
    },
};

use super::{Address, Entry, Forward, Ipip, Link, Neighbour, Peer, Type, Vxlan, wireguard};
use crate::{netlink::Connection, netns::Handle};

/// The tables of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Its devices, in the kernel's order.
    pub links: Vec<Link>,
    /// Their addresses, in the kernel's order.
    pub addresses: Vec<Address>,
    /// Routes of all tables, IPv4 first.
    pub routes: Vec<Entry>,
    /// Neighbours, IPv4 first.
    pub neighbours: Vec<Neighbour>,
    /// Forwarding databases of VXLAN devices.
    pub forwards: Vec<Forward>,
    /// Peers of `WireGuard` devices.
    pub peers: Vec<Peer>,
}

impl Snapshot {
    /// Reads all tables of a namespace.
    pub fn read(handle: &Handle) -> Result<Self> {
        let mut connection = Connection::open(handle)?;
        let links = read_links(&mut connection)?;
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let addresses = connection
            .dump(&request, "addresses")?
            .into_iter()
            .filter_map(address)
            .collect();
        let mut snapshot = Self {
            links,
            addresses,
            ..Self::default()
        };
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            for message in connection.dump(&RouteNetlinkMessage::GetRoute(request), "routes")? {
                // Cloned is what the kernel has learned for one destination: no route of a table (`fib_dump_info_fnhe`,
                // `net/ipv4/route.c`, Linux 5.3 and later).
                if let RouteNetlinkMessage::NewRoute(message) = message
                    && !message.header.flags.contains(RouteFlags::Cloned)
                {
                    snapshot.routes.extend(entries(&message));
                }
            }
            let mut request = NeighbourMessage::default();
            request.header.family = family;
            let request = RouteNetlinkMessage::GetNeighbour(request);
            snapshot.neighbours.extend(
                connection
                    .dump(&request, "neighbours")?
                    .into_iter()
                    .filter_map(neighbour),
            );
        }
        if snapshot.links.iter().any(|link| link.vxlan.is_some()) {
            let mut request = NeighbourMessage::default();
            request.header.family = AddressFamily::Bridge;
            let request = RouteNetlinkMessage::GetNeighbour(request);
            snapshot.forwards = connection
                .dump(&request, "forwarding databases")?
                .into_iter()
                .filter_map(forward)
                .collect();
        }
        for link in &snapshot.links {
            if link.kind.as_deref() != Some("wireguard") {
                continue;
            }
            match wireguard::peers(handle, link.ifindex) {
                Ok(peers) => snapshot.peers.extend(peers),
                // The main table tells, too, which node is behind a block.
                Err(error) => log::debug!("{}: {error:#}", link.name),
            }
        }
        Ok(snapshot)
    }

    /// The device with that index.
    pub fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }

    /// The addresses of a device, in the kernel's order.
    pub fn addresses_of(&self, ifindex: u32) -> impl Iterator<Item = &Address> {
        self.addresses
            .iter()
            .filter(move |address| address.ifindex == ifindex)
    }
}

/// The devices of a namespace, in the kernel's order: a cheap first look.
pub fn links(handle: &Handle) -> Result<Vec<Link>> {
    read_links(&mut Connection::open(handle)?)
}

fn read_links(connection: &mut Connection) -> Result<Vec<Link>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    Ok(connection
        .dump(&request, "devices")?
        .into_iter()
        .filter_map(link)
        .collect())
}

fn link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        ifindex: message.header.index,
        flags: message.header.flags.bits(),
        ..Link::default()
    };
    let mut has_xdp = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(address) => link.address = address,
            LinkAttribute::Controller(master) if master != 0 => link.master = Some(master),
            LinkAttribute::Link(peer) if peer != 0 => link.link = Some(peer),
            LinkAttribute::LinkNetNsId(id) if id >= 0 => link.link_netnsid = Some(id),
            LinkAttribute::Xdp(settings) => has_xdp = settings.iter().any(is_in_driver),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
                        LinkInfo::Data(InfoData::Vxlan(settings)) => link.vxlan = Some(vxlan(&settings)),
                        LinkInfo::Data(InfoData::Vlan(settings)) => link.vlan = vlan(&settings),
                        LinkInfo::Data(InfoData::IpTunnel(settings)) => link.ipip = Some(ipip(&settings)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // What comes in by a veth device is an `sk_buff` already, and seen when it is freed (`veth_xdp_rcv_skb`,
    // `drivers/net/veth.c`, Linux 6.18).
    link.xdp = has_xdp && link.kind.as_deref() != Some("veth");
    Some(link)
}

/// Those behind the driver get an `sk_buff` (`do_xdp_generic`, `net/core/dev.c`, Linux 6.18).
fn is_in_driver(setting: &LinkXdp) -> bool {
    matches!(setting, LinkXdp::Attached(how) if !matches!(how, XdpAttached::None | XdpAttached::SocketBuffer))
}

fn vlan(settings: &[InfoVlan]) -> Option<u16> {
    settings.iter().find_map(|setting| match setting {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    })
}

fn vxlan(settings: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan::default();
    for setting in settings {
        match *setting {
            InfoVxlan::Id(vni) => vxlan.vni = vni,
            InfoVxlan::Port(port) => vxlan.port = port,
            InfoVxlan::Local(address) => vxlan.local = specified(address.into()),
            InfoVxlan::Local6(address) => vxlan.local = specified(address.into()),
            InfoVxlan::Link(device) if device != 0 => vxlan.device = Some(device),
            InfoVxlan::CollectMetadata(on) => vxlan.collect_metadata = on,
            _ => {}
        }
    }
    vxlan
}

fn ipip(settings: &[InfoIpTunnel]) -> Ipip {
    let mut ipip = Ipip::default();
    for setting in settings {
        match *setting {
            InfoIpTunnel::Local(address) => ipip.local = specified(address),
            InfoIpTunnel::Remote(address) => ipip.remote = specified(address),
            _ => {}
        }
    }
    ipip
}

fn specified(address: IpAddr) -> Option<IpAddr> {
    (!address.is_unspecified()).then_some(address)
}

pub(super) fn address(message: RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else {
        return None;
    };
    let (mut local, mut plain) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            // IFA_LOCAL is the device's own address where it has a peer; IPv6 without a peer has IFA_ADDRESS only.
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => plain = Some(*address),
            _ => {}
        }
    }
    Some(Address {
        ifindex: message.header.index,
        address: local.or(plain)?,
        prefix_len: message.header.prefix_len,
        scope: message.header.scope.into(),
        secondary: message.header.flags.contains(AddressHeaderFlags::Secondary),
    })
}

/// The entries that one route message says: one for each next hop.
pub(super) fn entries(message: &RouteMessage) -> Vec<Entry> {
    let header = &message.header;
    let unspecified: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return Vec::new(),
    };
    let (mut destination, mut hops) = (unspecified, &[][..]);
    let mut entry = Entry {
        destination: unspecified.into(),
        kind: match header.kind {
            RouteType::Unicast => Type::Unicast,
            RouteType::Local => Type::Local,
            RouteType::BlackHole => Type::Blackhole,
            RouteType::Unreachable => Type::Unreachable,
            RouteType::Prohibit => Type::Prohibit,
            _ => Type::Other,
        },
        table: header.table.into(),
        protocol: header.protocol.into(),
        scope: header.scope.into(),
        metric: 0,
        gateway: None,
        oif: None,
        source: None,
        onlink: header.flags.contains(RouteFlags::Onlink),
        mtu: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address).unwrap_or(unspecified),
            RouteAttribute::Table(table) => entry.table = *table,
            RouteAttribute::Priority(metric) => entry.metric = *metric,
            RouteAttribute::PrefSource(address) => entry.source = ip(address),
            RouteAttribute::MultiPath(next_hops) => hops = next_hops,
            RouteAttribute::Metrics(metrics) => {
                entry.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            other => next_hop(&mut entry, other),
        }
    }
    let Ok(destination) = IpNet::new(destination, header.destination_prefix_length) else {
        return Vec::new();
    };
    entry.destination = destination;
    if hops.is_empty() {
        return vec![entry];
    }
    hops.iter()
        .map(|hop| {
            let mut entry = entry.clone();
            entry.oif = Some(hop.interface_index);
            entry.onlink |= hop.flags.contains(RouteNextHopFlags::Onlink);
            hop.attributes
                .iter()
                .for_each(|attribute| next_hop(&mut entry, attribute));
            entry
        })
        .collect()
}

fn next_hop(entry: &mut Entry, attribute: &RouteAttribute) {
    match attribute {
        RouteAttribute::Gateway(address) => entry.gateway = ip(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => entry.gateway = Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => entry.gateway = Some((*address).into()),
        RouteAttribute::Oif(ifindex) => entry.oif = Some(*ifindex),
        _ => {}
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbour(message: RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else {
        return None;
    };
    let (address, mac) = neighbour_attributes(&message);
    Some(Neighbour {
        ifindex: message.header.ifindex,
        address: address?,
        mac: mac.unwrap_or_default(),
    })
}

fn forward(message: RouteNetlinkMessage) -> Option<Forward> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else {
        return None;
    };
    let (destination, mac) = neighbour_attributes(&message);
    Some(Forward {
        ifindex: message.header.ifindex,
        mac: mac?,
        destination: destination?,
    })
}

fn neighbour_attributes(message: &NeighbourMessage) -> (Option<IpAddr>, Option<Vec<u8>>) {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => address = Some((*value).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => {
                address = Some((*value).into());
            }
            // A forwarding entry's destination is typed by its length alone (drivers/net/vxlan/vxlan_core.c).
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                address = match bytes.len() {
                    4 => <[u8; 4]>::try_from(&bytes[..]).ok().map(IpAddr::from),
                    16 => <[u8; 16]>::try_from(&bytes[..]).ok().map(IpAddr::from),
                    _ => None,
                };
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes.clone()),
            _ => {}
        }
    }
    (address, mac)
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::InfoKind;

    use super::*;

    #[test]
    fn xdp_is_told_where_nothing_of_it_is_seen() {
        let told = |kind: Option<InfoKind>, how| {
            let mut message = LinkMessage::default();
            message.attributes = vec![LinkAttribute::Xdp(vec![LinkXdp::Attached(how)])];
            if let Some(kind) = kind {
                let info = LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
                message.attributes.push(info);
            }
            link(RouteNetlinkMessage::NewLink(message)).unwrap().xdp
        };
        assert!(told(None, XdpAttached::Driver) && told(None, XdpAttached::Hardware));
        assert!(!told(None, XdpAttached::None));
        // Behind the driver, and at a veth device, packets are seen.
        assert!(!told(None, XdpAttached::SocketBuffer));
        assert!(!told(Some(InfoKind::Veth), XdpAttached::Driver));
    }
}
