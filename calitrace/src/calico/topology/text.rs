//! The topology for people: one paragraph a node, then the paths in traceroute's order.

use std::io::{Result, Write};

use super::{Certainty, Dataplane, Device, Node, Outcome, Path, Route, Step, Topology};
use crate::event::{EncapKind, Role, RouteKind};

pub(super) fn write(topology: &Topology, out: &mut dyn Write) -> Result<()> {
    for (at, node) in topology.nodes.iter().enumerate() {
        if at > 0 {
            writeln!(out)?;
        }
        write_node(node, out)?;
    }
    for path in &topology.paths {
        writeln!(out)?;
        write_path(path, out)?;
    }
    Ok(())
}

fn write_node(node: &Node, out: &mut dyn Write) -> Result<()> {
    writeln!(
        out,
        "node {}   network namespace {}   cluster {}",
        node.name, node.netns, node.cluster
    )?;
    writeln!(out, "  addresses  {}", join(&node.addresses))?;
    writeln!(out, "  services   {}", join(&node.services))?;
    let dataplane = node.dataplane.map_or("not known", Dataplane::name);
    writeln!(out, "  dataplane  {dataplane}")?;
    writeln!(out, "  devices")?;
    let width = node
        .devices
        .iter()
        .map(|device| device.name.len())
        .max()
        .unwrap_or_default();
    for device in &node.devices {
        let pod = node.pods.iter().find(|pod| pod.ifindex == device.ifindex);
        let pod = pod.map(|pod| {
            format!(
                "{} {}",
                pod.name.as_deref().unwrap_or("a pod without a known name,"),
                join(&pod.addresses)
            )
        });
        let what = pod.unwrap_or_else(|| join(&device.addresses));
        let line = format!(
            "    {:width$}  {:8}  {:9}  mtu {:5}  {what}",
            device.name,
            role(device.role),
            kind(device),
            device.mtu
        );
        writeln!(
            out,
            "{}{}",
            line.trim_end(),
            if device.up { "" } else { "  DOWN" }
        )?;
    }
    let others: Vec<&Route> = node.routes.iter().filter(|route| is_other(route, node)).collect();
    let blocks = node
        .local_blocks
        .iter()
        .chain(node.remote_blocks.iter().map(|block| &block.prefix));
    let prefixes = blocks.chain(others.iter().map(|route| &route.prefix));
    let width = prefixes
        .map(|prefix| prefix.to_string().len())
        .max()
        .unwrap_or_default();
    writeln!(out, "  blocks")?;
    for block in &node.local_blocks {
        writeln!(out, "    {:width$}  on this node", block.to_string())?;
    }
    for block in &node.remote_blocks {
        writeln!(out, "    {:width$}  {}", block.prefix.to_string(), reached(block))?;
    }
    writeln!(out, "  other routes")?;
    for route in others {
        writeln!(out, "    {:width$}  {}", route.prefix.to_string(), reached(route))?;
    }
    if !node.not_seen.is_empty() {
        writeln!(out, "  calitrace would not see")?;
    }
    for what in &node.not_seen {
        writeln!(out, "    {what}")?;
    }
    Ok(())
}

/// Neither a block's nor a pod's: those are told of before.
fn is_other(route: &Route, node: &Node) -> bool {
    let block = node.local_blocks.contains(&route.prefix) || node.remote_blocks.iter().any(|b| b == route);
    let pod = node
        .pods
        .iter()
        .any(|pod| pod.interface.is_some() && pod.interface == route.device);
    !block && !pod
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Workload => "workload",
        Role::Tunnel => "tunnel",
        Role::Uplink => "uplink",
        Role::Other => "other",
    }
}

fn kind(device: &Device) -> &str {
    device.kind.as_deref().unwrap_or("device")
}

pub(super) fn encap(kind: EncapKind) -> &'static str {
    match kind {
        EncapKind::Ipip => "IPIP",
        EncapKind::Vxlan => "VXLAN",
        EncapKind::Wireguard => "WireGuard",
    }
}

/// How a prefix is reached: `on node minikube-m02 (192.168.49.3), VXLAN via 10.244.205.192 dev vxlan.calico`.
fn reached(route: &Route) -> String {
    let mut parts = Vec::new();
    match route.kind {
        RouteKind::Unicast => {}
        RouteKind::Blackhole => parts.push("blackhole".to_owned()),
        RouteKind::Unreachable => parts.push("unreachable".to_owned()),
        RouteKind::Prohibit => parts.push("prohibit".to_owned()),
    }
    if let Some(node) = route.remote_node {
        parts.push(match &route.remote_name {
            Some(name) => format!("on node {name} ({node}),"),
            None => format!("on node {node},"),
        });
    }
    parts.extend(route.encap.map(|kind| encap(kind).to_owned()));
    parts.extend(route.gateway.map(|gateway| format!("via {gateway}")));
    parts.extend(route.device.as_ref().map(|device| format!("dev {device}")));
    parts.join(" ")
}

fn write_path(path: &Path, out: &mut dyn Write) -> Result<()> {
    let name = |pod: &Option<String>, address| pod.clone().unwrap_or_else(|| format!("{address}"));
    writeln!(
        out,
        "{} → {}   mtu {}{}",
        name(&path.from.pod, path.from.address),
        name(&path.to.pod, path.to.address),
        path.mtu,
        path.encap
            .map(|kind| format!("   {}", encap(kind)))
            .unwrap_or_default()
    )?;
    for line in hop_lines(path) {
        writeln!(out, "{line}")?;
    }
    match ending(path) {
        Some(ending) => writeln!(out, "    {ending}"),
        None => Ok(()),
    }
}

/// The lines of a traceroute, with the place of each.
pub(super) fn hop_lines(path: &Path) -> Vec<String> {
    let texts: Vec<String> = path
        .hops
        .iter()
        .map(|hop| {
            hop.address
                .map_or_else(|| "*".to_owned(), |address| address.to_string())
        })
        .collect();
    let width = texts.iter().map(String::len).max().unwrap_or_default();
    let line = |(hop, address): (&Step, &String)| {
        let place = hop.pod.as_ref().or(hop.node.as_ref()).map_or("", String::as_str);
        let inferred = if hop.certainty == Certainty::Inferred {
            "  (inferred)"
        } else {
            ""
        };
        let line = format!("{:2}  {address:width$}  {place}{inferred}", hop.ttl);
        line.trim_end().to_owned()
    };
    path.hops.iter().zip(&texts).map(line).collect()
}

/// How a path ends that does not lead to its receiver.
pub(super) fn ending(path: &Path) -> Option<String> {
    match path.outcome {
        Outcome::Delivered | Outcome::Left => None,
        Outcome::Blackhole => Some("ends in a blackhole: no pod has this address".to_owned()),
        Outcome::Unreachable => Some(format!("ends here: no route to {}", path.to.address)),
        Outcome::Loop => Some("never ends: the nodes' routes form a loop".to_owned()),
    }
}

fn join<T: ToString>(values: &[T]) -> String {
    values
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
