//! The numbers of the hooks. What a hook is for, how it is attached and what is lost without it stands in the table
//! of the loader (`calitrace::kernel::hooks`); here is only what both sides must agree on.

/// Where a record was made. The discriminant is the record's `hook` byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Hook {
    /// TC ingress of a workload interface: the pod sent it.
    WorkloadIngress = 0,
    /// TC egress of a workload interface: about to enter the pod.
    WorkloadEgress = 1,
    /// TC ingress of a tunnel device: decapsulated.
    TunnelIngress = 2,
    /// TC egress of a tunnel device: about to be encapsulated.
    TunnelEgress = 3,
    /// TC ingress of an uplink: arrived from another node.
    UplinkIngress = 4,
    /// TC egress of an uplink: leaves the node.
    UplinkEgress = 5,
    /// Raw tracepoint `skb:kfree_skb`: the kernel dropped it.
    KfreeSkb = 6,
    /// `ip_forward`: the node forwards it; the TTL is still as it came.
    IpForward = 7,
    /// `ip6_forward`: as above, IPv6.
    Ip6Forward = 8,
    /// `iptunnel_xmit`: a tunnel puts an outer IPv4 header in front of it.
    IptunnelXmit = 9,
    /// `ip_tunnel_rcv`: an IP tunnel takes it out of its outer header.
    IpTunnelRcv = 10,
    /// `vxlan_xmit`: a VXLAN device takes it to wrap it.
    VxlanXmit = 11,
    /// `vxlan_rcv`: VXLAN takes it out of its outer headers.
    VxlanRcv = 12,
    /// `__icmp_send`: the kernel answers it with an ICMP error.
    IcmpSend = 13,
    /// `icmp6_send`: the kernel answers it with an ICMPv6 error.
    Icmp6Send = 14,
    /// `nf_hook_slow`: netfilter did not accept it.
    NfHookSlow = 15,
    /// `nf_nat_setup_info`: a connection gets a translation.
    NfNatSetupInfo = 16,
    /// `skb_clone`: it goes on under a second address.
    SkbClone = 17,
    /// `pskb_expand_head`: its bytes move to another buffer.
    PskbExpandHead = 18,
    /// `nflog_tg`: a rule of iptables logs it (`NFLOG`), as Felix does with each verdict of a policy where flow logs are on.
    NflogTg = 19,
    /// `nft_log_eval`: as above, a rule of nftables, and of iptables by nftables since iptables 1.8.8.
    NftLogEval = 20,
}

/// What kind of interface a hook sits on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The host end of a pod's device.
    Workload,
    /// `tunl0`, `vxlan.calico`, `wireguard.cali`.
    Tunnel,
    /// A device towards other nodes.
    Uplink,
    /// Not bound to an interface.
    Stack,
}

/// Which way a packet passes an interface, as the node that owns it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Into the node's stack.
    Ingress,
    /// Out of the node's stack.
    Egress,
    /// The hook is not bound to a direction.
    None,
}

impl Hook {
    /// Every hook, in the order of their numbers.
    pub const ALL: [Self; 21] = [
        Self::WorkloadIngress,
        Self::WorkloadEgress,
        Self::TunnelIngress,
        Self::TunnelEgress,
        Self::UplinkIngress,
        Self::UplinkEgress,
        Self::KfreeSkb,
        Self::IpForward,
        Self::Ip6Forward,
        Self::IptunnelXmit,
        Self::IpTunnelRcv,
        Self::VxlanXmit,
        Self::VxlanRcv,
        Self::IcmpSend,
        Self::Icmp6Send,
        Self::NfHookSlow,
        Self::NfNatSetupInfo,
        Self::SkbClone,
        Self::PskbExpandHead,
        Self::NflogTg,
        Self::NftLogEval,
    ];

    /// The hook with this number, if there is one.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        if (number as usize) < Self::ALL.len() {
            Some(Self::ALL[number as usize])
        } else {
            None
        }
    }

    /// The kind of interface it sits on.
    #[must_use]
    pub const fn place(self) -> Place {
        match self {
            Self::WorkloadIngress | Self::WorkloadEgress => Place::Workload,
            Self::TunnelIngress | Self::TunnelEgress => Place::Tunnel,
            Self::UplinkIngress | Self::UplinkEgress => Place::Uplink,
            _ => Place::Stack,
        }
    }

    /// The direction in which packets pass it.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::WorkloadIngress | Self::TunnelIngress | Self::UplinkIngress => Direction::Ingress,
            Self::WorkloadEgress | Self::TunnelEgress | Self::UplinkEgress => Direction::Egress,
            _ => Direction::None,
        }
    }

    /// Whether it is a function of the kernel: it shows what happens between two interfaces, and no packet begins or
    /// ends there.
    #[must_use]
    pub const fn is_function(self) -> bool {
        self as u8 > Self::KfreeSkb as u8
    }
}
