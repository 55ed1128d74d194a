//! What people see of packet traces: flow traces and probe runs, as [`Block`]s, and when each is due.
//!
//! Pure: packet traces and time in, blocks out. Knows no output and reads no clock; its time is that of the traces and
//! ticks, `CLOCK_MONOTONIC` nanoseconds.

mod block;
mod flows;
mod probe;
mod way;

#[cfg(test)]
pub(crate) mod sample;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use block::{Block, Counts, Kind, Line, Reading};
pub use way::Step;

use self::{flows::Flows, probe::Runs};
use crate::{
    correlate::{PacketTrace, Verdict},
    event::Transport,
};

/// One second.
const SECOND: u64 = 1_000_000_000;

/// Every flow and probe run there is something to show of.
#[derive(Debug, Default)]
pub struct Views {
    flows: Flows,
    runs: Runs,
}

impl Views {
    /// Takes a packet trace that closed.
    pub fn push(&mut self, trace: &Arc<PacketTrace>) {
        // An ICMP error is shown as the answer to the packet it quotes; for itself only where it did not arrive.
        if matches!(trace.packet.transport, Transport::IcmpError { .. })
            && !matches!(trace.verdict, Verdict::Dropped | Verdict::Lost)
        {
            return;
        }
        if !self.runs.push(trace) {
            self.flows.push(trace);
        }
    }

    /// Appends the blocks that are due at `now`: a flow's when three of its packets are closed or after 1 s of
    /// silence, later again when its path or verdict changed, at most once a second; a probe run's when it is over.
    pub fn due(&mut self, now: u64, blocks: &mut Vec<Block>) {
        self.runs.due(now, blocks, &mut self.flows);
        self.flows.due(now, &self.runs, blocks);
    }

    /// Appends what was not shown yet, or changed since: nothing more will come.
    pub fn finish(&mut self, blocks: &mut Vec<Block>) {
        self.runs.due(u64::MAX, blocks, &mut self.flows);
        self.flows.finish(&self.runs, blocks);
    }

    /// Flows of which more packets failed after they were shown last, as they stand: what failed alike was not worth
    /// another block.
    #[must_use]
    pub fn grown(&self) -> Vec<Block> {
        self.flows.grown()
    }

    /// The flows as they stand, the one that changed last first, those in trouble before the others; only such as
    /// have been due. At most `limit` are made into blocks; the second number counts all there are.
    #[must_use]
    pub fn latest(&self, limit: usize) -> (Vec<Block>, usize) {
        self.flows.latest(limit)
    }
}
