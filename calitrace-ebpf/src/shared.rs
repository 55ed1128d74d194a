//! Map keys and values, counters, and the names of maps, programs and globals.

use core::mem::size_of;

/// Kernel structure offsets in bytes, read from the running kernel's BTF and set before load.
/// [`OFFSET_UNKNOWN`] means: not known, do not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Offsets {
    /// `struct sk_buff`.`head`
    pub skb_head: u32,
    /// `struct sk_buff`.`dev`
    pub skb_dev: u32,
    /// `struct sk_buff`.`len`
    pub skb_len: u32,
    /// `struct sk_buff`.`data_len`
    pub skb_data_len: u32,
    /// `struct sk_buff`.`data`
    pub skb_data: u32,
    /// `struct sk_buff`.`protocol`
    pub skb_protocol: u32,
    /// `struct sk_buff`.`network_header`
    pub skb_network_header: u32,
    /// `struct sk_buff`.`mac_header`
    pub skb_mac_header: u32,
    /// `struct sk_buff`.`end` (offset from `head` to `skb_shared_info` on 64-bit kernels)
    pub skb_end: u32,
    /// `struct skb_shared_info`.`gso_size`
    pub shinfo_gso_size: u32,
    /// `struct skb_shared_info`.`gso_segs`
    pub shinfo_gso_segs: u32,
    /// `struct net_device`.`ifindex`
    pub dev_ifindex: u32,
    /// `struct net_device`.`nd_net` (a `possible_net_t`, whose first member is the `struct net *`)
    pub dev_nd_net: u32,
    /// `struct net`.`ns.inum`
    pub net_inum: u32,
    /// 1 if `trace_kfree_skb` has a reason as its third argument (5.17 and later), 0 if not.
    pub kfree_has_reason: u32,
    /// `struct nf_hook_state`.`hook`: a number below 8, in one byte or (before 5.17) four.
    pub nf_state_hook: u32,
    /// `struct nf_hook_state`.`pf`
    pub nf_state_pf: u32,
    /// `struct nf_hook_state`.`in`
    pub nf_state_in: u32,
    /// `struct nf_hook_state`.`out`
    pub nf_state_out: u32,
    /// `struct nf_hook_state`.`net`
    pub nf_state_net: u32,
    /// `struct nf_conn`.`tuplehash[IP_CT_DIR_REPLY].tuple`
    pub ct_reply_tuple: u32,
    /// `struct nf_conn`.`tuplehash[IP_CT_DIR_ORIGINAL].tuple`
    pub ct_original_tuple: u32,
    /// `struct nf_conn`.`status`
    pub ct_status: u32,
    /// `struct sk_buff`.`_nfct`
    pub skb_nfct: u32,
    /// `struct nf_conn`.`ct_net` (a `possible_net_t`)
    pub ct_net: u32,
    /// `struct xt_action_param`.`targinfo`
    pub xt_targinfo: u32,
    /// From a `struct nft_expr` that logs to `prefix` in its own data, a `struct nft_log`.
    pub nft_log_prefix: u32,
}

/// An offset that is not known.
pub const OFFSET_UNKNOWN: u32 = u32::MAX;

impl Offsets {
    /// Nothing known: the programs then do without `skb->head`, and the loader tells them their namespace.
    pub const UNKNOWN: Self = Self {
        skb_head: OFFSET_UNKNOWN,
        skb_dev: OFFSET_UNKNOWN,
        skb_len: OFFSET_UNKNOWN,
        skb_data_len: OFFSET_UNKNOWN,
        skb_data: OFFSET_UNKNOWN,
        skb_protocol: OFFSET_UNKNOWN,
        skb_network_header: OFFSET_UNKNOWN,
        skb_mac_header: OFFSET_UNKNOWN,
        skb_end: OFFSET_UNKNOWN,
        shinfo_gso_size: OFFSET_UNKNOWN,
        shinfo_gso_segs: OFFSET_UNKNOWN,
        dev_ifindex: OFFSET_UNKNOWN,
        dev_nd_net: OFFSET_UNKNOWN,
        net_inum: OFFSET_UNKNOWN,
        kfree_has_reason: 0,
        nf_state_hook: OFFSET_UNKNOWN,
        nf_state_pf: OFFSET_UNKNOWN,
        nf_state_in: OFFSET_UNKNOWN,
        nf_state_out: OFFSET_UNKNOWN,
        nf_state_net: OFFSET_UNKNOWN,
        ct_reply_tuple: OFFSET_UNKNOWN,
        ct_original_tuple: OFFSET_UNKNOWN,
        ct_status: OFFSET_UNKNOWN,
        skb_nfct: OFFSET_UNKNOWN,
        ct_net: OFFSET_UNKNOWN,
        xt_targinfo: OFFSET_UNKNOWN,
        nft_log_prefix: OFFSET_UNKNOWN,
    };
}

/// What one attachment's packets came to. One value per slot and CPU; user space sums the CPUs.
///
/// `seen = non_ip + out_of_scope + filtered + ring_refused + recorded`, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// Times the program ran.
    pub seen: u64,
    /// Not IPv4 or IPv6, or too short to be.
    pub non_ip: u64,
    /// No innermost address is a pod's, a block's or a service's.
    pub out_of_scope: u64,
    /// Nothing to tell: netfilter accepted it.
    pub filtered: u64,
    /// The ring was full.
    pub ring_refused: u64,
    /// Records made.
    pub recorded: u64,
}

/// Key of the map from an interface to its counter slot. `ifindex` 0 stands for drops in that namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct InterfaceKey {
    /// Namespace inode number, as in the records.
    pub netns: u64,
    /// Interface index there.
    pub ifindex: u32,
    /// Number of the [`crate::Hook`]: one interface has a slot for each direction.
    pub hook: u32,
}

/// The first slots are those of the hooks themselves, by number: there counts what no attachment's slot is known for
/// (drops in namespaces that are no node's).
pub const FIRST_SLOT: u32 = 21;
/// Where the body of the kprobes is in the program array.
pub const BODY: u32 = 0;
/// Number of counter slots: about 4,000 attachments.
pub const SLOTS: u32 = 4096;
/// Ports that lead to services on every node, unless told otherwise (`--service-node-port-range` of Kubernetes' API server).
pub const NODE_PORTS: core::ops::RangeInclusive<u16> = 30_000..=32_767;
/// Capacity of each scope table.
pub const SCOPE_PREFIXES: u32 = 65_536;

/// Names of programs, maps and globals, as they stand in the object. None may contain `calico` or start with
/// `cali_`: Felix deletes what does (felix/bpf/tc/attach.go, Calico 3.32).
pub mod names {
    /// Ring buffer with the records.
    pub const EVENTS: &str = "EVENTS";
    /// Per-CPU array of [`super::Counters`], by slot.
    pub const COUNTERS: &str = "COUNTERS";
    /// Hash map from [`super::InterfaceKey`] to slot.
    pub const INTERFACES: &str = "INTERFACES";
    /// Array of one `u32`: how often the map of interfaces has changed.
    pub const GENERATION: &str = "GENERATION";
    /// LPM trie of IPv4 prefixes in scope (key: 4 bytes, network order).
    pub const SCOPE_V4: &str = "SCOPE_V4";
    /// LPM trie of IPv6 prefixes in scope.
    pub const SCOPE_V6: &str = "SCOPE_V6";
    /// Program array with the body of the kprobes at [`super::BODY`].
    pub const BODIES: &str = "BODIES";
    /// A TC program that does nothing: what a run costs in any case.
    pub const BARE: &str = "calitrace_bare";
    /// Global: [`super::Offsets`].
    pub const OFFSETS: &str = "OFFSETS";
    /// Global: `u64`, inode number of the one namespace these programs are attached in, where BTF does not tell them;
    /// else 0. (`bpf_get_netns_cookie` would not do: of an `sk_buff` it returns the namespace of the *socket*.)
    pub const NETNS: &str = "NETNS";
    /// Global: `u32`, UDP port of VXLAN.
    pub const VXLAN_PORT: &str = "VXLAN_PORT";
    /// Global: `u64`, unread bytes in the ring at which the consumer is woken.
    pub const WATERMARK: &str = "WATERMARK";
}

const _: () = {
    assert!(FIRST_SLOT as usize == crate::Hook::ALL.len());
    assert!(size_of::<Offsets>() == 108);
    assert!(size_of::<Counters>() == 48);
    assert!(size_of::<InterfaceKey>() == 16);
};

#[cfg(not(target_arch = "bpf"))]
mod pod {
    // SAFETY: both are `repr(C)`, made of integers only and without implicit padding (asserted above).
    unsafe impl aya::Pod for super::Counters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::InterfaceKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Offsets {}
}
