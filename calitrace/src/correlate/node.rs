//! What the facts say of one node: its name, addresses, interfaces, routes and rules.

use std::{cell::RefCell, cmp::Reverse, net::IpAddr};

use rustc_hash::FxHashMap;

use super::{Name, firewall::Firewall};
use crate::event::{Interface, Role, Route, RouteKind};

/// Look-ups kept for each node; destinations are few, so when there are more they are forgotten all at once.
const LOOKED_UP: usize = 65_536;

/// An interface of a node.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) name: Name,
    /// In bytes.
    pub(super) mtu: u32,
    /// Whether an XDP program in the driver decides before all hooks what comes in.
    pub(super) xdp: bool,
    /// Of uplinks: the addresses.
    uplink: Option<Vec<IpAddr>>,
}

impl Device {
    pub(super) fn of(interface: &Interface) -> Self {
        Self {
            name: interface.name.as_str().into(),
            mtu: interface.mtu,
            xdp: interface.xdp,
            uplink: (interface.role == Role::Uplink).then(|| interface.addresses.clone()),
        }
    }
}

/// A node's tables.
#[derive(Debug, Default)]
pub(super) struct NodeTables {
    pub(super) name: Option<Name>,
    pub(super) cluster: Option<u32>,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) interfaces: FxHashMap<u32, Device>,
    pub(super) firewall: Firewall,
    /// The most specific first.
    pub(super) routes: Vec<Route>,
    /// Index of the route by destination.
    looked_up: RefCell<FxHashMap<IpAddr, Option<usize>>>,
}

impl NodeTables {
    /// Takes these for all its routes.
    pub(super) fn set_routes(&mut self, routes: &[Route]) {
        routes.clone_into(&mut self.routes);
        self.routes
            .sort_by_key(|route| Reverse(route.prefix.prefix_len()));
        self.looked_up.get_mut().clear();
    }

    /// The most specific route to `address`.
    pub(super) fn route(&self, address: IpAddr) -> Option<&Route> {
        let mut looked_up = self.looked_up.borrow_mut();
        if looked_up.len() >= LOOKED_UP {
            looked_up.clear();
        }
        let index = *looked_up.entry(address).or_insert_with(|| {
            self.routes
                .iter()
                .position(|route| route.prefix.contains(&address))
        });
        self.routes.get(index?)
    }

    /// Whether an IPAM block of the node has the address: such a block is a blackhole in its routes.
    pub(super) fn has_block(&self, address: IpAddr) -> bool {
        let mut blocks = self
            .routes
            .iter()
            .filter(|route| route.kind == RouteKind::Blackhole);
        blocks.any(|route| route.prefix.contains(&address))
    }

    /// The uplink by which the node gets what is sent to this address of it, or its only one. None where it may be several.
    pub(super) fn uplink(&self, address: Option<IpAddr>) -> Option<&Device> {
        let mut uplinks: Vec<_> = self
            .interfaces
            .values()
            .filter_map(|device| Some((device, device.uplink.as_ref()?)))
            .collect();
        if let Some(address) = address
            && let Some(at) = uplinks.iter().position(|(_, own)| own.contains(&address))
        {
            uplinks = vec![uplinks[at]];
        }
        match uplinks[..] {
            [(device, _)] => Some(device),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplink(ifindex: u32, address: &str, xdp: bool) -> Interface {
        Interface {
            time: 0,
            netns: 1,
            ifindex,
            name: format!("eth{ifindex}"),
            role: Role::Uplink,
            mtu: 1500,
            addresses: vec![address.parse().unwrap()],
            xdp,
            gone: false,
        }
    }

    #[test]
    fn the_uplink_that_a_packet_comes_by_is_found() {
        let mut node = NodeTables::default();
        let mut add = |interface: &Interface| {
            let device = Device::of(interface);
            node.interfaces.insert(interface.ifindex, device);
        };
        add(&uplink(0, "192.168.49.3", true));
        let to = |node: &NodeTables, address: Option<&str>| -> Option<(String, bool)> {
            let address = address.map(|address| address.parse().unwrap());
            let device = node.uplink(address)?;
            Some((device.name.to_string(), device.xdp))
        };
        add(&Interface {
            role: Role::Workload,
            ..uplink(7, "10.0.0.1", true)
        });
        let eth0 = Some(("eth0".to_owned(), true));
        assert_eq!(to(&node, None), eth0);
        node.interfaces
            .insert(1, Device::of(&uplink(1, "192.168.50.3", false)));
        assert_eq!(to(&node, Some("192.168.49.3")), eth0);
        assert_eq!(to(&node, Some("192.168.50.3")), Some(("eth1".to_owned(), false)));
        // Which of two it came by is not known.
        assert_eq!(to(&node, None), None);
    }
}
