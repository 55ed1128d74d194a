//! The kernel's drop reasons in plain words.

/// What a drop's reason means, or, where that says nothing, the function that freed the packet.
pub(super) fn words(reason: Option<&str>, location: Option<&str>) -> Option<&'static str> {
    reason
        .and_then(of_reason)
        .or_else(|| location.and_then(of_function))
}

const XDP: &str = "an XDP program of the interface";

/// Functions that say what their reason does not: XDP programs have none up to 6.18 (`do_xdp_generic`, `net/core/dev.c`;
/// `veth_xdp_rcv_skb`, `drivers/net/veth.c`, in 5.10 within `veth_poll`, which frees nothing else). What a NIC's driver drops is
/// no `sk_buff` yet, and nobody sees it.
fn of_function(location: &str) -> Option<&'static str> {
    matches!(
        location,
        "do_xdp_generic"
            | "netif_receive_generic_xdp"
            | "bpf_prog_run_generic_xdp"
            | "veth_xdp_rcv_skb"
            | "veth_xdp_rcv"
            | "veth_poll"
    )
    .then_some(XDP)
}

/// The reasons one meets on a Calico node (`enum skb_drop_reason`, `include/net/dropreason-core.h`, Linux 6.18, where each is
/// described). Those of the receiver's TCP (`net/ipv4/tcp_input.c`) say whether anything is lost by it: what came twice or too
/// late is dropped all the time on a busy network, and harms nobody.
fn of_reason(reason: &str) -> Option<&'static str> {
    Some(match reason {
        // On the node's way.
        "IP_OUTNOROUTES" | "IP_INNOROUTES" => "no route",
        "IP_RPFILTER" => "reverse path filter",
        "IP_INVALID_SOURCE" | "IP_LOCAL_SOURCE" => "its source is no address a packet may come from",
        "IP_INVALID_DEST" => "its destination is no address a packet may go to",
        // `ip_error`, `net/ipv4/route.c`, where the interface does not forward.
        "IP_INADDRERRORS" => "its destination is not here, and forwarding is off",
        "IP_LOCALNET" => "a loopback address from outside",
        "OTHERHOST" => "its frame is meant for another host (is the neighbour entry of its receiver wrong?)",
        "UNICAST_IN_L2_MULTICAST" => "one receiver's packet in a frame for all",
        "IPV6DISABLED" => "IPv6 is disabled on the interface",
        "PKT_TOO_BIG" => "larger than the MTU, and nobody was seen telling the sender",
        "NEIGH_FAILED" | "NEIGH_QUEUEFULL" => "the next hop does not answer ARP",
        "NEIGH_CREATEFAIL" => {
            "the table of neighbours took no entry for the next hop (is it full? gc_thresh3)"
        }
        // A device without carrier has `noop_qdisc`, which drops all (`dev_deactivate`, `net/sched/sch_generic.c`).
        "QDISC_DROP" => "a queue is full, or the device has no carrier (is its other end down?)",
        "QDISC_OVERLIMIT" | "QDISC_CONGESTED" | "FQ_FLOW_LIMIT" | "FQ_BAND_LIMIT" | "CAKE_FLOOD"
        | "FULL_RING" | "CPU_BACKLOG" => "a queue is full",
        "TC_INGRESS" | "TC_EGRESS" => "a TC program",
        "BPF_CGROUP_EGRESS" => "a BPF program of its cgroup",
        "XDP" => XDP,
        "XFRM_POLICY" => "an IPsec policy",
        "SECURITY_HOOK" => "a security module (SELinux or the like)",
        "DEV_READY" => "the device is down",
        "NOMEM" => "out of memory",
        "IP_CSUM" | "TCP_CSUM" | "UDP_CSUM" | "ICMP_CSUM" | "SKB_CSUM" => "bad checksum",
        "IP_INHDR" | "HDR_TRUNC" | "PKT_TOO_SMALL" => "a broken header",
        "DUP_FRAG" => "a fragment that came twice or overlaps another",
        "FRAG_REASM_TIMEOUT" | "FRAG_TOO_FAR" => "fragments of it are missing",
        // Tunnels.
        "VXLAN_INVALID_HDR" => "a broken VXLAN header",
        "VXLAN_VNI_NOT_FOUND" => "no VXLAN device here has its VNI",
        "VXLAN_ENTRY_EXISTS" => "the VXLAN device knows its sender behind another node",
        "TUNNEL_TXINFO" => "the tunnel device does not know where to send it",
        "IP_TUNNEL_ECN" => "marks of congestion inside and outside the tunnel contradict each other",
        "RECURSION_LIMIT" => "a device that sends to itself again and again",
        // At the receiver.
        "NO_SOCKET" => "nobody listens",
        "IP_NOPROTO" | "UNHANDLED_PROTO" => "nobody here takes this protocol",
        "SOCKET_RCVBUFF" | "SOCKET_BACKLOG" => "the receiver's socket buffer is full",
        "PROTO_MEM" => "the receiver's sockets use all memory they may",
        "SOCKET_FILTER" => "a BPF filter of the receiver's socket",
        "TCP_LISTEN_OVERFLOW" => "the listener's queue of new connections is full",
        "TCP_ZEROWINDOW" | "TCP_OVERWINDOW" | "TCP_INVALID_END_SEQUENCE" => {
            "more than the receiver had room for"
        }
        "TCP_OFO_DROP" | "TCP_OFO_QUEUE_PRUNE" => "out of order, and the receiver had no room for it",
        "TCP_OLD_DATA" | "TCP_OFOMERGE" => "it came twice: the receiver has this data, nothing is lost",
        "TCP_OLD_SEQUENCE" => "the receiver is past it (sent twice, or a probe): nothing is lost",
        "TCP_OLD_ACK" | "TCP_TOO_OLD_ACK" | "TCP_RFC7323_PAWS_ACK" => {
            "a later acknowledgement overtook it: nothing is lost"
        }
        "TCP_RFC7323_PAWS" | "TCP_RFC7323_TW_PAWS" => {
            "a later segment overtook it, or it is of a former connection (PAWS)"
        }
        "TCP_RFC7323_TSECR" | "TCP_INVALID_SEQUENCE" | "TCP_INVALID_ACK_SEQUENCE" | "TCP_ACK_UNSENT_DATA" => {
            "its numbers do not belong to the receiver's connection"
        }
        "TCP_RESET" => "a reset that does not belong to the receiver's connection",
        "TCP_CLOSE" | "TCP_ABORT_ON_DATA" | "SOCKET_CLOSE" => "the receiver's connection is closed",
        "TCP_FLAGS" | "TCP_INVALID_SYN" => "its flags do not fit the receiver's connection",
        "TCP_MINTTL" => "its TTL is below what the receiver's socket asks for",
        "TCP_MD5NOTFOUND" | "TCP_MD5UNEXPECTED" | "TCP_MD5FAILURE" | "TCP_AUTH_HDR" | "TCP_AONOTFOUND"
        | "TCP_AOUNEXPECTED" | "TCP_AOKEYNOTFOUND" | "TCP_AOFAILURE" => {
            "its TCP signature (BGP password) is wrong"
        }
        _ => return None,
    })
}
