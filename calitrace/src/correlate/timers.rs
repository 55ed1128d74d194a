//! Deadlines of open traces. Knows identities and times; what happens then is for others.

use std::collections::VecDeque;

use super::open::{Id, Reached};

/// Nanoseconds in a millisecond.
pub(super) const MILLISECOND: u64 = 1_000_000;

/// How long a trace stays open after something happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// It was delivered: a drop may follow within 50 ms (design: the verdict "delivered").
    Delivered,
    /// It was dropped, left or was answered: the answer, or its arrival back at the sender, may follow.
    Ended,
    /// It ended where it may be answered from afar, and was not yet. As long as a packet may be under way.
    Awaiting,
    /// It began: nothing under way takes longer.
    Begun,
    /// It was last seen on its way through a node, which holds it until it knows its neighbour's address: by default the
    /// kernel asks for it thrice, a second each (`MCAST_PROBES`, `RETRANS_TIME`; `arp_tbl`, `net/ipv4/arp.c`, and `nd_tbl`,
    /// `net/ipv6/ndisc.c`; 6.1).
    Waiting,
    /// A rule dropped it, and the rules are being read. A while at a time.
    Rules,
}

impl Hold {
    /// What follows on where a packet got to.
    pub(super) const fn after(reached: Reached) -> Self {
        match reached {
            Reached::Nothing => Self::Begun,
            // What has a node's address may be translated, and go on after all.
            Reached::Outside | Reached::Node => Self::Ended,
            Reached::Pod => Self::Delivered,
        }
    }

    const ALL: [Self; 6] = [
        Self::Delivered,
        Self::Ended,
        Self::Awaiting,
        Self::Begun,
        Self::Waiting,
        Self::Rules,
    ];

    /// Nanoseconds.
    pub(super) const fn length(self) -> u64 {
        match self {
            Self::Delivered => 50 * MILLISECOND,
            Self::Ended => 80 * MILLISECOND,
            Self::Awaiting | Self::Begun => 2000 * MILLISECOND,
            // After the time that it had from its beginning.
            Self::Waiting => 1500 * MILLISECOND,
            Self::Rules => 20 * MILLISECOND,
        }
    }
}

/// One queue for each length, so that each is in order of time by itself and nothing needs sorting.
#[derive(Debug, Default)]
pub(super) struct Timers {
    queues: [VecDeque<(u64, Id)>; Hold::ALL.len()],
}

impl Timers {
    /// Wakes for `id` when `hold` is over that starts at `time`. Times must not go back.
    pub(super) fn set(&mut self, id: Id, hold: Hold, time: u64) -> u64 {
        let deadline = time + hold.length();
        self.queues[hold as usize].push_back((deadline, id));
        deadline
    }

    /// The next deadline that is not after `now`.
    pub(super) fn due(&mut self, now: u64) -> Option<(u64, Id)> {
        let queue = self
            .queues
            .iter_mut()
            .filter(|queue| queue.front().is_some_and(|(deadline, _)| *deadline <= now))
            .min_by_key(|queue| queue.front().map(|(deadline, _)| *deadline))?;
        queue.pop_front()
    }

    /// The trace that began first, closed ones included.
    pub(super) fn oldest(&mut self) -> Option<Id> {
        let mut next = |hold: Hold| self.queues[hold as usize].pop_front();
        next(Hold::Waiting)
            .or_else(|| next(Hold::Begun))
            .map(|(_, id)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_in_order_of_time() {
        let mut timers = Timers::default();
        let id = |index| Id { index, generation: 0 };
        timers.set(id(0), Hold::Begun, 0);
        timers.set(id(1), Hold::Ended, 0);
        timers.set(id(2), Hold::Delivered, 10 * MILLISECOND);
        timers.set(id(3), Hold::Delivered, 31 * MILLISECOND);
        let mut order = Vec::new();
        while let Some((_, id)) = timers.due(100 * MILLISECOND) {
            order.push(id.index);
        }
        assert_eq!(order, [2, 1, 3]);
        assert_eq!(timers.due(2000 * MILLISECOND).map(|(_, id)| id.index), Some(0));
        assert_eq!(timers.due(u64::MAX), None);
    }
}
