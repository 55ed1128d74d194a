//! Broken checksums of packets in VXLAN: what the sender's NIC or kernel computes wrongly is dropped by the receiver, and the
//! sender sees no reason (projectcalico/calico#3145, kubernetes/kubernetes#88986, canonical/microk8s#3695). Up to Linux 5.6 the
//! kernel itself did so with what it translates; newer ones do it with some NICs. Felix takes the work from them where
//! `ChecksumOffloadBroken` is set.
//!
//! That the tunnel leaves checksums to the NIC is no finding: of the kernels that calitrace runs on (5.10 and newer) none is
//! known as bad by its version (Felix sets it up to 5.7.0, `felix/environment/feature_detect_linux.go`, Calico 3.34), and on
//! these it is what most healthy nodes do. Only wrong checksums that came tell, and they tell of the sender.

use super::Findings;
use crate::event::Role;

pub(super) fn check(findings: &mut Findings<'_>) {
    let count = findings.evidence.bad_checksums;
    let vxlan = findings.node.with(Role::Tunnel).find_map(|tunnel| {
        let link = findings.node.snapshot.link(tunnel.ifindex)?;
        link.vxlan.is_some().then(|| link.name.clone())
    });
    let Some(tunnel) = vxlan.filter(|_| count > 0) else {
        return;
    };
    findings.note(
        format!(
            "UDP datagrams with a wrong checksum came to the node, {count} since it started: so ends what other nodes send \
             through {tunnel} where their NICs compute checksums wrongly."
        ),
        format!(
            "If the number grows, set featureDetectOverride: ChecksumOffloadBroken=true in FelixConfiguration; on one node \
             alone ethtool -K {tunnel} tx-checksum-ip-generic off, where the packets come from."
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calico::doctor::{Evidence, Severity, testing::Node};

    fn told(mut node: Node, bad_checksums: u64) -> Vec<String> {
        let evidence = Evidence {
            bad_checksums,
            ..Evidence::default()
        };
        node.told(check, &evidence, Severity::Note)
    }

    #[test]
    fn they_are_said_of_nodes_with_vxlan() {
        let notes = told(Node::new().with_vxlan(), 7);
        assert!(
            notes[0].contains("7 since it started") && notes[0].contains("through vxlan.calico"),
            "{notes:?}"
        );
    }

    #[test]
    fn none_are_no_finding_and_neither_are_those_of_others() {
        assert_eq!(told(Node::new().with_vxlan(), 0), [""; 0]);
        assert_eq!(told(Node::new(), 7), [""; 0]);
    }
}
