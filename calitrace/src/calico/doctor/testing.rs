//! A node for the tests of the families: the seed's first one, with nothing wrong.

use ipnet::IpNet;

use super::{Evidence, Findings, Severity, Subject};
use crate::{
    event::{EncapKind, Interface, Pod, Role, Route, RouteKind},
    route::{Address, Entry, Link, Snapshot, TABLE_MAIN, Type, Vxlan},
};

pub(super) struct Node {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    pods: Vec<Pod>,
    local_blocks: Vec<IpNet>,
    remote_blocks: Vec<IpNet>,
    snapshot: Snapshot,
}

impl Node {
    /// With `tunl0`, `eth0` and one pod.
    pub(super) fn new() -> Self {
        let block: IpNet = "10.244.205.192/26".parse().unwrap();
        let mut node = Self {
            interfaces: Vec::new(),
            routes: vec![Route {
                prefix: block,
                kind: RouteKind::Unicast,
                gateway: Some("192.168.49.3".parse().unwrap()),
                ifindex: Some(2),
                encap: Some(EncapKind::Ipip),
                remote_node: Some("192.168.49.3".parse().unwrap()),
            }],
            pods: vec![Pod {
                time: 0,
                netns: 1,
                ifindex: 4,
                addresses: vec!["10.244.120.67".parse().unwrap()],
                name: Some("default/web-0".to_owned()),
                pod_netns: None,
                gone: false,
            }],
            local_blocks: vec!["10.244.120.64/26".parse().unwrap()],
            remote_blocks: vec![block],
            snapshot: Snapshot::default(),
        };
        for (ifindex, name, kind, role, mtu) in [
            (2, "tunl0", "ipip", Role::Tunnel, 1480),
            (3, "eth0", "veth", Role::Uplink, 1500),
            (4, "cali8d02ed71817", "veth", Role::Workload, 1480),
        ] {
            node.snapshot.links.push(link(ifindex, name, kind, mtu));
            node.interfaces.push(Interface {
                time: 0,
                netns: 1,
                ifindex,
                name: name.to_owned(),
                role,
                mtu,
                addresses: Vec::new(),
                xdp: false,
                gone: false,
            });
        }
        node
    }

    /// The other node is reached by `eth0` alone.
    pub(super) fn without_tunnel(mut self) -> Self {
        self.interfaces.retain(|interface| interface.role != Role::Tunnel);
        self.snapshot.links.retain(|link| link.name != "tunl0");
        for route in &mut self.routes {
            (route.ifindex, route.encap) = (Some(3), None);
        }
        self
    }

    /// The tunnel is `vxlan.calico`.
    pub(super) fn with_vxlan(mut self) -> Self {
        for interface in self.interfaces.iter_mut().filter(|one| one.name == "tunl0") {
            "vxlan.calico".clone_into(&mut interface.name);
        }
        for link in self.snapshot.links.iter_mut().filter(|one| one.name == "tunl0") {
            "vxlan.calico".clone_into(&mut link.name);
            link.vxlan = Some(Vxlan::default());
        }
        for route in &mut self.routes {
            route.encap = Some(EncapKind::Vxlan);
        }
        self
    }

    /// No other node is known.
    pub(super) fn without_blocks(mut self) -> Self {
        self.routes.clear();
        self.remote_blocks.clear();
        self
    }

    /// A device that the node makes no use of.
    pub(super) fn with_unused(mut self, name: &str, kind: &str) -> Self {
        self.snapshot.links.push(link(9, name, kind, 1480));
        self
    }

    pub(super) fn with_address(mut self, ifindex: u32, address: &str) -> Self {
        self.snapshot.addresses.push(Address {
            ifindex,
            address: address.parse().unwrap(),
            prefix_len: 24,
            scope: 0,
            secondary: false,
        });
        self
    }

    pub(super) fn with_mtu(mut self, name: &str, mtu: u32) -> Self {
        for interface in self
            .interfaces
            .iter_mut()
            .filter(|interface| interface.name == name)
        {
            interface.mtu = mtu;
        }
        for link in self.snapshot.links.iter_mut().filter(|link| link.name == name) {
            link.mtu = mtu;
        }
        self
    }

    pub(super) fn with_device(mut self, ifindex: u32, name: &str) -> Self {
        self.snapshot.links.push(link(ifindex, name, "bridge", 1500));
        self
    }

    pub(super) fn with_route(mut self, prefix: &str, ifindex: u32) -> Self {
        self.snapshot.routes.push(Entry {
            destination: prefix.parse().unwrap(),
            kind: Type::Unicast,
            table: TABLE_MAIN,
            protocol: 3,
            scope: 0,
            metric: 0,
            gateway: None,
            oif: Some(ifindex),
            source: None,
            onlink: false,
            mtu: None,
        });
        self
    }

    /// What one family tells of this severity.
    pub(super) fn told(
        &mut self,
        family: fn(&mut Findings<'_>),
        evidence: &Evidence,
        severity: Severity,
    ) -> Vec<String> {
        let node = Subject {
            name: "minikube",
            interfaces: &self.interfaces,
            routes: &self.routes,
            pods: &self.pods,
            local_blocks: &self.local_blocks,
            remote_blocks: &self.remote_blocks,
            without_pod: Vec::new(),
            snapshot: &self.snapshot,
        };
        let mut findings = Findings {
            node,
            evidence,
            all: Vec::new(),
        };
        family(&mut findings);
        let told = findings
            .all
            .into_iter()
            .filter(|finding| finding.severity == severity);
        told.map(|finding| finding.what).collect()
    }
}

fn link(ifindex: u32, name: &str, kind: &str, mtu: u32) -> Link {
    Link {
        ifindex,
        name: name.to_owned(),
        kind: Some(kind.to_owned()),
        mtu,
        flags: 1,
        ..Link::default()
    }
}
