//! The table of connections: when it is full, the kernel drops the first packet of every new one (`__nf_conntrack_alloc`,
//! `net/netfilter/nf_conntrack_core.c`, Linux 6.18).

use super::Findings;

/// From here on it is said, in percent.
const NEARLY: u64 = 90;

pub(super) fn check(findings: &mut Findings<'_>) {
    let Some(table) = findings.evidence.conntrack else {
        return;
    };
    // 0 is no limit.
    let remedy = "Raise net.netfilter.nf_conntrack_max (Felix and kube-proxy set it, too), or find out with conntrack -L who \
                  opens so many.";
    if table.max > 0 && table.count >= table.max {
        findings.problem(
            format!(
                "The table of connections is full ({} of {}): new connections are dropped.",
                table.count, table.max
            ),
            remedy,
        );
    } else if table.max > 0 && table.count.saturating_mul(100) >= table.max.saturating_mul(NEARLY) {
        findings.note(
            format!(
                "The table of connections is nearly full ({} of {}): when it is, new connections are dropped.",
                table.count, table.max
            ),
            remedy,
        );
    } else if table.evicted > 0 {
        findings.note(
            format!(
                "The table of connections has been full: {} connections were thrown out for new ones.",
                table.evicted
            ),
            remedy,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calico::doctor::{Conntrack, Evidence, Severity, testing::Node};

    fn told(count: u64, max: u64, evicted: u64, severity: Severity) -> Vec<String> {
        let evidence = Evidence {
            conntrack: Some(Conntrack { count, max, evicted }),
            ..Evidence::default()
        };
        Node::new().told(check, &evidence, severity)
    }

    #[test]
    fn full_is_a_problem_and_nearly_full_a_note() {
        let full = told(262_144, 262_144, 7, Severity::Problem);
        assert!(full[0].contains("full (262144 of 262144)"), "{full:?}");
        assert_eq!(told(262_144, 262_144, 7, Severity::Note), [""; 0]);
        let nearly = told(90, 100, 0, Severity::Note);
        assert!(nearly[0].contains("nearly full (90 of 100)"), "{nearly:?}");
        let once = told(1, 100, 3, Severity::Note);
        assert!(once[0].contains("has been full: 3 connections"), "{once:?}");
    }

    #[test]
    fn room_is_no_finding() {
        for (count, max) in [(0, 100), (89, 100), (5, 0)] {
            for severity in [Severity::Problem, Severity::Note] {
                assert_eq!(told(count, max, 0, severity), [""; 0], "{count} of {max}");
            }
        }
    }
}
