//! Drops while the rules change.

use anyhow::{Result, ensure};
use calitrace_tests::{Lab, Policy, lab::netfilter::Backend};
use serde_json::Value;

use super::{
    kinds::{self, TWO},
    rules::change,
};
use crate::support::{Watch, change_nftables, with};

/// The policies that may have dropped the packets from pod 1 to pod 2, by their names.
fn policies(packets: &[Value]) -> Vec<Vec<&str>> {
    let echo =
        |packet: &&Value| packet["flow"]["proto"] == "icmp" && packet["flow"]["dst"] == "10.244.205.193";
    packets.iter().filter(echo).map(names).collect()
}

fn names(packet: &Value) -> Vec<&str> {
    let culprits = packet["drop"]["culprits"].as_array();
    culprits
        .into_iter()
        .flatten()
        .filter_map(|culprit| culprit["name"].as_str())
        .collect()
}

/// A policy is there and denies before its rules were ever read: the packet that shows it has its name all the same. Where
/// another one went meanwhile, it may have been either.
pub(super) fn first_drop(backend: Backend) -> Result<()> {
    let lab = kinds::lab(backend)?;
    let pod2 = lab.pod("pod2")?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    for name in ["default/first", "default/second"] {
        for denies in [true, false] {
            deny(&lab, &pod2.interface, name, denies)?;
            lab.ping("pod1", pod2.ip(), 1, &[])?;
        }
    }
    let packets = watch.stop()?.packets()?;
    let found = policies(&packets);
    let expected = [
        &["default/first"][..],
        &[],
        &["default/first", "default/second"],
        &[],
    ];
    ensure!(found == expected, "{expected:?}, not {found:?}: {packets:#?}");
    Ok(())
}

/// A policy that denies all is asked for a pod of the second node, or no longer.
fn deny(lab: &Lab, interface: &str, name: &str, denies: bool) -> Result<()> {
    let (pod, policy) = (format!("cali-tw-{interface}"), format!("cali-pi-np/{name}"));
    if lab.options().netfilter == Backend::Native {
        let (pod, policy) = (format!("filter-{pod}"), format!("filter-{policy}"));
        let change = if denies {
            format!(
                "add chain ip calico {policy}\n\
                 add rule ip calico {policy} counter drop comment \"cali:1; NetworkPolicy {name} ingress\"\n\
                 add rule ip calico {pod} index 2 counter jump {policy}\n"
            )
        } else {
            format!("flush chain ip calico {policy}\n")
        };
        return change_nftables(lab, TWO, &change);
    }
    let filter = if denies {
        format!(
            ":{policy} -\n\
             -A {policy} -m comment --comment \"NetworkPolicy {name} ingress\" -j DROP\n\
             -I {pod} 4 -j {policy}\n"
        )
    } else {
        format!("-D {pod} -j {policy}\n")
    };
    change(lab, TWO, &filter)
}

/// As Felix does when endpoints come and go: chains are written anew, each time as a whole.
pub(super) fn rewritten(backend: Backend) -> Result<()> {
    let lab = kinds::lab(backend)?;
    lab.set_policy("pod2", Policy::Deny)?;
    let pod2 = lab.pod("pod2")?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    for round in 0..20 {
        let other = if round % 2 == 0 {
            Policy::EndOfTier
        } else {
            Policy::Allow
        };
        lab.set_policy("pod4", other)?;
        lab.ping("pod1", pod2.ip(), 2, &["-W", "0.1"])?;
    }
    let packets = watch.stop()?.packets()?;
    let found = policies(&packets);
    ensure!(
        found.len() == 40 && found.iter().all(|policies| policies == &["default/deny-all"]),
        "{found:?}: {packets:#?}"
    );
    Ok(())
}
