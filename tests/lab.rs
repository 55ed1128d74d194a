//! The lab proves itself: what its kernel, `traceroute`, `ping` and sockets say must be what Calico nodes
//! with these addresses say, before anything is compared with it.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use calitrace_tests::traffic::traceroute::Kind;
use calitrace_tests::{DeviceOrder, Encapsulation, Lab, Options};
use libtest_mimic::{Arguments, Trial};

/// The traceroute between the pods of the two nodes, and between the pods of one, in both device orders.
const PATHS: [(DeviceOrder, [&str; 3], [&str; 2]); 2] = [
    (
        DeviceOrder::TunnelFirst,
        ["10.244.120.64", "10.244.205.192", "10.244.205.193"],
        ["10.244.120.64", "10.244.120.68"],
    ),
    (
        DeviceOrder::UplinkFirst,
        ["192.168.49.2", "10.244.205.192", "10.244.205.193"],
        ["192.168.49.2", "10.244.120.68"],
    ),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let trials = vec![test(
        "traceroute_shows_the_addresses_calico_shows",
        traceroute_shows_the_addresses,
    )];
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn test(name: &str, run: fn() -> Result<()>) -> Trial {
    Trial::test(name, move || run().map_err(|error| format!("{error:?}").into()))
}

fn traceroute_shows_the_addresses() -> Result<()> {
    for (order, between_nodes, on_one_node) in PATHS {
        let lab = Lab::up(&Options {
            order,
            encapsulation: Encapsulation::Vxlan,
            ..Options::default()
        })?;
        for kind in [
            Kind::Udp,
            Kind::Icmp,
            Kind::Tcp(9),
            Kind::Busybox,
            Kind::BusyboxIcmp,
        ] {
            let trace = lab.traceroute("pod1", lab.pod("pod2")?.ip(), kind, &[])?;
            ensure!(
                trace.path() == between_nodes,
                "{order:?} {kind:?}:\n{}",
                trace.raw
            );
            let trace = lab.traceroute("pod1", lab.pod("pod3")?.ip(), kind, &[])?;
            ensure!(trace.path() == on_one_node, "{order:?} {kind:?}:\n{}", trace.raw);
        }
    }
    Ok(())
}
