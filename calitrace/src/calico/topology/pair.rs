//! The two ends of a path as a user names them, and what they are: which pod, of which node, and which addresses.

use std::net::IpAddr;

use anyhow::{Result, bail};

use super::path::Walker;
use super::{Masquerade, Path, service, unseen};
use crate::{
    calico::{doctor::Firewall, view::NodeView},
    event,
    netfilter::{Asked, Device, States},
};

/// An end of a path, as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A pod: `namespace/name`.
    Pod(String),
    /// An address: a pod's, a service's, or any other.
    Address(IpAddr),
}

/// Names that are told beside one that is not there.
const NEAR: usize = 3;

/// The paths between two places: one for each address family that both have, and for a service's address one for each pod
/// behind it.
pub(super) fn paths(nodes: &[NodeView], from: &Place, to: &Place) -> Result<Vec<Path>> {
    let walker = Walker::new(nodes)?;
    let (start, pod) = sender(nodes, from)?;
    let firewall = start.handle.run(Firewall::read);
    let receivers = receiver(nodes, start, to)?;
    let mut paths = Vec::new();
    for v6 in [false, true] {
        let of_family = |addresses: &[IpAddr]| addresses.iter().copied().find(|a| a.is_ipv6() == v6);
        let sender = match from {
            Place::Address(address) => of_family(&[*address]),
            Place::Pod(_) => of_family(&pod.addresses),
        };
        let (Some(sender), Some(receiver)) = (sender, of_family(&receivers)) else {
            continue;
        };
        if sender == receiver {
            bail!("{receiver} is the sender's own address: a packet to it does not leave the pod");
        }
        let rules = firewall.as_ref().map(|read| if v6 { &read.v6 } else { &read.v4 });
        let translated = match rules {
            Ok(rules) => service::translations(rules, receiver),
            Err(_) => Vec::new(),
        };
        if translated.is_empty() {
            known_service(start, receiver, rules.map(String::as_str))?;
            paths.push(walker.path(start, pod, sender, receiver)?);
        }
        for (pod_behind, service) in translated {
            let mut path = walker.path(start, pod, sender, pod_behind)?;
            // Answers have the address back that the packet was sent to.
            for hop in path.hops.iter_mut().filter(|hop| hop.address == Some(pod_behind)) {
                hop.address = Some(service.address);
            }
            path.service = Some(service);
            paths.push(path);
        }
    }
    if paths.is_empty() {
        bail!("{from} and {to} have no address family in common");
    }
    for path in &mut paths {
        if let Ok(firewall) = &firewall {
            path.masquerade = masquerade(start, path, firewall)?;
        }
        path.not_seen = unseen::told(nodes, path);
    }
    if let Err(error) = &firewall {
        log::warn!(
            "whether the node {} translates addresses is not known: {error:#}",
            start.node.name
        );
    }
    Ok(paths)
}

/// The pod that sends, and its node.
fn sender<'a>(nodes: &'a [NodeView], from: &Place) -> Result<(&'a NodeView, &'a event::Pod)> {
    let found = pods(nodes, from);
    match found.as_slice() {
        [one] => Ok(*one),
        [] => match from {
            Place::Pod(name) => bail!("{}", unknown(nodes, name)),
            Place::Address(address) => bail!(
                "no pod of the nodes looked at ({}) has the address {address}, and a path begins at a pod; calitrace \
                 topology lists them",
                names(nodes)
            ),
        },
        several => bail!("{}", ambiguous(from, several)),
    }
}

/// The addresses of who receives, as the sender's cluster has them.
fn receiver(nodes: &[NodeView], start: &NodeView, to: &Place) -> Result<Vec<IpAddr>> {
    let name = match to {
        Place::Address(address) => return Ok(vec![*address]),
        Place::Pod(name) => name,
    };
    let found = pods(nodes, to);
    let near: Vec<_> = found
        .iter()
        .copied()
        .filter(|(node, _)| node.node.cluster == start.node.cluster)
        .collect();
    match (near.as_slice(), found.as_slice()) {
        ([(_, pod)], _) => Ok(pod.addresses.clone()),
        ([], []) => bail!("{}", unknown(nodes, name)),
        ([], [(node, _), ..]) => bail!(
            "the pod {name} is on the node {} of another cluster than the sender's node {}",
            node.node.name,
            start.node.name
        ),
        (several, _) => bail!("{}", ambiguous(to, several)),
    }
}

fn pods<'a>(nodes: &'a [NodeView], place: &Place) -> Vec<(&'a NodeView, &'a event::Pod)> {
    let is_it = |pod: &&event::Pod| match place {
        Place::Pod(name) => pod.name.as_ref() == Some(name),
        Place::Address(address) => pod.addresses.contains(address),
    };
    let all = nodes
        .iter()
        .flat_map(|node| node.pods.iter().map(move |pod| (node, pod)));
    all.filter(|(_, pod)| is_it(pod)).collect()
}

fn ambiguous(place: &Place, found: &[(&NodeView, &event::Pod)]) -> String {
    let each = found.iter().map(|(node, pod)| {
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        format!(
            "{} on the node {} (cluster {}, network namespace {})",
            addresses.join(", "),
            node.node.name,
            node.node.cluster,
            node.netns()
        )
    });
    let each: Vec<String> = each.collect();
    format!(
        "{place} is more than one pod: {}; choose one by its address, or its node by --node or --netns",
        each.join("; ")
    )
}

fn unknown(nodes: &[NodeView], name: &str) -> String {
    let known: Vec<&str> = nodes
        .iter()
        .flat_map(|node| &node.pods)
        .filter_map(|pod| pod.name.as_deref())
        .collect();
    let near = near(&known, name);
    let hint = if near.is_empty() {
        "calitrace topology lists them".to_owned()
    } else {
        format!("there is {}", near.join(", "))
    };
    format!(
        "no pod {name} is known on the nodes looked at ({}): {hint}. A pod of another node has no name here: give its address",
        names(nodes)
    )
}

fn names(nodes: &[NodeView]) -> String {
    let names: Vec<&str> = nodes.iter().map(|node| node.node.name.as_str()).collect();
    names.join(", ")
}

/// Names that may have been meant, the likeliest first: with a few letters changed, with the same pod name in another
/// namespace, or beginning with it.
fn near<'a>(known: &[&'a str], wanted: &str) -> Vec<&'a str> {
    let pod = |name: &'a str| name.split_once('/').map_or(name, |(_, pod)| pod);
    let wanted_pod = wanted.split_once('/').map_or(wanted, |(_, pod)| pod);
    let mut near: Vec<(usize, &str)> = known
        .iter()
        .filter_map(|&name| {
            let changes = distance(name, wanted);
            if name.starts_with(wanted) || pod(name) == wanted_pod {
                Some((0, name))
            } else {
                (changes <= 3.min(wanted_pod.len() / 2)).then_some((changes, name))
            }
        })
        .collect();
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(NEAR).map(|(_, name)| name).collect()
}

/// How many letters are to be added, taken away or replaced (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (at, letter) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = at + 1;
        for (column, wanted) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *wanted);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

/// A service's address that no rule translates: its path cannot be told.
fn known_service(start: &NodeView, address: IpAddr, rules: Result<&str, &anyhow::Error>) -> Result<()> {
    let Some(prefix) = start.services.iter().find(|prefix| prefix.contains(&address)) else {
        return Ok(());
    };
    let why = match rules {
        Ok(rules) if service::is_rejected(rules, address) => {
            "no pod is behind it: the node rejects packets to it".to_owned()
        }
        Ok(_) => "no iptables rule of this node says what is behind it. There may be no such service; kube-proxy in its \
                  nftables and IPVS modes and Calico's eBPF dataplane keep it elsewhere: give the address of a pod behind it"
            .to_owned(),
        Err(error) => format!("the node's rules cannot be read: {error:#}"),
    };
    bail!("{address} is an address for services ({prefix}), and {why}")
}

/// Whether the first node gives the packet its own address instead of the pod's.
fn masquerade(start: &NodeView, path: &Path, firewall: &Firewall) -> Result<Option<Masquerade>> {
    let (from, to) = (path.from.address, path.to.address);
    let decision = start.lookup.route_to(to)?;
    let output = decision
        .as_ref()
        .and_then(|decision| start.snapshot.link(decision.oif?));
    let output = output.map_or(Device::Unknown, |link| Device::Is(&link.name));
    let packet = Asked {
        src: from,
        dst: to,
        proto: if from.is_ipv6() { 58 } else { 1 },
        ports: None,
        icmp: None,
        input: Device::None,
        output,
        states: States::OPENING,
        is_from_there: false,
        local: &start.node.addresses,
    };
    if start.node.addresses.contains(&to) {
        return Ok(Some(Masquerade {
            applies: false,
            address: None,
        }));
    }
    // To a service kube-proxy may masquerade, too: a pod's packets to itself, or all.
    let applies = firewall
        .masquerades(&packet)
        .filter(|applies| *applies || path.service.is_none());
    Ok(applies.map(|applies| Masquerade {
        applies,
        address: decision.filter(|_| applies).and_then(|decision| decision.source),
    }))
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pod(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_near_a_mistyped_one_are_told() {
        let known = [
            "default/web-0",
            "default/web-1",
            "shop/cart-6bf9",
            "kube-system/coredns-7d4f",
        ];
        assert_eq!(near(&known, "default/wbe-0"), ["default/web-0"]);
        assert_eq!(near(&known, "default/web"), ["default/web-0", "default/web-1"]);
        assert_eq!(near(&known, "defautl/cart-6bf9"), ["shop/cart-6bf9"]);
        assert_eq!(near(&known, "default/nginx"), [""; 0]);
    }

    #[test]
    fn distances_are_changes() {
        for (one, other, changes) in [
            ("", "abc", 3),
            ("kitten", "sitting", 3),
            ("same", "same", 0),
            ("ab", "ba", 2),
        ] {
            assert_eq!(distance(one, other), changes, "{one} {other}");
            assert_eq!(distance(other, one), changes, "{other} {one}");
        }
    }
}
