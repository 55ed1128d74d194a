//! Which TCP segments a pod sends again. Knows sequence numbers in the order in which they left their sender; a segment
//! that comes out of order elsewhere is nothing new to it.

use std::hash::Hash;

use rustc_hash::FxHashMap;

use super::key;
use crate::event::{Flow, Packet, Transport};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// Flows that are remembered, and segments that were sent again; when there are more, the older half is forgotten.
const REMEMBERED: usize = 32_768;

/// What senders sent.
#[derive(Debug, Default)]
pub(super) struct Again {
    /// By flow: the sequence number behind all that was sent.
    next: Recent<u64, u32>,
    /// By flow and first sequence number: how often it was sent again.
    times: Recent<(u64, u32), u32>,
}

impl Again {
    /// Takes note of a packet where its sender sent it. Which retransmission of its first byte it is; none for what is sent
    /// for the first time, or takes no sequence numbers.
    pub(super) fn sent(&mut self, cluster: u32, flow: &Flow, packet: &Packet) -> Option<u32> {
        let Transport::Tcp {
            seq, flags, payload, ..
        } = packet.transport
        else {
            return None;
        };
        let numbers = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        if numbers == 0 || flags & RST != 0 {
            return None;
        }
        let (flow, end) = (key::stream(cluster, flow), seq.wrapping_add(numbers));
        let Some(next) = self.next.get(&flow) else {
            // Opened before observing began, perhaps: nothing is known of what was sent.
            self.next.insert(flow, end);
            return None;
        };
        // How far back it reaches, in the arithmetic of sequence numbers (RFC 9293 3.4).
        let back = next.wrapping_sub(seq).cast_signed();
        let again = if flags & SYN != 0 {
            // Another number is another connection.
            back == numbers.cast_signed()
        } else {
            // Keepalives of some systems carry the last byte once more (RFC 9293 3.8.4).
            back > 0 && !(back == 1 && numbers == 1 && flags & FIN == 0)
        };
        if !again || end.wrapping_sub(next).cast_signed() > 0 {
            self.next.insert(flow, end);
        }
        again.then(|| {
            let times = self.times.get(&(flow, seq)).unwrap_or_default() + 1;
            self.times.insert((flow, seq), times);
            times
        })
    }
}

/// The latest entries, at least [`REMEMBERED`] of them.
#[derive(Debug)]
struct Recent<K, V> {
    new: FxHashMap<K, V>,
    old: FxHashMap<K, V>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self {
            new: FxHashMap::default(),
            old: FxHashMap::default(),
        }
    }
}

impl<K: Eq + Hash, V: Copy> Recent<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        self.new.get(key).or_else(|| self.old.get(key)).copied()
    }

    fn insert(&mut self, key: K, value: V) {
        if self.new.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::sample;

    /// What each of these segments (first number, flags, payload) is, sent one after another.
    fn sent(segments: &[(u32, u8, u32)]) -> Vec<Option<u32>> {
        let mut again = Again::default();
        let segment = |(seq, flags, payload): &(u32, u8, u32)| {
            let transport = Transport::Tcp {
                src_port: 40_000,
                dst_port: 80,
                seq: *seq,
                ack: 1,
                flags: *flags,
                window: 500,
                tsval: None,
                payload: *payload,
            };
            let packet = sample::packet(6, payload + 52, transport);
            again.sent(1, &packet.flow(), &packet)
        };
        segments.iter().map(segment).collect()
    }

    #[test]
    fn what_reaches_back_is_sent_again() {
        const ACK: u8 = 16;
        let wrap = u32::MAX - 99;
        assert_eq!(
            sent(&[(wrap, ACK, 200), (100, ACK, 50), (100, ACK, 50), (100, ACK, 50)]),
            [None, None, Some(1), Some(2)]
        );
        // Cut otherwise than before, across the wrap.
        assert_eq!(
            sent(&[(wrap, ACK, 200), (0, ACK, 100), (100, ACK, 1)]),
            [None, Some(1), None]
        );
        // The end of it is new.
        assert_eq!(
            sent(&[
                (0, ACK, 100),
                (50, ACK, 100),
                (150, ACK | FIN, 0),
                (150, ACK | FIN, 0)
            ]),
            [None, Some(1), None, Some(1)]
        );
    }

    #[test]
    fn keepalives_acknowledgements_and_new_connections_are_not() {
        const ACK: u8 = 16;
        assert_eq!(
            sent(&[
                (0, ACK, 100),
                (99, ACK, 0),
                (99, ACK, 1),
                (100, ACK, 0),
                (100, ACK, 0)
            ]),
            [None; 5]
        );
        assert_eq!(
            sent(&[(7, SYN, 0), (7, SYN, 0), (8, ACK, 10), (3, SYN, 0), (4, ACK, 10)]),
            [None, Some(1), None, None, None]
        );
        assert_eq!(sent(&[(0, ACK, 100), (100, RST, 0), (100, RST, 0)]), [None; 3]);
    }
}
