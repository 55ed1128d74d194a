//! A pod finds its gateway, and the node forwards what it sends.

use std::net::IpAddr;

use super::Findings;
use crate::route::Type;

/// The address that pods have as their gateway (`cni-plugin/pkg/dataplane/linux/dataplane_linux.go`, Calico 3.34).
const POD_GATEWAY: [u8; 4] = [169, 254, 1, 1];

pub(super) fn check(findings: &mut Findings<'_>) {
    default_route(findings);
    proxy_arp(findings);
    forwarding(findings);
}

/// A node answers its pods' ARP requests for their gateway by proxy, which it does only for addresses that it would
/// route to another device: normally by the default route (projectcalico/calico#3270).
fn default_route(findings: &mut Findings<'_>) {
    let node = &findings.node;
    let workload = |ifindex| node.pods.iter().any(|pod| Some(pod.ifindex) == ifindex);
    let gateway = IpAddr::from(POD_GATEWAY);
    let routed = node.snapshot.routes.iter().any(|entry| {
        entry.kind == Type::Unicast && entry.destination.contains(&gateway) && !workload(entry.oif)
    });
    let default = node.snapshot.routes.iter().any(|entry| {
        entry.kind == Type::Unicast
            && entry.destination.prefix_len() == 0
            && entry.destination.addr().is_ipv4()
    });
    if !routed {
        findings.problem(
            "There is no default route, so the node does not answer its pods' ARP requests for their gateway \
             169.254.1.1, and no packet leaves a pod.",
            "Add a default route (ip route add default via ADDRESS).",
        );
    } else if !default {
        findings.note(
            "There is no default route: pods reach the cluster and nothing beyond it.",
            "Add a default route if pods are to reach other networks.",
        );
    }
}

fn proxy_arp(findings: &mut Findings<'_>) {
    let sysctls = &findings.evidence.sysctls;
    let silent = findings
        .node
        .workload_names(|pod| sysctls.is(&format!("ipv4/conf/{}/proxy_arp", pod.name), "0"));
    if !silent.is_empty() {
        findings.problem(
            format!("Proxy ARP is off on {}: the pods there find no gateway.", silent.join(", ")),
            "Restart calico-node, whose Felix sets net.ipv4.conf.INTERFACE.proxy_arp=1, and find out what unset it.",
        );
    }
}

fn forwarding(findings: &mut Findings<'_>) {
    let sysctls = &findings.evidence.sysctls;
    if sysctls.is("ipv4/ip_forward", "0") {
        findings.problem(
            "IPv4 forwarding is off: packets from and to pods end here.",
            "Set net.ipv4.ip_forward=1, and find out what unset it.",
        );
    } else {
        let off = findings
            .node
            .workload_names(|pod| sysctls.is(&format!("ipv4/conf/{}/forwarding", pod.name), "0"));
        if !off.is_empty() {
            findings.problem(
                format!(
                    "IPv4 forwarding is off on {}: packets of the pods there end here.",
                    off.join(", ")
                ),
                "Set net.ipv4.conf.INTERFACE.forwarding=1, and find out what unset it.",
            );
        }
    }
    let v6 = findings
        .node
        .pods
        .iter()
        .flat_map(|pod| &pod.addresses)
        .any(IpAddr::is_ipv6);
    if v6 && sysctls.is("ipv6/conf/all/forwarding", "0") {
        findings.problem(
            "IPv6 forwarding is off, and pods have IPv6 addresses: their packets end here.",
            "Set net.ipv6.conf.all.forwarding=1.",
        );
    }
}
