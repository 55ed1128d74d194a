//! `topology --from --to`: the path it expects is the one that traceroute prints, the largest packet it names passes and one
//! byte more does not, and what it cannot tell it says.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    DeviceOrder, Encapsulation, Lab, Need, Options, Proxy, command,
    lab::{
        netfilter::Backend,
        plan::{OUTSIDE, SERVICE},
    },
    traffic::traceroute::Kind,
};
use serde_json::Value;

use crate::{
    Test,
    support::{IPIP, WIREGUARD, only, quiet, run},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("topology_from_to_is_what_traceroute_prints", || {
        hops(Encapsulation::Vxlan)?;
        hops(Encapsulation::None)
    }),
    test("topology_from_to_over_tunl0_is_what_traceroute_prints", || {
        hops(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test(
        "topology_from_to_over_wireguard_is_what_traceroute_prints",
        || hops(Encapsulation::Wireguard),
    )
    .needs(WIREGUARD),
    test("topology_from_to_over_ipv6_and_a_router", routed),
    test("topology_from_to_of_one_node_alone", alone),
    test("topology_from_to_names_the_largest_packet", || {
        largest(Encapsulation::Vxlan)?;
        largest(Encapsulation::None)
    }),
    test("topology_from_to_names_the_largest_packet_over_tunl0", || {
        largest(Encapsulation::Ipip)
    })
    .needs(IPIP),
    test("topology_from_to_a_service", service),
    test("topology_from_to_outside_is_masqueraded_or_not", || {
        outside(Backend::Any)
    })
    .needs(&[Need::Program("conntrack")]),
    test("topology_from_to_outside_knows_nftables", || {
        outside(Backend::Native)
    })
    .needs(&[Need::Program("conntrack"), Need::Program("nft")]),
    test("topology_from_to_tells_what_is_not_there", errors),
];

/// `topology` between two places of a lab, seen on these nodes, as JSON.
fn between(lab: &Lab, nodes: &[&str], from: &str, to: &str) -> Result<Vec<Value>> {
    let mut words: Vec<String> = ["topology", "-o", "json", "--from", from, "--to", to]
        .map(str::to_owned)
        .to_vec();
    words.extend(only(lab, nodes));
    let finished = run(&words)?;
    ensure!(finished.status.success(), "{}", finished.stderr);
    let told: Value = serde_json::from_str(&finished.stdout).context("topology's JSON")?;
    let paths = told["paths"].as_array().context("paths")?.clone();
    for path in &paths {
        ensure!(path["from"]["node"].is_string(), "{path:#}");
    }
    Ok(paths)
}

/// Its text.
fn text(lab: &Lab, from: &str, to: &str) -> Result<String> {
    let mut words: Vec<String> = ["topology", "--from", from, "--to", to]
        .map(str::to_owned)
        .to_vec();
    words.extend(only(lab, &[]));
    let finished = run(&words)?;
    ensure!(finished.status.success(), "{}", finished.stderr);
    Ok(finished.stdout)
}

fn addresses(path: &Value) -> Vec<String> {
    let hops = path["hops"].as_array().map(Vec::as_slice).unwrap_or_default();
    hops.iter()
        .map(|hop| hop["address"].as_str().unwrap_or("*").to_owned())
        .collect()
}

/// `device` of a node, `pod:device` of a pod.
fn devices(path: &Value) -> Vec<String> {
    let devices = path["devices"].as_array().map(Vec::as_slice).unwrap_or_default();
    let name = |device: &Value| {
        let name = device["device"].as_str().unwrap_or_default();
        match device["pod"].as_str() {
            Some(pod) => format!("{pod}:{name}"),
            None => name.to_owned(),
        }
    };
    devices.iter().map(name).collect()
}

fn hops(encapsulation: Encapsulation) -> Result<()> {
    for order in [DeviceOrder::TunnelFirst, DeviceOrder::UplinkFirst] {
        let lab = Lab::up(&Options {
            encapsulation,
            order,
            ..quiet()
        })?;
        for (from, to) in [("pod1", "pod2"), ("pod2", "pod1"), ("pod1", "pod3")] {
            let (sender, receiver) = (lab.pod(from)?, lab.pod(to)?);
            let said = lab.traceroute(from, receiver.ip(), Kind::Udp, &[])?.path();
            let by_name = between(&lab, &[], &sender.full_name(), &receiver.full_name())?;
            let by_address = between(
                &lab,
                &[],
                &sender.address.to_string(),
                &receiver.address.to_string(),
            )?;
            ensure!(
                by_name.len() == 1 && by_name == by_address,
                "{by_name:#?}\n{by_address:#?}"
            );
            let path = &by_name[0];
            ensure!(
                addresses(path) == said,
                "{order:?} {from} to {to}: {path:#}, traceroute {said:?}"
            );
            ensure!(path["outcome"] == "delivered", "{path:#}");
            let mut expected = vec![format!("{}:eth0", sender.full_name()), sender.interface.clone()];
            if sender.node != receiver.node {
                let tunnel = encapsulation.device();
                expected.extend(tunnel.map(str::to_owned));
                expected.extend(["eth0", "eth0"].map(str::to_owned));
                expected.extend(tunnel.map(str::to_owned));
            }
            expected.extend([
                receiver.interface.clone(),
                format!("{}:eth0", receiver.full_name()),
            ]);
            ensure!(devices(path) == expected, "{expected:?}: {path:#}");
            if let Some(tunnel) = encapsulation.device().filter(|_| sender.node != receiver.node) {
                let wraps = path["devices"]
                    .as_array()
                    .and_then(|devices| devices.iter().find(|device| device["encap"].is_object()))
                    .with_context(|| format!("{path:#}"))?;
                let node = |name: &str| lab.node(name).map(|node| node.address.to_string());
                ensure!(
                    wraps["device"] == tunnel
                        && wraps["encap"]["src"] == node(&sender.node)?.as_str()
                        && wraps["encap"]["dst"] == node(&receiver.node)?.as_str(),
                    "{wraps:#}"
                );
            }
            let told = text(&lab, &sender.full_name(), &receiver.full_name())?;
            let lines: Vec<&str> = told
                .lines()
                .filter(|line| line.starts_with(|first: char| first == ' ' || first.is_ascii_digit()))
                .filter_map(|line| {
                    let mut words = line.split_whitespace();
                    words.next()?.parse::<u8>().ok()?;
                    words.next()
                })
                .collect();
            ensure!(lines == said, "{told}");
        }
    }
    Ok(())
}

/// Over both address families, and with a router between the nodes, which without encapsulation is a hop of its own.
fn routed() -> Result<()> {
    for (encapsulation, routed) in [
        (Encapsulation::None, false),
        (Encapsulation::None, true),
        (Encapsulation::Vxlan, true),
    ] {
        let lab = Lab::up(&Options {
            encapsulation,
            routed,
            ..Options::default()
        })?;
        let (from, to) = (lab.pod("pod1")?, lab.pod("pod2")?);
        let paths = between(&lab, &[], &from.full_name(), &to.full_name())?;
        ensure!(paths.len() == 2, "one for each family: {paths:#?}");
        let receivers: [IpAddr; 2] = [to.address.into(), to.address_v6.into()];
        for (path, receiver) in paths.iter().zip(receivers) {
            let said = lab.traceroute("pod1", receiver, Kind::Udp, &[])?.path();
            ensure!(
                addresses(path) == said && path["outcome"] == "delivered",
                "{encapsulation:?} {routed}: {path:#}, traceroute {said:?}"
            );
        }
        // Without the route to its block, a pod's address is one of those beyond the default gateway, which knows it not.
        let block = lab.node(&to.node)?.block;
        lab.namespace(&from.node)?.ip(&format!("route del {block}\n"))?;
        let path = &between(&lab, &[], &from.full_name(), &to.address.to_string())?[0];
        ensure!(path["outcome"] == "left", "{path:#}");
    }
    Ok(())
}

/// The other node is not looked at: its part is inferred from routes, and that is said.
fn alone() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let to = lab.pod("pod2")?.address.to_string();
    let from = lab.pod("pod1")?.full_name();
    let path = &between(&lab, &["minikube"], &from, &to)?[0];
    let said = lab.traceroute("pod1", to.parse()?, Kind::Udp, &[])?.path();
    ensure!(addresses(path) == said, "{path:#}, traceroute {said:?}");
    let certainty: Vec<&Value> = path["hops"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|hop| &hop["certainty"])
        .collect();
    ensure!(certainty == ["known", "inferred", "inferred"], "{path:#}");
    ensure!(path["outcome"] == "left" && path["mtu"] == 1450, "{path:#}");
    ensure!(
        path["not_seen"].as_array().is_some_and(|lines| lines
            .iter()
            .any(|line| line.as_str().is_some_and(|line| line.contains("beyond minikube")))),
        "{path:#}"
    );
    Ok(())
}

/// Whether an echo request of so many bytes passes whole and is answered. A node may learn only from the first one what
/// is too large, so three are sent, and the last one counts.
fn passes(lab: &Lab, to: IpAddr, size: u64) -> Result<bool> {
    let payload = (size - 28).to_string();
    let said = lab.ping("pod1", to, 3, &["-M", "do", "-s", &payload])?;
    Ok(said.replies.iter().any(|(sequence, ..)| *sequence == 3))
}

fn largest(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        ..quiet()
    })?;
    let pod1 = lab.pod("pod1")?;
    let node = lab.namespace(&pod1.node)?;
    // One after the other; each lowers what the one before left, or does nothing to it.
    let overhead = u64::from(1500 - encapsulation.mtu());
    let both_ends = |mtu: u32| -> Result<()> {
        node.ip(&format!("link set {} mtu {mtu}\n", pod1.interface))?;
        lab.namespace("pod1")?.ip(&format!("link set eth0 mtu {mtu}\n"))
    };
    let check = |to: &str, expected: u64, what: &str| -> Result<()> {
        let receiver = lab.pod(to)?;
        let path = &between(&lab, &[], &pod1.full_name(), &receiver.full_name())?[0];
        let mtu = path["mtu"].as_u64().context("an MTU")?;
        ensure!(mtu == expected, "{what} to {to}: {expected} in {path:#}");
        // What was learned before does not count.
        for part in ["pod1", &pod1.node] {
            command::run(&mut lab.exec(part, ["ip", "route", "flush", "cache"])?)?;
        }
        ensure!(
            passes(&lab, receiver.ip(), mtu)?,
            "{what} to {to}: {mtu} bytes do not pass"
        );
        ensure!(
            !passes(&lab, receiver.ip(), mtu + 1)?,
            "{what} to {to}: {} bytes pass",
            mtu + 1
        );
        let told = text(&lab, &pod1.full_name(), &receiver.full_name())?;
        ensure!(
            told.contains(&format!(
                "largest packet that passes whole: {mtu} bytes (ping -M do -s {})",
                mtu - 28
            )),
            "{told}"
        );
        Ok(())
    };
    let usual = u64::from(encapsulation.mtu());
    check("pod2", usual, "as it is")?;
    check("pod3", usual, "as it is")?;
    both_ends(1500)?;
    lab.namespace("pod2")?.ip("link set eth0 mtu 1500\n")?;
    check("pod2", usual, "with larger pods")?;
    for name in ["minikube", "minikube-m02"] {
        lab.namespace(name)?.ip("link set eth0 mtu 1400\n")?;
    }
    let carried = match encapsulation {
        // Outer packets are fragmented.
        Encapsulation::Vxlan | Encapsulation::Wireguard => usual,
        Encapsulation::None | Encapsulation::Ipip => 1400 - overhead,
    };
    check("pod2", carried, "with small uplinks")?;
    let path = &between(&lab, &[], &pod1.full_name(), &lab.pod("pod2")?.full_name())?[0];
    ensure!(path["unfragmented"] == 1400 - overhead, "{path:#}");
    both_ends(1300)?;
    check("pod2", 1300, "with small pods")?;
    check("pod3", 1300, "with small pods")
}

/// A service's address stands for the pod behind it, if the rules say so.
fn service() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let from = lab.pod("pod1")?.full_name();
    let paths = between(&lab, &[], &from, &SERVICE.to_string())?;
    ensure!(paths.len() == 1, "{paths:#?}");
    let path = &paths[0];
    let behind = lab.pod("pod2")?;
    let _server = lab.http_server("pod2", 8080)?;
    let said = lab.traceroute("pod1", SERVICE.into(), Kind::Tcp(80), &[])?.path();
    // The routers' answers are translated, too: all lines show the service.
    ensure!(
        said.len() == addresses(path).len() && said.iter().all(|address| *address == SERVICE.to_string()),
        "{path:#}, traceroute {said:?}"
    );
    ensure!(addresses(path).last() == said.last(), "{path:#}");
    let direct = &between(&lab, &[], &from, &behind.full_name())?[0];
    ensure!(
        path["hops"][0] == direct["hops"][0] && path["hops"][1] == direct["hops"][1],
        "{path:#}"
    );
    ensure!(
        path["to"]["pod"] == behind.full_name().as_str()
            && path["service"]["address"] == SERVICE.to_string().as_str()
            && path["service"]["ports"][0]["port"] == 80
            && path["service"]["ports"][0]["target"] == 8080
            && path["masquerade"].is_null(),
        "{path:#}"
    );
    let itself = &between(&lab, &[], &behind.full_name(), &SERVICE.to_string())?[0];
    let said = lab.traceroute("pod2", SERVICE.into(), Kind::Tcp(80), &[])?.path();
    ensure!(
        said.len() == addresses(itself).len() && itself["outcome"] == "delivered",
        "{itself:#}, traceroute {said:?}"
    );
    drop(lab);
    // Kube-proxy keeps it in a table of its own.
    let lab = Lab::up(&Options {
        proxy: Proxy::Nftables,
        ..quiet()
    })?;
    let said = refused(&lab, &from, &SERVICE.to_string())?;
    ensure!(
        said.contains("no iptables rule of this node says what is behind it"),
        "{said}"
    );
    Ok(())
}

/// What the node makes of the source is what conntrack keeps.
fn outside(netfilter: Backend) -> Result<()> {
    let lab = Lab::up(&Options { netfilter, ..quiet() })?;
    let pod = lab.pod("pod1")?;
    let node = lab.node(&pod.node)?.address.to_string();
    // A node's own address is outside of the pools, and is reached without the tunnel.
    let there = lab.node("minikube-m02")?.address;
    let path = &between(&lab, &[], &pod.full_name(), &there.to_string())?[0];
    let said = lab.traceroute("pod1", there.into(), Kind::Udp, &[])?.path();
    ensure!(addresses(path) == said, "{path:#}, traceroute {said:?}");
    let expected = [
        &format!("{}:eth0", pod.full_name()),
        &pod.interface,
        "eth0",
        "eth0",
    ];
    ensure!(devices(path) == expected && path["encap"].is_null(), "{path:#}");
    for masquerades in [true, false] {
        if !masquerades {
            // One of them has the chain.
            let flushed = [
                "iptables-legacy -w 10 -t nat -F cali-nat-outgoing",
                "iptables-nft -w 10 -t nat -F cali-nat-outgoing",
                "nft flush chain ip calico nat-cali-nat-outgoing",
            ]
            .map(|words| -> Result<bool> {
                Ok(command::output(&mut lab.exec(&pod.node, words.split(' '))?)?
                    .status
                    .success())
            });
            ensure!(
                flushed.into_iter().filter_map(Result::ok).any(|done| done),
                "no chain was there"
            );
            command::run(&mut lab.exec(&pod.node, ["conntrack", "-F"])?)?;
        }
        let path = &between(&lab, &[], &pod.full_name(), &OUTSIDE.to_string())?[0];
        lab.ping("pod1", OUTSIDE.into(), 1, &[])?;
        let kept = command::run(&mut lab.exec(&pod.node, ["conntrack", "-L", "-d", &OUTSIDE.to_string()])?)?;
        let kept = command::text(&kept);
        let source = if masquerades {
            node.clone()
        } else {
            pod.address.to_string()
        };
        ensure!(kept.contains(&format!("src={OUTSIDE} dst={source} ")), "{kept}");
        ensure!(path["masquerade"]["applies"] == masquerades, "{path:#}");
        ensure!(
            path["masquerade"]["address"].as_str() == masquerades.then_some(node.as_str()),
            "{path:#}"
        );
        ensure!(path["outcome"] == "left", "{path:#}");
    }
    // Between pods of the pool nothing is translated.
    let path = &between(&lab, &[], &pod.full_name(), &lab.pod("pod2")?.full_name())?[0];
    ensure!(path["masquerade"]["applies"] == false, "{path:#}");
    Ok(())
}

/// What an end that is none is told.
fn refused(lab: &Lab, from: &str, to: &str) -> Result<String> {
    let mut words: Vec<String> = ["topology", "--from", from, "--to", to]
        .map(str::to_owned)
        .to_vec();
    words.extend(only(lab, &[]));
    let finished = run(&words)?;
    ensure!(
        finished.status.code() == Some(1) && finished.stdout.is_empty(),
        "{finished:?}"
    );
    Ok(finished.stderr)
}

fn errors() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let (pod1, pod2) = (lab.pod("pod1")?.full_name(), lab.pod("pod2")?.full_name());
    let mut mistyped = pod2.clone();
    mistyped.pop();
    let said = refused(&lab, &pod1, &mistyped)?;
    ensure!(
        said.contains(&format!("no pod {mistyped} is known")) && said.contains(&format!("there is {pod2}")),
        "{said}"
    );
    let said = refused(&lab, "192.0.2.1", &pod2)?;
    ensure!(said.contains("has the address 192.0.2.1"), "{said}");
    let said = refused(&lab, &pod1, "fd00::1")?;
    ensure!(said.contains("no address family in common"), "{said}");
    let said = refused(&lab, &pod1, &pod1)?;
    ensure!(said.contains("does not leave the pod"), "{said}");
    // Another lab has pods of the same names and addresses.
    let twin = Lab::up(&quiet())?;
    let mut words: Vec<String> = ["topology", "--from", &pod1, "--to", &pod2]
        .map(str::to_owned)
        .to_vec();
    words.extend(only(&lab, &[]));
    let one = run(&words)?;
    ensure!(one.status.success(), "{one:?}");
    words.extend(only(&twin, &[]));
    let two = run(&words)?;
    ensure!(
        two.status.code() == Some(1) && two.stderr.contains(&format!("{pod1} is more than one pod")),
        "{two:?}"
    );
    let path = &between(
        &lab,
        &[],
        &pod1,
        &lab.node("minikube-m02")?.unused_address.to_string(),
    )?[0];
    ensure!(path["outcome"] == "blackhole", "{path:#}");
    Ok(())
}
