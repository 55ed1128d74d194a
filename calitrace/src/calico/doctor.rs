//! What is wrong with a node, as far as its tables and settings tell: each finding a sentence, and what would mend it.
//! [`check`] is pure; [`Sysctls::read`] reads the settings that it judges.

use std::{collections::BTreeMap, fs, io, net::IpAddr, path::Path};

use anyhow::{Context as _, Result};

use super::view::NodeView;
use crate::{
    event::{EncapKind, Role},
    netns::Handle,
    route::{Link, Type},
};

/// The address that pods have as their gateway (`cni-plugin/pkg/dataplane/linux/dataplane_linux.go`, Calico 3.34).
const POD_GATEWAY: [u8; 4] = [169, 254, 1, 1];

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Packets are lost.
    Problem,
    /// Packets may be lost, or less can be told of them.
    Note,
}

/// Something that is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Name of the node.
    pub node: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong and what follows from it: a sentence.
    pub what: String,
    /// What would mend it: a sentence.
    pub remedy: String,
}

/// Settings of a node's namespace, by their names below `net` (`ipv4/ip_forward`). One that is not there is not judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sysctls(BTreeMap<String, String>);

impl Sysctls {
    /// Reads those that [`check`] judges.
    pub fn read(view: &NodeView) -> Result<Self> {
        let mut names: Vec<String> = [
            "ipv4/ip_forward",
            "ipv4/conf/all/rp_filter",
            "ipv4/conf/default/rp_filter",
            "ipv6/conf/all/forwarding",
        ]
        .map(str::to_owned)
        .to_vec();
        for interface in view
            .interfaces
            .iter()
            .filter(|interface| interface.role == Role::Workload)
        {
            for setting in ["proxy_arp", "forwarding"] {
                names.push(format!("ipv4/conf/{}/{setting}", interface.name));
            }
        }
        Self::read_named(&view.handle, names)
    }

    fn read_named(handle: &Handle, names: Vec<String>) -> Result<Self> {
        handle.run(|| {
            let mut values = BTreeMap::new();
            for name in names {
                let path = Path::new("/proc/sys/net").join(&name);
                match fs::read_to_string(&path) {
                    Ok(value) => drop(values.insert(name, value.trim().to_owned())),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
                }
            }
            Ok(Self(values))
        })
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.0.get(name).is_some_and(|set| set == value)
    }
}

/// All that is wrong with a node, problems first.
pub fn check(view: &NodeView, sysctls: &Sysctls) -> Vec<Finding> {
    let mut findings = Findings {
        view,
        all: Vec::new(),
    };
    findings.pods_gateway(sysctls);
    findings.forwarding(sysctls);
    findings.reverse_path(sysctls);
    findings.tunnels();
    findings.remote_blocks();
    findings.workloads();
    findings.names();
    findings.all.sort_by_key(|finding| finding.severity);
    findings.all
}

struct Findings<'a> {
    view: &'a NodeView,
    all: Vec<Finding>,
}

impl Findings<'_> {
    fn add(&mut self, severity: Severity, what: String, remedy: impl Into<String>) {
        self.all.push(Finding {
            node: self.view.node.name.clone(),
            severity,
            what,
            remedy: remedy.into(),
        });
    }

    /// A node answers its pods' ARP requests for their gateway by proxy, which it does only for addresses that it would
    /// route to another device: normally by the default route (projectcalico/calico#3270).
    fn pods_gateway(&mut self, sysctls: &Sysctls) {
        let workload = |ifindex| self.view.pods.iter().any(|pod| Some(pod.ifindex) == ifindex);
        let gateway = IpAddr::from(POD_GATEWAY);
        let routed = self.view.snapshot.routes.iter().any(|entry| {
            entry.kind == Type::Unicast && entry.destination.contains(&gateway) && !workload(entry.oif)
        });
        let default = self.view.snapshot.routes.iter().any(|entry| {
            entry.kind == Type::Unicast
                && entry.destination.prefix_len() == 0
                && entry.destination.addr().is_ipv4()
        });
        if !routed {
            self.add(
                Severity::Problem,
                "There is no default route, so the node does not answer its pods' ARP requests for their gateway \
                 169.254.1.1, and no packet leaves a pod."
                    .to_owned(),
                "Add a default route (ip route add default via ADDRESS).",
            );
        } else if !default {
            self.add(
                Severity::Note,
                "There is no default route: pods reach the cluster and nothing beyond it.".to_owned(),
                "Add a default route if pods are to reach other networks.",
            );
        }
        let silent = self.workload_names(|name| sysctls.is(&format!("ipv4/conf/{name}/proxy_arp"), "0"));
        if !silent.is_empty() {
            self.add(
                Severity::Problem,
                format!("Proxy ARP is off on {}: the pods there find no gateway.", silent.join(", ")),
                "Restart calico-node, whose Felix sets net.ipv4.conf.INTERFACE.proxy_arp=1, and find out what unset it.",
            );
        }
    }

    fn forwarding(&mut self, sysctls: &Sysctls) {
        if sysctls.is("ipv4/ip_forward", "0") {
            self.add(
                Severity::Problem,
                "IPv4 forwarding is off: packets from and to pods end here.".to_owned(),
                "Set net.ipv4.ip_forward=1, and find out what unset it.",
            );
        } else {
            let off = self.workload_names(|name| sysctls.is(&format!("ipv4/conf/{name}/forwarding"), "0"));
            if !off.is_empty() {
                self.add(
                    Severity::Problem,
                    format!(
                        "IPv4 forwarding is off on {}: packets of the pods there end here.",
                        off.join(", ")
                    ),
                    "Set net.ipv4.conf.INTERFACE.forwarding=1, and find out what unset it.",
                );
            }
        }
        let v6 = self
            .view
            .pods
            .iter()
            .flat_map(|pod| &pod.addresses)
            .any(IpAddr::is_ipv6);
        if v6 && sysctls.is("ipv6/conf/all/forwarding", "0") {
            self.add(
                Severity::Problem,
                "IPv6 forwarding is off, and pods have IPv6 addresses: their packets end here.".to_owned(),
                "Set net.ipv6.conf.all.forwarding=1.",
            );
        }
    }

    /// Felix ends itself when it finds loose reverse path filtering, unless `ignoreLooseRPF` is set, because a pod could
    /// then use others' addresses (`felix/dataplane/linux/endpoint_mgr.go`).
    fn reverse_path(&mut self, sysctls: &Sysctls) {
        let loose: Vec<_> = ["all", "default"]
            .into_iter()
            .filter(|scope| sysctls.is(&format!("ipv4/conf/{scope}/rp_filter"), "2"))
            .map(|scope| format!("net.ipv4.conf.{scope}.rp_filter"))
            .collect();
        if !loose.is_empty() {
            self.add(
                Severity::Note,
                format!(
                    "Reverse path filtering is loose ({}=2): Felix refuses to start so.",
                    loose.join("=2, ")
                ),
                "Set it to 1 or 0, or set Felix's ignoreLooseRPF.",
            );
        }
    }

    fn tunnels(&mut self) {
        let view = self.view;
        for interface in view
            .interfaces
            .iter()
            .filter(|interface| interface.role == Role::Tunnel)
        {
            let Some(link) = view.snapshot.link(interface.ifindex) else {
                continue;
            };
            if !link.up() {
                self.add(
                    Severity::Problem,
                    format!(
                        "The tunnel {} is down: no packet reaches other nodes through it.",
                        link.name
                    ),
                    format!(
                        "Restart calico-node, or set it up (ip link set {} up).",
                        link.name
                    ),
                );
            }
            if !interface
                .addresses
                .iter()
                .any(|&address| super::anatomy::global(address))
            {
                self.add(
                    Severity::Note,
                    format!("The tunnel {} has no address: the node's own packets to remote pods have another source.", link.name),
                    "Restart calico-node, unless bpfOverlayHostSourceIP is HostAddress, where it is meant so.",
                );
            }
            for uplink in view
                .interfaces
                .iter()
                .filter(|interface| interface.role == Role::Uplink)
            {
                let Some(overhead) = overhead(link).filter(|overhead| link.mtu + overhead > uplink.mtu)
                else {
                    continue;
                };
                self.add(
                    Severity::Problem,
                    format!(
                        "The tunnel {} has MTU {} and adds {overhead} bytes, but {} carries only {}: long packets are lost \
                         or fragmented.",
                        link.name, link.mtu, uplink.name, uplink.mtu
                    ),
                    format!("Set Calico's MTU to {} or less.", uplink.mtu.saturating_sub(overhead)),
                );
            }
        }
    }

    fn remote_blocks(&mut self) {
        let view = self.view;
        for route in view
            .routes
            .iter()
            .filter(|route| view.remote_blocks.contains(&route.prefix))
        {
            // With `external` set, the destination comes with each packet (Calico's eBPF dataplane).
            let external = route
                .ifindex
                .and_then(|ifindex| view.snapshot.link(ifindex)?.vxlan);
            let external = external.is_some_and(|vxlan| vxlan.collect_metadata);
            if route.encap == Some(EncapKind::Vxlan) && route.remote_node.is_none() && !external {
                let gateway = route
                    .gateway
                    .map_or_else(String::new, |gateway| format!(" {gateway}"));
                self.add(
                    Severity::Problem,
                    format!(
                        "VXLAN does not know which node has the gateway{gateway}: packets to {} are lost.",
                        route.prefix
                    ),
                    "Restart calico-node, whose Felix writes the neighbour and forwarding entries.",
                );
            }
        }
        for remote in
            super::anatomy::sorted(view.routes.iter().filter_map(|route| route.remote_node).collect())
        {
            let reachable = view
                .snapshot
                .routes
                .iter()
                .any(|entry| entry.kind == Type::Unicast && entry.destination.contains(&remote));
            if !reachable {
                self.add(
                    Severity::Problem,
                    format!("There is no route to the node {remote}: packets to its pods are lost."),
                    "Restore the route to the nodes' network.",
                );
            }
        }
    }

    fn workloads(&mut self) {
        let view = self.view;
        for link in view.devices_without_pod() {
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
            self.add(
                Severity::Problem,
                format!("{state} {}{why}: its pod has no network.", link.name),
                remedy,
            );
        }
        let tunnels = view
            .interfaces
            .iter()
            .filter(|interface| interface.role == Role::Tunnel);
        let Some(tunnel) = tunnels.min_by_key(|tunnel| tunnel.mtu) else {
            return;
        };
        let larger: Vec<_> = view
            .interfaces
            .iter()
            .filter(|interface| interface.role == Role::Workload && interface.mtu > tunnel.mtu)
            .map(|interface| interface.name.clone())
            .collect();
        if !larger.is_empty() {
            self.add(
                Severity::Note,
                format!(
                    "{} of {} workload interfaces have a larger MTU than the tunnel {} ({}): long packets depend on path MTU \
                     discovery.",
                    larger.len(),
                    view.pods.len(),
                    tunnel.name,
                    tunnel.mtu
                ),
                "Make these pods anew after the MTU was changed.",
            );
        }
    }

    fn names(&mut self) {
        let unnamed = self.view.pods.iter().filter(|pod| pod.name.is_none()).count();
        if unnamed > 0 {
            self.add(
                Severity::Note,
                format!("{unnamed} of {} pods have no known name and are shown by their addresses.", self.view.pods.len()),
                "Names come from /var/run/calico/endpoint-status (Calico 3.30 and later), /var/lib/cni/results or \
                 /var/log/pods on the node.",
            );
        }
    }

    fn workload_names(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let workloads = self
            .view
            .interfaces
            .iter()
            .filter(|interface| interface.role == Role::Workload);
        workloads
            .filter(|interface| wanted(&interface.name))
            .map(|interface| interface.name.clone())
            .collect()
    }
}

/// What a tunnel adds to a packet, in bytes (`felix/dataplane/linux/int_dataplane.go`, Calico 3.34).
fn overhead(link: &Link) -> Option<u32> {
    let v6 = link.name.contains("v6");
    Some(match super::anatomy::encap_of(link)? {
        EncapKind::Ipip => 20,
        EncapKind::Vxlan if v6 => 70,
        EncapKind::Vxlan => 50,
        EncapKind::Wireguard if v6 => 80,
        EncapKind::Wireguard => 60,
    })
}
