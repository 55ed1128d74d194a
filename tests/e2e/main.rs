//! End to end: real packets between the pods of a lab, `calitrace` as a user runs it, and the truth of `traceroute`,
//! `tcpdump`, the sockets and the kernel beside it.
//!
//! Run as root. A test that lacks what it needs is skipped, and says why; with `CI=true` that is a failure.

#![expect(clippy::print_stdout, reason = "a test run speaks on standard output")]

mod agree;
mod alone;
mod between;
mod causes;
mod coexist;
mod counts;
mod doctor;
mod drops;
mod failures;
mod fallbacks;
mod faults;
mod felix;
mod flood;
mod functions;
mod ipv6;
mod leftovers;
mod limits;
mod log;
mod logged;
mod merged;
mod mtu;
mod nat;
mod neighbours;
mod receivers;
mod repair;
mod scope;
mod support;
mod tools;
mod topology;
mod traced;
mod tunnels;
mod underlay;
mod uplinks;

use std::process::ExitCode;

use calitrace_tests::{Test, harness, test};

fn main() -> ExitCode {
    // Each test has a lab of its own and two cores have to do; the inventory of what is left must be its own, too.
    harness::run_singly(
        [
            agree::TESTS,
            alone::TESTS,
            counts::TESTS,
            scope::TESTS,
            doctor::TESTS,
            causes::TESTS,
            drops::TESTS,
            faults::TESTS,
            felix::TESTS,
            ipv6::TESTS,
            limits::TESTS,
            receivers::TESTS,
            log::TESTS,
            logged::TESTS,
            merged::TESTS,
            mtu::TESTS,
            nat::TESTS,
            neighbours::TESTS,
            tools::TESTS,
            topology::TESTS,
            between::TESTS,
            tunnels::TESTS,
            underlay::TESTS,
            uplinks::TESTS,
            flood::TESTS,
            functions::TESTS,
            failures::TESTS,
            leftovers::TESTS,
            repair::TESTS,
            coexist::TESTS,
            fallbacks::TESTS,
        ]
        .concat(),
    )
}
