//! Discovery on the running kernel: Calico-shaped namespaces made with `ip`, compared with what `ip` says about them.

mod changes;
mod rig;
mod told;

use std::{collections::BTreeSet, net::IpAddr, process::ExitCode};

use calitrace::{
    calico::{self, NodeView, Options},
    event::{EncapKind, Role, RouteKind},
    netns,
};
use calitrace_tests::{Test, harness, test};
use rig::{Lab, POD1, POD2, Result};

const TESTS: &[Test] = &[
    test("nodes_are_what_ip_says", nodes_are_what_ip_says),
    test("parts_are_told_apart", parts_are_told_apart),
    test("hop_addresses_are_the_kernels", hop_addresses_are_the_kernels),
    test(
        "names_come_from_the_nodes_own_root",
        names_come_from_the_nodes_own_root,
    ),
    test("two_labs_are_two_clusters", two_labs_are_two_clusters),
    test("what_is_no_node_is_none", what_is_no_node_is_none),
    test(
        "a_monitor_tells_which_tables_changed",
        changes::a_monitor_tells_which_tables_changed,
    ),
    test("changes_are_told", changes::changes_are_told),
    test("doctor_command", told::doctor_command),
    test("topology_command", told::topology_command),
    test("topology_is_what_ip_says", told::topology_is_what_ip_says),
    test(
        "expected_paths_follow_the_kernels",
        told::expected_paths_follow_the_kernels,
    ),
    test("doctor_names_what_is_wrong", told::doctor_names_what_is_wrong),
    test(
        "a_refresh_with_many_pods_is_quick",
        changes::a_refresh_with_many_pods_is_quick,
    ),
];

fn main() -> ExitCode {
    harness::run(TESTS.iter().copied())
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::from([0, 0, 0, 0]))
}

/// The nodes in the given namespaces, in that order.
fn discover(namespaces: &[&str]) -> Result<Vec<NodeView>> {
    let options = Options {
        netns: namespaces.iter().map(ToString::to_string).collect(),
        ..Options::default()
    };
    let nodes = calico::discover(&options)?;
    let found = netns::list()?;
    namespaces
        .iter()
        .map(|name| {
            let inode = netns::resolve(name, &found)?.inode();
            let node = nodes.iter().find(|node| node.netns() == inode);
            node.cloned()
                .ok_or_else(|| anyhow::anyhow!("{name} was not taken for a node"))
        })
        .collect()
}

fn nodes_are_what_ip_says() -> Result<()> {
    let lab = Lab::up()?;
    let nodes = discover(&[&lab.node1, &lab.node2])?;
    for (node, namespace) in [(&nodes[0], &lab.node1), (&nodes[1], &lab.node2)] {
        let links = rig::json(namespace, &["link"])?;
        let mut said: Vec<_> = links
            .iter()
            .map(|l| (l["ifindex"].as_u64(), l["ifname"].as_str(), l["mtu"].as_u64()))
            .collect();
        let mut seen: Vec<_> = node
            .snapshot
            .links
            .iter()
            .map(|link| {
                (
                    Some(link.ifindex.into()),
                    Some(link.name.as_str()),
                    Some(link.mtu.into()),
                )
            })
            .collect();
        said.sort_unstable();
        seen.sort_unstable();
        assert_eq!(seen, said);

        let said: BTreeSet<_> = rig::json(namespace, &["addr"])?
            .iter()
            .flat_map(|l| l["addr_info"].as_array().cloned().unwrap_or_default())
            .map(|address| {
                format!(
                    "{}/{}",
                    address["local"].as_str().unwrap_or_default(),
                    address["prefixlen"]
                )
            })
            .collect();
        let seen: BTreeSet<_> = node
            .snapshot
            .addresses
            .iter()
            .map(|a| format!("{}/{}", a.address, a.prefix_len))
            .collect();
        assert_eq!(seen, said);

        let said: BTreeSet<_> = rig::json(namespace, &["route", "show"])?
            .iter()
            .map(rig::route_line)
            .collect();
        let seen: BTreeSet<_> = node
            .snapshot
            .routes
            .iter()
            .filter(|entry| entry.table == calitrace::route::TABLE_MAIN && entry.destination.addr().is_ipv4())
            .map(|entry| {
                let device = entry.oif.and_then(|oif| node.snapshot.link(oif));
                // The kernel gives blackholes a device of their own in IPv6 only.
                format!(
                    "{} via {} dev {}",
                    entry.destination,
                    entry
                        .gateway
                        .map_or_else(|| "-".to_owned(), |gateway| gateway.to_string()),
                    device.map_or("-", |link| &link.name)
                )
            })
            .collect();
        assert_eq!(seen, said);
    }

    Ok(())
}

fn parts_are_told_apart() -> Result<()> {
    let lab = Lab::up()?;
    let nodes = discover(&[&lab.node1, &lab.node2])?;
    let (node1, node2) = (&nodes[0], &nodes[1]);
    let role = |name: &str| {
        node1
            .interfaces
            .iter()
            .find(|interface| interface.name == name)
            .map(|interface| interface.role)
    };
    assert_eq!(role(POD1.interface), Some(Role::Workload));
    assert_eq!(role("vxlan.calico"), Some(Role::Tunnel));
    assert_eq!(role("eth0"), Some(Role::Uplink));
    assert_eq!(node1.local_blocks, ["10.244.120.64/26".parse()?]);
    assert_eq!(node1.remote_blocks, ["10.244.205.192/26".parse()?]);
    let block = node1
        .routes
        .iter()
        .find(|route| route.prefix == node1.remote_blocks[0])
        .expect("the remote block");
    assert_eq!(block.encap, Some(EncapKind::Vxlan));
    assert_eq!(block.gateway, Some(addr("10.244.205.192")));
    assert_eq!(block.remote_node, Some(addr("192.168.49.3")));
    let local = node1
        .routes
        .iter()
        .find(|route| route.prefix == node1.local_blocks[0])
        .expect("the local block");
    assert_eq!((local.kind, local.gateway), (RouteKind::Blackhole, None));
    assert_eq!(
        node1.routes.last().map(|route| route.prefix.prefix_len()),
        Some(0),
        "the default route is the last"
    );
    assert_eq!(node1.services, ["10.96.0.0/12".parse()?]);
    let pod = &node1.pods[0];
    assert_eq!(pod.addresses, [addr(POD1.address)]);
    let pod_netns = netns::resolve(&lab.pod1, &netns::list()?)?.inode();
    assert_eq!(
        pod.pod_netns,
        Some(pod_netns),
        "the veth's other end leads to the pod's namespace"
    );
    assert_eq!(
        node1.node.addresses.iter().collect::<BTreeSet<_>>(),
        [&addr("10.244.120.64"), &addr("192.168.49.2")].into()
    );
    assert_eq!(node2.pods[0].addresses, [addr(POD2.address)]);
    Ok(())
}

fn hop_addresses_are_the_kernels() -> Result<()> {
    let lab = Lab::up()?;
    let nodes = discover(&[&lab.node1, &lab.node2])?;
    // Node 1's tunnel device is older than its uplink, node 2's is younger.
    for (node, namespace) in [(&nodes[0], &lab.node1), (&nodes[1], &lab.node2)] {
        for towards in [POD1.address, POD2.address, "192.168.49.1", "8.8.8.8"] {
            let said = rig::json(
                namespace,
                &["route", "get", towards, "tos", "0xc0", "ipproto", "icmp"],
            )?;
            let seen = node
                .lookup
                .hop_address(addr(towards), None)?
                .map(|address| address.to_string());
            assert_eq!(
                seen.as_deref(),
                said[0]["prefsrc"].as_str(),
                "{namespace} towards {towards}"
            );
        }
    }
    assert_eq!(
        nodes[0].lookup.hop_address(addr(POD1.address), None)?,
        Some(addr("10.244.120.64"))
    );
    assert_eq!(
        nodes[1].lookup.hop_address(addr(POD1.address), None)?,
        Some(addr("10.244.205.192"))
    );
    assert_eq!(
        nodes[1].lookup.hop_address(addr(POD2.address), None)?,
        Some(addr("192.168.49.3"))
    );
    // IPv6 has no tunnel here; node 1 has a pod with an address on a device without one.
    rig::ip(
        &lab.node1,
        &format!(
            "addr add fd00:49::2/64 dev eth0 nodad\naddr add fd00:10:244::40/128 dev vxlan.calico nodad\n\
             route add fd00:10:244::43/128 dev {}\nroute add default via fd00:49::1",
            POD1.interface
        ),
    )?;
    for towards in ["fd00:10:244::43", "fd00:49::9", "2001:db8::1"] {
        let said = rig::json(
            &lab.node1,
            &["-6", "route", "get", towards, "ipproto", "ipv6-icmp"],
        )?;
        let seen = nodes[0]
            .lookup
            .hop_address(addr(towards), None)?
            .map(|address| address.to_string());
        assert!(
            seen.is_some() && seen.as_deref() == said[0]["prefsrc"].as_str(),
            "{seen:?} {said:?} towards {towards}"
        );
    }
    // A blackhole sends nothing back.
    assert_eq!(nodes[0].lookup.hop_address(addr("10.244.120.100"), None)?, None);

    // With the sysctl, the address of the device that the packet came in by goes first; read anew each time.
    let uplink = nodes[0]
        .snapshot
        .links
        .iter()
        .find(|link| link.name == "eth0")
        .map(|link| link.ifindex);
    let lookup = &nodes[0].lookup;
    assert_eq!(
        lookup.hop_address(addr(POD1.address), uplink)?,
        Some(addr("10.244.120.64"))
    );
    rig::sysctl(&lab.node1, "net.ipv4.icmp_errors_use_inbound_ifaddr=1")?;
    assert_eq!(
        lookup.hop_address(addr(POD1.address), uplink)?,
        Some(addr("192.168.49.2"))
    );
    let workload = Some(nodes[0].pods[0].ifindex);
    assert_eq!(
        lookup.hop_address(addr(POD1.address), workload)?,
        Some(addr("10.244.120.64")),
        "it has no address"
    );

    let decision = lookup
        .route_to(addr("192.168.49.3"))?
        .expect("a route to the other node");
    assert_eq!(
        (decision.oif, decision.gateway, decision.source),
        (uplink, None, Some(addr("192.168.49.2")))
    );
    rig::ip(&lab.node1, "route del default")?;
    assert_eq!(lookup.route_to(addr("8.8.8.8"))?, None);
    Ok(())
}

fn names_come_from_the_nodes_own_root() -> Result<()> {
    let lab = Lab::up()?;
    let status = format!(
        r#"{{"ifaceName":"{}","mac":"ee:ee:ee:ee:ee:ee","ipv4Nets":["{}/32"],"ipv6Nets":[]}}"#,
        POD1.interface, POD1.address
    );
    lab.file(&lab.root1, "var/lib/calico/nodename", "minikube\n")?;
    let file = format!("var/run/calico/endpoint-status/k8s default%2F{} eth0", POD1.name);
    lab.file(&lab.root1, &file, &status)?;
    lab.file(
        &lab.root1,
        "etc/kubernetes/manifests/kube-apiserver.yaml",
        "    - --service-cluster-ip-range=10.100.0.0/16\n",
    )?;
    lab.file(&lab.root2, "var/lib/calico/nodename", "minikube-m02")?;
    let cni = format!(
        r#"{{"kind":"cniCacheV1","cniArgs":[["K8S_POD_NAMESPACE","default"],["K8S_POD_NAME","{}"]],
            "result":{{"interfaces":[{{"name":"{}"}}],"ips":[{{"address":"{}/32"}}]}}}}"#,
        POD2.name, POD2.interface, POD2.address
    );
    lab.file(&lab.root2, "var/lib/cni/results/k8s-pod-network-1f-eth0", &cni)?;
    let early = discover(&[&lab.node1])?.remove(0);
    assert_eq!(
        early.node.name, lab.node1,
        "without a process there is only the namespace's name"
    );
    let _inside = [
        rig::live_in(&lab.node1, &lab.root1)?,
        rig::live_in(&lab.node2, &lab.root2)?,
    ];

    let nodes = discover(&[&lab.node1, &lab.node2])?;
    assert_eq!(nodes[0].node.name, "minikube");
    assert_eq!(nodes[1].node.name, "minikube-m02");
    assert_eq!(
        nodes[0].pods[0].name.as_deref(),
        Some("default/busybox-f5945bfb5-mw26t")
    );
    assert_eq!(
        nodes[1].pods[0].name.as_deref(),
        Some("default/busybox-f5945bfb5-mwgr6")
    );
    assert_eq!(nodes[0].services, ["10.100.0.0/16".parse()?]);
    assert!(!nodes[0].has_unnamed_pods());

    let late = early.refresh()?.expect("still a node");
    // Its cluster is another matter: it was looked at alone.
    assert_eq!(
        (&late.node.name, &late.pods),
        (&nodes[0].node.name, &nodes[0].pods)
    );
    assert_eq!(late.services, nodes[0].services);

    // Only the kubelet's logs left: the SHA-1 rule finds the pod among them. A later look finds what was not there before.
    std::fs::remove_dir_all(lab.root2.join("var/lib/cni"))?;
    let unnamed = discover(&[&lab.node2])?.remove(0);
    assert!(unnamed.has_unnamed_pods());
    lab.file(&lab.root2, "var/log/pods/default_another_1/x", "")?;
    lab.file(&lab.root2, &format!("var/log/pods/default_{}_2/x", POD2.name), "")?;
    let named = unnamed.refresh()?.expect("still a node");
    assert_eq!(
        named.pods[0].name.as_deref(),
        Some("default/busybox-f5945bfb5-mwgr6")
    );
    let by_name = Options {
        nodes: vec!["minikube-m02".to_owned()],
        netns: vec![lab.node1.clone(), lab.node2.clone()],
        ..Options::default()
    };
    let wanted: Vec<_> = calico::discover(&by_name)?.iter().map(NodeView::netns).collect();
    assert_eq!(wanted, [named.netns()]);
    Ok(())
}

fn two_labs_are_two_clusters() -> Result<()> {
    let (one, other) = (Lab::up()?, Lab::up()?);
    let nodes = discover(&[&one.node1, &one.node2, &other.node1, &other.node2])?;
    let cluster = |at: usize| nodes[at].node.cluster;
    assert_eq!(
        nodes[0].node.addresses, nodes[2].node.addresses,
        "the labs' addresses are equal"
    );
    assert_eq!(cluster(0), cluster(1));
    assert_eq!(cluster(2), cluster(3));
    assert_ne!(cluster(0), cluster(2));
    Ok(())
}

fn what_is_no_node_is_none() -> Result<()> {
    let lab = Lab::up()?;
    let found = netns::list()?;
    let nodes: BTreeSet<_> = calico::discover(&Options::default())?
        .iter()
        .map(NodeView::netns)
        .collect();
    let is_node = |name: &str| anyhow::Ok(nodes.contains(&netns::resolve(name, &found)?.inode()));
    assert!(is_node(&lab.node1)? && is_node(&lab.node2)?);
    assert!(!is_node(&lab.pod1)? && !is_node(&lab.pod2)? && !is_node(&lab.underlay)?);

    // A node without pods is one by its tunnel and block; without the block it is none.
    rig::ip(&lab.node1, &format!("link del {}", POD1.interface))?;
    let node = discover(&[&lab.node1])?.remove(0);
    assert!(node.pods.is_empty());
    rig::ip(&lab.node1, "route del blackhole 10.244.120.64/26")?;
    assert!(node.refresh()?.is_none());
    assert!(
        calico::discover(&Options {
            netns: vec![lab.node1.clone()],
            ..Options::default()
        })?
        .is_empty()
    );

    // Another prefix for interfaces.
    let other = Options {
        netns: vec![lab.node2.clone()],
        interface_prefixes: vec!["azv".to_owned()],
        ..Options::default()
    };
    assert!(calico::discover(&other)?[0].pods.is_empty());
    let error = calico::discover(&Options {
        netns: vec!["no-such-namespace".to_owned()],
        ..Options::default()
    });
    assert!(error.is_err_and(|error| error.to_string().contains("no-such-namespace")));
    Ok(())
}
