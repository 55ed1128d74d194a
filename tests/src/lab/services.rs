//! The service as kube-proxy makes it of a node's netfilter rules, in each of its modes, and Calico's floating IP. Pure
//! text, and the tools that load it.
//!
//! Shaped as `pkg/proxy/{iptables,nftables,ipvs}/proxier.go` of Kubernetes do it. Left out: load balancing, as there is
//! one end point, and health checks.

#![expect(
    clippy::format_push_string,
    reason = "`write!` would add an error that cannot happen to each line"
)]

use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::plan::{FLOATING, NODE_PORTS, POOL, Pod, SERVICE, SERVICE_PORTS};
use crate::command;
use crate::namespace::Namespace;

/// How kube-proxy translates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// Chains of iptables.
    #[default]
    Iptables,
    /// A table of nftables of its own; iptables has Calico's chains only.
    Nftables,
    /// A virtual server of the kernel, with the service's address on the device `kube-ipvs0`.
    Ipvs,
}

/// The device that has the services' addresses, with IPVS.
pub(super) const IPVS_DEVICE: &str = "kube-ipvs0";

/// The letters that kube-proxy's chains of each port end with: of the base-32 SHA-256 of the service port, and of that
/// and the end point (`portProtoHash` and `servicePortEndpointChainName`).
const HASHES: [(&str, &str); 2] = [
    ("CDGGSHYLG3RE2FKL", "2Z3DCG7EEPZUMBLJ"),
    ("3OI236ZBKTWAFB2I", "WHDAPUQ3SLTX36S3"),
];

/// Each port of the service: protocol, port, the pod's port, the port on every node, and the letters of its chains.
fn ports() -> impl Iterator<Item = (&'static str, u16, u16, u16, &'static str, &'static str)> {
    SERVICE_PORTS.into_iter().zip(NODE_PORTS).zip(HASHES).map(
        |(((protocol, port, target), node_port), (service, end_point))| {
            (protocol, port, target, node_port, service, end_point)
        },
    )
}

/// Kube-proxy's part of the table `nat`, for `iptables-restore`. `backend` is the pod behind the service, if it is there.
pub(super) fn iptables(proxy: Proxy, backend: Option<&Pod>) -> String {
    if proxy == Proxy::Nftables {
        return String::new();
    }
    let mut text = ":KUBE-POSTROUTING -\n:KUBE-MARK-MASQ -\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" \
         -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n"
        .to_owned();
    let Some(pod) = backend.filter(|_| proxy == Proxy::Iptables) else {
        return text;
    };
    text += ":KUBE-SERVICES -\n:KUBE-NODEPORTS -\n\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n";
    let address = pod.address;
    for (protocol, port, target, node_port, service, end_point) in ports() {
        let matched = format!("-p {protocol} -m {protocol}");
        text += &format!(
            ":KUBE-SVC-{service} -\n:KUBE-EXT-{service} -\n:KUBE-SEP-{end_point} -\n\
             -A KUBE-SERVICES -d {SERVICE}/32 {matched} --dport {port} -j KUBE-SVC-{service}\n\
             -A KUBE-NODEPORTS {matched} --dport {node_port} -j KUBE-EXT-{service}\n\
             -A KUBE-EXT-{service} -j KUBE-MARK-MASQ\n\
             -A KUBE-EXT-{service} -j KUBE-SVC-{service}\n\
             -A KUBE-SVC-{service} ! -s {POOL} -d {SERVICE}/32 {matched} --dport {port} -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{service} -j KUBE-SEP-{end_point}\n\
             -A KUBE-SEP-{end_point} -s {address}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{end_point} {matched} -j DNAT --to-destination {address}:{target}\n"
        );
    }
    text + "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n"
}

/// Calico's rules for the floating IP of its pod (`felix/rules/nat.go`): to the pod from everywhere, and back to itself
/// under that address.
pub(super) fn floating_ip(pod: &Pod) -> String {
    let address = pod.address;
    format!(
        "-A cali-fip-dnat -d {FLOATING}/32 -j DNAT --to-destination {address}\n\
         -A cali-fip-snat -s {address}/32 -d {address}/32 -j SNAT --to-source {FLOATING}\n"
    )
}

/// Loads what is not iptables'.
pub(super) fn load(namespace: &Namespace, proxy: Proxy, backend: Option<&Pod>) -> Result<()> {
    let (mut tool, rules): (Command, String) = match proxy {
        Proxy::Iptables => return Ok(()),
        Proxy::Nftables => {
            let mut nft = namespace.command("nft");
            nft.args(["-f", "-"]);
            (nft, nftables(backend))
        }
        Proxy::Ipvs => {
            command::run(namespace.command("ipvsadm").arg("--clear"))?;
            let mut restore = namespace.command("ipvsadm");
            restore.arg("--restore");
            (restore, ipvs(backend))
        }
    };
    command::run_with_input(&mut tool, &rules)?;
    Ok(())
}

/// Kube-proxy's table, which replaces the one before.
fn nftables(backend: Option<&Pod>) -> String {
    let mut text = "table ip kube-proxy {}\ndelete table ip kube-proxy\ntable ip kube-proxy {\n\
         chain masquerading {\n\
         meta mark & 0x4000 == 0 return\n\
         meta mark set meta mark ^ 0x4000\n\
         masquerade fully-random\n}\n\
         chain mark-for-masquerade {\nmeta mark set meta mark | 0x4000\n}\n"
        .to_owned();
    let (mut service_ips, mut node_ports) = (Vec::new(), Vec::new());
    for (protocol, port, target, node_port, service, end_point) in ports() {
        let Some(pod) = backend else { continue };
        let address = pod.address;
        text += &format!(
            "chain endpoint-{end_point} {{\n\
             ip saddr {address} jump mark-for-masquerade\n\
             meta l4proto {protocol} dnat to {address}:{target}\n}}\n\
             chain service-{service} {{\n\
             ip daddr {SERVICE} {protocol} dport {port} ip saddr != {POOL} jump mark-for-masquerade\n\
             goto endpoint-{end_point}\n}}\n\
             chain external-{service} {{\njump mark-for-masquerade\ngoto service-{service}\n}}\n"
        );
        service_ips.push(format!(
            "{SERVICE} . {protocol} . {port} : goto service-{service}"
        ));
        node_ports.push(format!("{protocol} . {node_port} : goto external-{service}"));
    }
    let elements = |list: &[String]| match list {
        [] => String::new(),
        list => format!("elements = {{ {} }}\n", list.join(", ")),
    };
    text += &format!(
        "map service-ips {{\ntype ipv4_addr . inet_proto . inet_service : verdict\n{}}}\n\
         map service-nodeports {{\ntype inet_proto . inet_service : verdict\n{}}}\n",
        elements(&service_ips),
        elements(&node_ports)
    );
    text + "chain services {\n\
         ip daddr . meta l4proto . th dport vmap @service-ips\n\
         fib daddr type local meta l4proto . th dport vmap @service-nodeports\n}\n\
         chain nat-prerouting {\ntype nat hook prerouting priority -100; policy accept;\njump services\n}\n\
         chain nat-output {\ntype nat hook output priority -100; policy accept;\njump services\n}\n\
         chain nat-postrouting {\ntype nat hook postrouting priority 100; policy accept;\njump masquerading\n}\n}\n"
}

/// The virtual servers, as `ipvsadm --restore` reads them.
fn ipvs(backend: Option<&Pod>) -> String {
    let mut text = String::new();
    for (protocol, port, target, _, _, _) in ports() {
        let kind = if protocol == "tcp" { "-t" } else { "-u" };
        text += &format!("-A {kind} {SERVICE}:{port} -s rr\n");
        if let Some(pod) = backend {
            text += &format!("-a {kind} {SERVICE}:{port} -r {}:{target} -m\n", pod.address);
        }
    }
    text
}

/// What IPVS needs of a node: the services' address, and that conntrack knows its connections.
pub(super) fn ipvs_device() -> String {
    format!("link add {IPVS_DEVICE} type dummy\naddress add {SERVICE}/32 dev {IPVS_DEVICE}\n")
}
