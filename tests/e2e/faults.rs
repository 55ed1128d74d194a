//! Faults of nodes and of what lies between them, each made for real, and beside each its twin without: the same packets arrive.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Encapsulation, Lab, Need, Options, command,
    lab::{UNDERLAY, netfilter::Backend},
    needs::has_drop_reasons,
};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, at_interfaces, change_nftables, change_rules, goes, with},
    test,
    traced::{POD1, POD2, all, culprit, datagrams, lab, ping, raw_socket, says, traced},
};

pub(crate) const TESTS: &[Test] = &[
    test("a_packet_that_conntrack_calls_invalid", invalid),
    test("a_tunnel_packet_of_a_stranger", || stranger(Encapsulation::Vxlan)),
    test("a_tunl0_packet_of_a_stranger", || stranger(Encapsulation::Ipip))
        .needs(&[Need::Encapsulation(Encapsulation::Ipip)]),
    test("a_route_that_leads_nowhere", unreachable),
    test("a_source_that_the_kernel_filters", reverse_path),
    test("a_queue_that_is_full", queue),
    test("a_packet_lost_between_two_nodes", lost),
    test("a_packet_too_large_for_the_next_node", too_large),
    test("an_outer_packet_that_is_cut_is_one_trace", cut),
    test("a_checksum_that_is_wrong", bad_checksum),
    test("a_tunnel_s_checksum_that_is_wrong", bad_outer_checksum),
    test("a_path_mtu_that_nobody_is_told", black_hole),
    test("a_path_mtu_that_is_told_and_never_heard", unheard),
];

const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);

/// An answer to nothing. The twin is a question.
fn invalid() -> Result<()> {
    let lab = lab()?;
    let (traces, _) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "delivered")?;
    let (traces, text) = traced(&lab, "icmp", POD1, |lab| {
        // Echo reply, number 1 of 4711; the checksum is the complement of the words' sum (RFC 792).
        let mut message = [0, 0, 0, 0, 0x12, 0x67, 0, 1];
        message[2..4].copy_from_slice(&(!0x1268_u16).to_be_bytes());
        let socket = lab.namespace("pod1")?.within(|| raw_socket(libc::IPPROTO_ICMP))?;
        socket
            .send_to(&message, SocketAddr::from((POD2, 0)))
            .context("send an echo reply")?;
        Ok(())
    })?;
    all(&traces, "dropped")?;
    culprit(&traces[0], "minikube", "invalid")?;
    says(
        &text,
        "✗ dropped on node minikube at cali8d02ed71817, before vxlan.calico: conntrack calls the packet INVALID",
    )
}

/// A question whose checksum is wrong: nothing but a broken packet is invalid that may begin a connection. The twin has the
/// right one.
fn bad_checksum() -> Result<()> {
    let lab = lab()?;
    // Echo request, number 1 of 4711 (RFC 792).
    let ask = |lab: &Lab, checksum: u16| {
        let mut message = [8, 0, 0, 0, 0x12, 0x67, 0, 1];
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        let socket = lab.namespace("pod1")?.within(|| raw_socket(libc::IPPROTO_ICMP))?;
        socket
            .send_to(&message, SocketAddr::from((POD2, 0)))
            .context("send an echo request")?;
        Ok(())
    };
    let (traces, _) = traced(&lab, "icmp", POD1, |lab| ask(lab, !(0x0800 + 0x1268)))?;
    all(&traces, "delivered")?;
    let (traces, text) = traced(&lab, "icmp", POD1, |lab| ask(lab, 0xbad))?;
    all(&traces, "dropped")?;
    culprit(&traces[0], "minikube", "broken")?;
    says(
        &text,
        "✗ dropped on node minikube at cali8d02ed71817, before vxlan.calico: no rule but the one for INVALID: conntrack finds \
         its checksum or header broken",
    )
}

/// VXLAN whose outer checksum is wrong, as some NICs' drivers and double translation leave it (`kubernetes/kubernetes#88986`):
/// the receiver drops it before it is unwrapped, and the pod's trace says so.
fn bad_outer_checksum() -> Result<()> {
    let lab = lab()?;
    // Where the NIC is to compute it, veths leave it out.
    lab.offloads(false)?;
    let (traces, _) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "delivered")?;
    change_nftables(
        &lab,
        "minikube",
        "table ip broken {\n chain post {\n  type filter hook postrouting priority 300;\n  udp dport 4789 @th,48,16 set 0xbad\n }\n}\n",
    )?;
    let (traces, text) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "dropped")?;
    for trace in &traces {
        ensure!(
            trace["drop"]["node"] == "minikube-m02" && trace["drop"]["culprits"] == serde_json::json!([]),
            "{trace:#}"
        );
    }
    if has_drop_reasons() {
        says(
            &text,
            "✗ dropped on node minikube-m02 at eth0: bad checksum, UDP_CSUM",
        )?;
    }
    Ok(())
}

/// A node that Felix does not know on another one: the outer packet is dropped there, and the trace is the pod's.
fn stranger(encapsulation: Encapsulation) -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation,
        netfilter: Backend::Nft,
        ipv6: false,
        ..Options::default()
    })?;
    let (packets, name) = match encapsulation {
        Encapsulation::Ipip => ("-p 4", "IPIP"),
        _ => ("-p udp -m udp --dport 4789", "IPv4 VXLAN"),
    };
    let (traces, _) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "delivered")?;
    change_rules(
        &lab,
        "minikube-m02",
        &format!(
            "*filter\n-D cali-INPUT {packets} -m comment --comment \"Allow {name} packets from allowed hosts\" \
             -s 192.168.49.2/32 -m addrtype --dst-type LOCAL -j ACCEPT\nCOMMIT\n"
        ),
    )?;
    let (traces, text) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "dropped")?;
    for trace in &traces {
        culprit(trace, "minikube-m02", "unknown_tunnel_peer")?;
    }
    says(
        &text,
        "✗ dropped on node minikube-m02 at eth0: encapsulated by a host that is not known as a node of the cluster",
    )
}

/// A node told so by a route. The twin has the usual one.
fn unreachable() -> Result<()> {
    let lab = lab()?;
    let (traces, _) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "delivered")?;
    lab.namespace("minikube")?
        .ip(&format!("route add unreachable {POD2}/32\n"))?;
    // At most one a second is answered where the lab has no other limit: that sets back this one (`ip_error`, `net/ipv4/route.c`,
    // and `inet_peer_xrlim_allow`, `net/ipv4/inetpeer.c`, 5.10 and 6.1).
    let (traces, text) = traced(&lab, "icmp", POD1, |lab| {
        lab.ping("pod1", POD2.into(), 3, &["-i", "1.2"]).map(drop)
    })?;
    all(&traces, "rejected")?;
    for trace in &traces {
        let (drop, answer) = (&trace["drop"], &trace["answer"]);
        // ICMP host unreachable (RFC 792).
        ensure!(
            answer["icmp"] == serde_json::json!([3, 1]) && answer["address"] == "10.244.120.64",
            "{trace:#}"
        );
        ensure!(
            drop["node"] == "minikube" && drop["route"]["kind"] == "unreachable",
            "{trace:#}"
        );
    }
    let reason = if has_drop_reasons() {
        "NOT_SPECIFIED at ip_error"
    } else {
        "at ip_error"
    };
    says(
        &text,
        &format!(
            "✗ rejected on node minikube at cali8d02ed71817: the unreachable route {POD2}/32, {reason}; 10.244.120.64 sent ICMP \
             host unreachable to {POD1}"
        ),
    )
}

/// The kernel's own filter, where netfilter's does not look.
fn reverse_path() -> Result<()> {
    let lab = lab()?;
    lab.namespace("pod1")?
        .ip(&format!("address add {ELSEWHERE}/32 dev eth0\n"))?;
    // The other node filters, too, and has a route there.
    lab.namespace("minikube-m02")?.ip(&format!(
        "route add {ELSEWHERE}/32 via 10.244.120.64 dev vxlan.calico onlink\n"
    ))?;
    change_rules(&lab, "minikube", "*raw\n-F cali-PREROUTING\nCOMMIT\n")?;
    let interface = lab.pod("pod1")?.interface;
    let filter = |value: &'static str| {
        // The larger of the two counts (`IN_DEV_RPFILTER`, include/linux/inetdevice.h).
        let names = ["all", &interface].map(|scope| (format!("net/ipv4/conf/{scope}/rp_filter"), "0"));
        let node = lab.namespace("minikube")?;
        node.sysctls(names)?;
        node.sysctls([(format!("net/ipv4/conf/{interface}/rp_filter"), value)])
    };
    filter("0")?;
    let (traces, _) = traced(&lab, "udp", ELSEWHERE, |lab| datagrams(lab, ELSEWHERE, 2))?;
    all(&traces, "delivered")?;
    filter("1")?;
    let (traces, _) = traced(&lab, "udp", POD1, |lab| datagrams(lab, POD1, 2))?;
    all(&traces, "delivered")?;
    let (traces, text) = traced(&lab, "udp", ELSEWHERE, |lab| datagrams(lab, ELSEWHERE, 2))?;
    all(&traces, "dropped")?;
    for trace in &traces {
        let drop = &trace["drop"];
        let reason = has_drop_reasons().then_some("IP_RPFILTER");
        ensure!(
            drop["node"] == "minikube" && drop["interface"] == *interface,
            "{trace:#}"
        );
        ensure!(drop["reason"].as_str() == reason, "{trace:#}");
    }
    if has_drop_reasons() {
        says(
            &text,
            "✗ dropped on node minikube at cali8d02ed71817: reverse path filter, IP_RPFILTER",
        )?;
    }
    Ok(())
}

/// More than the uplink's queue holds; what it holds arrives.
fn queue() -> Result<()> {
    const COUNT: u32 = 200;
    let lab = lab()?;
    let (traces, _) = traced(&lab, "udp", POD1, |lab| datagrams(lab, POD1, COUNT))?;
    all(&traces, "delivered")?;
    let shape = "tc qdisc add dev eth0 root tbf rate 1mbit burst 4000 limit 20000";
    command::run(&mut lab.exec("minikube", shape.split(' '))?)?;
    let (traces, _) = traced(&lab, "udp", POD1, |lab| datagrams(lab, POD1, COUNT))?;
    ensure!(traces.len() == COUNT as usize, "{} traces", traces.len());
    let mut show = lab.exec("minikube", ["tc", "-s", "qdisc", "show", "dev", "eth0"])?;
    let counters = command::text(&command::run(&mut show)?);
    // ` Sent 23826 bytes 21 pkt (dropped 179, overlimits 200 requeues 0)`
    let dropped = counters
        .split("(dropped ")
        .nth(1)
        .and_then(|rest| rest.split(',').next());
    let dropped: usize = dropped.context("a counter of drops")?.parse()?;
    let at = |verdict: &str| traces.iter().filter(|trace| trace["verdict"] == verdict).count();
    ensure!(
        dropped > 0 && at("dropped") == dropped && at("delivered") == COUNT as usize - dropped,
        "{} dropped, {} delivered: {counters}",
        at("dropped"),
        at("delivered")
    );
    for trace in traces.iter().filter(|trace| trace["verdict"] == "dropped") {
        let drop = &trace["drop"];
        let reason = drop["reason"].as_str();
        ensure!(
            drop["node"] == "minikube" && drop["interface"] == "eth0",
            "{trace:#}"
        );
        // Later kernels have reasons for qdiscs.
        ensure!(
            reason.is_none_or(|reason| reason.starts_with("QDISC") || reason == "NOT_SPECIFIED"),
            "{trace:#}"
        );
    }
    Ok(())
}

/// What lies between the nodes drops it, and is not looked at.
fn lost() -> Result<()> {
    let lab = lab()?;
    let (traces, _) = traced(&lab, "icmp", POD1, ping)?;
    all(&traces, "delivered")?;
    let cut = "link set minikube-m02 nomaster\n";
    lab.namespace(UNDERLAY)?.ip(cut)?;
    // The neighbour is known, and stays so.
    let (traces, text) = traced(&lab, "icmp", POD1, |lab| {
        ping(lab)?;
        // So long it may be under way, and the hooks are in place.
        std::thread::sleep(Duration::from_secs(4));
        Ok(())
    })?;
    all(&traces, "lost")?;
    for trace in &traces {
        let lost = &trace["lost"];
        ensure!(
            lost["node"] == "minikube" && lost["interface"] == "eth0" && lost["next_node"] == "minikube-m02",
            "{trace:#}"
        );
    }
    says(&text, "✗ lost between minikube eth0 (sent ")
}

/// The next node's uplink takes less than was sent to it, and drops the rest where no hook is. The twin fits.
fn too_large() -> Result<()> {
    let lab = lab()?;
    let send = |lab: &Lab| {
        datagrams(lab, POD1, 3)?;
        // So long they may be under way, and the hooks are in place.
        std::thread::sleep(Duration::from_secs(4));
        Ok(())
    };
    let (traces, _) = traced(&lab, "udp", POD1, send)?;
    all(&traces, "delivered")?;
    lab.namespace("minikube-m02")?.ip("link set eth0 mtu 1000\n")?;
    let (traces, text) = traced(&lab, "udp", POD1, send)?;
    all(&traces, "lost")?;
    for trace in &traces {
        // 1000 bytes of data, headers of UDP and IPv4 (28), and VXLAN's (50).
        let expected = serde_json::json!({"interface": "eth0", "mtu": 1000, "length": 1078});
        ensure!(trace["lost"]["too_large"] == expected, "{trace:#}");
    }
    says(&text, "✗ lost between minikube eth0 (sent ")?;
    ensure!(
        text.contains(
            "VXLAN (UDP) is larger (1078 bytes) than the MTU of 1000 of its eth0, filtered on the way"
        ),
        "{text}"
    );
    Ok(())
}

/// The sender's uplink takes less: the node cuts the outer packet, and each datagram is still one.
fn cut() -> Result<()> {
    const COUNT: u32 = 3;
    let lab = lab()?;
    lab.namespace("minikube")?.ip("link set eth0 mtu 1000\n")?;
    let watch = Watch::start(&with(&lab, &["-o", "json", "--proto", "udp"]))?;
    datagrams(&lab, POD1, COUNT)?;
    let traces = watch.stop()?.packets()?;
    // The later fragments, which have the nodes' addresses alone, make none.
    ensure!(traces.len() == COUNT as usize, "{traces:#?}");
    all(&traces, "delivered")?;
    for trace in &traces {
        ensure!(
            goes(trace, "udp", &POD1.to_string(), &POD2.to_string()),
            "{trace:#}"
        );
        let lengths: Vec<&Value> = at_interfaces(trace)
            .filter_map(|seen| seen["encap"].get("length"))
            .collect();
        // IPv4's header, and what fits behind it in eights.
        ensure!(lengths == [996, 996], "{trace:#}");
        ensure!(
            trace["hops"].as_array().is_some_and(|hops| hops.len() == 3),
            "{trace:#}"
        );
    }
    Ok(())
}

/// Two pings of this IP length, which must not be fragmented.
fn whole(lab: &Lab, length: usize) -> Result<()> {
    // Of IPv4's and ICMP's headers.
    let payload = (length - 28).to_string();
    lab.ping("pod1", POD2.into(), 2, &["-M", "do", "-s", &payload])
        .map(drop)
}

/// Pods with a larger MTU than the tunnel's, and a node that drops its own ICMP errors.
fn black_hole() -> Result<()> {
    let lab = lab()?;
    let pod = lab.pod("pod1")?;
    lab.namespace("minikube")?
        .ip(&format!("link set {} mtu 1500\n", pod.interface))?;
    lab.namespace("pod1")?.ip("link set eth0 mtu 1500\n")?;
    change_rules(
        &lab,
        "minikube",
        "*filter\n-I OUTPUT -p icmp -m icmp --icmp-type fragmentation-needed -j DROP\nCOMMIT\n",
    )?;
    let (traces, _) = traced(&lab, "icmp", POD1, |lab| whole(lab, 1450))?;
    all(&traces, "delivered")?;
    let (traces, text) = traced(&lab, "icmp", POD1, |lab| whole(lab, 1500))?;
    all(&traces, "dropped")?;
    for trace in &traces {
        let drop = &trace["drop"];
        ensure!(
            drop["node"] == "minikube" && trace["length"] == 1500 && trace["answer"].is_null(),
            "{trace:#}"
        );
    }
    if has_drop_reasons() {
        says(
            &text,
            "✗ dropped on node minikube at cali8d02ed71817, before vxlan.calico: 1500 bytes with DF exceed the MTU of 1450, and \
             nobody was seen telling the sender: a path MTU black hole",
        )?;
    }
    says(&text, "bytes and MTU: cali8d02ed71817 1500 of 1500")
}

/// The other node's pod takes less, that node says so, and on the way back a firewall drops what it says. The twin is let
/// through.
fn unheard() -> Result<()> {
    let lab = lab()?;
    let pod = lab.pod("pod2")?;
    lab.namespace("minikube-m02")?
        .ip(&format!("link set {} mtu 1400\n", pod.interface))?;
    let is_told = |trace: &Value| trace["verdict"] == "rejected" && trace["answer"]["mtu"] == 1400;
    let (traces, text) = traced(&lab, "icmp", POD1, |lab| whole(lab, 1450))?;
    for trace in &traces {
        ensure!(
            is_told(trace) && trace["answer"]["dropped"].is_null(),
            "{trace:#}"
        );
    }
    let sizes = "cali8d02ed71817 1450 of 1450, vxlan.calico 1450 of 1450, eth0 1500 of 1500 (VXLAN +50)";
    says(&text, &format!("bytes and MTU: {sizes}"))?;
    // The pod has learned the path's MTU; what it was told is forgotten.
    lab.namespace("pod1")?.ip("route flush cache\n")?;
    change_rules(
        &lab,
        "minikube",
        "*filter\n-I FORWARD -p icmp -m icmp --icmp-type fragmentation-needed -j DROP\nCOMMIT\n",
    )?;
    let (traces, text) = traced(&lab, "icmp", POD1, |lab| whole(lab, 1450))?;
    for trace in &traces {
        let report = &trace["answer"]["dropped"];
        ensure!(
            is_told(trace) && report["node"] == "minikube" && report["culprits"][0]["cause"] == "foreign",
            "{trace:#}"
        );
    }
    says(
        &text,
        "✗ rejected on node minikube-m02 before cali79f33e4263e: 1450 bytes with DF exceed the MTU of 1400; 10.244.205.192 sent \
         ICMP fragmentation needed to 10.244.120.67, but that was dropped on node minikube at vxlan.calico, before \
         cali8d02ed71817: not Calico",
    )?;
    ensure!(text.contains(": a path MTU black hole"), "{text}");
    Ok(())
}
