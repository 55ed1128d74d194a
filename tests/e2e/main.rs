//! End to end: real packets between the pods of a lab, `calitrace` as a user runs it, and the truth of `traceroute`,
//! `tcpdump`, the sockets and the kernel beside it.
//!
//! Run as root. Without, every test is skipped, and said to be; with `CI=true` that is a failure.

#![expect(clippy::print_stdout, reason = "a test run speaks on standard output")]

mod agree;
mod alone;
mod counts;
mod drops;
mod failures;
mod flood;
mod leftovers;
mod log;
mod scope;
mod support;
mod topology;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// A test: its name and what it does.
type Test = (&'static str, fn() -> anyhow::Result<()>);

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each test has a lab of its own and two cores have to do; the inventory of what is left must be its own, too.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let root = nix::unistd::geteuid().is_root();
    let skip = !root && std::env::var_os("CI").is_none();
    if skip {
        println!("the end-to-end tests are skipped: network namespaces and eBPF need root");
    }
    let trials = [
        agree::TESTS,
        alone::TESTS,
        counts::TESTS,
        scope::TESTS,
        drops::TESTS,
        log::TESTS,
        topology::TESTS,
        flood::TESTS,
        failures::TESTS,
        leftovers::TESTS,
    ]
    .concat()
    .into_iter()
    .map(|(name, run)| {
        Trial::test(name, move || run().map_err(|error| format!("{error:#}").into())).with_ignored_flag(skip)
    })
    .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
