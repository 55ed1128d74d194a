//! The lab proves itself: what its kernel, `traceroute`, `ping` and sockets say must be what Calico nodes
//! with these addresses say, before anything is compared with it. Needs root.

mod counts;
mod life;
mod paths;
mod policy;
mod presence;

use std::process::ExitCode;

use calitrace_tests::lab::netfilter::Backend;
use calitrace_tests::{Encapsulation, Need, Test, harness, test};

const NFT: &[Need] = &[Need::Program("nft")];

const TESTS: &[Test] = &[
    test("paths::vxlan", paths::vxlan),
    test("paths::without_encapsulation", paths::without_encapsulation),
    test("paths::ipip", paths::ipip).needs(&[Need::Encapsulation(Encapsulation::Ipip)]),
    test("paths::wireguard", paths::wireguard)
        .needs(&[Need::Encapsulation(Encapsulation::Wireguard), Need::Program("wg")]),
    test("paths::routed", paths::routed),
    test("paths::routed_ipip", paths::routed_ipip).needs(&[Need::Encapsulation(Encapsulation::Ipip)]),
    test("paths::cross_subnet", paths::cross_subnet),
    test("paths::cross_subnet_ipip", paths::cross_subnet_ipip)
        .needs(&[Need::Encapsulation(Encapsulation::Ipip)]),
    test("paths::ipv6", paths::ipv6),
    test("paths::blocked_time_exceeded", paths::blocked_time_exceeded),
    test("paths::changed_tunnel_address", paths::changed_tunnel_address),
    test("paths::outside", paths::outside),
    test("policy::deny_and_end_of_tier", policy::deny_and_end_of_tier),
    test("policy::nft", policy::nft),
    test("policy::nftables_mode", policy::nftables_mode).needs(NFT),
    test("policy::blackhole", policy::blackhole),
    test("policy::service", || policy::service(Backend::Any)),
    test("policy::service_in_nftables_mode", || {
        policy::service(Backend::Native)
    })
    .needs(NFT),
    test("policy::no_default_route", policy::no_default_route),
    test("counts::ping", counts::ping),
    test("counts::udp", counts::udp),
    test("counts::tcp_without_offloads", counts::tcp_without_offloads),
    test("life::pods_come_and_go", life::pods_come_and_go),
    test("life::two_labs_at_once", life::two_labs_at_once),
    test("life::nothing_is_left", life::nothing_is_left),
    test(
        "life::a_killed_process_is_swept_after",
        life::a_killed_process_is_swept_after,
    ),
    test("life::roots", life::roots),
    test(
        "presence::programs_are_seen_while_they_are_there",
        presence::programs_are_seen,
    )
    .needs(&[Need::Tcx]),
    test(
        "presence::filters_are_seen_while_they_are_there",
        presence::filters_are_seen,
    ),
];

fn main() -> ExitCode {
    if life::is_told_to_die() {
        return life::build_a_lab_and_die();
    }
    harness::run(TESTS.iter().copied())
}
