//! What was observed and what was lost, over time: whether the absence of an observation means anything.

use rustc_hash::FxHashMap;

use crate::event::{Attachment, AttachmentState, Hook, Ledger, Netns};

/// Spans of loss that are remembered: an hour of seconds. When there are more, the oldest two become one.
const SPANS: usize = 3600;

/// Attachments of hooks, and the spans of time in which records were lost.
#[derive(Debug, Default)]
pub(super) struct Ledgers {
    /// Since when each interface of a node has been observed.
    attached: FxHashMap<(Netns, Hook), FxHashMap<u32, u64>>,
    /// TC programs of others beside hooks.
    others: FxHashMap<(Netns, u32, Hook), Vec<String>>,
    /// Time and losses of the last ledger.
    last: (u64, u64),
    spans: Vec<(u64, u64)>,
}

impl Ledgers {
    /// A hook began or ceased to observe.
    pub(super) fn attachment(&mut self, attachment: &Attachment) {
        let interfaces = self
            .attached
            .entry((attachment.netns, attachment.hook))
            .or_default();
        let site = (attachment.netns, attachment.ifindex, attachment.hook);
        match attachment.state {
            AttachmentState::Attached => {
                if attachment.others.is_empty() {
                    self.others.remove(&site);
                } else {
                    self.others.insert(site, attachment.others.clone());
                }
                interfaces.entry(attachment.ifindex).or_insert(attachment.time);
            }
            AttachmentState::Detached | AttachmentState::Lost => {
                interfaces.remove(&attachment.ifindex);
            }
        }
    }

    /// The next ledger. Packets that a budget left out are missing, too.
    pub(super) fn ledger(&mut self, ledger: &Ledger) {
        let lost = ledger.lost() + ledger.rows.iter().map(|row| row.over_budget).sum::<u64>();
        let (since, before) = self.last;
        if lost > before {
            if self.spans.len() >= SPANS {
                self.spans[1].0 = self.spans[0].0;
                self.spans.remove(0);
            }
            self.spans.push((since, ledger.time));
        }
        self.last = (ledger.time, lost.max(before));
    }

    /// Whether records may have been lost between the two times.
    pub(super) fn lost(&self, from: u64, to: u64) -> bool {
        self.spans
            .iter()
            .rev()
            .any(|(start, end)| *start <= to && *end >= from)
    }

    /// The TC programs of others beside a hook.
    pub(super) fn others(&self, netns: Netns, ifindex: u32, hook: Hook) -> &[String] {
        self.others
            .get(&(netns, ifindex, hook))
            .map_or(&[], Vec::as_slice)
    }

    /// Whether a ledger has come since `time`: before that nobody can say that nothing was lost by then. What was
    /// attached all the time is known by then, too: a ledger follows a look at the hooks.
    pub(super) fn reaches(&self, time: u64) -> bool {
        self.last.0 >= time
    }

    /// Whether `hook` has observed each of the node's interfaces of its kind since `time`.
    pub(super) fn observed_since(&self, node: Netns, hook: Hook, time: u64) -> bool {
        self.attached.get(&(node, hook)).is_some_and(|interfaces| {
            !interfaces.is_empty() && interfaces.values().all(|since| *since <= time)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::LedgerRow;

    fn ledger(time: u64, refused: u64) -> Ledger {
        Ledger {
            time,
            exact: false,
            rows: vec![LedgerRow {
                ring_refused: refused,
                ..LedgerRow::default()
            }],
            evicted: 0,
        }
    }

    #[test]
    fn a_growing_count_makes_the_span_before_it_uncertain() {
        let mut ledgers = Ledgers::default();
        ledgers.ledger(&ledger(100, 0));
        ledgers.ledger(&ledger(200, 5));
        ledgers.ledger(&ledger(300, 5));
        assert!(!ledgers.lost(0, 99));
        assert!(ledgers.lost(150, 160));
        assert!(!ledgers.lost(201, 400));
    }

    #[test]
    fn an_interface_attached_later_leaves_a_gap() {
        let mut ledgers = Ledgers::default();
        let mut attachment = Attachment {
            time: 10,
            netns: 1,
            ifindex: 2,
            hook: Hook::UplinkIngress,
            state: AttachmentState::Attached,
            since: None,
            others: Vec::new(),
        };
        assert!(!ledgers.observed_since(1, Hook::UplinkIngress, 20));
        ledgers.attachment(&attachment);
        assert!(ledgers.observed_since(1, Hook::UplinkIngress, 20));
        assert!(!ledgers.observed_since(1, Hook::UplinkIngress, 5));
        attachment.state = AttachmentState::Lost;
        ledgers.attachment(&attachment);
        assert!(!ledgers.observed_since(1, Hook::UplinkIngress, 20));
    }
}
