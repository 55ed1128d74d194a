//! Address translation: which changes of a flow are one, with the evidence for it. A change that nothing supports is
//! taken for another packet.
//!
//! Within a node Linux translates the same `sk_buff` between its ingress and egress hooks (`nf_nat_ipv4_manip_pkt`,
//! `net/netfilter/nf_nat_proto.c`, 6.1): addresses, ports and echo ids change, nothing else of the packet does.

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
        let service_in =
            destination && (topology.is_service(before.dst) || topology.is_own(node, before.dst));
        let service_out = source && (topology.is_service(after.src) || topology.is_own(node, after.src));
        service_in || service_out || self.reverse(cluster, before) == Some(after)
    }

    fn reverse(&self, cluster: u32, before: &Flow) -> Option<&Flow> {
        self.recent
            .get(&(cluster, *before))
            .or_else(|| self.older.get(&(cluster, *before)))
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
