//! What makes logs of several machines one: their clocks, namespaces and clusters are made comparable.
//!
//! Knows the numbers in items that mean something on one machine only, and no files. The numbers of namespaces repeat
//! from machine to machine (the first one of each has the same), those of clusters from run to run.

use std::net::IpAddr;

use rustc_hash::FxHashMap;

use crate::{
    correlate::Offset,
    event::{ClockOffset, Fact, Item, Netns, Node},
};

/// How the numbers of one log become those of the merged one. The default changes nothing.
#[derive(Debug, Default)]
pub(super) struct Machine {
    /// How far its clock is ahead of another machine's, that one's of a third's, and so on to that of the first log.
    pub(super) ahead: Vec<Offset>,
    /// Distinguishes its namespaces: 0 for those of the first log's machine, which keep their numbers.
    pub(super) number: u32,
    /// Its clusters; one that is not there keeps its number.
    clusters: FxHashMap<u32, u32>,
}

impl Machine {
    /// A time of this log on the first one's clock.
    pub(super) fn time(&self, time: u64) -> u64 {
        self.ahead.iter().fold(time, |time, ahead| ahead.to_here(time))
    }

    /// What is to be known of the clock of a node of this log, in the log's own numbers.
    pub(super) fn clock_of(&self, node: &Node) -> Option<Item> {
        let ahead = i128::from(node.time) - i128::from(self.time(node.time));
        let bounds: Option<Vec<u64>> = self.ahead.iter().map(Offset::bound).collect();
        (!self.ahead.is_empty()).then(|| {
            Item::Fact(Fact::ClockOffset(ClockOffset {
                time: node.time,
                netns: node.netns,
                ahead_ns: i64::try_from(ahead).unwrap_or_default(),
                bound_ns: bounds.map(|bounds| bounds.iter().sum()),
            }))
        })
    }

    /// Rewrites an item of this log.
    pub(super) fn adopt(&self, item: &mut Item) {
        if let Some(time) = item.time_mut() {
            *time = self.time(*time);
        }
        if let Item::Fact(Fact::Node(node)) = item
            && let Some(cluster) = self.clusters.get(&node.cluster)
        {
            node.cluster = *cluster;
        }
        if self.number != 0 {
            // 0 is no namespace; but what was seen without one was seen on this machine. Inode numbers take the lower half.
            let seen = matches!(item, Item::Observation(_));
            item.namespaces_mut(|netns| {
                if *netns != 0 || seen {
                    *netns |= u64::from(self.number) << 32;
                }
            });
        }
    }
}

/// Finds the clusters that are one: a tunnel or route gateway of the one is an address of the other. `logs` are the
/// facts that each log begins with.
pub(super) fn join_clusters(machines: &mut [&mut Machine], logs: &[&[Item]]) {
    let mut of_address: FxHashMap<IpAddr, Vec<usize>> = FxHashMap::default();
    let mut classes: Vec<(usize, u32)> = Vec::new();
    let mut of_node: FxHashMap<(usize, Netns), usize> = FxHashMap::default();
    for (log, node) in facts(logs).filter_map(|(log, fact)| match fact {
        Fact::Node(node) => Some((log, node)),
        _ => None,
    }) {
        let class = (log, node.cluster);
        let index = classes
            .iter()
            .position(|known| *known == class)
            .unwrap_or(classes.len());
        if index == classes.len() {
            classes.push(class);
        }
        of_node.insert((log, node.netns), index);
        for address in &node.addresses {
            of_address.entry(*address).or_default().push(index);
        }
    }
    // Each class points to the lowest one it is joined to.
    let mut joined: Vec<usize> = (0..classes.len()).collect();
    for (log, fact) in facts(logs) {
        let Fact::Routes { netns, routes, .. } = fact else {
            continue;
        };
        let Some(&here) = of_node.get(&(log, *netns)) else {
            continue;
        };
        let gateways = routes
            .iter()
            .flat_map(|route| [route.gateway, route.remote_node])
            .flatten();
        for there in gateways.filter_map(|gateway| of_address.get(&gateway)).flatten() {
            // Two clusters of one log are two, whatever their addresses.
            if classes[*there].0 != log {
                let (low, high) = (joined[here].min(joined[*there]), joined[here].max(joined[*there]));
                joined
                    .iter_mut()
                    .filter(|class| **class == high)
                    .for_each(|class| *class = low);
            }
        }
    }
    for (class, (log, cluster)) in classes.iter().enumerate() {
        let number = u32::try_from(joined[class]).unwrap_or(u32::MAX);
        machines[*log].clusters.insert(*cluster, number);
    }
}

fn facts<'a>(logs: &[&'a [Item]]) -> impl Iterator<Item = (usize, &'a Fact)> {
    logs.iter().enumerate().flat_map(|(log, items)| {
        items.iter().filter_map(move |item| match item {
            Item::Fact(fact) => Some((log, fact)),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EncapKind, Ledger, LedgerRow, Node, Route, RouteKind};

    fn node(netns: Netns, cluster: u32, address: &str) -> Item {
        let addresses = vec![address.parse().unwrap()];
        Item::Fact(Fact::Node(Node {
            time: 1,
            netns,
            name: address.into(),
            cluster,
            addresses,
        }))
    }

    fn route(netns: Netns, remote_node: &str) -> Item {
        let route = Route {
            prefix: "10.244.205.192/26".parse().unwrap(),
            kind: RouteKind::Unicast,
            gateway: Some("10.244.205.192".parse().unwrap()),
            ifindex: Some(7),
            encap: Some(EncapKind::Vxlan),
            remote_node: Some(remote_node.parse().unwrap()),
        };
        Item::Fact(Fact::Routes {
            time: 1,
            netns,
            routes: vec![route],
        })
    }

    /// The clusters of the nodes of each log, after joining.
    fn clusters(mut logs: Vec<Vec<Item>>) -> Vec<Vec<u32>> {
        let mut machines: Vec<Machine> = logs.iter().map(|_| Machine::default()).collect();
        let begun: Vec<&[Item]> = logs.iter().map(Vec::as_slice).collect();
        join_clusters(&mut machines.iter_mut().collect::<Vec<_>>(), &begun);
        let cluster = |item: &Item| match item {
            Item::Fact(Fact::Node(node)) => Some(node.cluster),
            _ => None,
        };
        logs.iter_mut()
            .zip(&machines)
            .map(|(log, machine)| {
                for item in log.iter_mut() {
                    machine.adopt(item);
                }
                log.iter().filter_map(cluster).collect()
            })
            .collect()
    }

    #[test]
    fn nodes_that_route_to_each_other_are_one_cluster() {
        let one = vec![node(1, 1, "192.168.49.2"), route(1, "192.168.49.3")];
        let two = vec![node(1, 9, "192.168.49.3"), route(1, "192.168.49.2")];
        assert_eq!(clusters(vec![one, two]), [[0], [0]]);
    }

    #[test]
    fn equal_numbers_of_strangers_are_two_clusters() {
        let one = vec![node(1, 1, "192.168.49.2"), route(1, "192.168.49.3")];
        let two = vec![node(1, 1, "192.168.50.3"), route(1, "192.168.50.2")];
        assert_eq!(clusters(vec![one, two]), [[0], [1]]);
    }

    #[test]
    fn a_third_log_joins_by_either() {
        let one = vec![node(1, 1, "192.168.49.2")];
        let two = vec![node(1, 1, "192.168.49.3")];
        let three = vec![
            node(1, 1, "192.168.49.4"),
            route(1, "192.168.49.2"),
            route(1, "192.168.49.3"),
        ];
        assert_eq!(clusters(vec![one, two, three]), [[0], [0], [0]]);
    }

    #[test]
    fn namespaces_of_another_machine_are_others() {
        let machine = Machine {
            number: 2,
            ..Machine::default()
        };
        let mut fact = node(4_026_531_840, 1, "192.168.49.2");
        machine.adopt(&mut fact);
        let Item::Fact(Fact::Node(node)) = fact else {
            unreachable!()
        };
        assert_eq!(node.netns, 0x2_f000_0000);
        let rows = vec![
            LedgerRow {
                netns: Some(0),
                ..LedgerRow::default()
            },
            LedgerRow::default(),
        ];
        let mut ledger = Item::Ledger(Ledger {
            rows: rows.clone(),
            ..Ledger::default()
        });
        machine.adopt(&mut ledger);
        assert_eq!(
            ledger,
            Item::Ledger(Ledger {
                rows,
                ..Ledger::default()
            })
        );
    }
}
