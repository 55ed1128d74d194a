//! What a run of calitrace leaves behind that is killed while it uses clsact: its filters, and the qdisc it added for
//! them. (By TCX nothing is left: links go with the process.)
//!
//! What is ours is told by evidence only. A filter is a leftover if it carries the name of one of our programs and no
//! process is alive that its handle names ([`super::owner`]). A qdisc is one if a filter on it says that calitrace added
//! the qdisc, and nothing else is on it. Killed between adding a qdisc and its first filter, a run leaves an empty qdisc
//! that nobody can be shown to own: it does nothing, and stays.

use std::fmt;

use anyhow::{Context as _, Result};
use aya::programs::TcAttachType;

use super::{
    clsact::{self, Filter},
    owner::{self, Handle},
};
use crate::netns;

/// What was left on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The interface's name.
    pub interface: String,
    /// Names of the filters' programs.
    pub filters: Vec<String>,
    /// The clsact qdisc is ours, too, and nothing else is on it.
    pub qdisc: bool,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "on {}: ", self.interface)?;
        match self.filters.as_slice() {
            [one] => write!(f, "the TC filter {one}")?,
            more => write!(f, "the TC filters {}", more.join(", "))?,
        }
        if self.qdisc {
            f.write_str(" and their clsact qdisc")?;
        }
        Ok(())
    }
}

/// Finds what was left in a namespace.
pub fn find(netns: &netns::Handle) -> Result<Vec<Leftover>> {
    look(netns, false)
}

/// Takes it away, and nothing else. Returns what it was.
pub fn remove(netns: &netns::Handle) -> Result<Vec<Leftover>> {
    look(netns, true)
}

fn look(netns: &netns::Handle, remove: bool) -> Result<Vec<Leftover>> {
    let mut found = Vec::new();
    netns.run(|| {
        let mut alive = None;
        for (ifindex, kind) in clsact::interfaces()? {
            let mut directions = vec![TcAttachType::Ingress];
            // An ingress qdisc shows the same filters in both directions.
            if kind == "clsact" {
                directions.push(TcAttachType::Egress);
            }
            let mut filters = Vec::new();
            for direction in directions {
                filters.extend(clsact::filters(ifindex, direction)?);
            }
            if !filters.iter().any(Filter::is_akin) {
                continue;
            }
            let alive = match &alive {
                Some(alive) => alive,
                None => alive.insert(owner::alive()?),
            };
            let is_left =
                |filter: &Filter| filter.is_akin() && !alive.contains(&Handle::decode(filter.handle).token);
            let (left, others): (Vec<_>, Vec<_>) = filters.into_iter().partition(is_left);
            if left.is_empty() {
                continue;
            }
            let qdisc = others.is_empty()
                && kind == "clsact"
                && left.iter().any(|filter| Handle::decode(filter.handle).own_qdisc);
            if remove {
                for filter in &left {
                    clsact::remove(ifindex, filter)?;
                }
                if qdisc {
                    clsact::remove_if_empty(ifindex)?;
                }
            }
            let interface = nix::net::if_::if_indextoname(ifindex)
                .with_context(|| format!("ask for the name of interface {ifindex}"))?;
            found.push(Leftover {
                interface: interface.to_string_lossy().into_owned(),
                filters: left.into_iter().map(|filter| filter.name).collect(),
                qdisc,
            });
        }
        Ok(())
    })?;
    Ok(found)
}
