//! Workload interfaces without a route, and pods without a name.

use super::Findings;

pub(super) fn check(findings: &mut Findings<'_>) {
    devices(findings);
    names(findings);
}

fn devices(findings: &mut Findings<'_>) {
    for link in findings.node.without_pod.clone() {
        let (state, remedy) = if link.up() {
            (
                "No route leads to",
                "Wait for Felix to set it up; if it stays so, delete the pod, so that it is made anew.",
            )
        } else {
            (
                "The kernel took away the routes through",
                "Set it up (ip link set NAME up), and restart calico-node.",
            )
        };
        let why = if link.up() { "" } else { ", which is down" };
        findings.problem(
            format!("{state} {}{why}: its pod has no network.", link.name),
            remedy,
        );
    }
}

fn names(findings: &mut Findings<'_>) {
    let pods = findings.node.pods;
    let unnamed = pods.iter().filter(|pod| pod.name.is_none()).count();
    if unnamed > 0 {
        findings.note(
            format!("{unnamed} of {} pods have no known name and are shown by their addresses.", pods.len()),
            "Names come from /var/run/calico/endpoint-status (Calico 3.30 and later), /var/lib/cni/results or \
             /var/log/pods on the node.",
        );
    }
}
