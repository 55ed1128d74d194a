//! What carries out Calico's policies on a node.

use serde::Serialize;

use crate::{
    calico::{doctor::Firewall, view::NodeView},
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
/// Felix' first chain in the table `filter` (`felix/rules/rule_defs.go`, Calico 3.34). In eBPF mode there are others.
const FORWARD: &str = "\n:cali-FORWARD ";

impl Dataplane {
    /// That of a node; none where nothing of Felix is seen, or its rules cannot be read.
    pub(super) fn of(view: &NodeView) -> Option<Self> {
        if has_ebpf(&view.snapshot.links) {
            return Some(Self::Ebpf);
        }
        match view.handle.run(Firewall::read) {
            Ok(firewall) => Self::by_rules(&firewall),
            Err(error) => {
                log::warn!("the rules of the node {} are not read: {error:#}", view.node.name);
                None
            }
        }
    }

    fn by_rules(firewall: &Firewall) -> Option<Self> {
        if !firewall.native_v4.is_empty() || !firewall.native_v6.is_empty() {
            return Some(Self::Nftables);
        }
        let mut iptables = [&firewall.v4, &firewall.v6].into_iter();
        iptables
            .any(|rules| rules.contains(FORWARD))
            .then_some(Self::Iptables)
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

    #[test]
    fn rules_tell_the_others() {
        let by = |v4: &str, native_v4: &str| {
            Dataplane::by_rules(&Firewall {
                v4: v4.to_owned(),
                native_v4: native_v4.to_owned(),
                ..Firewall::default()
            })
        };
        let felix = "*filter\n:FORWARD ACCEPT [0:0]\n:cali-FORWARD - [0:0]\nCOMMIT\n";
        assert_eq!(by(felix, ""), Some(Dataplane::Iptables));
        assert_eq!(by("", "{}\n"), Some(Dataplane::Nftables));
        // What was left by the mode before does nothing any more.
        assert_eq!(by(felix, "{}\n"), Some(Dataplane::Nftables));
        assert_eq!(by("*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n", ""), None);
    }
}
