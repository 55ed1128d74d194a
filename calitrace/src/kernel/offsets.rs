//! Which kernel structure members the programs read, taken from BTF.

use calitrace_ebpf::shared::{OFFSET_UNKNOWN, Offsets};

use super::btf::Btf;

/// `struct xt_action_param`.`targinfo`, behind the union with `target` (`include/linux/netfilter/x_tables.h`, 5.10 to 6.18).
const XT_TARGINFO: u32 = 8;
/// `struct nft_expr`.`data` (`include/net/netfilter/nf_tables.h`), and in it `struct nft_log`.`prefix` behind 16 bytes of
/// `struct nf_loginfo` (`net/netfilter/nft_log.c`, `include/net/netfilter/nf_log.h`, 5.10 to 6.18).
const NFT_LOG_PREFIX: u32 = 8 + 16;

/// Reads every offset that [`Offsets`] has; one that the kernel lacks stays unknown, and the programs do without.
pub(super) fn read(btf: &Btf) -> Offsets {
    let skb = |member: &str| btf.offset("sk_buff", &[member]).unwrap_or(OFFSET_UNKNOWN);
    let of = |structure: &str, path: &[&str]| btf.offset(structure, path).unwrap_or(OFFSET_UNKNOWN);
    Offsets {
        skb_head: skb("head"),
        skb_dev: skb("dev"),
        skb_len: skb("len"),
        skb_data_len: skb("data_len"),
        skb_data: skb("data"),
        skb_protocol: skb("protocol"),
        skb_network_header: skb("network_header"),
        skb_mac_header: skb("mac_header"),
        skb_end: skb("end"),
        shinfo_gso_size: of("skb_shared_info", &["gso_size"]),
        shinfo_gso_segs: of("skb_shared_info", &["gso_segs"]),
        dev_ifindex: of("net_device", &["ifindex"]),
        dev_nd_net: of("net_device", &["nd_net"]),
        net_inum: of("net", &["ns", "inum"]),
        kfree_has_reason: u32::from(kfree_has_reason(btf)),
        nf_state_hook: of("nf_hook_state", &["hook"]),
        nf_state_pf: of("nf_hook_state", &["pf"]),
        nf_state_in: of("nf_hook_state", &["in"]),
        nf_state_out: of("nf_hook_state", &["out"]),
        nf_state_net: of("nf_hook_state", &["net"]),
        ct_reply_tuple: OFFSET_UNKNOWN,
        ct_original_tuple: OFFSET_UNKNOWN,
        ct_status: OFFSET_UNKNOWN,
        skb_nfct: skb("_nfct"),
        ct_net: OFFSET_UNKNOWN,
        xt_targinfo: XT_TARGINFO,
        nft_log_prefix: NFT_LOG_PREFIX,
    }
}

/// Reads the offsets that conntrack's own types take. They are in the kernel's BTF where conntrack is built in, else in
/// that of its module.
pub(super) fn read_conntrack(btf: &Btf, offsets: &mut Offsets) {
    let tuple = |member: &str| btf.offset("nf_conntrack_tuple_hash", &[member]);
    // `IP_CT_DIR_REPLY` is the second of the two (include/uapi/linux/netfilter/nf_conntrack_tuple_common.h).
    if let (Some(hashes), Some(size), Some(tuple), Some(net), Some(status)) = (
        btf.offset("nf_conn", &["tuplehash"]),
        btf.size("nf_conntrack_tuple_hash"),
        tuple("tuple"),
        btf.offset("nf_conn", &["ct_net"]),
        btf.offset("nf_conn", &["status"]),
    ) {
        offsets.ct_original_tuple = hashes + tuple;
        offsets.ct_reply_tuple = hashes + size + tuple;
        offsets.ct_status = status;
        offsets.ct_net = net;
    }
}

/// Reads the offsets that logging rules take, from the BTF of their modules or the kernel's own. Before 5.11 no BTF tells
/// of modules, and a module may come later: meanwhile they are as they have always been.
pub(super) fn read_logs(btf: &Btf, offsets: &mut Offsets) {
    if let Some(info) = btf.offset("xt_action_param", &["targinfo"]) {
        offsets.xt_targinfo = info;
    }
    if let (Some(data), Some(prefix)) = (
        btf.offset("nft_expr", &["data"]),
        btf.offset("nft_log", &["prefix"]),
    ) {
        offsets.nft_log_prefix = data + prefix;
    }
}

/// Whether `trace_kfree_skb(skb, location, reason, …)` has its third argument: since 5.17, of type
/// `enum skb_drop_reason`. A typedef `btf_trace_NAME` has `void *__data` before them.
fn kfree_has_reason(btf: &Btf) -> bool {
    btf.parameters("btf_trace_kfree_skb")
        .is_some_and(|parameters| parameters >= 4)
        && btf.enum_values("skb_drop_reason").is_some()
}

/// Whether namespaces and drops can be told with these.
pub(super) fn suffice(offsets: &Offsets) -> bool {
    [
        offsets.skb_head,
        offsets.skb_dev,
        offsets.skb_len,
        offsets.skb_data_len,
        offsets.skb_data,
        offsets.skb_protocol,
        offsets.skb_network_header,
        offsets.dev_ifindex,
        offsets.dev_nd_net,
        offsets.net_inum,
    ]
    .iter()
    .all(|&offset| offset != OFFSET_UNKNOWN)
}
