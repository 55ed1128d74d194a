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
    /// Function of the kernel.
    Function(Function),
}

/// A function of the kernel, and the programs for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its symbol.
    pub symbol: &'static str,
    /// The module it is in, where it is not in the kernel itself: without the module no packet gets there either.
    pub module: Option<&'static str>,
    /// Program for a trampoline (fentry; fexit where the result matters): cheaper than a kprobe.
    pub trampoline: Option<&'static str>,
    /// The result matters: the row's program is a kretprobe.
    pub result: bool,
}

/// A function in the kernel itself.
const fn function(symbol: &'static str) -> Function {
    Function {
        symbol,
        module: None,
        trampoline: None,
        result: false,
    }
}

/// A function of a module.
const fn in_module(symbol: &'static str, module: &'static str) -> Function {
    Function {
        module: Some(module),
        ..function(symbol)
    }
}

impl Function {
    /// With a program for a trampoline.
    const fn or(self, trampoline: &'static str) -> Self {
        Self {
            trampoline: Some(trampoline),
            ..self
        }
    }

    /// The result matters.
    const fn with_result(self) -> Self {
        Self { result: true, ..self }
    }
}

impl Attach {
    /// Name of the capability that it takes ([`super::capabilities`]).
    #[must_use]
    pub fn takes(self) -> &'static str {
        match self {
            Self::Tc => "tc",
            Self::RawTracepoint(_) => "raw tracepoints",
            Self::Function(_) => "kprobes",
        }
    }
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
    Row {
        hook: Hook::IpForward,
        name: "ip_forward",
        program: "calitrace_ip_forward",
        attach: Attach::Function(function("ip_forward").or("calitrace_ip_forward_entry")),
        since: "5.10",
        lost: "the moment at which a node forwards an IPv4 packet",
    },
    Row {
        hook: Hook::Ip6Forward,
        name: "ip6_forward",
        program: "calitrace_ip6_forward",
        attach: Attach::Function(function("ip6_forward")),
        since: "5.10",
        lost: "the moment at which a node forwards an IPv6 packet",
    },
    Row {
        hook: Hook::IptunnelXmit,
        name: "iptunnel_xmit",
        program: "calitrace_iptunnel_xmit",
        attach: Attach::Function(function("iptunnel_xmit").or("calitrace_iptunnel_xmit_entry")),
        since: "5.10",
        lost: "the outer header at the moment the tunnel makes it (it is seen at the uplink all the same)",
    },
    Row {
        hook: Hook::IpTunnelRcv,
        name: "ip_tunnel_rcv",
        program: "calitrace_ip_tunnel_rcv",
        attach: Attach::Function(in_module("ip_tunnel_rcv", "ip_tunnel")),
        since: "5.10",
        lost: "the moment at which tunl0 takes a packet out of its outer header",
    },
    Row {
        hook: Hook::VxlanXmit,
        name: "vxlan_xmit",
        program: "calitrace_vxlan_xmit",
        attach: Attach::Function(in_module("vxlan_xmit", "vxlan")),
        since: "5.10",
        lost: "the moment at which vxlan.calico takes a packet to wrap it",
    },
    Row {
        hook: Hook::VxlanRcv,
        name: "vxlan_rcv",
        program: "calitrace_vxlan_rcv",
        attach: Attach::Function(in_module("vxlan_rcv", "vxlan")),
        since: "5.10",
        lost: "the moment at which vxlan.calico takes a packet out of its outer headers",
    },
    Row {
        hook: Hook::IcmpSend,
        name: "icmp_send",
        program: "calitrace_icmp_send",
        attach: Attach::Function(function("__icmp_send")),
        since: "5.10",
        lost: "that the kernel answered a packet with an ICMP error, where the answer itself is not seen",
    },
    Row {
        hook: Hook::Icmp6Send,
        name: "icmp6_send",
        program: "calitrace_icmp6_send",
        attach: Attach::Function(function("icmp6_send")),
        since: "5.10",
        lost: "that the kernel answered a packet with an ICMPv6 error, where the answer itself is not seen",
    },
    Row {
        hook: Hook::NfHookSlow,
        name: "nf_hook_slow",
        program: "calitrace_nf_hook_slow_return",
        attach: Attach::Function(
            function("nf_hook_slow")
                .or("calitrace_nf_hook_slow_exit")
                .with_result(),
        ),
        since: "5.10",
        lost: "which netfilter hook dropped or took a packet, and between which interfaces",
    },
    Row {
        hook: Hook::NfNatSetupInfo,
        name: "nf_nat_setup_info",
        program: "calitrace_nf_nat_setup_info",
        attach: Attach::Function(in_module("nf_nat_setup_info", "nf_nat")),
        since: "5.10",
        lost: "translations to and from addresses that are no known service's",
    },
    Row {
        hook: Hook::SkbClone,
        name: "skb_clone",
        program: "calitrace_skb_clone_return",
        attach: Attach::Function(function("skb_clone").or("calitrace_skb_clone_exit").with_result()),
        since: "5.10",
        lost: "that a packet goes on as a clone of itself: the clone is taken for another packet",
    },
    Row {
        hook: Hook::PskbExpandHead,
        name: "pskb_expand_head",
        program: "calitrace_pskb_expand_head_return",
        attach: Attach::Function(
            function("pskb_expand_head")
                .or("calitrace_pskb_expand_head_exit")
                .with_result(),
        ),
        since: "5.10",
        lost: "that a packet's bytes were copied to a larger buffer on the way",
    },
    Row {
        hook: Hook::NflogTg,
        name: "nflog_tg",
        program: "calitrace_nflog_tg",
        attach: Attach::Function(in_module("nflog_tg", "xt_NFLOG")),
        since: "5.10",
        lost: "what Calico's rules of iptables log of a packet where flow logs are on: by which rule of which policy it was \
               allowed or denied",
    },
    Row {
        hook: Hook::NftLogEval,
        name: "nft_log_eval",
        program: "calitrace_nft_log_eval",
        attach: Attach::Function(in_module("nft_log_eval", "nft_log")),
        since: "5.10",
        lost: "the same of rules of nftables, and of those that iptables (1.8.8 and newer) makes of them",
    },
];

/// The program that notes the arguments of functions whose result matters, where there are no trampolines.
pub(super) const ENTER: &str = "calitrace_enter";
/// The body of the kprobes.
pub(super) const BODY: &str = "calitrace_function";

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
        let trampolines = TABLE.iter().filter_map(|row| match row.attach {
            Attach::Function(function) => function.trampoline,
            _ => None,
        });
        for program in TABLE
            .iter()
            .map(|row| row.program)
            .chain(trampolines)
            .chain([ENTER, BODY])
        {
            assert!(
                !program.contains("calico") && !program.starts_with("cali_"),
                "{program}"
            );
        }
    }
}
