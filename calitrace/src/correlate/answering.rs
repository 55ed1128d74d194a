//! What answers do to the traces of what they answer: who answered, when the answer was back, and whether it ever was.

use super::{
    AnswerKind, Correlator, DropReport, answer,
    join::Sight,
    open::{Answered, Id, Open, Reached},
    timers::Hold,
    topology::Next,
    underlay,
};
use crate::event::{Direction, Observation};

impl Correlator {
    /// A packet answers a trace.
    pub(super) fn answered(&mut self, found: answer::Match, by: Id, observation: &Observation) {
        let (kind, address) = (found.kind, observation.packet.src);
        let trace = self.open.get_mut(found.index);
        let awaited = answer::is_awaited(trace);
        trace.answered = Some(Box::new(Answered {
            kind,
            address,
            rtt: None,
            icmp: found.icmp,
            mtu: found.mtu,
            by,
            dropped: None,
        }));
        let by_destination = matches!(kind, AnswerKind::EchoReply | AnswerKind::SynAck);
        if awaited || !by_destination {
            self.hold(found.index, Hold::Ended, observation.time);
        }
        if !by_destination {
            return;
        }
        let trace = self.open.get_mut(found.index);
        // The packet got there, out of sight. Past the hooks of a pod's interface where
        // another TC program hands it on (bpf_redirect_peer), or while a hook was away; and masqueraded packets leave a
        // node out of sight, since no address of theirs is a pod's then.
        let (topology, last) = (&self.topology, trace.last());
        let open = trace.reached == Reached::Nothing;
        if (open || trace.reached == Reached::Outside) && trace.current().dst == address {
            trace.reached = if topology.node_of(trace.cluster, address).is_some() {
                Reached::Node
            } else if !open {
                return;
            } else if topology.owner(trace.cluster, address).is_some() {
                Reached::Pod
            } else if last.is_ingress() && topology.next(last.node, None, address) == Next::Unobserved {
                Reached::Outside
            } else {
                return;
            };
            self.open.conceal(found.index);
            self.hold(found.index, Hold::Ended, observation.time);
        }
    }

    /// An answer on its way back may be where the packet it answers was first seen: a round trip.
    pub(super) fn report(&mut self, index: u32, observation: &Observation) {
        let Some(id) = self.open.get(index).answers else {
            return;
        };
        let Some(probe) = self.open.find_mut(id) else {
            return;
        };
        let first = probe.first();
        let back = (first.netns, first.ifindex) == (observation.netns, observation.ifindex)
            && first.is_ingress() != (observation.hook.direction() == Direction::Ingress)
            && observation.drop.is_none();
        let rtt = observation.time.saturating_sub(first.time);
        let awaited = answer::is_awaited(probe);
        if let Some(answered) = probe.answered.as_mut().filter(|_| back) {
            answered.rtt = Some(rtt);
            answered.address = observation.packet.src;
            if awaited {
                self.hold(id.index, Hold::Ended, observation.time);
            }
        }
    }

    /// Whether it was answered and the answer was dropped on its way: how, is known when the answer's trace closes.
    pub(super) fn awaits_end_of_answer(&self, trace: &Open) -> bool {
        let answered = trace
            .answered
            .as_ref()
            .filter(|answered| answered.dropped.is_none());
        answered.is_some_and(|answered| {
            let answer = self.open.find(answered.by);
            answer.is_some_and(|answer| answer.drop.is_some())
        })
    }

    /// The answer `by` to a trace was dropped on its way: nobody heard it.
    pub(super) fn unheard(&mut self, asked: Id, by: Id, drop: Option<&DropReport>) {
        let answered = self
            .open
            .find_mut(asked)
            .and_then(|asked| asked.answered.as_mut());
        if let Some(answered) = answered.filter(|answered| answered.by == by) {
            answered.dropped = drop.cloned();
        }
    }

    /// A router between the nodes says what became of a packet in a tunnel: no packet of a pod's, and it reaches none.
    pub(super) fn swallowed(&mut self, sight: &Sight<'_>) {
        let observation = sight.observation;
        let Some(found) = answer::of_tunnelled(&self.open, sight.place, &observation.packet) else {
            return;
        };
        self.open.get_mut(found.index).swallowed = Some(Box::new(underlay::Swallowed {
            router: observation.packet.src,
            kind: found.kind,
            icmp: found.icmp.unwrap_or_default(),
        }));
        self.open.conceal(found.index);
        self.hold(found.index, Hold::Ended, observation.time);
    }
}
