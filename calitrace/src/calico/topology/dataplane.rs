//! What carries out Calico's policies on a node.

use anyhow::Result;
use serde::Serialize;

use crate::{
    calico::{doctor::is_calico, view::NodeView},
    iptables::{self, Shown},
    nftables,
    route::Link,
};

/// Which of Felix' dataplanes it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dataplane {
    /// Rules of iptables, whichever of its two backends holds them.
    Iptables,
    /// Calico's nftables mode: a table of its own.
    Nftables,
    /// eBPF programs at the interfaces.
    Ebpf,
}

/// The devices of Calico's eBPF dataplane in a node (`felix/dataplane/linux/dataplanedefs/dataplane_defs.go`, Calico 3.34).
const EBPF_DEVICES: [&str; 2] = ["bpfin.cali", "bpfout.cali"];
/// Felix' chain in the table `filter` (`felix/rules/rule_defs.go`, Calico 3.34).
const FORWARD: &str = "\n:cali-FORWARD ";

impl Dataplane {
    /// That of a node; none where nothing of Felix is seen, or its rules cannot be read.
    pub(super) fn of(view: &NodeView) -> Option<Self> {
        if has_ebpf(&view.snapshot.links) {
            return Some(Self::Ebpf);
        }
        match view.handle.run(Self::by_rules) {
            Ok(found) => found,
            Err(error) => {
                log::warn!(
                    "the dataplane of the node {} is not told: {error:#}",
                    view.node.name
                );
                None
            }
        }
    }

    /// By the rules of the namespace that the calling thread is in.
    fn by_rules() -> Result<Option<Self>> {
        if nftables::are_there() && nftables::tables()?.iter().any(is_calico) {
            return Ok(Some(Self::Nftables));
        }
        let mut missing = None;
        for tool in iptables::tools() {
            match iptables::rules(tool)? {
                Shown::Rules(_, text) if text.contains(FORWARD) => return Ok(Some(Self::Iptables)),
                Shown::Rules(..) | Shown::Nothing => {}
                Shown::Missing => missing = Some(tool.is_missing()),
            }
        }
        missing.map_or(Ok(None), Err)
    }

    /// As people call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Ebpf => "eBPF",
        }
    }
}

/// Felix's own pair of devices, or its tunnel as it makes it for eBPF programs.
pub(super) fn has_ebpf(links: &[Link]) -> bool {
    links.iter().any(|link| {
        let external = link.vxlan.is_some_and(|vxlan| vxlan.collect_metadata);
        EBPF_DEVICES.contains(&link.name.as_str()) || (external && link.name.ends_with(".calico"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::Vxlan;

    fn link(name: &str, external: bool) -> Link {
        Link {
            ifindex: 2,
            name: name.to_owned(),
            mtu: 1450,
            flags: 1,
            vxlan: Some(Vxlan {
                collect_metadata: external,
                ..Vxlan::default()
            }),
            ..Link::default()
        }
    }

    #[test]
    fn the_ebpf_dataplane_is_known_by_its_devices() {
        assert!(has_ebpf(&[link("eth0", false), link("bpfin.cali", false)]));
        assert!(has_ebpf(&[link("vxlan.calico", true)]));
        assert!(!has_ebpf(&[
            link("vxlan.calico", false),
            link("cilium_vxlan", true)
        ]));
    }
}
