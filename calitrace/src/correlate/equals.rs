//! Packets with the same content, of which the first to leave is taken for the first to arrive, and a drop that shows that it
//! was not: it stands behind where the packet left its node, and by the nodes' clocks it may come after the arrival of
//! another one.

use smallvec::SmallVec;
use thin_vec::ThinVec;

use super::{
    Joint,
    join::{self, Sight},
    open::{Answered, Open, OpenTraces, Reached, Seen},
    waypoint::Waypoint,
};
use crate::event::{Drop, Hook, Netns};

/// What a trace has from beyond a node.
struct Beyond {
    seen: Vec<Seen>,
    waypoints: ThinVec<Waypoint>,
    reached: Reached,
    covered: u32,
    /// With the index in `seen`.
    drop: Option<Box<(Drop, usize)>>,
    answered: Option<Box<Answered>>,
}

/// Where the drop is of a packet that seems to have got beyond its node: what it has from there is the next one's that is
/// equal, what that has the one's after it, up to one that seems not to have arrived. Returns those that changed; none where no
/// such one is, and nothing is known better.
pub(super) fn hand_on(sight: &Sight<'_>, open: &mut OpenTraces) -> SmallVec<[u32; 4]> {
    let chain = chain(sight, open);
    if chain.len() < 2 {
        return SmallVec::new();
    }
    let node = sight.place.node;
    let mut carried = take(open, chain[0], node);
    for index in chain.iter().skip(1) {
        let own = take(open, *index, node);
        give(open, *index, carried);
        carried = own;
    }
    chain.into_iter().skip(1).collect()
}

/// The packet that is dropped, and those equal to it that left behind it, up to the first that nothing is known of beyond the
/// node.
fn chain(sight: &Sight<'_>, open: &OpenTraces) -> SmallVec<[u32; 4]> {
    let observation = sight.observation;
    let mut chain = SmallVec::new();
    if observation.hook != Hook::KfreeSkb {
        return chain;
    }
    let node = sight.place.node;
    let Some(first) = open.by_skb(node, observation.skb) else {
        return chain;
    };
    let dropped = open.get(first);
    let is_equal = |trace: &Open| {
        *trace.current() == sight.flow
            && trace.translations.is_empty()
            && trace.part.matches(&sight.part, false)
    };
    let Some(left) = leaving(dropped, node).map(|at| &dropped.seen[at]) else {
        return chain;
    };
    let is_contradicted = dropped.alike
        && dropped.drop.is_none()
        && left.skb == observation.skb
        && dropped.last().node != node
        && !sight.part.is_stream()
        && is_equal(dropped)
        && join::follows(left, sight);
    if !is_contradicted {
        return chain;
    }
    let mut others: SmallVec<[(u64, u32); 8]> = SmallVec::new();
    for tag in sight.part.tags() {
        for index in open.by_reference(dropped.cluster, &sight.flow, tag) {
            let trace = open.get(*index);
            let behind = leaving(trace, node).map(|at| trace.seen[at].time);
            if let Some(time) = behind.filter(|time| *time >= left.time && is_equal(trace))
                && *index != first
                && !others.iter().any(|(_, known)| known == index)
            {
                others.push((time, *index));
            }
        }
    }
    others.sort_unstable_by_key(|(time, _)| *time);
    // What was dropped before it got beyond the node has no part in this.
    others.retain(|(_, index)| {
        let trace = open.get(*index);
        trace.last().node != node || !trace.is_at_end()
    });
    let is_free = |(_, index): &(u64, u32)| open.get(*index).last().node == node;
    if let Some(end) = others.iter().position(is_free) {
        chain.push(first);
        chain.extend(others[..=end].iter().map(|(_, index)| *index));
    }
    chain
}

/// The last sighting on the node, if the packet left it there.
fn leaving(trace: &Open, node: Netns) -> Option<usize> {
    let at = trace.seen.iter().rposition(|seen| seen.node == node)?;
    matches!(trace.seen[at].hook, Hook::UplinkEgress | Hook::TunnelEgress).then_some(at)
}

fn take(open: &mut OpenTraces, index: u32, node: Netns) -> Beyond {
    let trace = open.get_mut(index);
    let at = leaving(trace, node).map_or(trace.seen.len(), |at| at + 1);
    let seen = trace.seen.split_off(at);
    let (own, beyond) = std::mem::take(&mut trace.waypoints)
        .into_iter()
        .partition(|waypoint| waypoint.seen.node == node);
    trace.waypoints = own;
    Beyond {
        seen,
        waypoints: beyond,
        reached: std::mem::replace(&mut trace.reached, Reached::Nothing),
        covered: std::mem::take(&mut trace.covered),
        drop: trace.drop.take().map(|mut drop| {
            drop.1 -= at;
            drop
        }),
        answered: trace.answered.take(),
    }
}

fn give(open: &mut OpenTraces, index: u32, beyond: Beyond) {
    let (id, at) = (open.id(index), open.get(index).seen.len());
    for mut seen in beyond.seen {
        seen.joined = Some(Joint::Order);
        open.append(index, seen);
    }
    if let Some(answer) = beyond
        .answered
        .as_ref()
        .and_then(|answered| open.find_mut(answered.by))
    {
        answer.answers = Some(id);
    }
    let trace = open.get_mut(index);
    trace.alike = true;
    trace.waypoints.extend(beyond.waypoints);
    trace.reached = beyond.reached;
    trace.covered = beyond.covered;
    trace.drop = beyond.drop.map(|mut drop| {
        drop.1 += at;
        drop
    });
    trace.answered = beyond.answered;
    if trace.is_at_end() {
        open.conceal(index);
    } else {
        open.reveal(index);
    }
}
