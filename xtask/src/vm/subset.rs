//! What `cargo xtask test` runs in guests: on each kernel a few minutes' worth of what differs between kernels. The whole
//! matrix is `cargo xtask vm`.

use anyhow::{Context as _, Result, bail};

use super::programs::Run;
use crate::cargo::Executable;

/// The oldest, Debian's most used, and the newest.
pub(super) const KERNELS: [&str; 3] = ["5.10", "6.1", "7"];

/// Test programs, and the beginnings or parts of names of the tests to run.
const TESTS: [(&str, &[&str]); 5] = [
    (
        "kernel",
        &[
            "attaching::nothing_is_left",
            "clsact::",
            "parsing::",
            "transports::",
        ],
    ),
    (
        "discovery",
        &["nodes_are_what_ip_says", "hop_addresses_are_the_kernels"],
    ),
    ("functions", &["trampolines::"]),
    (
        "lab",
        &[
            "paths::ipip",
            "paths::wireguard",
            "policy::nft",
            "presence::filters",
        ],
    ),
    (
        "e2e",
        &[
            "real_traffic_over_tunl0",
            "a_drop_names_its_netfilter_hook",
            "a_policy_that_denies",
            "a_policy_of_nftables_that_denies",
            "flow_logs_tell_which_of_two_in_iptables_nft",
            "a_thousand_packets_of_many_fates",
            "a_thousand_packets_with_nftables",
            "more_packets_than_the_kernel_takes_in",
            "a_service_is_one_trace",
            "masquerading_to_the_outside",
            "answers_from_the_outside",
            "functions_are_seen_between_interfaces_ipip",
            "nothing_is_left_after_kill_9",
            "a_kernel_locked_down_still_shows_paths",
        ],
    ),
];

/// The runs of the subset, or of all tests whose names contain `only`.
pub(super) fn runs<'a>(programs: &[&'a Executable], only: Option<&str>) -> Result<Vec<Run<'a>>> {
    let mut runs = Vec::new();
    for (target, filters) in TESTS {
        let program = programs
            .iter()
            .find(|program| program.target == target)
            .with_context(|| format!("no test program `{target}` was built"))?;
        if let Some(only) = only {
            runs.extend(Run::some(program, &[only])?);
            continue;
        }
        for filter in filters {
            // A name that fits no test any more must not leave its test out silently.
            if Run::some(program, &[filter])?.is_none() {
                bail!("no test of `{target}` is named {filter}: mend the list in xtask/src/vm/subset.rs");
            }
        }
        runs.extend(Run::some(program, filters)?);
    }
    Ok(runs)
}
