//! Makes the loss ledger of the kernel's counters and of what user space did with the records.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use crate::{
    event::{Attachment, AttachmentState, Hook, Ledger, LedgerRow, Netns},
    kernel::{Count, hooks},
};

/// Counts of user space, and the names of the nodes.
#[derive(Debug, Default)]
pub(super) struct Books {
    /// Per node; drops in namespaces that are no node's are kept under 0.
    nodes: FxHashMap<Netns, String>,
    /// The node of a pod's own namespace. What happens there is told of; the kernel side counts it with what belongs to no
    /// node, since only nodes have slots for it.
    pods: FxHashMap<Netns, Netns>,
    decoded: FxHashMap<(Netns, Hook), u64>,
    /// Hooks that were taken away and are not back yet, with the time they were last seen in place.
    away: FxHashMap<(Netns, Hook, u32), u64>,
    /// Time in which hooks were away that are back.
    unobserved: FxHashMap<(Netns, Hook), u64>,
}

impl Books {
    /// A node and its name.
    pub(super) fn name(&mut self, netns: Netns, name: String) {
        self.nodes.insert(netns, name);
    }

    /// A pod's own namespace and its node's.
    pub(super) fn pod(&mut self, netns: Netns, node: Netns) {
        self.pods.insert(netns, node);
    }

    /// Whether it is a node's namespace, or one of a pod of a node. 0, which is not known, may be.
    pub(super) fn is_ours(&self, netns: Netns) -> bool {
        let node = self.pods.get(&netns).unwrap_or(&netns);
        netns == 0 || self.nodes.contains_key(node)
    }

    /// A record was decoded.
    pub(super) fn decoded(&mut self, netns: Netns, hook: Hook) {
        *self.decoded.entry((netns, hook)).or_default() += 1;
    }

    /// A hook was attached or ceased to observe.
    pub(super) fn attachment(&mut self, attachment: &Attachment) {
        let Attachment {
            netns, ifindex, hook, ..
        } = *attachment;
        match attachment.state {
            AttachmentState::Lost => {
                let since = attachment.since.unwrap_or(attachment.time);
                self.away.entry((netns, hook, ifindex)).or_insert(since);
            }
            // Detached: its interface is gone, or observing ended.
            AttachmentState::Attached | AttachmentState::Detached => {
                if let Some(since) = self.away.remove(&(netns, hook, ifindex)) {
                    *self.unobserved.entry((netns, hook)).or_default() +=
                        attachment.time.saturating_sub(since);
                }
            }
        }
    }

    /// The ledger for these kernel counts.
    pub(super) fn ledger(
        &self,
        time: u64,
        exact: bool,
        counts: &[Count],
        dropped: &BTreeMap<(Netns, Hook), u64>,
    ) -> Ledger {
        let mut rows: FxHashMap<(Netns, Hook), LedgerRow> = FxHashMap::default();
        for count in counts {
            let key = (self.row_of(count.netns), count.hook);
            let row = rows.entry(key).or_default();
            row.seen += count.counters.seen;
            row.non_ip += count.counters.non_ip;
            row.out_of_scope += count.counters.out_of_scope;
            row.filtered += count.counters.filtered;
            row.ring_refused += count.counters.ring_refused;
            row.recorded += count.counters.recorded;
        }
        for (&(netns, hook), records) in &self.decoded {
            rows.entry((self.row_of(netns), hook)).or_default().decoded += records;
        }
        for (&(netns, hook), records) in dropped {
            rows.entry((self.row_of(netns), hook)).or_default().user_dropped += records;
        }
        for (&(netns, hook), nanoseconds) in &self.unobserved {
            let row = rows.entry((self.row_of(netns), hook)).or_default();
            row.unobserved_ns += nanoseconds;
        }
        for (&(netns, hook, _), since) in &self.away {
            let row = rows.entry((self.row_of(netns), hook)).or_default();
            row.unobserved_ns += time.saturating_sub(*since);
        }
        for (&(netns, hook), row) in &mut rows {
            row.node = self.nodes.get(&netns).cloned();
            row.netns = row.node.is_some().then_some(netns);
            hooks::row(hook).name.clone_into(&mut row.hook);
        }
        let mut rows: Vec<_> = rows.into_iter().collect();
        rows.sort_by(|((_, a_hook), a), ((_, b_hook), b)| (&a.node, a_hook).cmp(&(&b.node, b_hook)));
        Ledger {
            time,
            exact,
            rows: rows.into_iter().map(|(_, row)| row).collect(),
            evicted: 0,
        }
    }

    /// Where the kernel side counts what happens in a namespace: both sides of the sums have to be in one row.
    fn row_of(&self, netns: Netns) -> Netns {
        if self.nodes.contains_key(&netns) { netns } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use calitrace_ebpf::shared::Counters;

    use super::*;

    #[test]
    fn a_record_of_a_pods_own_namespace_is_in_the_row_that_counted_it() {
        let (node, pod, hook) = (1, 7, Hook::SkbClone);
        let mut books = Books::default();
        books.name(node, "minikube".to_owned());
        books.pod(pod, node);
        assert!(books.is_ours(pod) && books.is_ours(node) && books.is_ours(0) && !books.is_ours(8));
        books.decoded(node, hook);
        books.decoded(pod, hook);
        let recorded = Counters {
            seen: 1,
            recorded: 1,
            ..Counters::default()
        };
        // The kernel side knows no slot for the pod's namespace, and says 0.
        let counts = [node, 0].map(|netns| Count {
            netns,
            ifindex: 0,
            hook,
            counters: recorded,
        });
        let ledger = books.ledger(10, true, &counts, &BTreeMap::new());
        assert_eq!(ledger.rows.len(), 2);
        for row in ledger.rows {
            assert_eq!((row.recorded, row.decoded), (1, 1), "{:?}", row.node);
        }
    }

    #[test]
    fn the_time_without_a_hook_is_in_its_row() {
        let mut books = Books::default();
        books.name(1, "minikube".to_owned());
        let mut attachment = Attachment {
            time: 500,
            netns: 1,
            ifindex: 2,
            hook: Hook::UplinkIngress,
            state: AttachmentState::Lost,
            since: Some(300),
            others: Vec::new(),
        };
        let unobserved = |books: &Books, time| {
            let ledger = books.ledger(time, false, &[], &BTreeMap::new());
            ledger.rows.iter().map(|row| row.unobserved_ns).sum::<u64>()
        };
        assert_eq!(unobserved(&books, 600), 0);
        books.attachment(&attachment);
        assert_eq!(unobserved(&books, 600), 300, "still away");
        attachment = Attachment {
            time: 700,
            state: AttachmentState::Attached,
            since: None,
            ..attachment
        };
        books.attachment(&attachment);
        assert_eq!(unobserved(&books, 900), 400);
        books.attachment(&attachment);
        assert_eq!(unobserved(&books, 900), 400, "told again, it was not away");
    }
}
