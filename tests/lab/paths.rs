//! The ways of packets: what traceroute shows in each kind of lab.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, ensure};
use calitrace_tests::lab::UNDERLAY;
use calitrace_tests::lab::plan::OUTSIDE;
use calitrace_tests::traffic::tcpdump;
use calitrace_tests::traffic::traceroute::Kind;
use calitrace_tests::{DeviceOrder, Encapsulation, Lab, Options};

const KINDS: [Kind; 5] = [
    Kind::Udp,
    Kind::Icmp,
    Kind::Tcp(9),
    Kind::Busybox,
    Kind::BusyboxIcmp,
];

/// Runs every traceroute from pod 1 to the pod of the other node and to its neighbour, and requires these
/// addresses.
fn expect(options: &Options, between_nodes: [&str; 3], on_one_node: [&str; 2]) -> Result<()> {
    let lab = Lab::up(options)?;
    for kind in KINDS {
        let trace = lab.traceroute("pod1", lab.pod("pod2")?.ip(), kind, &[])?;
        ensure!(
            trace.path() == between_nodes,
            "{options:?} {kind:?}:\n{}",
            trace.raw
        );
        let trace = lab.traceroute("pod1", lab.pod("pod3")?.ip(), kind, &[])?;
        ensure!(
            trace.path() == on_one_node,
            "{options:?} {kind:?}:\n{}",
            trace.raw
        );
    }
    Ok(())
}

/// The first address depends on which device was registered first (`inet_select_addr`).
fn with_tunnel(encapsulation: Encapsulation) -> Result<()> {
    for (order, first) in [
        (DeviceOrder::TunnelFirst, "10.244.120.64"),
        (DeviceOrder::UplinkFirst, "192.168.49.2"),
    ] {
        let options = Options {
            encapsulation,
            order,
            ..Options::default()
        };
        expect(
            &options,
            [first, "10.244.205.192", "10.244.205.193"],
            [first, "10.244.120.68"],
        )?;
    }
    Ok(())
}

pub(crate) fn vxlan() -> Result<()> {
    with_tunnel(Encapsulation::Vxlan)
}

pub(crate) fn ipip() -> Result<()> {
    with_tunnel(Encapsulation::Ipip)
}

pub(crate) fn wireguard() -> Result<()> {
    with_tunnel(Encapsulation::Wireguard)
}

/// VXLAN hides the router between the nodes; without encapsulation it is a hop as others are.
pub(crate) fn routed() -> Result<()> {
    for (encapsulation, first, between_nodes) in [
        (
            Encapsulation::Vxlan,
            "10.244.120.64",
            &["10.244.205.192", "10.244.205.193"][..],
        ),
        (
            Encapsulation::None,
            "192.168.49.2",
            &["192.168.49.1", "192.168.50.3", "10.244.205.193"],
        ),
    ] {
        let lab = Lab::up(&Options {
            encapsulation,
            routed: true,
            ..Options::default()
        })?;
        let expected = [&[first], between_nodes].concat();
        for kind in KINDS {
            let trace = lab.traceroute("pod1", lab.pod("pod2")?.ip(), kind, &[])?;
            ensure!(
                trace.path() == expected,
                "{encapsulation:?} {kind:?}:\n{}",
                trace.raw
            );
        }
        let to = IpAddr::V6(lab.pod("pod2")?.address_v6);
        let trace = lab.traceroute("pod1", to, Kind::Icmp, &[])?;
        ensure!(
            trace.path()[1..] == ["fd00:192:168:49::1", "fd00:192:168:50::3", "fd00:10:244:205::1"],
            "{encapsulation:?}:\n{}",
            trace.raw
        );
    }
    Ok(())
}

/// `tunl0` gives the outer header the inner one's TTL, and ipip keeps to itself what the router between the nodes says of
/// it: that probe is answered by nobody. The next one is at the second node with a TTL of 2, and so goes on to the pod.
pub(crate) fn routed_ipip() -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation: Encapsulation::Ipip,
        routed: true,
        ..Options::default()
    })?;
    swallowed(&lab, "pod2", &["10.244.120.64", "*", "10.244.205.193"])
}

fn swallowed(lab: &Lab, receiver: &str, expected: &[&str]) -> Result<()> {
    for kind in [Kind::Udp, Kind::Icmp] {
        let trace = lab.traceroute("pod1", lab.pod(receiver)?.ip(), kind, &["-q", "1", "-w", "3"])?;
        ensure!(trace.path() == expected, "{kind:?}:\n{}", trace.raw);
    }
    let ping = lab.ping("pod1", lab.pod(receiver)?.ip(), 3, &[])?;
    ensure!(ping.received == 3, "{}", ping.raw);
    Ok(())
}

fn across_subnets(encapsulation: Encapsulation) -> Result<Lab> {
    let lab = Lab::up(&Options {
        encapsulation,
        cross_subnet: true,
        ..Options::default()
    })?;
    // The node of the same subnet is reached without the tunnel, and so answers with its own address.
    let expected = ["10.244.120.64", "192.168.49.3", "10.244.205.193"];
    for kind in KINDS {
        let trace = lab.traceroute("pod1", lab.pod("pod2")?.ip(), kind, &[])?;
        ensure!(
            trace.path() == expected,
            "{encapsulation:?} {kind:?}:\n{}",
            trace.raw
        );
    }
    Ok(lab)
}

pub(crate) fn cross_subnet() -> Result<()> {
    let lab = across_subnets(Encapsulation::Vxlan)?;
    for (from, expected) in [
        ("pod1", ["10.244.120.64", "10.244.33.128", "10.244.33.129"]),
        ("pod2", ["10.244.205.192", "10.244.33.128", "10.244.33.129"]),
    ] {
        let trace = lab.traceroute(from, lab.pod("pod5")?.ip(), Kind::Udp, &[])?;
        ensure!(trace.path() == expected, "{}", trace.raw);
    }
    Ok(())
}

pub(crate) fn cross_subnet_ipip() -> Result<()> {
    let lab = across_subnets(Encapsulation::Ipip)?;
    swallowed(&lab, "pod5", &["10.244.120.64", "*", "10.244.33.129"])
}

pub(crate) fn without_encapsulation() -> Result<()> {
    let options = Options {
        encapsulation: Encapsulation::None,
        ..Options::default()
    };
    let first = "192.168.49.2";
    expect(
        &options,
        [first, "192.168.49.3", "10.244.205.193"],
        [first, "10.244.120.68"],
    )
}

pub(crate) fn ipv6() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let to = IpAddr::V6(lab.pod("pod2")?.address_v6);
    for kind in [Kind::Udp, Kind::Icmp, Kind::Busybox] {
        let trace = lab.traceroute("pod1", to, kind, &[])?;
        let expected = ["fd00:192:168:49::2", "fd00:192:168:49::3", "fd00:10:244:205::1"];
        ensure!(trace.path() == expected, "{kind:?}:\n{}", trace.raw);
    }
    Ok(())
}

pub(crate) fn blocked_time_exceeded() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let to = lab.pod("pod2")?.ip();
    let once = ["-q", "1", "-w", "3"];
    lab.block_time_exceeded(true)?;
    let trace = lab.traceroute("pod1", to, Kind::Icmp, &once)?;
    ensure!(
        trace.path() == ["*", "*", "10.244.205.193"],
        "blocked:\n{}",
        trace.raw
    );
    lab.block_time_exceeded(false)?;
    let trace = lab.traceroute("pod1", to, Kind::Icmp, &once)?;
    ensure!(
        trace.path() == ["10.244.120.64", "10.244.205.192", "10.244.205.193"],
        "lifted:\n{}",
        trace.raw
    );
    Ok(())
}

pub(crate) fn changed_tunnel_address() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let to = lab.pod("pod2")?.ip();
    lab.set_tunnel_address("minikube-m02", Ipv4Addr::new(10, 244, 205, 250))?;
    lab.set_tunnel_address("minikube", Ipv4Addr::new(10, 244, 120, 65))?;
    let trace = lab.traceroute("pod1", to, Kind::Udp, &[])?;
    ensure!(
        trace.path() == ["10.244.120.65", "10.244.205.250", "10.244.205.193"],
        "{}",
        trace.raw
    );
    ensure!(lab.node("minikube")?.tunnel_address == Ipv4Addr::new(10, 244, 120, 65));
    Ok(())
}

pub(crate) fn outside() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("underlay.pcap");
    let capture = lab.tcpdump(UNDERLAY, "br0", &file, "icmp")?;
    let ping = lab.ping("pod1", IpAddr::V4(OUTSIDE), 3, &[])?;
    ensure!(ping.received == 3, "{}", ping.raw);
    capture.stop()?;
    let masqueraded = tcpdump::read(&file, "icmp and src 192.168.49.2 and dst 203.0.113.10")?;
    ensure!(masqueraded.len() == 3, "masqueraded: {masqueraded:#?}");
    Ok(())
}
