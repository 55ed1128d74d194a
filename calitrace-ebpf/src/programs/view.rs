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

use super::maps::known;

/// Access to a packet's bytes.
pub(super) trait View {
    /// Copies a `T` (a header: integers and arrays of them) from `offset` bytes behind the network header.
    fn load<T: Copy>(&self, offset: u32) -> Option<T>;

    /// Bytes from the network header to the end of the packet, padding of the link layer included.
    fn end(&self) -> Option<u32>;
}

/// Lets the compiler use wide loads on header types, which are made of single bytes.
#[repr(C, align(8))]
struct Aligned<T>(MaybeUninit<T>);

/// The packet of a TC program.
pub(super) struct SkbView(pub(super) *mut __sk_buff);

impl View for SkbView {
    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        let mut value = Aligned::<T>(MaybeUninit::uninit());
        let to = value.0.as_mut_ptr();
        // SAFETY: the helper checks `offset` and writes exactly `size_of::<T>()` bytes.
        let status = unsafe {
            bpf_skb_load_bytes_relative(
                self.0.cast_const().cast(),
                offset,
                to.cast(),
                size_of::<T>() as u32,
                BPF_HDR_START_NET,
            )
        };
        if status != 0 {
            // It reads the linear part only (net/core/filter.c); the other helper reads fragments, too, but
            // counts from `skb->data`.
            let network = network_offset(self.0)?;
            // SAFETY: as above.
            let status = unsafe {
                bpf_skb_load_bytes(
                    self.0.cast_const().cast(),
                    network.wrapping_add(offset),
                    to.cast(),
                    size_of::<T>() as u32,
                )
            };
            if status != 0 {
                return None;
            }
        }
        // SAFETY: a helper filled it, and any bytes make a header.
        Some(unsafe { value.0.assume_init() })
    }

    #[inline(always)]
    fn end(&self) -> Option<u32> {
        // SAFETY: a field of the program's context.
        let length = unsafe { (*self.0).len };
        length.checked_sub(network_offset(self.0)?)
    }
}

/// Offset of the network header from `skb->data`. On an Ethernet device TC programs get `data` at the MAC header, on
/// `tunl0` and its like at the IP header.
#[inline(always)]
fn network_offset(skb: *mut __sk_buff) -> Option<u32> {
    u32::try_from(raw_network_offset(skb)).ok()
}

/// [`network_offset`], or a negative number. A function of its own, as it is rarely called from many places.
#[inline(never)]
#[expect(clippy::cast_ptr_alignment, reason = "probe_read copies from any address")]
fn raw_network_offset(skb: *mut __sk_buff) -> i64 {
    if let (Some(head), Some(data), Some(header)) =
        (known!(skb_head), known!(skb_data), known!(skb_network_header))
    {
        let skb = skb.cast::<u8>().cast_const();
        // SAFETY: the context of a TC program is the `sk_buff` itself; probe_read checks the address.
        let (Ok(head), Ok(data), Ok(header)) = (unsafe {
            (
                bpf_probe_read_kernel(skb.wrapping_add(head).cast::<u64>()),
                bpf_probe_read_kernel(skb.wrapping_add(data).cast::<u64>()),
                bpf_probe_read_kernel(skb.wrapping_add(header).cast::<u16>()),
            )
        }) else {
            return -1;
        };
        return (head + u64::from(header)).wrapping_sub(data).cast_signed();
    }
    // Without BTF: an Ethernet header names the protocol that the skb has, at its bytes 12 and 13.
    let mut ether_type = 0_u16;
    // SAFETY: writes two bytes into `ether_type`; the other read is a field of the context.
    let (status, protocol) = unsafe {
        (
            bpf_skb_load_bytes(skb.cast_const().cast(), 12, (&raw mut ether_type).cast(), 2),
            (*skb).protocol,
        )
    };
    if status == 0 && u32::from(ether_type) == protocol {
        14
    } else {
        0
    }
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
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        if u64::from(offset) + size_of::<T>() as u64 > u64::from(self.linear) {
            return None;
        }
        let mut value = Aligned::<T>(MaybeUninit::uninit());
        // SAFETY: the helper checks the address and writes exactly `size_of::<T>()` bytes.
        let status = unsafe {
            probe_read(
                value.0.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                (self.network + u64::from(offset)) as *const _,
            )
        };
        if status == 0 {
            // SAFETY: the helper filled it, and any bytes make a header.
            Some(unsafe { value.0.assume_init() })
        } else {
            None
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
