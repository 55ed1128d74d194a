//! What conntrack knows of a packet whose addresses do not tell whose it is: a pod's that leaves under its node's address,
//! or an answer under a service's.

use super::{
    maps::known,
    nat::Tuple,
    view::{field, is_kernel_address},
};

/// `IPS_SRC_NAT` and `IPS_DST_NAT` (`include/uapi/linux/netfilter/nf_conntrack_common.h`).
const TRANSLATED: u64 = 1 << 4 | 1 << 5;
/// The lowest bits of `skb->_nfct` tell how the packet stands to the connection (`NFCT_PTRMASK`,
/// `include/linux/skbuff.h`).
const POINTER: u64 = !7;

/// Whether the packet is of a translated connection with an end that is a pod's, a block's or a service's. Of most packets
/// at an uplink that are not, one or two words are read.
#[inline(always)]
pub(super) fn in_scope(skb: u64) -> bool {
    translated(skb).unwrap_or(false)
}

#[inline(always)]
fn translated(skb: u64) -> Option<bool> {
    let connection = field::<u64>(skb, known!(skb_nfct)?)? & POINTER;
    if !is_kernel_address(connection) || field::<u64>(connection, known!(ct_status)?)? & TRANSLATED == 0 {
        return None;
    }
    let original: Tuple = field(connection, known!(ct_original_tuple)?)?;
    if original.in_scope() {
        return Some(true);
    }
    let reply: Tuple = field(connection, known!(ct_reply_tuple)?)?;
    Some(reply.in_scope())
}
