//! Views of a packet's bytes, counted from its network header: through the skb helpers in TC programs, through
//! `probe_read_kernel` where only a `struct sk_buff *` is at hand. Knows nothing of what the bytes mean.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_hdr_start_off::BPF_HDR_START_NET},
    helpers::{
        bpf_probe_read_kernel,
        generated::{bpf_probe_read_kernel as probe_read, bpf_skb_load_bytes, bpf_skb_load_bytes_relative},
    },
};

use super::maps::{Draft, known};

/// Access to a packet's bytes.
pub(super) trait View {
    /// Copies a `T` (a header: integers and arrays of them) from `offset` bytes behind the network header to `to`.
    /// 0 if it could.
    ///
    /// # Safety
    /// `to` is valid for writes of a `T`.
    unsafe fn copy<T>(&self, offset: u32, to: *mut T) -> i64;

    /// Bytes from the network header to the end of the packet, padding of the link layer included.
    fn end(&self) -> Option<u32>;

    /// As [`Self::copy`], by value.
    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        let mut value = Aligned::<T>(MaybeUninit::uninit());
        // SAFETY: `value` is a `T`; when it was filled, any bytes make a header.
        unsafe {
            if self.copy(offset, value.0.as_mut_ptr()) == 0 {
                Some(value.0.assume_init())
            } else {
                None
            }
        }
    }
}

/// Lets the compiler use wide loads on header types, which are made of single bytes.
#[repr(C, align(8))]
struct Aligned<T>(MaybeUninit<T>);

/// The packet of a TC program.
pub(super) struct SkbView {
    skb: *mut __sk_buff,
    /// Bytes from `skb->data` to the network header.
    network: u32,
}

impl SkbView {
    /// Looks at the packet of a program's context. Notes its `head` on the way.
    #[inline(always)]
    pub(super) fn new(skb: *mut __sk_buff, draft: &mut Draft) -> Option<Self> {
        Some(Self {
            skb,
            network: network_offset(skb, draft)?,
        })
    }
}

/// Reads a `T` that the IP header begins with, if it is in the linear part: cheaper than all that it takes to find a
/// packet's other bytes, and enough to leave most packets alone.
#[inline(always)]
pub(super) fn beginning<T: Copy>(skb: *mut __sk_buff, offset: u32) -> Option<T> {
    let mut value = Aligned::<T>(MaybeUninit::uninit());
    // SAFETY: the helper writes `size_of::<T>()` bytes into `value`; when it was filled, any bytes make a header.
    unsafe {
        let to = value.0.as_mut_ptr().cast();
        let size = size_of::<T>() as u32;
        if bpf_skb_load_bytes_relative(skb.cast_const().cast(), offset, to, size, BPF_HDR_START_NET) == 0 {
            Some(value.0.assume_init())
        } else {
            None
        }
    }
}

impl View for SkbView {
    #[inline(always)]
    unsafe fn copy<T>(&self, offset: u32, to: *mut T) -> i64 {
        // Not `bpf_skb_load_bytes_relative`, which would count from the network header by itself: it reads the linear
        // part only (net/core/filter.c), and payload often lies outside.
        // SAFETY: the helper checks `offset` and writes `size_of::<T>()` bytes, for which `to` is valid.
        unsafe {
            bpf_skb_load_bytes(
                self.skb.cast_const().cast(),
                self.network.wrapping_add(offset),
                to.cast(),
                size_of::<T>() as u32,
            )
        }
    }

    #[inline(always)]
    fn end(&self) -> Option<u32> {
        // SAFETY: a field of the program's context.
        unsafe { (*self.skb).len }.checked_sub(self.network)
    }
}

/// Offset of the network header from `skb->data`. On an Ethernet device TC programs get `data` at the MAC header, on
/// `tunl0` and its like at the IP header.
#[inline(always)]
fn network_offset(skb: *mut __sk_buff, draft: &mut Draft) -> Option<u32> {
    if let (Some(head), Some(data), Some(header)) =
        (known!(skb_head), known!(skb_data), known!(skb_network_header))
    {
        // The context of a TC program is the `sk_buff` itself.
        let (head, data, header) = positions(skb as u64, head, data, header, draft)?;
        draft.record.plain.head = head;
        let offset = (head + u64::from(header)).wrapping_sub(data);
        return u16::try_from(offset).ok().map(u32::from);
    }
    // Without BTF: an Ethernet header names the protocol that the skb has, at its bytes 12 and 13.
    let mut ether_type = 0_u16;
    // SAFETY: writes two bytes into `ether_type`; the other read is a field of the context.
    let (status, protocol) = unsafe {
        let to = (&raw mut ether_type).cast();
        (
            bpf_skb_load_bytes(skb.cast_const().cast(), 12, to, 2),
            (*skb).protocol,
        )
    };
    Some(if status == 0 && u32::from(ether_type) == protocol {
        14
    } else {
        0
    })
}

/// Reads three members of the `sk_buff`: in one go where they lie close together, as they do in all kernels known.
#[inline(always)]
fn positions(
    skb: u64,
    head: usize,
    data: usize,
    header: usize,
    draft: &mut Draft,
) -> Option<(u64, u64, u16)> {
    let first = header & !7;
    let (near_head, near_data) = (head.wrapping_sub(first), data.wrapping_sub(first));
    if near_head <= size_of_val(&draft.window) - 8 && near_data <= size_of_val(&draft.window) - 8 {
        let to = &raw mut draft.window;
        // SAFETY: the helper checks the address, and writes the array; the members lie in it (the verifier, for which the
        // offsets are constants, checks that).
        return unsafe {
            let size = size_of_val(&*to) as u32;
            if probe_read(to.cast(), size, (skb + first as u64) as *const _) != 0 {
                return None;
            }
            Some((
                to.byte_add(near_head).cast::<u64>().read_volatile(),
                to.byte_add(near_data).cast::<u64>().read_volatile(),
                to.byte_add(header - first).cast::<u16>().read_volatile(),
            ))
        };
    }
    Some((field(skb, head)?, field(skb, data)?, field(skb, header)?))
}

/// The packet of a `struct sk_buff *` seen by a tracing program.
pub(super) struct KernelView {
    /// Address of the network header.
    network: u64,
    /// Bytes from there to the end of the linear part.
    linear: u32,
    /// Bytes from there to the end of the packet.
    end: u32,
}

impl KernelView {
    /// Looks at the packet of `skb`. `None` if its fields do not make sense: much of what the kernel frees is no
    /// received or sent packet, and its header offsets were never set.
    #[inline(always)]
    pub(super) fn new(skb: u64) -> Option<Self> {
        let head: u64 = field(skb, known!(skb_head)?)?;
        let data: u64 = field(skb, known!(skb_data)?)?;
        let header: u16 = field(skb, known!(skb_network_header)?)?;
        let length: u32 = field(skb, known!(skb_len)?)?;
        let paged: u32 = field(skb, known!(skb_data_len)?)?;
        // An offset of 0 was never set: the kernel leaves headroom before every packet's header.
        if !is_kernel_address(head) || data < head || header == 0 || header == u16::MAX || paged > length {
            return None;
        }
        let network = head + u64::from(header);
        // `data` may lie before the network header (Ethernet) or behind it (transport layer).
        let end = data.wrapping_add(u64::from(length)).wrapping_sub(network);
        let linear = end.wrapping_sub(u64::from(paged));
        // 1 MiB: above any packet, big TCP included.
        if linear > 1 << 20 || end > 1 << 20 {
            return None;
        }
        Some(Self {
            network,
            linear: linear as u32,
            end: end as u32,
        })
    }
}

impl View for KernelView {
    #[inline(always)]
    unsafe fn copy<T>(&self, offset: u32, to: *mut T) -> i64 {
        if u64::from(offset) + size_of::<T>() as u64 > u64::from(self.linear) {
            return -1;
        }
        // SAFETY: the helper checks the address and writes `size_of::<T>()` bytes, for which `to` is valid.
        unsafe {
            probe_read(
                to.cast(),
                size_of::<T>() as u32,
                (self.network + u64::from(offset)) as *const _,
            )
        }
    }

    #[inline(always)]
    fn end(&self) -> Option<u32> {
        Some(self.end)
    }
}

/// Reads a field of a kernel structure.
#[inline(always)]
pub(super) fn field<T: Copy>(base: u64, offset: usize) -> Option<T> {
    // SAFETY: probe_read checks the address.
    unsafe { bpf_probe_read_kernel((base as *const u8).wrapping_add(offset).cast::<T>()) }.ok()
}

/// Whether a value can be the address of a kernel object: in the upper half and aligned to a word.
#[inline(always)]
pub(super) fn is_kernel_address(value: u64) -> bool {
    value.cast_signed() < 0 && value.is_multiple_of(8)
}
