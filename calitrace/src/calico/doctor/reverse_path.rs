//! Reverse path filters, by which the kernel drops what comes by another device than its answer would leave by.

use super::Findings;
use crate::event::Role;

pub(super) fn check(findings: &mut Findings<'_>) {
    loose(findings);
    strict(findings);
}

/// Felix ends itself when it finds loose reverse path filtering, unless `ignoreLooseRPF` is set, because a pod could
/// then use others' addresses (`felix/dataplane/linux/endpoint_mgr.go`).
fn loose(findings: &mut Findings<'_>) {
    let sysctls = &findings.evidence.sysctls;
    let loose: Vec<_> = ["all", "default"]
        .into_iter()
        .filter(|scope| sysctls.is(&format!("ipv4/conf/{scope}/rp_filter"), "2"))
        .map(|scope| format!("net.ipv4.conf.{scope}.rp_filter"))
        .collect();
    if !loose.is_empty() {
        findings.note(
            format!(
                "Reverse path filtering is loose ({}=2): Felix refuses to start so.",
                loose.join("=2, ")
            ),
            "Set it to 1 or 0, or set Felix's ignoreLooseRPF.",
        );
    }
}

/// What a pod sends to another node's own address goes without encapsulation, and the answer comes through the tunnel.
/// Where both keep their addresses, a strict filter drops the one at that node's uplink, the other at this node's tunnel
/// (projectcalico/calico#592). It is the larger value of the device's and all devices' that counts (`IN_DEV_RPFILTER`,
/// `include/linux/inetdevice.h`).
fn strict(findings: &mut Findings<'_>) {
    let masquerades = findings
        .evidence
        .firewall
        .as_ref()
        .and_then(|firewall| firewall.has_masquerading(false));
    let tunnelled = findings
        .node
        .to_blocks()
        .any(|route| route.encap.is_some() && route.prefix.addr().is_ipv4());
    if masquerades != Some(false) || !tunnelled {
        return;
    }
    let value = |scope: &str| {
        findings
            .evidence
            .sysctls
            .number(&format!("ipv4/conf/{scope}/rp_filter"))
    };
    let carriers = findings
        .node
        .with(Role::Uplink)
        .chain(findings.node.with(Role::Tunnel));
    let strict: Vec<String> = carriers
        .filter(|device| value("all").max(value(&device.name)) == Some(1))
        .map(|device| device.name.clone())
        .collect();
    if !strict.is_empty() {
        findings.note(
            format!(
                "Reverse path filtering is strict on {}, pods of other nodes are behind a tunnel, and no pool has natOutgoing: \
                 what a pod sends to another node's own address comes there by the uplink, and the answer here by the \
                 tunnel; where that is strict, it is dropped.",
                strict.join(", ")
            ),
            "Set natOutgoing in the IP pool, or net.ipv4.conf.INTERFACE.rp_filter=2 on these interfaces of all nodes \
             (net.ipv4.conf.all.rp_filter stays below 2).",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        calico::doctor::{Evidence, Firewall, Severity, Sysctls, testing::Node},
        netfilter::compact_nft_with_nat,
    };

    const ON: &str = "*nat\n:cali-nat-outgoing - [0:0]\n\
                      -A cali-nat-outgoing -m set --match-set cali40masq-ipam-pools src -j MASQUERADE --random-fully\nCOMMIT\n";
    const OFF: &str = "*nat\n:cali-POSTROUTING - [0:0]\n:cali-nat-outgoing - [0:0]\n-A cali-POSTROUTING -j cali-nat-outgoing\n\
                       -A cali-POSTROUTING -o tunl0 -j MASQUERADE\nCOMMIT\n";

    fn told(rules: &str, settings: &[(&str, &str)]) -> Vec<String> {
        let evidence = Evidence {
            sysctls: Sysctls::new(settings.iter().copied()),
            firewall: Some(Firewall {
                v4: rules.to_owned(),
                ..Firewall::default()
            }),
            ..Evidence::default()
        };
        Node::new().told(check, &evidence, Severity::Note)
    }

    #[test]
    fn strict_and_not_masqueraded_loses_what_pods_send_to_nodes() {
        for strict in [
            &[
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/eth0/rp_filter", "1"),
            ],
            &[
                ("ipv4/conf/all/rp_filter", "1"),
                ("ipv4/conf/eth0/rp_filter", "0"),
            ],
        ] {
            let told = told(OFF, strict);
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(told[0].contains("strict on eth0"), "{told:?}");
        }
    }

    #[test]
    fn calicos_nftables_mode_masquerades_too() {
        let text =
            compact_nft_with_nat(include_str!("../../../../tests/felix/v3.33-by-hand/plain.json")).unwrap();
        let told = |native: String| {
            let evidence = Evidence {
                sysctls: Sysctls::new([("ipv4/conf/eth0/rp_filter", "1")]),
                firewall: Some(Firewall {
                    native_v4: native,
                    ..Firewall::default()
                }),
                ..Evidence::default()
            };
            Node::new().told(check, &evidence, Severity::Note)
        };
        assert_eq!(told(text.clone()), [""; 0]);
        let found = told(text.replace("masquerade", "return"));
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn either_alone_is_as_it_should_be() {
        let strict = [
            ("ipv4/conf/all/rp_filter", "1"),
            ("ipv4/conf/eth0/rp_filter", "1"),
        ];
        assert_eq!(told(ON, &strict), [""; 0]);
        assert_eq!(
            told("*filter\nCOMMIT\n", &strict),
            [""; 0],
            "Felix's chains are not there"
        );
        let loose = [
            ("ipv4/conf/tunl0/rp_filter", "0"),
            ("ipv4/conf/eth0/rp_filter", "2"),
        ];
        assert_eq!(told(OFF, &loose), [""; 0]);
        assert_eq!(told(OFF, &[("ipv4/conf/eth0/rp_filter", "0")]), [""; 0]);
    }

    #[test]
    fn without_tunnel_the_answer_leaves_by_the_same_device() {
        let evidence = Evidence {
            sysctls: Sysctls::new([("ipv4/conf/eth0/rp_filter", "1")]),
            firewall: Some(Firewall {
                v4: OFF.to_owned(),
                ..Firewall::default()
            }),
            ..Evidence::default()
        };
        let told = Node::new()
            .without_tunnel()
            .told(check, &evidence, Severity::Note);
        assert_eq!(told, [""; 0]);
    }
}
