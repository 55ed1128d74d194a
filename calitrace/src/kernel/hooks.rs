//! The one table of hooks. Attaching, `doctor`, decoding and the event log derive from it: to add a hook, add a row
//! here and a number in `calitrace_ebpf::Hook` (and a program where its arguments have a new shape).

use calitrace_ebpf::Hook;

/// How a hook's program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// TC, to each interface of the hook's place, in its direction.
    Tc,
    /// Raw tracepoint with this name.
    RawTracepoint(&'static str),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its number on the wire.
    pub hook: Hook,
    /// Its name in logs, ledgers and help.
    pub name: &'static str,
    /// Name of the program in the object.
    pub program: &'static str,
    /// How it is attached.
    pub attach: Attach,
    /// First kernel series that has it.
    pub since: &'static str,
    /// What is lost without it, as the end of a sentence.
    pub lost: &'static str,
}

/// Every hook, in the order of their numbers.
pub const TABLE: [Row; Hook::ALL.len()] = [
    Row {
        hook: Hook::WorkloadIngress,
        name: "workload_ingress",
        program: "calitrace_workload_ingress",
        attach: Attach::Tc,
        since: "5.10",
        lost: "packets that pods send",
    },
    Row {
        hook: Hook::WorkloadEgress,
        name: "workload_egress",
        program: "calitrace_workload_egress",
        attach: Attach::Tc,
        since: "5.10",
        lost: "delivery to pods",
    },
    Row {
        hook: Hook::TunnelIngress,
        name: "tunnel_ingress",
        program: "calitrace_tunnel_ingress",
        attach: Attach::Tc,
        since: "5.10",
        lost: "packets as they leave the tunnel",
    },
    Row {
        hook: Hook::TunnelEgress,
        name: "tunnel_egress",
        program: "calitrace_tunnel_egress",
        attach: Attach::Tc,
        since: "5.10",
        lost: "packets as they enter the tunnel",
    },
    Row {
        hook: Hook::UplinkIngress,
        name: "uplink_ingress",
        program: "calitrace_uplink_ingress",
        attach: Attach::Tc,
        since: "5.10",
        lost: "packets as they arrive from other nodes, and their outer headers",
    },
    Row {
        hook: Hook::UplinkEgress,
        name: "uplink_egress",
        program: "calitrace_uplink_egress",
        attach: Attach::Tc,
        since: "5.10",
        lost: "packets as they leave for other nodes, and their outer headers",
    },
    Row {
        hook: Hook::KfreeSkb,
        name: "kfree_skb",
        program: "calitrace_kfree_skb",
        attach: Attach::RawTracepoint("kfree_skb"),
        since: "5.10 (reasons from 5.17)",
        lost: "where and why packets are dropped",
    },
];

/// The row of a hook.
#[must_use]
pub fn row(hook: Hook) -> &'static Row {
    &TABLE[hook as usize]
}

/// The hook with this name.
#[must_use]
pub fn by_name(name: &str) -> Option<Hook> {
    TABLE.iter().find(|row| row.name == name).map(|row| row.hook)
}

/// Hooks as their names, for serde's `with`.
pub mod by_name {
    use calitrace_ebpf::Hook;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    /// Writes the hook's name.
    pub fn serialize<S: Serializer>(hook: &Hook, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(super::row(*hook).name)
    }

    /// Reads a hook's name.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hook, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        super::by_name(&name).ok_or_else(|| D::Error::custom(format!("unknown hook {name:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_numbers() {
        for (number, row) in TABLE.iter().enumerate() {
            assert_eq!(row.hook as usize, number);
            assert_eq!(by_name(row.name), Some(row.hook));
        }
    }

    #[test]
    fn felix_would_delete_no_program_of_ours() {
        for row in TABLE {
            assert!(
                !row.program.contains("calico") && !row.program.starts_with("cali_"),
                "{}",
                row.program
            );
        }
    }
}
