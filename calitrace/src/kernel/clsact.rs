//! clsact, for kernels without TCX: the qdisc that TC filters hang on, and which filters it has. All of it in the
//! calling thread's network namespace.
//!
//! A filter outlives the process that added it, and a qdisc is shared with everybody who uses TC: one that we did not
//! add, or that has others' filters, is left alone.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use aya::programs::{TcAttachType, tc};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};

use crate::{kernel::hooks, netlink::Connection};

/// Adds the qdisc; false if there was one.
pub(super) fn add(ifname: &str) -> Result<bool> {
    match tc::qdisc_add_clsact(ifname) {
        Ok(()) => Ok(true),
        Err(tc::TcError::AlreadyAttached) => Ok(false),
        Err(tc::TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("add a clsact qdisc to {ifname}")),
    }
}

/// Takes the qdisc away if no filters are left on it.
pub(super) fn remove_if_empty(ifindex: u32) -> Result<()> {
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        if !filters(ifindex, direction)?.is_empty() {
            return Ok(());
        }
    }
    let mut message = message(ifindex)?;
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    message.header.parent = TcHandle::CLSACT;
    Connection::here()?
        .change(RouteNetlinkMessage::DelQueueDiscipline(message))
        .with_context(|| format!("remove the clsact qdisc of interface {ifindex}"))
}

/// The interfaces that have a qdisc for filters, and its kind: `clsact`, or `ingress`, which takes the same place and has
/// one direction only.
pub(super) fn interfaces() -> Result<BTreeMap<u32, String>> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    let qdiscs = Connection::here()?.dump(&request, "qdiscs")?.into_iter();
    Ok(qdiscs
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(qdisc) => Some(qdisc),
            _ => None,
        })
        .filter(|qdisc| qdisc.header.handle.major == TcHandle::CLSACT.major)
        .filter_map(|qdisc| Some((u32::try_from(qdisc.header.index).ok()?, kind(&qdisc.attributes))))
        .collect())
}

/// A filter on a clsact qdisc.
#[derive(Debug)]
pub(super) struct Filter {
    /// Name of a bpf filter; empty for one of another kind.
    pub(super) name: String,
    /// What kind of filter it is: `bpf`, `u32`, `flower`.
    kind: String,
    /// Its number among those of its priority.
    pub(super) handle: u32,
    /// The chain that it is part of; only chain 0 is run by itself.
    pub(super) chain: u32,
    /// Priority in the upper half, protocol in the lower.
    info: u32,
    parent: TcHandle,
}

impl Filter {
    /// Whether it is calitrace's, of this run or another.
    pub(super) fn is_akin(&self) -> bool {
        hooks::TABLE.iter().any(|row| row.program == self.name)
    }

    /// What to call it.
    pub(super) fn label(self) -> String {
        if self.name.is_empty() {
            self.kind
        } else {
            self.name
        }
    }

    fn priority(&self) -> u16 {
        // The upper half fits.
        (self.info >> 16) as u16
    }
}

/// The last priority of ours on egress: behind all that others commonly use (Felix and others that let the kernel
/// choose: 49152 and below, `TC_H_MAKE(0x80000000U, 0U)` in `tc_new_tfilter`, `net/sched/cls_api.c`).
const LAST_PRIORITY: u16 = 0xfff0;

/// A priority of our own for a filter that is to run before all others, or after them. Filters of one priority are one
/// thing to the kernel and to `tc filter del`, and must be of one kind and protocol: never share one.
pub(super) fn free_priority(filters: &[Filter], first: bool) -> u16 {
    let taken: BTreeSet<u16> = filters.iter().map(Filter::priority).collect();
    let last = filters
        .iter()
        .filter(|filter| !filter.is_akin())
        .map(Filter::priority)
        .max();
    let behind = LAST_PRIORITY.max(last.unwrap_or_default().saturating_add(1));
    let free = |priority: &u16| !taken.contains(priority);
    let from = if first { 1 } else { behind };
    let found = (from..=u16::MAX)
        .find(free)
        .or_else(|| (1..from).rev().find(free));
    // All 65535 taken: the kernel will say what it thinks of that.
    found.unwrap_or(from)
}

/// The filters in one direction, in the order they run in.
pub(super) fn filters(ifindex: u32, direction: TcAttachType) -> Result<Vec<Filter>> {
    let mut message = message(ifindex)?;
    message.header.parent = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: match direction {
            TcAttachType::Egress => TcHandle::MIN_EGRESS,
            _ => TcHandle::MIN_INGRESS,
        },
    };
    let parent = message.header.parent;
    let request = RouteNetlinkMessage::GetTrafficFilter(message);
    let filters = Connection::here()?
        .dump(&request, "TC filters")
        .with_context(|| format!("interface {ifindex}"))?
        .into_iter();
    Ok(filters
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
            _ => None,
        })
        // A classifier is announced once without a handle before its filters.
        .filter(|filter| filter.header.handle != TcHandle::UNSPEC)
        .map(|filter| Filter {
            kind: kind(&filter.attributes),
            chain: chain(&filter.attributes),
            name: bpf_name(&filter.attributes),
            handle: filter.header.handle.into(),
            info: filter.header.info,
            parent,
        })
        .collect())
}

/// Takes a filter away.
pub(super) fn remove(ifindex: u32, filter: &Filter) -> Result<()> {
    let mut message = message(ifindex)?;
    message.header.handle = filter.handle.into();
    message.header.parent = filter.parent;
    message.header.info = filter.info;
    Connection::here()?
        .change(RouteNetlinkMessage::DelTrafficFilter(message))
        .with_context(|| format!("remove the TC filter {} of interface {ifindex}", filter.name))
}

fn kind(attributes: &[TcAttribute]) -> String {
    let kind = attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.clone()),
        _ => None,
    });
    kind.unwrap_or_default()
}

fn chain(attributes: &[TcAttribute]) -> u32 {
    let chain = attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Chain(chain) => Some(*chain),
        _ => None,
    });
    chain.unwrap_or_default()
}

fn bpf_name(attributes: &[TcAttribute]) -> String {
    let options = attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options
        .flatten()
        .find_map(|option| match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
            _ => None,
        })
        .unwrap_or_default()
}

fn message(ifindex: u32) -> Result<TcMessage> {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(ifindex).context("interface index")?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(name: &str, priority: u32) -> Filter {
        Filter {
            name: name.to_owned(),
            kind: "bpf".to_owned(),
            handle: 1,
            chain: 0,
            info: priority << 16,
            parent: TcHandle::CLSACT,
        }
    }

    #[test]
    fn a_priority_is_never_shared_and_outermost_where_there_is_room() {
        assert_eq!(free_priority(&[], true), 1);
        assert_eq!(free_priority(&[], false), LAST_PRIORITY);
        let felix = [filter("cali_tc_preamble", 49152)];
        assert_eq!(free_priority(&felix, true), 1);
        assert_eq!(free_priority(&felix, false), LAST_PRIORITY);
        let twice = [filter("calitrace_uplink_ingress", 1), filter("theirs", 2)];
        assert_eq!(free_priority(&twice, true), 3);
        let far = [
            filter("theirs", 0xfff5),
            filter("calitrace_uplink_egress", 0xfff6),
        ];
        assert_eq!(free_priority(&far, false), 0xfff7);
        assert_eq!(
            free_priority(&[filter("theirs", 0xffff)], false),
            0xfffe,
            "as late as it can"
        );
    }
}
