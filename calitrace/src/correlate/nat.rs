//! Address translation: which changes of a flow are one, with the evidence for it. A change that nothing supports is
//! taken for another packet.
//!
//! Within a node Linux translates the same `sk_buff` between its ingress and egress hooks (`nf_nat_ipv4_manip_pkt`,
//! `net/netfilter/nf_nat_proto.c`, 6.1): addresses, ports and echo ids change, nothing else of the packet does.

use std::net::IpAddr;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::{Endpoint, NatKind, key, open::Translation, topology::Topology};
use crate::event::{Flow, Netns};

/// Translated flows that are remembered; when there are more, the older half is forgotten.
const REMEMBERED: usize = 32_768;

/// Translations that were seen, to recognise those of the answers.
#[derive(Debug, Default)]
pub(super) struct Translations {
    /// What the answers to a translated flow look like before and after.
    recent: FxHashMap<(u32, Flow), Flow>,
    older: FxHashMap<(u32, Flow), Flow>,
    /// What the kernel said becomes of the packets of a flow on a node: the new destination, the new source.
    announced: FxHashMap<(Netns, Flow), [Option<IpAddr>; 2]>,
    /// Source and destination that the first fragment of a datagram got on a node. Later ones have no ports to tell whose they
    /// are, but go the same way.
    fragmented: FxHashMap<(Netns, Datagram), (IpAddr, IpAddr)>,
}

/// Names a fragmented datagram (RFC 791, RFC 8200 4.5): protocol, source, destination, identification.
type Datagram = (u8, IpAddr, IpAddr, u32);

fn datagram(flow: &Flow, ip_id: u32) -> Datagram {
    (flow.proto, flow.src, flow.dst, ip_id)
}

impl Translations {
    /// Whether `before` becoming `after` on `node` is a translation, given that it is the same `sk_buff` and packet part.
    pub(super) fn is_one(
        &self,
        topology: &Topology,
        cluster: u32,
        node: Netns,
        before: &Flow,
        after: &Flow,
    ) -> bool {
        if before.proto != after.proto {
            return false;
        }
        let destination = before.dst != after.dst || before.dst_port != after.dst_port;
        let source = before.src != after.src || before.src_port != after.src_port;
        // Each side that changed needs its own reason: a service, or the node itself.
        let known = |address| topology.is_service(address) || topology.is_own(node, address);
        (!destination || known(before.dst)) && (!source || known(after.src))
            || self.reverse(cluster, before) == Some(after)
            || self.is_announced(node, before, after)
    }

    /// Conntrack gives a connection a translation (`nf_nat_setup_info`). `flow` is what its packets look like so far.
    pub(super) fn announce(&mut self, node: Netns, flow: &Flow, destination: bool, address: IpAddr) {
        if self.announced.len() >= REMEMBERED {
            self.announced.clear();
        }
        let known = self.announced.entry((node, *flow)).or_default();
        known[usize::from(!destination)] = Some(address);
    }

    /// Whether that is what becomes of the packets of `before` on `node`. The source is set up with the destination
    /// translated already.
    fn is_announced(&self, node: Netns, before: &Flow, after: &Flow) -> bool {
        let announced = |flow: &Flow| self.announced.get(&(node, *flow)).copied().unwrap_or_default();
        let [destination, source] = announced(before);
        let between = Flow {
            dst: after.dst,
            dst_port: after.dst_port,
            ..*before
        };
        let [_, later] = announced(&between);
        let changed = |from: IpAddr, to: IpAddr, said: Option<IpAddr>| from == to || said == Some(to);
        (destination.is_some() || source.is_some() || later.is_some())
            && changed(before.dst, after.dst, destination)
            && changed(before.src, after.src, source.or(later))
    }

    /// The first fragment of a datagram was translated.
    pub(super) fn begin(&mut self, node: Netns, ip_id: u32, before: &Flow, after: &Flow) {
        if self.fragmented.len() >= REMEMBERED {
            self.fragmented.clear();
        }
        self.fragmented
            .insert((node, datagram(before, ip_id)), (after.src, after.dst));
    }

    /// Whether that is what becomes of a later fragment of the same datagram.
    pub(super) fn goes_on(&self, node: Netns, ip_id: u32, before: &Flow, after: &Flow) -> bool {
        let known = self.fragmented.get(&(node, datagram(before, ip_id)));
        before.proto == after.proto && known == Some(&(after.src, after.dst))
    }

    fn reverse(&self, cluster: u32, before: &Flow) -> Option<&Flow> {
        self.recent
            .get(&(cluster, *before))
            .or_else(|| self.older.get(&(cluster, *before)))
    }

    /// The flow of what comes back, as its sender writes it, as far as translations were seen.
    pub(super) fn back(&self, cluster: u32, flow: &Flow) -> Flow {
        key::reverse(self.reverse(cluster, flow).unwrap_or(flow))
    }

    /// A translation was seen: the answers will be translated back.
    pub(super) fn remember(&mut self, cluster: u32, before: &Flow, after: &Flow) {
        if self.recent.len() >= REMEMBERED {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent
            .insert((cluster, key::reverse(after)), key::reverse(before));
    }
}

/// The steps from one flow to another, shown by the sighting with index `at`.
pub(super) fn steps(node: Netns, at: usize, before: &Flow, after: &Flow) -> SmallVec<[Translation; 2]> {
    let ports = matches!(before.proto, 6 | 17 | 132);
    let destination = |flow: &Flow| Endpoint {
        address: flow.dst,
        port: ports.then_some(flow.dst_port),
    };
    let source = |flow: &Flow| Endpoint {
        address: flow.src,
        port: ports.then_some(flow.src_port),
    };
    let mut steps = SmallVec::new();
    if destination(before) != destination(after) {
        let (from, to) = (destination(before), destination(after));
        steps.push(Translation {
            kind: NatKind::Dnat,
            node,
            at,
            from,
            to,
        });
    }
    if source(before) != source(after) || before.src_port != after.src_port {
        let (from, to) = (source(before), source(after));
        steps.push(Translation {
            kind: NatKind::Snat,
            node,
            at,
            from,
            to,
        });
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Fact;

    const NODE: Netns = 7;

    fn flow(src: [u8; 4], dst: [u8; 4], dst_port: u16) -> Flow {
        Flow {
            proto: 6,
            src: src.into(),
            dst: dst.into(),
            src_port: 40_000,
            dst_port,
        }
    }

    #[test]
    fn a_service_address_is_evidence_and_any_other_is_not() {
        let mut topology = Topology::default();
        let prefixes = vec!["10.96.0.0/12".parse().unwrap()];
        topology.learn(&Fact::Services { time: 0, prefixes });
        let translations = Translations::default();
        let is_one = |before, after| translations.is_one(&topology, 1, NODE, &before, &after);
        let pod = flow([10, 244, 0, 1], [10, 244, 1, 1], 8080);
        assert!(is_one(flow([10, 244, 0, 1], [10, 96, 0, 10], 80), pod));
        assert!(!is_one(flow([10, 244, 0, 1], [10, 244, 2, 2], 80), pod));
        assert!(is_one(
            key::reverse(&pod),
            key::reverse(&flow([10, 244, 0, 1], [10, 96, 0, 10], 80))
        ));
    }

    #[test]
    fn a_translation_that_was_seen_is_evidence_for_that_of_the_answer() {
        let topology = Topology::default();
        let mut translations = Translations::default();
        let before = flow([10, 244, 0, 1], [172, 16, 0, 10], 80);
        let after = flow([10, 244, 0, 1], [10, 244, 1, 1], 8080);
        let (answer, translated) = (key::reverse(&after), key::reverse(&before));
        assert!(!translations.is_one(&topology, 1, NODE, &answer, &translated));
        translations.remember(1, &before, &after);
        assert!(translations.is_one(&topology, 1, NODE, &answer, &translated));
        assert!(
            !translations.is_one(&topology, 2, NODE, &answer, &translated),
            "another cluster"
        );
    }

    #[test]
    fn what_conntrack_announced_is_evidence_on_its_node_and_for_its_flow() {
        let topology = Topology::default();
        let mut translations = Translations::default();
        let before = flow([10, 244, 0, 1], [172, 16, 0, 10], 80);
        let after = flow([10, 244, 0, 1], [10, 244, 1, 1], 8080);
        translations.announce(NODE, &before, true, after.dst);
        assert!(translations.is_one(&topology, 1, NODE, &before, &after));
        assert!(!translations.is_one(&topology, 1, NODE + 1, &before, &after));
        let elsewhere = flow([10, 244, 0, 1], [10, 244, 1, 2], 8080);
        assert!(!translations.is_one(&topology, 1, NODE, &before, &elsewhere));
        // The source, too: masquerading.
        let masqueraded = flow([192, 168, 49, 2], [10, 244, 1, 1], 8080);
        assert!(!translations.is_one(&topology, 1, NODE, &before, &masqueraded));
        translations.announce(NODE, &after, false, masqueraded.src);
        assert!(translations.is_one(&topology, 1, NODE, &before, &masqueraded));
    }

    #[test]
    fn both_sides_translated_are_two_steps() {
        let before = flow([10, 244, 0, 1], [10, 96, 0, 10], 80);
        let after = flow([192, 168, 49, 2], [10, 244, 0, 1], 8080);
        let kinds: Vec<NatKind> = steps(NODE, 1, &before, &after)
            .iter()
            .map(|step| step.kind)
            .collect();
        assert_eq!(kinds, [NatKind::Dnat, NatKind::Snat]);
    }
}
