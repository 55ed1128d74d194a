//! Address translation of each kind that a Calico node does: one trace with its steps for every packet that the sockets
//! counted, in both directions, with the addresses that the sockets at both ends saw.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Lab, Need, Options, Proxy, command,
    lab::{
        UNDERLAY,
        plan::{FLOATING, FLOATING_POD, GATEWAY, NODE_PORTS, OUTSIDE, SERVICE},
    },
    traffic::traceroute::Kind,
};
use serde_json::{Value, json};

use crate::{
    Test,
    counts::segments,
    support::{Watch, arrived, at_interfaces, goes, quiet, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("masquerading_to_the_outside_is_a_nat_step", masquerade).needs(&[Need::Conntrack]),
    test("answers_from_the_outside_are_whole", answers).needs(&[Need::Conntrack]),
    test("answers_from_the_outside_over_ipv6_are_whole", answers_v6).needs(&[Need::Conntrack]),
    test("a_node_port_is_one_trace_from_the_outside", node_port),
    test("a_node_port_of_another_node_is_one_trace", node_port_of_another),
    test("a_pod_that_reaches_itself_through_its_service", hairpin),
    test("a_floating_ip_is_one_trace_with_its_steps", floating_ip),
    test("a_service_by_nftables_is_one_trace", || {
        cluster_ip(Proxy::Nftables)
    })
    .needs(&[Need::Program("nft")]),
    test("a_service_by_ipvs_is_one_trace", || cluster_ip(Proxy::Ipvs)).needs(&[Need::Ipvs]),
];

/// Bytes asked for. From the outside one segment only: its offloads are on, and the last hop would count fewer.
const BODY: usize = 30_000;
const SEGMENT: usize = 1_000;
/// A connection: its ends as the sockets know them, and the traces of what they sent.
struct Connection {
    client: SocketAddr,
    /// What the client asked for.
    asked: SocketAddr,
    /// The client, as the server saw it.
    peer: SocketAddr,
    server: SocketAddr,
    /// From the client, and back.
    traces: [Vec<Value>; 2],
}

/// A step of translation: its kind, its node, and what became of which address.
type Step<'a> = (&'a str, &'a str, SocketAddr, SocketAddr);

/// One HTTP request from a part of the lab to `asked`, answered by a server in another.
fn connect(
    lab: &Lab,
    options: &[&str],
    client: &str,
    asked: SocketAddr,
    (part, port): (&str, u16),
) -> Result<Connection> {
    lab.offloads(false)?;
    let arguments = [&["-o", "json", "--proto", "tcp"], options].concat();
    let watch = Watch::start(&with(lab, &arguments))?;
    let server = lab.http_server(part, port)?;
    let body = if part == UNDERLAY { SEGMENT } else { BODY };
    let said = lab.http_get(client, asked, body)?;
    let served = server.stop()?;
    let address = if part == UNDERLAY {
        OUTSIDE
    } else {
        lab.pod(part)?.address
    };
    let server: SocketAddr = (address, port).into();
    let served = served.first().context("a connection")?;
    let peer = served.peer;
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let packets = watch.stop()?.packets()?;
    let of = |from: SocketAddr, to: SocketAddr| -> Vec<Value> {
        let ends = |packet: &&Value| {
            let flow = &packet["flow"];
            flow["src"] == from.ip().to_string()
                && flow["src_port"] == from.port()
                && flow["dst"] == to.ip().to_string()
                && flow["dst_port"] == to.port()
        };
        packets.iter().filter(ends).cloned().collect()
    };
    let traces = [of(said.local, asked), of(server, peer)];
    let counts = said.segments;
    let resent = counts.retransmitted + served.segments.retransmitted;
    let traced = [traces[0].len(), traces[1].len()];
    segments("there", traced[0] as u64, counts.segments_out, resent)
        .and_then(|()| segments("back", traced[1] as u64, counts.segments_in, resent))
        .with_context(|| format!("{packets:#?}"))?;
    ensure!(
        packets.len() == traced[0] + traced[1],
        "others, too: {packets:#?}"
    );
    Ok(Connection {
        client: said.local,
        asked,
        peer,
        server,
        traces,
    })
}

impl Connection {
    /// Whether all traces have these steps, there and back, and these verdicts.
    fn check(&self, there: &[Step<'_>], back: &[Step<'_>], verdicts: [&str; 2]) -> Result<()> {
        for ((traces, steps), verdict) in self.traces.iter().zip([there, back]).zip(verdicts) {
            let steps: Vec<Value> = steps
                .iter()
                .map(|(kind, node, from, to)| {
                    let end = |end: &SocketAddr| json!({"address": end.ip(), "port": end.port()});
                    json!({"kind": kind, "node": node, "from": end(from), "to": end(to)})
                })
                .collect();
            for trace in traces {
                ensure!(
                    trace["nat"] == Value::from(steps.clone()),
                    "{steps:#?}: {trace:#}"
                );
                let received = verdict == "delivered" && arrived(trace);
                ensure!(received || trace["verdict"] == verdict, "{verdict}: {trace:#}");
            }
        }
        Ok(())
    }

    /// Whether one node translated both ends: the destination to the server, the source to what the server saw.
    fn check_both_ends(&self, node: &str, verdicts: [&str; 2]) -> Result<()> {
        let (client, asked, peer, server) = (self.client, self.asked, self.peer, self.server);
        self.check(
            &[("dnat", node, asked, server), ("snat", node, client, peer)],
            &[("dnat", node, peer, client), ("snat", node, server, asked)],
            verdicts,
        )
    }
}

/// What a pod sends to the outside has its node's address there.
fn masquerade() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let node = lab.node("minikube")?;
    let asked = (OUTSIDE, 8080).into();
    let seen = connect(&lab, &[], "pod1", asked, (UNDERLAY, 8080))?;
    ensure!(seen.peer.ip() == node.address, "the server saw {}", seen.peer);
    seen.check(
        &[("snat", &node.name, seen.client, seen.peer)],
        &[("dnat", &node.name, seen.peer, seen.client)],
        ["left", "delivered"],
    )
}

/// Echo replies, datagrams and ICMP errors that answer what was masqueraded come to the node's address; and what the node
/// itself asks there is none of ours, though it goes to the same place.
fn answers() -> Result<()> {
    const COUNT: u64 = 5;
    let lab = Lab::up(&quiet())?;
    let (node, pod) = (lab.node("minikube")?, lab.pod("pod1")?);
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let server = lab.udp_server(UNDERLAY, 5353, true)?;
    // From several addresses a socket would answer by the nearest.
    let port = (GATEWAY, 5353).into();
    let pings = lab.ping("pod1", OUTSIDE.into(), 5, &[])?;
    let datagrams = lab.udp_exchange("pod1", port, COUNT, 100)?;
    let traceroute = lab.traceroute("pod1", OUTSIDE.into(), Kind::Udp, &[])?;
    ensure!(lab.ping("minikube", OUTSIDE.into(), 5, &[])?.received == 5);
    ensure!(lab.udp_exchange("minikube", port, COUNT, 100)?.received == COUNT);
    server.stop()?;
    let packets = watch.stop()?.packets()?;
    // Only the last line's probes are answered from there.
    let errors = traceroute.hops.last().context("a hop")?.probes.iter().flatten();
    let expected = [
        ("icmp", OUTSIDE, "ICMP echo reply", pings.received),
        ("udp", GATEWAY, "datagram", datagrams.received),
        ("icmp", OUTSIDE, "ICMP error", errors.count() as u64),
    ];
    for (proto, from, what, count) in expected {
        let is_it = |packet: &&Value| {
            let is_error = packet["flow"]["icmp_id"].is_null() && proto == "icmp";
            goes(packet, proto, &from.to_string(), &node.address.to_string())
                && is_error == (what == "ICMP error")
        };
        let of_these: Vec<&Value> = packets.iter().filter(is_it).collect();
        // Traceroute ends at the third error; to the probes that are under way there are answers, too.
        ensure!(
            of_these.len() as u64 == count || (what == "ICMP error" && of_these.len() as u64 > count),
            "{count} {what}, {} traces: {packets:#?}",
            of_these.len()
        );
        for trace in of_these {
            let first = at_interfaces(trace).next().context("an interface")?;
            let step = &trace["nat"][0];
            ensure!(
                trace["verdict"] == "delivered"
                    && first["direction"] == "ingress"
                    && first["interface"] == "eth0"
                    && step["kind"] == "dnat"
                    && step["to"]["address"] == pod.address.to_string()
                    && trace["flow"]["dst_pod"] == *pod.full_name(),
                "{what}: {trace:#}"
            );
        }
    }
    Ok(())
}

/// An IP pool of IPv6 with `natOutgoing`: echo replies and datagrams.
fn answers_v6() -> Result<()> {
    const COUNT: u64 = 5;
    let lab = Lab::up(&Options::default())?;
    let (node, pod) = (lab.node("minikube")?, lab.pod("pod1")?);
    let outside = node.gateway_v6();
    let rule = format!(
        "*nat\n-A POSTROUTING -s {} -o eth0 -j MASQUERADE\nCOMMIT\n",
        pod.address_v6
    );
    let mut load = lab.exec("minikube", ["ip6tables-nft-restore", "--noflush", "-w", "10"])?;
    command::run_with_input(&mut load, &rule)?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let server = lab.udp_server(UNDERLAY, 5353, true)?;
    let pings = lab.ping("pod1", outside.into(), 5, &[])?;
    let datagrams = lab.udp_exchange("pod1", (outside, 5353).into(), COUNT, 100)?;
    server.stop()?;
    let packets = watch.stop()?.packets()?;
    for (proto, count) in [("icmpv6", pings.received), ("udp", datagrams.received)] {
        let is_it = |packet: &&Value| goes(packet, proto, &outside.to_string(), &node.address_v6.to_string());
        let of_these: Vec<&Value> = packets.iter().filter(is_it).collect();
        ensure!(
            count == 5 && of_these.len() as u64 == count,
            "{count} of {proto}: {packets:#?}"
        );
        for trace in of_these {
            let first = at_interfaces(trace).next().context("an interface")?;
            ensure!(
                trace["verdict"] == "delivered"
                    && first["interface"] == "eth0"
                    && trace["nat"][0]["to"]["address"] == pod.address_v6.to_string(),
                "{trace:#}"
            );
        }
    }
    Ok(())
}

/// From the outside by a node that the pod is not on: kube-proxy makes it the node's own, or the pod would answer past it.
fn node_port() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let node = lab.node("minikube")?;
    let asked = (node.address, NODE_PORTS[0]).into();
    let seen = connect(&lab, &[], UNDERLAY, asked, ("pod2", 8080))?;
    ensure!(
        seen.peer.ip() == node.tunnel_address,
        "the server saw {}",
        seen.peer
    );
    seen.check_both_ends(&node.name, ["delivered", "left"])
}

/// From a pod by another node's port: masqueraded on the way there, and translated twice there.
fn node_port_of_another() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let [one, two] = ["minikube", "minikube-m02"].map(|name| lab.node(name));
    let (one, two) = (one?, two?);
    let asked = (two.address, NODE_PORTS[0]).into();
    let seen = connect(&lab, &[], "pod1", asked, ("pod2", 8080))?;
    ensure!(
        seen.peer.ip() == two.tunnel_address,
        "the server saw {}",
        seen.peer
    );
    let Connection {
        client, peer, server, ..
    } = seen;
    // The first one keeps the port, as nobody else of that node has it.
    let between = SocketAddr::new(one.address.into(), client.port());
    seen.check(
        &[
            ("snat", &one.name, client, between),
            ("dnat", &two.name, asked, server),
            ("snat", &two.name, between, peer),
        ],
        &[
            ("dnat", &two.name, peer, between),
            ("snat", &two.name, server, asked),
            ("dnat", &one.name, between, client),
        ],
        ["delivered", "delivered"],
    )
}

/// Under its own address a pod would answer itself past its node: kube-proxy masquerades it.
fn hairpin() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let node = lab.node("minikube-m02")?;
    let seen = connect(&lab, &[], "pod2", (SERVICE, 80).into(), ("pod2", 8080))?;
    ensure!(
        seen.peer.ip() == node.tunnel_address,
        "the server saw {}",
        seen.peer
    );
    seen.check_both_ends(&node.name, ["delivered", "delivered"])?;
    for trace in seen.traces.iter().flatten() {
        let name = lab.pod("pod2")?.full_name();
        ensure!(
            trace["flow"]["src_pod"] == *name && trace["flow"]["dst_pod"] == *name,
            "{trace:#}"
        );
    }
    Ok(())
}

/// From the outside, where it keeps the sender's address, and from the pod itself, where it takes on its own.
fn floating_ip() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let node = lab.node("minikube-m02")?.name;
    let asked = (FLOATING, 8080).into();
    let outside = connect(&lab, &[], UNDERLAY, asked, (FLOATING_POD, 8080))?;
    ensure!(outside.peer == outside.client, "the server saw {}", outside.peer);
    outside.check(
        &[("dnat", &node, asked, outside.server)],
        &[("snat", &node, outside.server, asked)],
        ["delivered", "left"],
    )?;
    let itself = connect(&lab, &[], FLOATING_POD, asked, (FLOATING_POD, 8080))?;
    ensure!(itself.peer.ip() == FLOATING, "the server saw {}", itself.peer);
    itself.check_both_ends(&node, ["delivered", "delivered"])
}

fn cluster_ip(proxy: Proxy) -> Result<()> {
    let lab = Lab::up(&Options { proxy, ..quiet() })?;
    let asked = (SERVICE, 80).into();
    // From the other node, and on the same one.
    for (client, node) in [("pod1", "minikube"), ("pod4", "minikube-m02")] {
        let seen = connect(&lab, &[], client, asked, ("pod2", 8080))?;
        ensure!(seen.peer == seen.client, "the server saw {}", seen.peer);
        seen.check(
            &[("dnat", node, asked, seen.server)],
            &[("snat", node, seen.server, asked)],
            ["delivered", "delivered"],
        )?;
    }
    Ok(())
}
