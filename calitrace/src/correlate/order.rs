//! Puts observations in order of time. Knows their times and nothing else about them.

use std::collections::VecDeque;

use crate::event::Observation;

/// Holds observations back until nothing older can follow.
///
/// Records come from several CPUs, almost in order; so a new one goes to the end or close to it. The observations
/// themselves stay where they are: only 16 bytes each are moved.
#[derive(Debug, Default)]
pub(super) struct Order {
    queue: VecDeque<(u64, u32)>,
    /// Those that are free have what was in them last: an observation is large, and is written over, not moved.
    slots: Vec<Observation>,
    free: Vec<u32>,
}

impl Order {
    /// Takes an observation. Of equal times the first taken is the first given back.
    pub(super) fn push(&mut self, observation: &Observation) {
        let time = observation.time;
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize].clone_from(observation);
            slot
        } else {
            self.slots.push(observation.clone());
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        };
        if self.queue.back().is_none_or(|(last, _)| *last <= time) {
            self.queue.push_back((time, slot));
        } else {
            let place = self.queue.partition_point(|(other, _)| *other <= time);
            self.queue.insert(place, (time, slot));
        }
    }

    /// The oldest observation, if it is not newer than `now`.
    pub(super) fn pop(&mut self, now: u64) -> Option<&Observation> {
        let (time, slot) = *self.queue.front()?;
        if time > now {
            return None;
        }
        self.queue.pop_front();
        self.free.push(slot);
        self.slots.get(slot as usize)
    }
}
