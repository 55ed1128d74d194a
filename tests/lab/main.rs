//! The lab proves itself: what its kernel, `traceroute`, `ping` and sockets say must be what Calico nodes
//! with these addresses say, before anything is compared with it. Needs root.

mod counts;
mod life;
mod paths;
mod policy;
mod presence;

use std::process::ExitCode;

use anyhow::Result;
use calitrace_tests::inventory::has_tcx;
use calitrace_tests::{Encapsulation, Lab};
use libtest_mimic::{Arguments, Trial};

type Test = fn() -> Result<()>;

fn main() -> ExitCode {
    if life::is_told_to_die() {
        return life::build_a_lab_and_die();
    }
    let arguments = Arguments::from_args();
    let root = nix::unistd::geteuid().is_root();
    let tests: &[(&str, Test)] = &[
        ("paths::vxlan", paths::vxlan),
        ("paths::without_encapsulation", paths::without_encapsulation),
        ("paths::ipip", paths::ipip),
        ("paths::ipv6", paths::ipv6),
        ("paths::blocked_time_exceeded", paths::blocked_time_exceeded),
        ("paths::changed_tunnel_address", paths::changed_tunnel_address),
        ("paths::outside", paths::outside),
        ("policy::deny_and_end_of_tier", policy::deny_and_end_of_tier),
        ("policy::nft", policy::nft),
        ("policy::blackhole", policy::blackhole),
        ("policy::service", policy::service),
        ("policy::no_default_route", policy::no_default_route),
        ("counts::ping", counts::ping),
        ("counts::udp", counts::udp),
        ("counts::tcp_without_offloads", counts::tcp_without_offloads),
        ("life::pods_come_and_go", life::pods_come_and_go),
        ("life::two_labs_at_once", life::two_labs_at_once),
        ("life::nothing_is_left", life::nothing_is_left),
        (
            "life::a_killed_process_is_swept_after",
            life::a_killed_process_is_swept_after,
        ),
        ("life::roots", life::roots),
        (
            "presence::programs_are_seen_while_they_are_there",
            presence::programs_are_seen,
        ),
        (
            "presence::filters_are_seen_while_they_are_there",
            presence::filters_are_seen,
        ),
    ];
    let reason = |name: &str| match name {
        _ if !root => Some("skipped: needs root"),
        "paths::ipip" if !Lab::supports(Encapsulation::Ipip).unwrap_or(true) => {
            Some("skipped: no ipip in this kernel")
        }
        "presence::programs_are_seen_while_they_are_there" if !has_tcx() => {
            Some("skipped: no TCX in this kernel")
        }
        _ => None,
    };
    let trials = tests.iter().map(|(name, run)| {
        let (run, reason) = (*run, reason(name));
        Trial::test(*name, move || run().map_err(|error| format!("{error:?}").into()))
            .with_ignored_flag(reason.is_some())
            .with_kind(reason.unwrap_or_default())
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
