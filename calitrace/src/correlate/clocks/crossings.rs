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
    /// Its TTL then.
    pub(super) ttl: u8,
    /// Nothing else had the same content.
    pub(super) sole: bool,
}

impl Noted {
    /// The same content once more. With a lower TTL later it is the same packet, which came round again: a route leads in a
    /// circle.
    fn again(&mut self, time: u64, ttl: u8) {
        let mut passes = [(self.time, self.ttl), (time, ttl)];
        passes.sort_unstable();
        let [first, then] = passes;
        self.sole &= first.0 < then.0 && first.1 > then.1;
        (self.time, self.ttl) = first;
    }
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
        let (time, ttl) = (observation.time, packet.ttl);
        for (key, sole) in [Some(whole), end].into_iter().flatten() {
            if key.leading_zeros() >= self.level {
                let noted = packets.entry(key).and_modify(|noted| noted.again(time, ttl));
                noted.or_insert(Noted {
                    time,
                    uplink,
                    ttl,
                    sole,
                });
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

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(passes: [(u64, u8); 3]) -> Noted {
        let [(time, ttl), others @ ..] = passes;
        let mut noted = Noted {
            time,
            uplink: true,
            ttl,
            sole: true,
        };
        for (time, ttl) in others {
            noted.again(time, ttl);
        }
        noted
    }

    #[test]
    fn a_packet_that_comes_round_again_is_the_same_in_any_order_of_records() {
        for order in [
            [(1, 9), (2, 7), (3, 5)],
            [(2, 7), (3, 5), (1, 9)],
            [(3, 5), (1, 9), (2, 7)],
        ] {
            let noted = passes(order);
            assert_eq!((noted.time, noted.ttl, noted.sole), (1, 9, true), "{order:?}");
        }
    }

    #[test]
    fn packets_alike_whose_ttl_does_not_fall_are_several() {
        for order in [
            [(1, 9), (2, 7), (3, 9)],
            [(2, 7), (1, 5), (3, 4)],
            [(1, 9), (1, 8), (2, 7)],
        ] {
            let noted = passes(order);
            assert_eq!((noted.time, noted.sole), (1, false), "{order:?}");
        }
    }
}
