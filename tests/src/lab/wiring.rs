//! The `ip -batch` texts and kernel settings that turn a plan into devices and routes. Pure: text out.
//!
//! Shaped as Calico's CNI plugin and Felix do it (`cni-plugin/pkg/dataplane/linux/dataplane_linux.go`,
//! `felix/dataplane/linux/{endpoint_mgr,vxlan_mgr,route_mgr}.go`).

#![expect(
    clippy::format_push_string,
    reason = "`write!` would add an error that cannot happen to each line"
)]

use std::net::Ipv4Addr;

use super::plan::{
    DeviceOrder, Encapsulation, FLOATING, Node, OUTSIDE, Options, Pod, VXLAN, WIREGUARD, WORKLOAD_MAC,
};

/// The route protocol number Felix marks its routes with (`DefaultRouteProto`).
const PROTO_FELIX: u8 = 80;
/// The link-local address every workload interface has: the EUI-64 of its MAC address.
const WORKLOAD_LINK_LOCAL: &str = "fe80::ecee:eeff:feee:eeee";

/// A setting below `/proc/sys` and its value.
pub(super) type Setting = (String, &'static str);

/// The bridges that carry the underlay, one for each subnet, the addresses of the router between them, and an address
/// outside of the cluster. Where there is a router to pass, it knows the way to the nodes' blocks, as it would by BGP:
/// what is not encapsulated crosses it, too.
pub(super) fn underlay(nodes: &[Node], ipv6: bool) -> String {
    let mut batch = format!("link set lo up\naddress add {OUTSIDE}/32 dev lo\n");
    let mut gateways: Vec<Ipv4Addr> = Vec::new();
    for node in nodes {
        let gateway = node.gateway();
        let number = gateways.iter().position(|known| *known == gateway);
        let bridge = format!("br{}", number.unwrap_or(gateways.len()));
        if number.is_none() {
            gateways.push(gateway);
            batch += &format!("link add {bridge} type bridge\naddress add {gateway}/24 dev {bridge}\n");
            if ipv6 {
                batch += &format!("address add {}/64 dev {bridge} nodad\n", node.gateway_v6());
            }
            batch += &format!("link set {bridge} up\n");
        }
        batch += &format!("link set {} master {bridge} up\n", node.name);
    }
    // Calico's BGP tells the way to a floating IP: the node of its pod.
    if let Some(node) = nodes.get(1) {
        batch += &format!("route add {FLOATING} via {}\n", node.address);
    }
    if gateways.len() > 1 {
        for node in nodes {
            batch += &format!("route add {} via {}\n", node.block, node.address);
            if ipv6 {
                batch += &format!("route add {} via {}\n", node.block_v6, node.address_v6);
            }
        }
    }
    batch
}

/// A node's devices, addresses and default route. Its uplink's other end appears in `underlay` under the
/// node's name. `make_tunl0`: the namespace has no `tunl0` of the kernel's.
pub(super) fn node(node: &Node, options: &Options, make_tunl0: bool, underlay: &str) -> String {
    let tunnel = tunnel(node, options.encapsulation, make_tunl0);
    let uplink = format!(
        "link add eth0 type veth peer name {} netns {underlay}\n",
        node.name
    );
    let mut batch = "link set lo up\n".to_owned();
    match options.order {
        DeviceOrder::TunnelFirst => batch += &(tunnel + &uplink),
        DeviceOrder::UplinkFirst => batch += &(uplink + &tunnel),
    }
    if let Some(device) = options.encapsulation.device() {
        batch += &format!(
            "address add {}/32 dev {device}\nlink set {device} up\n",
            node.tunnel_address
        );
    }
    batch += &format!("address add {}/24 dev eth0\n", node.address);
    if options.ipv6 {
        batch += &format!("address add {}/64 dev eth0 nodad\n", node.address_v6);
    }
    batch += "link set eth0 up\n";
    if options.encapsulation == Encapsulation::Wireguard {
        batch += &format!(
            "rule add priority {} not fwmark {mark}/{mark} table {}\n",
            WIREGUARD.priority,
            WIREGUARD.table,
            mark = WIREGUARD.mark
        );
    }
    batch + &default_route(node, options.ipv6)
}

fn tunnel(node: &Node, encapsulation: Encapsulation, make_tunl0: bool) -> String {
    let mtu = encapsulation.mtu();
    match encapsulation {
        Encapsulation::Vxlan => format!(
            "link add vxlan.calico address {} mtu {mtu} type vxlan id {} local {} dstport {} nolearning\n",
            node.tunnel_mac(),
            VXLAN.0,
            node.address,
            VXLAN.1
        ),
        Encapsulation::Ipip if make_tunl0 => format!("link add tunl0 type ipip\nlink set tunl0 mtu {mtu}\n"),
        Encapsulation::Ipip => format!("link set tunl0 mtu {mtu}\n"),
        Encapsulation::Wireguard => format!("link add wireguard.cali mtu {mtu} type wireguard\n"),
        Encapsulation::None => String::new(),
    }
}

/// The default routes of a node. Without one the kernel answers no pod's ARP request for 169.254.1.1:
/// proxy ARP needs a route to the asked address through another device (projectcalico/calico#3270).
pub(super) fn default_route(node: &Node, ipv6: bool) -> String {
    let mut batch = format!("route add default via {} dev eth0\n", node.gateway());
    if ipv6 {
        batch += &format!("route add default via {} dev eth0\n", node.gateway_v6());
    }
    batch
}

/// A node's route for its own block and its way to the others': one blackhole that the pods' /32 routes
/// are more specific than, and one gateway for each peer.
pub(super) fn blocks<'a>(node: &Node, peers: impl Iterator<Item = &'a Node>, options: &Options) -> String {
    let mut batch = format!("route add blackhole {} proto {PROTO_FELIX}\n", node.block);
    if options.ipv6 {
        batch += &format!("route add blackhole {} proto {PROTO_FELIX}\n", node.block_v6);
    }
    for peer in peers {
        batch += &to_peer(node, peer, options);
        if options.ipv6 {
            let gateway = if node.is_routed_to(peer) {
                node.gateway_v6()
            } else {
                peer.address_v6
            };
            batch += &format!(
                "route add {} via {gateway} dev eth0 proto {PROTO_FELIX}\n",
                peer.block_v6
            );
        }
    }
    batch
}

/// The way from a node to a peer's block, replacing what was there.
pub(super) fn to_peer(node: &Node, peer: &Node, options: &Options) -> String {
    let block = peer.block;
    let routed = node.is_routed_to(peer);
    let gateway = if routed { node.gateway() } else { peer.address };
    let unencapsulated = format!("route replace {block} via {gateway} dev eth0 proto bird\n");
    match options.encapsulation {
        _ if options.cross_subnet && !routed => unencapsulated,
        Encapsulation::Vxlan => {
            let (vtep, mac) = (peer.tunnel_address, peer.tunnel_mac());
            format!(
                "neighbour replace {vtep} lladdr {mac} dev vxlan.calico nud permanent\n\
                 route replace {block} via {vtep} dev vxlan.calico proto {PROTO_FELIX} onlink\n"
            )
        }
        Encapsulation::Ipip => {
            format!(
                "route replace {block} via {} dev tunl0 proto bird onlink\n",
                peer.address
            )
        }
        Encapsulation::None => unencapsulated,
        // BGP's route stays in the main table; Felix's is in a table of its own (`felix/wireguard/wireguard.go`).
        Encapsulation::Wireguard => {
            unencapsulated
                + &format!(
                    "route replace {block} dev wireguard.cali table {} proto {PROTO_FELIX} scope link\n",
                    WIREGUARD.table
                )
        }
    }
}

/// Forgets the MAC address of a gateway that is none any more.
pub(super) fn forget_gateway(device: &str, gateway: Ipv4Addr) -> String {
    format!("neighbour del {gateway} dev {device}\n")
}

/// The node a frame for the peer's VXLAN device is sent to, as a `bridge -batch` line.
pub(super) fn forwarding_entry(peer: &Node) -> String {
    format!(
        "fdb replace {} dev vxlan.calico dst {}\n",
        peer.tunnel_mac(),
        peer.address
    )
}

/// The change of a node's tunnel address. The new one comes before the old one goes, so that packets on
/// their way always find one.
pub(super) fn change_tunnel_address(device: &str, old: Ipv4Addr, new: Ipv4Addr) -> String {
    format!("address add {new}/32 dev {device}\naddress del {old}/32 dev {device}\n")
}

/// The node's side of a pod, and the interface pair itself.
pub(super) fn workload(pod: &Pod, options: &Options) -> String {
    let Pod {
        interface,
        mac,
        namespace,
        address,
        address_v6,
        ..
    } = pod;
    let mtu = options.encapsulation.mtu();
    let mut batch = format!(
        "link add {interface} address {WORKLOAD_MAC} mtu {mtu} type veth \
         peer name eth0 address {mac} mtu {mtu} netns {namespace}\n\
         link set {interface} up\n\
         route add {address}/32 dev {interface} scope link\n\
         neighbour replace {address} lladdr {mac} dev {interface} nud permanent\n"
    );
    if options.ipv6 {
        batch += &format!(
            "route add {address_v6}/128 dev {interface}\n\
             neighbour replace {address_v6} lladdr {mac} dev {interface} nud permanent\n"
        );
    }
    batch
}

/// The pod's own side.
pub(super) fn pod(pod: &Pod, ipv6: bool) -> String {
    let mut batch = format!(
        "link set lo up\n\
         address add {}/32 dev eth0\n\
         link set eth0 up\n\
         route add 169.254.1.1 dev eth0 scope link\n\
         route add default via 169.254.1.1 dev eth0\n",
        pod.address
    );
    if ipv6 {
        batch += &format!(
            "address add {}/128 dev eth0 nodad\n\
             route add default via {WORKLOAD_LINK_LOCAL} dev eth0\n",
            pod.address_v6
        );
    }
    batch
}

/// Settings of every namespace of the lab, made before its devices are. ICMP errors are not limited in
/// rate: a second traceroute within a second must not show `*`.
pub(super) fn namespace_settings(ipv6: bool) -> Vec<Setting> {
    let disabled = if ipv6 { "0" } else { "1" };
    let mut settings = vec![
        ("net/ipv4/icmp_ratelimit".to_owned(), "0"),
        // One set for all namespaces, and not visible here, before 6.13.
        ("net/ipv4/icmp_msgs_per_sec?".to_owned(), "1000000"),
        ("net/ipv4/icmp_msgs_burst?".to_owned(), "1000000"),
        ("net/ipv4/conf/all/rp_filter".to_owned(), "0"),
        ("net/ipv6/icmp/ratelimit?".to_owned(), "0"),
    ];
    for scope in ["all", "default"] {
        settings.push((format!("net/ipv6/conf/{scope}/disable_ipv6?"), disabled));
        // No duplicate address detection: addresses are of use at once.
        settings.push((format!("net/ipv6/conf/{scope}/accept_dad?"), "0"));
        settings.push((format!("net/ipv6/conf/{scope}/accept_ra?"), "0"));
        settings.push((format!("net/ipv6/conf/{scope}/router_solicitations?"), "0"));
    }
    settings
}

/// Settings that make a router of a namespace.
pub(super) fn router_settings() -> Vec<Setting> {
    vec![
        ("net/ipv4/ip_forward".to_owned(), "1"),
        ("net/ipv4/conf/default/rp_filter".to_owned(), "1"),
        ("net/ipv6/conf/all/forwarding?".to_owned(), "1"),
        ("net/ipv6/conf/default/forwarding?".to_owned(), "1"),
    ]
}

/// Settings of a workload interface (`configureProcSysForInterface` and the CNI plugin).
pub(super) fn workload_settings(interface: &str) -> Vec<Setting> {
    [
        ("ipv4/conf", "route_localnet", "1"),
        ("ipv4/neigh", "proxy_delay", "0"),
        ("ipv4/conf", "proxy_arp", "1"),
        ("ipv4/conf", "forwarding", "1"),
        ("ipv4/conf", "rp_filter", "1"),
        ("ipv6/conf", "proxy_ndp?", "1"),
        ("ipv6/conf", "forwarding?", "1"),
        ("ipv6/conf", "accept_ra?", "0"),
    ]
    .into_iter()
    .map(|(family, name, value)| (format!("net/{family}/{interface}/{name}"), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::plan;
    use super::*;

    fn position(text: &str, part: &str) -> usize {
        text.find(part)
            .unwrap_or_else(|| panic!("{part} is missing in:\n{text}"))
    }

    #[test]
    fn the_order_of_devices_is_the_order_of_registration() {
        let first = &plan::nodes("7", &Options::default())[0];
        for (order, tunnel_first) in [
            (DeviceOrder::TunnelFirst, true),
            (DeviceOrder::UplinkFirst, false),
        ] {
            let batch = node(
                first,
                &Options {
                    order,
                    ..Options::default()
                },
                false,
                "ct7-underlay",
            );
            let tunnel = position(&batch, "link add vxlan.calico");
            assert_eq!(tunnel < position(&batch, "link add eth0"), tunnel_first);
        }
    }

    #[test]
    fn a_peer_is_reached_through_the_gateway_of_its_encapsulation() {
        for (encapsulation, routed, cross_subnet, route) in [
            (
                Encapsulation::Vxlan,
                false,
                false,
                "10.244.205.192/26 via 10.244.205.192 dev vxlan.calico",
            ),
            (Encapsulation::Vxlan, false, true, "via 192.168.49.3 dev eth0"),
            (Encapsulation::Vxlan, true, true, "dev vxlan.calico"),
            (Encapsulation::Ipip, false, false, "via 192.168.49.3 dev tunl0"),
            (Encapsulation::Ipip, true, false, "via 192.168.50.3 dev tunl0"),
            (Encapsulation::None, false, false, "via 192.168.49.3 dev eth0"),
            (Encapsulation::None, true, false, "via 192.168.49.1 dev eth0"),
            (
                Encapsulation::Wireguard,
                false,
                false,
                "dev wireguard.cali table 1",
            ),
        ] {
            let options = Options {
                encapsulation,
                routed,
                cross_subnet,
                ..Options::default()
            };
            let nodes = plan::nodes("7", &options);
            position(&to_peer(&nodes[0], &nodes[1], &options), route);
        }
    }
}
