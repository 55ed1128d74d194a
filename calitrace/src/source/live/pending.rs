//! Puts what several rings hold in order of time. Knows times, and not what was observed.

use crate::event::Observation;

/// Observations that older ones may follow, from a ring that was emptied later.
#[derive(Debug, Default)]
pub(super) struct Pending {
    observations: Vec<Observation>,
}

impl Pending {
    pub(super) fn push(&mut self, observation: Observation) {
        self.observations.push(observation);
    }

    /// The observations made before `time`, when all rings were begun to be emptied: no older ones follow. In order; of
    /// equal times the first pushed is the first.
    pub(super) fn before(&mut self, time: u64) -> impl ExactSizeIterator<Item = Observation> {
        self.observations.sort_by_key(|observation| observation.time);
        let count = self
            .observations
            .partition_point(|observation| observation.time < time);
        self.observations.drain(..count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Transport, sample};

    fn observed(time: u64, cpu: u16) -> Observation {
        Observation {
            cpu,
            ..sample::sent(time, sample::packet(47, 48, Transport::Other))
        }
    }

    #[test]
    fn rings_emptied_one_after_the_other_give_one_order() {
        let mut pending = Pending::default();
        // Emptying began at 20. The first ring had 10 and 18; before the second was reached, it got 25.
        for (time, cpu) in [(10, 0), (18, 0), (11, 1), (18, 1), (25, 1)] {
            pending.push(observed(time, cpu));
        }
        let order = |pending: &mut Pending, time| -> Vec<(u64, u16)> {
            let released = pending.before(time);
            released.map(|seen| (seen.time, seen.cpu)).collect()
        };
        assert_eq!(order(&mut pending, 20), [(10, 0), (11, 1), (18, 0), (18, 1)]);
        // What the first ring got meanwhile comes before what the second had by then.
        pending.push(observed(22, 0));
        assert_eq!(order(&mut pending, 30), [(22, 0), (25, 1)]);
        assert_eq!(order(&mut pending, u64::MAX), []);
    }
}
