//! What functions of the kernel show between two interfaces: waypoints of a trace. They explain and add evidence; no trace
//! begins or ends with one, and no verdict needs one.

use super::{
    Joint, LogReport,
    join::{self, Sight},
    nat::Translations,
    open::{Open, OpenTraces, Seen},
    timers::MILLISECOND,
    topology::{NO_CLUSTER, Topology},
};
use crate::{
    event::{Detail, Hook, NetfilterVerdict},
    netfilter::Logged,
};

/// A function's sighting as it is kept while the trace is open.
#[derive(Clone, Debug)]
pub(super) struct Waypoint {
    pub(super) seen: Seen,
    pub(super) detail: Option<Detail>,
}

/// Waypoints that a trace keeps: a loop in the kernel must not make it grow without end.
const KEPT: usize = 32;
/// `nf_hook_slow` returns this long after it dropped a packet at most: at once, but its CPU may be taken away meanwhile
/// (several milliseconds on a loaded virtual machine). The address alone names the latest packet that had it.
const RETURNS: u64 = 50 * MILLISECOND;

/// Takes note of an observation of a function. Without a trace that it belongs to, nothing comes of it.
pub(super) fn take(sight: &Sight<'_>, open: &mut OpenTraces, translations: &mut Translations) {
    let observation = sight.observation;
    let place = sight.place;
    if let Some(Detail::Translated {
        destination, address, ..
    }) = &observation.detail
    {
        translations.announce(place.node, &sight.flow, *destination, *address);
        return;
    }
    if place.cluster == NO_CLUSTER {
        return;
    }
    let Some(index) = open.by_skb(place.node, observation.skb) else {
        return;
    };
    let trace = open.get_mut(index);
    if trace.waypoints.len() >= KEPT || !belongs(sight, trace) {
        return;
    }
    let mut seen = sight.seen();
    seen.joined = Some(Joint::Skb);
    if is_judgement(observation.detail.as_ref()) {
        // The packet was gone: what it was the drop's sighting says.
        let last = trace.last();
        (seen.ttl, seen.length) = (last.ttl, last.length);
    }
    trace.waypoints.push(Waypoint {
        seen,
        detail: observation.detail.clone(),
    });
    if let Some(Detail::Cloned { skb }) = observation.detail {
        open.alias(index, place.node, skb);
    }
}

fn is_judgement(detail: Option<&Detail>) -> bool {
    matches!(
        detail,
        Some(Detail::Judged {
            verdict: NetfilterVerdict::Dropped,
            ..
        })
    )
}

/// Whether the `sk_buff` is still the trace's packet: on the same node, soon after its last sighting, with the same
/// content. Addresses and ports may be translated already.
fn belongs(sight: &Sight<'_>, trace: &Open) -> bool {
    let observation = sight.observation;
    let last = trace.last_of(sight.interval);
    let since = observation.time.saturating_sub(last.time);
    if last.node != sight.place.node || trace.cluster != sight.place.cluster || observation.time < last.time {
        return false;
    }
    if is_judgement(observation.detail.as_ref()) {
        return last.hook == Hook::KfreeSkb && since <= RETURNS;
    }
    last.hook != Hook::KfreeSkb
        && since <= join::LIFE
        && observation.packet.ttl <= last.ttl
        && trace.flow.proto == sight.flow.proto
        && trace.part.matches(&sight.part, true)
}

/// Netfilter's word on the drop of a trace.
fn judgement(trace: &Open) -> Option<&Detail> {
    let details = trace
        .waypoints
        .iter()
        .rev()
        .map(|waypoint| waypoint.detail.as_ref());
    details.flatten().find(|detail| is_judgement(Some(detail)))
}

/// What Felix's rules logged last before it was seen so, on the same node and since it passed an interface there, and by which
/// prefix.
pub(super) fn logged_before(trace: &Open, index: usize) -> Option<(&str, Logged)> {
    let seen = &trace.seen[index];
    let before = trace.seen[..index].iter().rev();
    let since = before.clone().find(|before| before.hook != Hook::KfreeSkb)?.time;
    let mut latest = trace.waypoints.iter().rev().filter(|waypoint| {
        let Seen { node, time, .. } = waypoint.seen;
        node == seen.node && (since..=seen.time).contains(&time)
    });
    latest.find_map(|waypoint| logged(waypoint.detail.as_ref()?))
}

/// What a rule of Felix's logged, and by which prefix.
fn logged(detail: &Detail) -> Option<(&str, Logged)> {
    match detail {
        Detail::Logged { prefix } => Some((prefix, Logged::parse(prefix)?)),
        _ => None,
    }
}

/// What a rule logged, with names as the node's rules have them.
pub(super) fn log_report(detail: &Detail, seen: &Seen, ipv6: bool, topology: &Topology) -> Option<LogReport> {
    let Detail::Logged { prefix } = detail else {
        return None;
    };
    let logged = Logged::parse(prefix).map(|mut logged| {
        if logged.cut
            && let Some(firewall) = topology.firewall(seen.node)
        {
            logged.complete(&firewall.loggers(prefix, ipv6, seen.time));
        }
        logged
    });
    Some(LogReport {
        prefix: prefix.clone(),
        logged,
    })
}

/// The name of the netfilter hook that dropped it.
pub(super) fn netfilter_hook(trace: &Open) -> Option<&'static str> {
    judgement(trace)?.netfilter_hook()
}

/// Indexes of the devices that netfilter knew of when it dropped it: by which it came, by which it was to leave; 0 is none.
pub(super) fn netfilter_devices(trace: &Open) -> Option<(u32, u32)> {
    match judgement(trace)? {
        Detail::Judged { input, output, .. } => Some((*input, *output)),
        _ => None,
    }
}

/// Whether the kernel set out to answer the packet with a time exceeded.
pub(super) fn expired(trace: &Open) -> bool {
    let v6 = trace.flow.src.is_ipv6();
    trace.waypoints.iter().any(|waypoint| {
        let Some(Detail::Answered { icmp_type, code }) = &waypoint.detail else {
            return false;
        };
        // RFC 792 and RFC 4443: time exceeded in transit.
        (*icmp_type, *code) == if v6 { (3, 0) } else { (11, 0) }
    })
}

/// In words.
pub(super) fn describe(detail: &Detail) -> String {
    match detail {
        Detail::Answered { icmp_type, code } => format!("answered with ICMP type {icmp_type} code {code}"),
        Detail::Judged {
            verdict,
            family,
            hook,
            ..
        } => {
            let name = detail
                .netfilter_hook()
                .map_or_else(|| format!("hook {hook} of family {family}"), str::to_owned);
            match verdict {
                NetfilterVerdict::Dropped => format!("netfilter {name}: dropped"),
                NetfilterVerdict::Taken => format!("netfilter {name}: taken"),
            }
        }
        Detail::Translated {
            destination, address, ..
        } => format!(
            "{} becomes {address}",
            if *destination { "destination" } else { "source" }
        ),
        Detail::Cloned { .. } => "goes on as a clone".to_owned(),
        Detail::Logged { prefix } => format!("logged with the prefix {prefix:?}"),
    }
}
