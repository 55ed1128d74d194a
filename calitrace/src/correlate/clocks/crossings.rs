//! What each machine saw of the packets between them, so little of it that logs of days fit.

use rustc_hash::FxHashMap;

use crate::{
    correlate::key,
    event::{Hook, Observation},
};

/// Packets of one direction that are kept of each machine; of more, a sample that is the same on all machines.
const KEPT: usize = 1 << 17;

/// What left and reached the nodes of one machine, and when.
#[derive(Debug, Default)]
pub struct Crossings {
    pub(super) left: Packets,
    pub(super) came: Packets,
    /// So many bits of a key are zero of what is kept.
    level: u32,
}

/// By content.
pub(super) type Packets = FxHashMap<u64, Noted>;

/// A packet, or the end of one, as one machine saw it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noted {
    /// When it was seen first.
    pub(super) time: u64,
    /// At the uplinks.
    pub(super) uplink: bool,
    /// Nothing else had the same content.
    pub(super) sole: bool,
}

impl Crossings {
    /// Takes note of an observation.
    pub fn note(&mut self, observation: &Observation) {
        use Hook::{TunnelEgress, TunnelIngress, UplinkEgress, UplinkIngress};
        let (packets, uplink) = match observation.hook {
            UplinkEgress | TunnelEgress => (&mut self.left, observation.hook == UplinkEgress),
            UplinkIngress | TunnelIngress => (&mut self.came, observation.hook == UplinkIngress),
            _ => return,
        };
        let packet = &observation.packet;
        let whole = (key::crossing(uplink, packet), true);
        let end = key::crossing_end(uplink, packet).map(|key| (key, false));
        let time = observation.time;
        for (key, sole) in [Some(whole), end].into_iter().flatten() {
            if key.leading_zeros() >= self.level {
                let noted = packets.entry(key).and_modify(|noted| {
                    noted.time = noted.time.min(time);
                    noted.sole = false;
                });
                noted.or_insert(Noted { time, uplink, sole });
            }
        }
        while self.left.len().max(self.came.len()) > KEPT {
            self.level += 1;
            for packets in [&mut self.left, &mut self.came] {
                packets.retain(|key, _| key.leading_zeros() >= self.level);
            }
        }
    }
}
