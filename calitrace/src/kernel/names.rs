//! Words for the numbers of a drop: reasons from the running kernel's BTF, functions from its symbol table.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    thread,
};

use super::{btf::Btf, symbols::Symbols};
use crate::event::DropNames;

/// The names; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Names {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    reasons: HashMap<u32, String>,
    subsystems: HashMap<u32, String>,
    has_reason: bool,
    symbols: OnceLock<Option<Symbols>>,
}

/// `SKB_DROP_REASON_SUBSYS_SHIFT` (include/net/dropreason.h, Linux 6.4): the subsystem is in the upper half.
const SUBSYSTEM_SHIFT: u32 = 16;

impl Names {
    /// Reads the reasons from BTF. The numbers change from kernel to kernel: none are compiled in.
    pub(super) fn new(btf: Option<&Btf>, has_reason: bool) -> Self {
        let table = |name: &str, prefix: &str| {
            btf.and_then(|btf| btf.enum_values(name))
                .unwrap_or_default()
                .into_iter()
                .map(|(value, name)| (value, name.strip_prefix(prefix).unwrap_or(name).to_owned()))
                .collect::<HashMap<u32, String>>()
        };
        let inner = Inner {
            reasons: table("skb_drop_reason", "SKB_DROP_REASON_"),
            subsystems: table("skb_drop_reason_subsys", "SKB_DROP_REASON_SUBSYS_"),
            has_reason,
            symbols: OnceLock::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Reads the symbol table on a thread of its own, so that the first drop does not have to wait for it.
    pub(super) fn prepare(&self) {
        let names = self.clone();
        thread::spawn(move || names.symbols().is_some());
    }

    /// The symbol table, if the kernel shows it.
    fn symbols(&self) -> Option<&Symbols> {
        self.inner
            .symbols
            .get_or_init(|| {
                Symbols::load()
                    .inspect_err(|error| {
                        log::warn!("drops are shown without the function they happened in: {error:#}");
                    })
                    .ok()
            })
            .as_ref()
    }

    /// Every drop reason of the kernel with its number, for the header of an event log.
    pub fn reasons(&self) -> impl Iterator<Item = (u32, &str)> {
        self.inner
            .reasons
            .iter()
            .map(|(value, name)| (*value, name.as_str()))
    }
}

impl DropNames for Names {
    fn reason(&self, reason: u32) -> Option<String> {
        if !self.inner.has_reason {
            return None;
        }
        if let Some(name) = self.inner.reasons.get(&reason) {
            return Some(name.clone());
        }
        // A subsystem's reasons are in its module's own BTF; the number within it has to do.
        Some(match self.inner.subsystems.get(&(reason >> SUBSYSTEM_SHIFT)) {
            Some(subsystem) if reason >> SUBSYSTEM_SHIFT != 0 => {
                format!("{subsystem}_{}", reason & ((1 << SUBSYSTEM_SHIFT) - 1))
            }
            _ => reason.to_string(),
        })
    }

    fn symbol(&self, address: u64) -> Option<String> {
        self.symbols()?.function(address).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(has_reason: bool) -> Names {
        let inner = Inner {
            reasons: HashMap::from([(12, "NETFILTER_DROP".to_owned())]),
            subsystems: HashMap::from([(0, "CORE".to_owned()), (2, "OPENVSWITCH".to_owned())]),
            has_reason,
            symbols: OnceLock::from(None),
        };
        Names {
            inner: Arc::new(inner),
        }
    }

    #[test]
    fn a_reason_has_its_name_or_its_number() {
        assert_eq!(names(true).reason(12).as_deref(), Some("NETFILTER_DROP"));
        assert_eq!(names(true).reason(0x0002_0003).as_deref(), Some("OPENVSWITCH_3"));
        assert_eq!(names(true).reason(99).as_deref(), Some("99"));
        assert_eq!(names(true).reason(0x0009_0001).as_deref(), Some("589825"));
    }

    #[test]
    fn a_kernel_without_reasons_gives_none() {
        assert_eq!(names(false).reason(12), None);
    }

    #[test]
    fn without_symbols_there_is_no_location() {
        assert_eq!(names(true).symbol(0xffff_ffff_8100_0000), None);
    }
}
