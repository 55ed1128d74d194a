//! Which TCP segments a pod sends again, and which ones carry nothing new: keepalives and acknowledgements. Knows sequence
//! numbers in the order in which they left their sender; a segment that comes out of order elsewhere is nothing new to it.

use std::hash::Hash;

use rustc_hash::FxHashMap;

use super::key;
use crate::event::{Flow, Packet, Transport};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Flows that are remembered, and segments that were sent again; when there are more, the older half is forgotten.
const REMEMBERED: usize = 32_768;

/// What a pod sends, beside what it sends for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Nothing to say: data for the first time, SYN, RST, another protocol.
    Ordinary,
    /// Data again: how often its first byte had been sent before.
    Again(u32),
    /// Without data, or with no more than one byte before what is to come: asks whether the other end is there.
    KeepAlive,
    /// The answer to that.
    KeepAliveAck,
    /// Acknowledges the same once more while data is missing: for the how manieth time.
    DuplicateAck(u32),
    /// Acknowledges, and carries nothing.
    Ack,
}

/// What senders sent.
#[derive(Debug, Default)]
pub(super) struct Again {
    /// By flow.
    sides: Recent<u64, Side>,
    /// By flow and first sequence number: how often it was sent again.
    times: Recent<(u64, u32), u32>,
}

/// What one side of a connection sent so far.
#[derive(Clone, Copy, Debug)]
struct Side {
    /// The sequence number behind all of it.
    next: u32,
    /// The latest acknowledgement.
    ack: u32,
    /// How often that was repeated while data was missing.
    duplicates: u32,
    /// The latest window.
    window: u16,
    /// The latest was a keepalive, and is not answered yet.
    probing: bool,
}

/// A TCP segment, as far as it matters here.
#[derive(Clone, Copy)]
struct Segment {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    /// Sequence numbers that it takes.
    numbers: u32,
}

impl Segment {
    /// None of another protocol.
    fn of(packet: &Packet) -> Option<Self> {
        let Transport::Tcp {
            seq,
            ack,
            flags,
            window,
            payload,
            ..
        } = packet.transport
        else {
            return None;
        };
        Some(Self {
            seq,
            ack,
            flags,
            window,
            numbers: payload
                .wrapping_add(u32::from(flags & SYN != 0))
                .wrapping_add(u32::from(flags & FIN != 0)),
        })
    }

    fn end(self) -> u32 {
        self.seq.wrapping_add(self.numbers)
    }

    fn is_pure_ack(self) -> bool {
        self.numbers == 0 && self.flags & ACK != 0
    }
}

impl Again {
    /// Takes note of a packet where its sender sent it. `back` is the flow of what the other end sends, as that one writes
    /// it.
    pub(super) fn sent(&mut self, cluster: u32, flow: &Flow, back: &Flow, packet: &Packet) -> Sent {
        let Some(segment) = Segment::of(packet).filter(|segment| segment.flags & RST == 0) else {
            return Sent::Ordinary;
        };
        let flow = key::stream(cluster, flow);
        let before = self.sides.get(&flow);
        let sent = if segment.is_pure_ack() {
            self.acknowledged(before, key::stream(cluster, back), segment)
        } else {
            self.took_numbers(before, flow, segment)
        };
        let Segment { ack, window, .. } = segment;
        // In the arithmetic of sequence numbers (RFC 9293 3.4). Another SYN is another connection.
        let is_further = |next: u32| segment.end().wrapping_sub(next).cast_signed() > 0;
        let next = match before {
            Some(side) if !is_further(side.next) && (segment.flags & SYN == 0 || sent != Sent::Ordinary) => {
                side.next
            }
            _ => segment.end(),
        };
        let duplicates = match (sent, before) {
            (Sent::DuplicateAck(times), _) => times,
            (_, Some(side)) if side.ack == ack => side.duplicates,
            _ => 0,
        };
        self.sides.insert(
            flow,
            Side {
                next,
                ack,
                duplicates,
                window,
                probing: sent == Sent::KeepAlive,
            },
        );
        sent
    }

    /// Data, SYN or FIN.
    fn took_numbers(&mut self, before: Option<Side>, flow: u64, segment: Segment) -> Sent {
        let Segment {
            seq, flags, numbers, ..
        } = segment;
        // Opened before observing began, perhaps: nothing is known of what was sent.
        let Some(side) = before.filter(|_| numbers > 0) else {
            return Sent::Ordinary;
        };
        // How far back it reaches.
        let back = side.next.wrapping_sub(seq).cast_signed();
        // Keepalives of some systems carry the last byte once more (RFC 9293 3.8.4).
        if back == 1 && numbers == 1 && flags & (SYN | FIN) == 0 {
            return Sent::KeepAlive;
        }
        let again = if flags & SYN != 0 {
            // Another number is another connection.
            back == numbers.cast_signed()
        } else {
            back > 0
        };
        if !again {
            return Sent::Ordinary;
        }
        let times = self.times.get(&(flow, seq)).unwrap_or_default() + 1;
        self.times.insert((flow, seq), times);
        Sent::Again(times)
    }

    /// An acknowledgement and nothing else. The terms are Wireshark's, and RFC 5681's for a duplicate: the other end has sent
    /// what is not acknowledged, and neither acknowledgement nor window have changed.
    fn acknowledged(&mut self, before: Option<Side>, back: u64, segment: Segment) -> Sent {
        let behind = before.map(|side| side.next.wrapping_sub(segment.seq));
        let other = self.sides.get(&back);
        if behind == Some(1) {
            // With the window closed it asks for that one (RFC 9293 3.8.6.1), and looks the same.
            let is_closed = other.is_some_and(|other| other.window == 0);
            return if is_closed { Sent::Ack } else { Sent::KeepAlive };
        }
        let (Some(other), None | Some(0)) = (other, behind) else {
            return Sent::Ack;
        };
        if other.probing && segment.ack == other.next {
            self.sides.insert(
                back,
                Side {
                    probing: false,
                    ..other
                },
            );
            return Sent::KeepAliveAck;
        }
        let is_missing = other.next.wrapping_sub(segment.ack).cast_signed() > 0;
        match before {
            Some(side) if is_missing && (side.ack, side.window) == (segment.ack, segment.window) => {
                Sent::DuplicateAck(side.duplicates + 1)
            }
            _ => Sent::Ack,
        }
    }
}

/// The latest entries, at least [`REMEMBERED`] of them.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
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
    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.new.get(key).or_else(|| self.old.get(key)).copied()
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
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

    /// The sides of a connection, and what each of these segments of theirs is.
    #[derive(Default)]
    struct Connection(Again);

    impl Connection {
        /// By the client, or the server.
        fn sends(&mut self, client: bool, segment: Segment) -> Sent {
            let transport = Transport::Tcp {
                src_port: 40_000,
                dst_port: 80,
                seq: segment.seq,
                ack: segment.ack,
                flags: segment.flags,
                window: segment.window,
                tsval: None,
                payload: segment.numbers,
            };
            let packet = sample::packet(6, segment.numbers + 52, transport);
            let (there, back) = (packet.flow(), key::reverse(&packet.flow()));
            let (flow, back) = if client { (there, back) } else { (back, there) };
            self.0.sent(1, &flow, &back, &packet)
        }
    }

    /// `numbers` are bytes of payload here.
    fn segment(seq: u32, ack: u32, flags: u8, numbers: u32) -> Segment {
        Segment {
            seq,
            ack,
            flags,
            window: 500,
            numbers,
        }
    }

    /// What each of these segments (first number, flags, payload) is, sent one after another.
    fn sent(segments: &[(u32, u8, u32)]) -> Vec<Sent> {
        let mut connection = Connection::default();
        segments
            .iter()
            .map(|(seq, flags, payload)| connection.sends(true, segment(*seq, 1, *flags, *payload)))
            .collect()
    }

    const NEW: Sent = Sent::Ordinary;

    #[test]
    fn what_reaches_back_is_sent_again() {
        let wrap = u32::MAX - 99;
        assert_eq!(
            sent(&[(wrap, ACK, 200), (100, ACK, 50), (100, ACK, 50), (100, ACK, 50)]),
            [NEW, NEW, Sent::Again(1), Sent::Again(2)]
        );
        // Cut otherwise than before, across the wrap.
        assert_eq!(
            sent(&[(wrap, ACK, 200), (0, ACK, 100), (100, ACK, 1)]),
            [NEW, Sent::Again(1), NEW]
        );
        // The end of it is new.
        assert_eq!(
            sent(&[
                (0, ACK, 100),
                (50, ACK, 100),
                (150, ACK | FIN, 0),
                (150, ACK | FIN, 0)
            ]),
            [NEW, Sent::Again(1), NEW, Sent::Again(1)]
        );
        // An acknowledgement tells what was sent before observing began.
        assert_eq!(
            sent(&[(100, ACK, 0), (50, ACK, 50), (100, ACK, 10)]),
            [Sent::Ack, Sent::Again(1), NEW]
        );
    }

    #[test]
    fn keepalives_acknowledgements_and_new_connections_are_not() {
        assert_eq!(
            sent(&[
                (0, ACK, 100),
                (99, ACK, 0),
                (99, ACK, 1),
                (100, ACK, 0),
                (100, ACK, 0)
            ]),
            [NEW, Sent::KeepAlive, Sent::KeepAlive, Sent::Ack, Sent::Ack]
        );
        assert_eq!(
            sent(&[(7, SYN, 0), (7, SYN, 0), (8, ACK, 10), (3, SYN, 0), (4, ACK, 10)]),
            [NEW, Sent::Again(1), NEW, NEW, NEW]
        );
        assert_eq!(sent(&[(0, ACK, 100), (100, RST, 0), (100, RST, 0)]), [NEW; 3]);
    }

    #[test]
    fn a_keepalive_is_answered_once() {
        let mut connection = Connection::default();
        let mut sends = |client, seq, ack| connection.sends(client, segment(seq, ack, ACK, 0));
        assert_eq!(sends(false, 1, 1000), Sent::Ack);
        assert_eq!(sends(true, 1000, 1), Sent::Ack);
        assert_eq!(sends(true, 999, 1), Sent::KeepAlive);
        assert_eq!(sends(false, 1, 1000), Sent::KeepAliveAck);
        // Nothing is missing, so nothing is acknowledged twice.
        assert_eq!(sends(false, 1, 1000), Sent::Ack);
    }

    #[test]
    fn a_probe_of_a_closed_window_is_no_keepalive() {
        let mut connection = Connection::default();
        connection.sends(true, segment(900, 1, ACK, 100));
        let closed = Segment {
            window: 0,
            ..segment(1, 1000, ACK, 0)
        };
        assert_eq!(connection.sends(false, closed), Sent::Ack);
        assert_eq!(connection.sends(true, segment(999, 1, ACK, 0)), Sent::Ack);
    }

    #[test]
    fn an_acknowledgement_is_a_duplicate_while_data_is_missing() {
        let mut connection = Connection::default();
        let mut sends = |client, seq, ack, payload| connection.sends(client, segment(seq, ack, ACK, payload));
        sends(true, 1000, 1, 500);
        assert_eq!(sends(false, 1, 1500, 0), Sent::Ack);
        // 1500 to 1999 are lost.
        for seq in [1500, 2000, 2500] {
            assert_eq!(sends(true, seq, 1, 500), NEW);
        }
        assert_eq!(sends(false, 1, 1500, 0), Sent::DuplicateAck(1));
        assert_eq!(sends(false, 1, 1500, 0), Sent::DuplicateAck(2));
        let wider = Segment {
            window: 600,
            ..segment(1, 1500, ACK, 0)
        };
        assert_eq!(connection.sends(false, wider), Sent::Ack);
        let mut sends = |client, seq, ack, payload| connection.sends(client, segment(seq, ack, ACK, payload));
        assert_eq!(sends(true, 1500, 1, 500), Sent::Again(1));
        assert_eq!(sends(false, 1, 3000, 0), Sent::Ack);
        assert_eq!(sends(false, 1, 3000, 0), Sent::Ack);
    }
}
