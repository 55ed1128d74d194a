//! What `topology` and `doctor` tell of a node, against `ip`, routes and settings.

use std::{collections::BTreeSet, process::Command};

use anyhow::Context as _;

use calitrace::calico::{
    NodeView,
    doctor::{self, Evidence, Severity},
    topology::{Certainty, Outcome, Step, Topology, expected_path},
};

use crate::{
    addr, discover,
    rig::{self, Lab, POD1, POD2, Result},
};

pub(crate) fn topology_is_what_ip_says() -> Result<()> {
    let lab = Lab::up()?;
    let nodes = discover(&[&lab.node1, &lab.node2])?;
    let topology = serde_json::to_value(Topology::of(&nodes)?)?;
    assert_eq!(topology["type"], "topology");
    for (node, namespace) in nodes.iter().zip([&lab.node1, &lab.node2]) {
        let told = topology["nodes"]
            .as_array()
            .expect("nodes")
            .iter()
            .find(|told| told["netns"] == node.netns());
        let told = told.expect("each node is told of");
        let links = rig::json(namespace, &["-d", "addr"])?;
        let devices = told["devices"].as_array().expect("devices");
        assert_eq!(devices.len(), 3, "{devices:?}");
        for device in devices {
            let link = links
                .iter()
                .find(|link| link["ifname"] == device["name"])
                .expect("ip knows the device");
            for (ours, theirs) in [("ifindex", "ifindex"), ("mtu", "mtu"), ("mac", "address")] {
                assert_eq!(device[ours], link[theirs], "{ours} of {}", device["name"]);
            }
            assert_eq!(device["kind"], link["linkinfo"]["info_kind"]);
            assert_eq!(device["vni"], link["linkinfo"]["info_data"]["id"]);
            assert_eq!(device["port"], link["linkinfo"]["info_data"]["port"]);
            let up = link["flags"]
                .as_array()
                .is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
            assert_eq!(device["up"], up);
            let addresses: Vec<_> = link["addr_info"].as_array().into_iter().flatten().collect();
            let addresses: Vec<_> = addresses
                .iter()
                .map(|a| format!("{}/{}", a["local"].as_str().unwrap_or("-"), a["prefixlen"]))
                .collect();
            assert_eq!(device["addresses"], serde_json::json!(addresses));
        }
        let said: BTreeSet<_> = rig::json(namespace, &["route", "show"])?
            .iter()
            .map(rig::route_line)
            .collect();
        let text = |route: &serde_json::Value, key: &str| route[key].as_str().unwrap_or("-").to_owned();
        let ours: BTreeSet<_> = told["routes"]
            .as_array()
            .expect("routes")
            .iter()
            .map(|r| {
                format!(
                    "{} via {} dev {}",
                    text(r, "prefix"),
                    text(r, "gateway"),
                    text(r, "device")
                )
            })
            .collect();
        assert_eq!(ours, said);
    }
    Ok(())
}

/// The command itself, as a user runs it.
pub(crate) fn topology_command() -> Result<()> {
    let lab = Lab::up()?;
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_calitrace"));
        command
            .arg("topology")
            .args(arguments)
            .output()
            .context("run calitrace topology")
    };
    let output = run(&["-o", "json", "--netns", &lab.node1, "--netns", &lab.node2])?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let names: Vec<_> = told["nodes"]
        .as_array()
        .expect("nodes")
        .iter()
        .map(|node| &node["name"])
        .collect();
    assert_eq!(names.len(), 2);
    let mut paths = told["paths"].as_array().expect("paths").iter();
    let path = paths
        .find(|path| path["from"]["address"] == POD1.address)
        .expect("a path from pod 1");
    let hops: Vec<_> = path["hops"]
        .as_array()
        .expect("hops")
        .iter()
        .map(|hop| &hop["address"])
        .collect();
    assert_eq!(hops, ["10.244.120.64", "10.244.205.192", POD2.address]);

    let text = run(&["--netns", &lab.node1])?;
    assert!(text.status.success());
    let text = String::from_utf8(text.stdout)?;
    assert!(
        text.contains(" 2  10.244.205.192  192.168.49.3  (inferred)"),
        "{text}"
    );
    let none = run(&["--netns", &lab.pod1])?;
    assert_eq!(none.status.code(), Some(4));
    let said = String::from_utf8(none.stderr)?;
    assert!(
        said.contains("no Calico node in the network namespace") && said.contains("cali*"),
        "{said}"
    );
    Ok(())
}

/// The command itself, with a fault in the node.
pub(crate) fn doctor_command() -> Result<()> {
    let lab = Lab::up()?;
    rig::ip(&lab.node1, "route del default")?;
    let run = |arguments: &[&str]| -> Result<String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_calitrace"));
        let output = command
            .arg("doctor")
            .args(arguments)
            .output()
            .context("run calitrace doctor")?;
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    };
    let told = run(&["--netns", &lab.node1])?;
    assert!(told.contains("There is no default route"), "{told}");
    // Whether the kernel has these is its own affair; that each is judged, and says why, is ours.
    for name in ["kprobes", "fentry", "ipip", "btf"] {
        let line = told
            .lines()
            .find(|line| line.split_whitespace().nth(1) == Some(name));
        assert!(
            line.is_some_and(|line| line.starts_with(['✓', '✗'])),
            "{name}: {told}"
        );
    }
    let told = run(&["--netns", &lab.pod1])?;
    assert!(told.contains("no Calico node in the network namespace"), "{told}");
    Ok(())
}

pub(crate) fn expected_paths_follow_the_kernels() -> Result<()> {
    let lab = Lab::up()?;
    let nodes = discover(&[&lab.node1, &lab.node2])?;
    let path = |nodes: &[NodeView], from: &str, to: &str| {
        let path = expected_path(nodes, addr(from), addr(to))?;
        let address = |step: &Step| {
            step.address
                .map_or_else(|| "*".to_owned(), |address| address.to_string())
        };
        let hops: Vec<_> = path
            .hops
            .iter()
            .map(|hop| (address(hop), hop.certainty))
            .collect();
        anyhow::Ok((hops, path.mtu, path.outcome))
    };
    let known = |addresses: &[&str]| -> Vec<_> {
        addresses
            .iter()
            .map(|address| ((*address).to_owned(), Certainty::Known))
            .collect()
    };
    // Node 1 has its tunnel device before its uplink, node 2 after it: as reference traceroutes show (first hop).
    assert_eq!(
        path(&nodes, POD1.address, POD2.address)?,
        (
            known(&["10.244.120.64", "10.244.205.192", POD2.address]),
            1450,
            Outcome::Delivered
        )
    );
    assert_eq!(
        path(&nodes, POD2.address, POD1.address)?,
        (
            known(&["192.168.49.3", "10.244.120.64", POD1.address]),
            1450,
            Outcome::Delivered
        )
    );
    assert_eq!(
        path(&nodes, POD1.address, "192.168.49.2")?.0,
        known(&["192.168.49.2"]),
        "its own node"
    );
    assert_eq!(
        path(&nodes, POD1.address, "10.244.120.100")?.2,
        Outcome::Blackhole
    );
    assert_eq!(
        path(&nodes, POD1.address, "10.244.205.200")?.2,
        Outcome::Blackhole
    );

    // One node alone: the VXLAN gateway and the receiver are inferred.
    let inferred = |address: &str| (address.to_owned(), Certainty::Inferred);
    let mut expected = known(&["10.244.120.64"]);
    expected.extend([inferred("10.244.205.192"), inferred(POD2.address)]);
    assert_eq!(
        path(&nodes[..1], POD1.address, POD2.address)?,
        (expected, 1450, Outcome::Left)
    );
    let mut outside = known(&["10.244.120.64"]);
    outside.push(inferred("192.168.49.1"));
    assert_eq!(
        path(&nodes[..1], POD1.address, "8.8.8.8")?,
        (outside, 1500, Outcome::Left)
    );

    let mut text = Vec::new();
    Topology::of(&nodes)?.write_text(&mut text)?;
    let text = String::from_utf8(text)?;
    for line in [
        "10.244.205.192/26  on node",
        "VXLAN via 10.244.205.192 dev vxlan.calico",
        "10.244.120.67 → 10.244.205.193   mtu 1450   VXLAN",
        " 2  10.244.205.192  ",
    ] {
        assert!(text.contains(line), "{line:?} is missing in:\n{text}");
    }
    Ok(())
}

pub(crate) fn doctor_names_what_is_wrong() -> Result<()> {
    let lab = Lab::up()?;
    for setting in [
        "net.ipv4.ip_forward=1",
        &format!("net.ipv4.conf.{}.proxy_arp=1", POD1.interface),
    ] {
        rig::sysctl(&lab.node1, setting)?;
    }
    let findings = |severity: Severity| -> Result<Vec<_>> {
        let node = discover(&[&lab.node1])?.remove(0);
        let found = doctor::check(&node, &Evidence::read(&node)?);
        Ok(found
            .into_iter()
            .filter(|finding| finding.severity == severity)
            .map(|f| f.what)
            .collect())
    };
    assert_eq!(findings(Severity::Problem)?, [""; 0], "nothing is wrong yet");
    let notes = findings(Severity::Note)?;
    for what in [
        "have a larger MTU than the tunnel vxlan.calico (1450)",
        "1 of 1 pods have no known name",
    ] {
        assert!(
            notes.iter().any(|note| note.contains(what)),
            "{what:?} is missing in {notes:#?}"
        );
    }
    assert!(!notes.iter().any(|note| note.contains("rp_filter")), "{notes:#?}");
    rig::sysctl(&lab.node1, "net.ipv4.conf.all.rp_filter=2")?;
    let notes = findings(Severity::Note)?;
    assert!(
        notes
            .iter()
            .any(|note| note.contains("net.ipv4.conf.all.rp_filter=2")),
        "{notes:?}"
    );
    let breaks: [(&str, &dyn Fn() -> Result<()>); 6] = [
        ("IPv4 forwarding is off", &|| {
            rig::sysctl(&lab.node1, "net.ipv4.ip_forward=0")
        }),
        ("Proxy ARP is off on cali8d02ed71817", &|| {
            rig::sysctl(
                &lab.node1,
                &format!("net.ipv4.conf.{}.proxy_arp=0", POD1.interface),
            )
        }),
        ("There is no default route", &|| {
            rig::ip(&lab.node1, "route del default")
        }),
        (
            "has MTU 1480 and adds 50 bytes, but eth0 carries only 1500",
            &|| rig::ip(&lab.node1, "link set vxlan.calico mtu 1480"),
        ),
        ("does not know which node has the gateway 10.244.205.192", &|| {
            rig::ip(&lab.node1, "neigh del 10.244.205.192 dev vxlan.calico")
        }),
        ("through cali8d02ed71817, which is down", &|| {
            rig::ip(&lab.node1, &format!("link set {} down", POD1.interface))
        }),
    ];
    for (what, break_it) in breaks {
        break_it()?;
        let found = findings(Severity::Problem)?;
        assert!(
            found.iter().any(|finding| finding.contains(what)),
            "{what:?} is missing in {found:#?}"
        );
    }
    Ok(())
}
