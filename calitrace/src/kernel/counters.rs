//! The kernel side's counts, for the loss ledger.

use anyhow::Result;
use calitrace_ebpf::{Hook, shared::Counters};

use super::{instance::Totals, load::Kernel};
use crate::event::Netns;

/// What one interface's hook has counted since loading, detached ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// The namespace; 0 for what belongs to no namespace that is observed (drops elsewhere).
    pub netns: Netns,
    /// The interface; 0 for drops.
    pub ifindex: u32,
    /// The hook.
    pub hook: Hook,
    /// The counts, summed over the CPUs.
    pub counters: Counters,
}

impl Kernel {
    /// Every count. Exact once the hooks are detached; before, a packet under way may be missing in one of two sums.
    pub fn counters(&self) -> Result<Vec<Count>> {
        let mut totals = Totals::new();
        for instance in self.instances.values() {
            instance.collect(&mut totals)?;
        }
        let count = |((netns, ifindex, hook), counters)| Count {
            netns,
            ifindex,
            hook,
            counters,
        };
        Ok(totals.into_iter().map(count).collect())
    }
}
