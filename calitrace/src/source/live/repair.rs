//! Looks after the attachments: one that somebody took away, or got in front of, is put back, and the time without it is
//! told. By clsact that happens whenever Felix attaches its eBPF dataplane to an interface: it deletes the qdisc.

use super::{attach::Site, clock, control::Control};
use crate::{
    event::AttachmentState,
    kernel::{AttachmentCheck, Checked},
};

/// How often a hook is put back to the outermost place. Two programs that both insist on it help nobody; from any place
/// it still observes.
const REPAIRS: u32 = 5;

/// What is known of a site from looking at it.
#[derive(Debug, Default)]
pub(super) struct Watched {
    /// When it was last seen in place (`CLOCK_MONOTONIC`, nanoseconds).
    seen: u64,
    /// The programs of others beside it.
    others: Vec<String>,
    /// How often it was put back to the outermost place.
    repaired: u32,
}

impl Control {
    /// Looks at every attachment. What was lost is let go of, so that [`Self::attach`] attaches it again.
    pub(super) fn check(&mut self) {
        // What is found in place now was there at this time.
        let time = clock::monotonic();
        let found = self.kernel.check(|netns, error| {
            // A namespace may vanish while it is looked at.
            log::debug!("the hooks in namespace {netns} cannot be looked at: {error:#}");
        });
        for Checked {
            netns,
            ifindex,
            hook,
            state,
            others,
        } in found
        {
            let site = Site { netns, ifindex, hook };
            if !self.sites.contains_key(&site) {
                continue;
            }
            match state {
                AttachmentCheck::InPlace => self.in_place(site, time, others),
                AttachmentCheck::Displaced => self.displaced(site, time, others),
                AttachmentCheck::Lost => self.lost(site),
                // Discovery finds that.
                AttachmentCheck::Gone => {}
            }
        }
    }

    /// A site was just attached.
    pub(super) fn put_in_place(&mut self, site: Site) {
        self.watched.entry(site).or_default().seen = clock::monotonic();
    }

    fn in_place(&mut self, site: Site, time: u64, others: Vec<String>) {
        let watched = self.watched.entry(site).or_default();
        watched.seen = time;
        if watched.others != others {
            watched.others.clone_from(&others);
            self.send_attachment(site, AttachmentState::Attached, None, others);
        }
    }

    fn displaced(&mut self, site: Site, time: u64, others: Vec<String>) {
        let repaired = self.watched.get(&site).map_or(0, |watched| watched.repaired);
        if repaired >= REPAIRS {
            return self.in_place(site, time, others);
        }
        let name = self.describe(site);
        let by = others.join(", ");
        if repaired + 1 == REPAIRS {
            log::warn!(
                "{name} is no longer the outermost ({by}); it was put back {repaired} times and stays as it is"
            );
        } else {
            log::warn!("{name} is no longer the outermost ({by}); attaching it again");
            // It observed until now.
            self.let_go(site, clock::monotonic());
        }
        self.watched.entry(site).or_default().repaired = repaired + 1;
    }

    fn lost(&mut self, site: Site) {
        log::warn!(
            "{} was taken away by another program; attaching it again",
            self.describe(site)
        );
        let Watched { seen, repaired, .. } = self.watched.remove(&site).unwrap_or_default();
        self.let_go(site, seen);
        self.watched.entry(site).or_default().repaired = repaired;
    }

    fn let_go(&mut self, site: Site, since: u64) {
        if let Err(error) = self.kernel.detach_tc(site.netns, site.ifindex, site.hook) {
            log::debug!("{error:#}");
        }
        self.sites.remove(&site);
        self.watched.remove(&site);
        self.send_attachment(site, AttachmentState::Lost, Some(since), Vec::new());
    }

    fn describe(&self, site: Site) -> String {
        format!(
            "the hook on {} of node {}",
            self.sites.get(&site).map_or("an interface", String::as_str),
            self.node_name(site.netns)
        )
    }
}
