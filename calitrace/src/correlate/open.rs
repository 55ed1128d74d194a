//! Open packet traces and the indexes by which observations and answers find them. Knows how to keep and find; whether
//! two sightings may be of one packet is decided in [`super::join`].

use std::{collections::BTreeMap, net::IpAddr};

use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use thin_vec::ThinVec;

use super::{
    AnswerKind, DropReport, Endpoint, Joint, NatKind,
    again::Sent,
    key::{self, Part},
    timers::Hold,
    underlay::Swallowed,
    waypoint::Waypoint,
};
use crate::event::{Detail, Direction, Drop, Encap, Flow, Hook, Netns, Packet};

/// Names an open trace; of one that was closed and whose place was taken it names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// A sighting as it is kept while the trace is open.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) time: u64,
    pub(super) skb: u64,
    pub(super) netns: Netns,
    /// The node; in a pod's own namespace the pod's.
    pub(super) node: Netns,
    pub(super) ifindex: u32,
    pub(super) length: u32,
    /// Of a super-packet, how many packets it is or is to become; 0 of others.
    pub(super) segments: u16,
    /// Sequence interval of TCP data and UDP.
    pub(super) interval: (u32, u32),
    pub(super) hook: Hook,
    pub(super) ttl: u8,
    pub(super) in_pod: bool,
    /// Which of the trace's flows it had: 0 is the sender's, then those after each translation.
    pub(super) flow: u8,
    /// Why it is of this packet; none for the first.
    pub(super) joined: Option<Joint>,
    /// Most sightings have none, and traces are kept by the hundred thousand.
    pub(super) encap: Option<Box<Encap>>,
}

impl Seen {
    pub(super) fn is_ingress(&self) -> bool {
        self.hook.direction() == Direction::Ingress
    }

    pub(super) fn is_egress(&self) -> bool {
        self.hook.direction() == Direction::Egress
    }
}

/// An address translation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Translation {
    pub(super) kind: NatKind,
    pub(super) node: Netns,
    /// Index of the sighting that showed it.
    pub(super) at: usize,
    pub(super) from: Endpoint,
    pub(super) to: Endpoint,
}

/// Where a packet got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// It is under way.
    Nothing,
    /// It passed the last egress hook of its destination's interface.
    Pod,
    /// A node took it in that has the destination's address.
    Node,
    /// It left an uplink, and nobody beyond is observed.
    Outside,
}

/// Who answered.
#[derive(Clone, Debug)]
pub(super) struct Answered {
    pub(super) kind: AnswerKind,
    pub(super) address: IpAddr,
    pub(super) rtt: Option<u64>,
    pub(super) icmp: Option<(u8, u8)>,
    pub(super) mtu: Option<u32>,
    /// The answer's own trace.
    pub(super) by: Id,
    /// The answer was dropped on its way back.
    pub(super) dropped: Option<DropReport>,
}

/// An open trace. What most traces have nothing of takes a pointer: there may be a hundred thousand of them.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Open {
    pub(super) cluster: u32,
    /// As first observed.
    pub(super) packet: Packet,
    pub(super) part: Part,
    /// The flow as the sender wrote it.
    pub(super) flow: Flow,
    /// The flows it was translated to. The pieces of a cut packet come to it one by one, so each sighting has its own.
    pub(super) translated: ThinVec<Flow>,
    pub(super) seen: Vec<Seen>,
    /// What functions of the kernel showed of it.
    pub(super) waypoints: ThinVec<Waypoint>,
    pub(super) translations: ThinVec<Translation>,
    pub(super) reached: Reached,
    /// Bytes of TCP data that reached the destination.
    pub(super) covered: u32,
    /// The drop, and the sighting that was it.
    pub(super) drop: Option<Box<(Drop, usize)>>,
    pub(super) answered: Option<Box<Answered>>,
    /// What was said of its outer header, and not to its sender.
    pub(super) swallowed: Option<Box<Swallowed>>,
    /// The trace that this packet answers.
    pub(super) answers: Option<Id>,
    /// What it is beside new data, where a pod sent it.
    pub(super) sent: Sent,
    /// Packets to come may be this one: it is in the index by content.
    pub(super) findable: bool,
    /// Another one with the same content was under way at the same time.
    pub(super) alike: bool,
    /// All that was joined had the number that the kernel gives no other packet of the flow.
    pub(super) numbered: bool,
    /// It may have gone on in a super-packet of whose parts not all were found.
    pub(super) merged: bool,
    pub(super) close_at: u64,
}

impl Open {
    pub(super) fn first(&self) -> &Seen {
        &self.seen[0]
    }

    pub(super) fn last(&self) -> &Seen {
        &self.seen[self.seen.len() - 1]
    }

    /// The flow after all translations so far.
    pub(super) fn current(&self) -> &Flow {
        self.translated.last().unwrap_or(&self.flow)
    }

    /// The flow that it had at a sighting.
    pub(super) fn flow_at(&self, seen: &Seen) -> &Flow {
        match seen.flow {
            0 => &self.flow,
            later => &self.translated[usize::from(later) - 1],
        }
    }

    /// Whether it got to its end, or was dropped.
    pub(super) fn is_at_end(&self) -> bool {
        self.reached != Reached::Nothing || self.drop.is_some()
    }

    /// All flows that it has had, the sender's first.
    pub(super) fn flows(&self) -> impl Iterator<Item = &Flow> {
        std::iter::once(&self.flow).chain(&self.translated)
    }

    /// Whether it has had this flow.
    pub(super) fn has_flow(&self, flow: &Flow) -> bool {
        self.flows().any(|own| own == flow)
    }

    /// The last sighting that has bytes in common with `interval`; of anything but TCP data the last one.
    pub(super) fn last_of(&self, (seq, len): (u32, u32)) -> &Seen {
        if len == 0 {
            return self.last();
        }
        let shares = |seen: &&Seen| key::overlap(seen.interval.0, seen.interval.1, seq, len) > 0;
        self.seen
            .iter()
            .rev()
            .find(shares)
            .unwrap_or_else(|| self.first())
    }
}

type Bucket = SmallVec<[u32; 2]>;

/// Traces with one reference key that are kept, the latest: for answers, and for a super-packet as many as can be merged.
const REFERENCES: usize = key::MOST_SEGMENTS as usize;

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    /// In a place of its own: the table of slots grows by doubling.
    open: Option<Box<Open>>,
}

/// The open traces.
#[derive(Debug, Default)]
pub(super) struct OpenTraces {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// By node and address of the `sk_buff`.
    skbs: FxHashMap<(Netns, u64), u32>,
    /// By [`key::content`], the oldest first.
    content: FxHashMap<u64, Bucket>,
    /// By [`key::stream`] and start of the sequence interval.
    streams: FxHashMap<u64, Stream>,
    /// By [`key::reference`], and what a reset can answer by [`key::stream`] too; the oldest first.
    references: FxHashMap<u64, Bucket>,
}

#[derive(Debug, Default)]
struct Stream {
    starts: BTreeMap<u32, Bucket>,
    /// The longest interval there was.
    longest: u32,
}

impl OpenTraces {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn get(&self, index: u32) -> &Open {
        self.slots[index as usize]
            .open
            .as_deref()
            .expect("indexes name open traces only")
    }

    pub(super) fn get_mut(&mut self, index: u32) -> &mut Open {
        self.slots[index as usize]
            .open
            .as_deref_mut()
            .expect("indexes name open traces only")
    }

    pub(super) fn id(&self, index: u32) -> Id {
        Id {
            index,
            generation: self.slots[index as usize].generation,
        }
    }

    /// The trace, if it is still open.
    pub(super) fn find(&self, id: Id) -> Option<&Open> {
        let slot = self.slots.get(id.index as usize)?;
        slot.open.as_deref().filter(|_| slot.generation == id.generation)
    }

    /// The same, to be changed.
    pub(super) fn find_mut(&mut self, id: Id) -> Option<&mut Open> {
        let slot = self.slots.get_mut(id.index as usize)?;
        slot.open
            .as_deref_mut()
            .filter(|_| slot.generation == id.generation)
    }

    /// Opens a trace.
    pub(super) fn insert(&mut self, open: Open) -> u32 {
        let (cluster, flow, part) = (open.cluster, open.flow, open.part);
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("far fewer traces are open than 2^32")
        });
        self.slots[index as usize].open = Some(Box::new(open));
        self.refer(index, cluster, &flow, part);
        self.publish(index, &flow);
        index
    }

    /// Adds a sighting, by which the `sk_buff` now finds the trace.
    pub(super) fn append(&mut self, index: u32, seen: Seen) {
        if seen.skb != 0 {
            self.skbs.insert((seen.node, seen.skb), index);
        }
        self.get_mut(index).seen.push(seen);
    }

    /// The packet goes on under another address, too.
    pub(super) fn alias(&mut self, index: u32, node: Netns, skb: u64) {
        self.skbs.insert((node, skb), index);
    }

    /// The flow of a trace changes. Pieces of it may still come with the former one.
    pub(super) fn translate(&mut self, index: u32, flow: Flow) {
        if !self.get(index).part.is_stream() {
            self.conceal(index);
        }
        let open = self.get_mut(index);
        open.translated.push(flow);
        let (cluster, part) = (open.cluster, open.part);
        self.refer(index, cluster, &flow, part);
        self.publish(index, &flow);
    }

    /// Nothing that comes by content can be this packet any more.
    pub(super) fn conceal(&mut self, index: u32) {
        let open = self.get_mut(index);
        if !std::mem::replace(&mut open.findable, false) {
            return;
        }
        let (cluster, part) = (open.cluster, open.part);
        if !part.is_stream() {
            let flow = *open.current();
            return take(&mut self.content, key::content(cluster, &flow, &part), index);
        }
        let flows: SmallVec<[Flow; 2]> = open.flows().copied().collect();
        for flow in flows {
            let stream = key::stream(cluster, &flow);
            let Some(starts) = self.streams.get_mut(&stream) else {
                continue;
            };
            let start = part.interval().0;
            if let Some(bucket) = starts.starts.get_mut(&start) {
                bucket.retain(|other| *other != index);
                if bucket.is_empty() {
                    starts.starts.remove(&start);
                }
            }
            if starts.starts.is_empty() {
                self.streams.remove(&stream);
            }
        }
    }

    /// The opposite of [`Self::conceal`].
    pub(super) fn reveal(&mut self, index: u32) {
        let open = self.get(index);
        if !open.findable {
            let flow = *open.current();
            self.publish(index, &flow);
        }
    }

    /// Lets it be found by its content as a packet of `flow`.
    fn publish(&mut self, index: u32, flow: &Flow) {
        let open = self.get_mut(index);
        open.findable = true;
        let (cluster, part) = (open.cluster, open.part);
        if part.is_stream() {
            let (start, len) = part.interval();
            let stream = self.streams.entry(key::stream(cluster, flow)).or_default();
            stream.starts.entry(start).or_default().push(index);
            stream.longest = stream.longest.max(len);
        } else {
            self.content
                .entry(key::content(cluster, flow, &part))
                .or_default()
                .push(index);
        }
    }

    fn refer(&mut self, index: u32, cluster: u32, flow: &Flow, part: Part) {
        let mut push = |key| {
            let bucket = self.references.entry(key).or_default();
            if bucket.len() >= REFERENCES {
                bucket.remove(0);
            }
            bucket.push(index);
        };
        for tag in part.tags() {
            push(key::reference(cluster, flow, tag));
        }
        if part.is_resettable() {
            push(key::stream(cluster, flow));
        }
    }

    /// Takes a trace out.
    pub(super) fn remove(&mut self, index: u32) -> Box<Open> {
        self.conceal(index);
        let slot = &mut self.slots[index as usize];
        let open = slot.open.take().expect("indexes name open traces only");
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        let clones = open
            .waypoints
            .iter()
            .filter_map(|waypoint| match waypoint.detail {
                Some(Detail::Cloned { skb }) => Some((waypoint.seen.node, skb)),
                _ => None,
            });
        for skb in open.seen.iter().map(|seen| (seen.node, seen.skb)).chain(clones) {
            if self.skbs.get(&skb) == Some(&index) {
                self.skbs.remove(&skb);
            }
        }
        for flow in open.flows() {
            for tag in open.part.tags() {
                take(
                    &mut self.references,
                    key::reference(open.cluster, flow, tag),
                    index,
                );
            }
            if open.part.is_resettable() {
                take(&mut self.references, key::stream(open.cluster, flow), index);
            }
        }
        open
    }

    /// The trace that the `sk_buff` was last seen in.
    pub(super) fn by_skb(&self, node: Netns, skb: u64) -> Option<u32> {
        if skb == 0 {
            None
        } else {
            self.skbs.get(&(node, skb)).copied()
        }
    }

    /// Traces with this content, the oldest first.
    pub(super) fn by_content(&self, cluster: u32, flow: &Flow, part: &Part) -> &[u32] {
        self.content
            .get(&key::content(cluster, flow, part))
            .map_or(&[], |bucket| bucket.as_slice())
    }

    /// Traces whose TCP data has bytes in common with `part`, in order of their first byte, those with the same one
    /// in order of time.
    pub(super) fn by_interval(&self, cluster: u32, flow: &Flow, part: &Part) -> SmallVec<[u32; 8]> {
        let mut found = SmallVec::new();
        let (seq, len) = part.interval();
        let Some(stream) = self.streams.get(&key::stream(cluster, flow)).filter(|_| len > 0) else {
            return found;
        };
        let from = seq.wrapping_sub(stream.longest.saturating_sub(1));
        let to = seq.wrapping_add(len - 1);
        let mut collect = |from, to| {
            for (start, bucket) in stream.starts.range(from..=to) {
                let overlaps = |index: &&u32| {
                    let (_, other) = self.get(**index).part.interval();
                    key::overlap(seq, len, *start, other) > 0
                };
                found.extend(bucket.iter().filter(overlaps).copied());
            }
        };
        if from <= to {
            collect(from, to);
        } else {
            collect(from, u32::MAX);
            collect(0, to);
        }
        found
    }

    /// Traces whose UDP has datagrams in common with `part`, by their numbers.
    pub(super) fn by_datagrams(&self, cluster: u32, flow: &Flow, part: &Part) -> SmallVec<[u32; 8]> {
        let mut found = SmallVec::new();
        for tag in part.tags() {
            for index in self.by_reference(cluster, flow, tag) {
                if self.get(*index).findable && !found.contains(index) {
                    found.push(*index);
                }
            }
        }
        found
    }

    /// Traces that an answer to this flow and tag may mean, the oldest first.
    pub(super) fn by_reference(&self, cluster: u32, flow: &Flow, tag: u32) -> &[u32] {
        self.references
            .get(&key::reference(cluster, flow, tag))
            .map_or(&[], |bucket| bucket.as_slice())
    }

    /// The packets of a flow without numbers may be in a super-packet that was seen.
    pub(super) fn may_be_merged(&mut self, cluster: u32, flow: &Flow) {
        let packets: SmallVec<[u32; 8]> = self.by_reference(cluster, flow, 0).into();
        for index in packets {
            self.get_mut(index).merged = true;
        }
    }

    /// The latest traces of a TCP flow that a reset can answer, the oldest first.
    pub(super) fn recent(&self, cluster: u32, flow: &Flow) -> &[u32] {
        self.references
            .get(&key::stream(cluster, flow))
            .map_or(&[], |bucket| bucket.as_slice())
    }

    /// Whether all indexes are empty, as they must be when nothing is open.
    #[cfg(test)]
    pub(super) fn is_clean(&self) -> bool {
        self.skbs.is_empty()
            && self.content.is_empty()
            && self.streams.is_empty()
            && self.references.is_empty()
    }

    /// Everything that is open, in order of its beginning.
    pub(super) fn all(&self) -> Vec<u32> {
        let mut all: Vec<u32> = (0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX))
            .filter(|index| self.slots[*index as usize].open.is_some())
            .collect();
        all.sort_by_key(|index| self.get(*index).first().time);
        all
    }
}

fn take(index: &mut FxHashMap<u64, Bucket>, key: u64, trace: u32) {
    if let Some(bucket) = index.get_mut(&key) {
        bucket.retain(|other| *other != trace);
        if bucket.is_empty() {
            index.remove(&key);
        }
    }
}

/// The longest a trace may be found by content after its first sighting.
pub(super) const WINDOW: u64 = Hold::Begun.length() + Hold::Waiting.length();
