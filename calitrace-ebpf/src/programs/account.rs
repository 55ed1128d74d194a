//! Scope, counters and the ring: what becomes of a parsed packet, and that it is counted exactly once.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_ns},
    maps::{lpm_trie::Key, ring_buf::RingBufEntry},
};
use calitrace_ebpf::{
    Encapsulated, Flags, Full, Kind, Logged, Plain,
    shared::{Counters, InterfaceKey},
};

use super::{
    maps::{
        self, COUNTERS, Device, Draft, EVENTS, INTERFACES, NETNS, SCOPE_V4, SCOPE_V6, WATERMARK, copy, known,
    },
    view::{field, is_kernel_address},
};

/// What became of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    NonIp,
    OutOfScope,
    Filtered,
    RingRefused,
    Recorded,
}

/// Whether one of the packet's addresses is a pod's, a block's or a service's.
#[inline(always)]
#[expect(
    clippy::many_single_char_names,
    reason = "bytes of two addresses; a slice would be bounds-checked"
)]
pub(super) fn in_scope(plain: &Plain) -> bool {
    if plain.flags & Flags::V6 != 0 {
        in_scope_v6(plain.src, plain.dst)
    } else {
        let [.., a, b, c, d] = plain.src;
        let [.., e, f, g, h] = plain.dst;
        in_scope_v4([a, b, c, d], [e, f, g, h])
    }
}

/// As [`in_scope`].
#[inline(always)]
pub(super) fn in_scope_v4(src: [u8; 4], dst: [u8; 4]) -> bool {
    SCOPE_V4.get(Key::new(32, src)).is_some() || SCOPE_V4.get(Key::new(32, dst)).is_some()
}

/// As [`in_scope`].
#[inline(always)]
pub(super) fn in_scope_v6(src: [u8; 16], dst: [u8; 16]) -> bool {
    SCOPE_V6.get(Key::new(128, src)).is_some() || SCOPE_V6.get(Key::new(128, dst)).is_some()
}

/// Whether one of the addresses of the packet inside a quoted IPIP packet is a pod's, a block's or a service's.
#[inline(always)]
#[expect(clippy::many_single_char_names, reason = "as above")]
pub(super) fn quote_in_scope(full: &Full) -> bool {
    let [.., a, b, c, d] = full.outer.src;
    let [.., e, f, g, h] = full.tail.quoted_dst;
    in_scope_v4([a, b, c, d], [e, f, g, h])
}

/// Counts one run of a hook's program in the slot of its interface.
#[inline(always)]
pub(super) fn count(hook: u32, netns: u64, ifindex: u32, outcome: Outcome) {
    count_at(slot(netns, ifindex, hook), outcome);
}

/// The slot of an interface at a hook; the hook's own where it has none.
#[inline(always)]
fn slot(netns: u64, ifindex: u32, hook: u32) -> u32 {
    let key = InterfaceKey { netns, ifindex, hook };
    // SAFETY: a slot number, replaced as a whole; a stale one counts in a slot that is still read.
    unsafe { INTERFACES.get(key) }.copied().unwrap_or(hook)
}

/// Counts one run of a program in a slot.
#[inline(always)]
pub(super) fn count_at(slot: u32, outcome: Outcome) {
    let Some(counters) = COUNTERS.get_ptr_mut(slot) else {
        return;
    };
    // SAFETY: a map value of this CPU, valid while the program runs.
    unsafe {
        add(&raw mut (*counters).seen);
        add(match outcome {
            Outcome::NonIp => &raw mut (*counters).non_ip,
            Outcome::OutOfScope => &raw mut (*counters).out_of_scope,
            Outcome::Filtered => &raw mut (*counters).filtered,
            Outcome::RingRefused => &raw mut (*counters).ring_refused,
            Outcome::Recorded => &raw mut (*counters).recorded,
        });
    }
}

/// Adds one. Atomic, although the value is this CPU's own: a softirq may run the same program between load and store.
///
/// # Safety
/// `counter` points into a map value.
#[inline(always)]
unsafe fn add(counter: *mut u64) {
    // SAFETY: aligned, as `Counters` is. An intrinsic, because `AtomicU64` has no arithmetic on this target; without
    // use of its result it is the one atomic instruction that every kernel knows.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

const _: () = assert!(align_of::<Counters>() == 8);

/// The namespace (inode number) and index of a `struct net_device *`; zeros if it is none. What `skb->dev` holds may
/// be something else altogether: the field is shared with a receive queue's scratch space and tree pointers.
#[inline(always)]
pub(super) fn device(dev: u64) -> (u64, u32) {
    read_device(dev).unwrap_or((0, 0))
}

#[inline(always)]
fn read_device(dev: u64) -> Option<(u64, u32)> {
    if !is_kernel_address(dev) {
        return None;
    }
    let inode = network(field(dev, known!(dev_nd_net)?)?)?;
    Some((inode, field(dev, known!(dev_ifindex)?)?))
}

/// The inode number of a `struct net *`, if it is one.
#[inline(always)]
pub(super) fn network(net: u64) -> Option<u64> {
    if !is_kernel_address(net) {
        return None;
    }
    let inode: u32 = field(net, known!(net_inum)?)?;
    // Inode numbers of namespaces begin at PROC_DYNAMIC_FIRST (0xf0000000, fs/proc/generic.c), fixed ones just below.
    if inode < 0xefff_ff00 {
        return None;
    }
    Some(u64::from(inode))
}

/// The namespace of the device that a TC program runs on, and its slot.
///
/// They are remembered by the address of the device, of which alone the packet tells: to follow its pointers and to look
/// it up costs more than most of the rest. What is remembered of a device holds until the map of interfaces is written,
/// and that is always done before programs are attached to a new one at the same address.
#[inline(always)]
pub(super) fn interface(skb: u64, ifindex: u32, hook: u32) -> (u64, u32) {
    let told = NETNS.load();
    if told != 0 {
        return (told, slot(told, ifindex, hook));
    }
    // Before the look-up, lest a change in between be missed.
    let generation = maps::generation();
    let dev: u64 = known!(skb_dev).and_then(|offset| field(skb, offset)).unwrap_or(0);
    let Some(known) = maps::device(dev, hook) else {
        return (0, hook);
    };
    // SAFETY: a value of this CPU's, used by one run at a time.
    unsafe {
        if (*known).dev == dev
            && (*known).ifindex == ifindex
            && (*known).hook == hook
            && (*known).generation == generation
        {
            return ((*known).netns, (*known).slot);
        }
        // Settled: else the compiler keeps a copy of it that is not there when the device cannot be read, and verifiers
        // before 6.3 or so mind even a look at that.
        let netns = core::hint::black_box(device(dev).0);
        let slot = slot(netns, ifindex, hook);
        known.write(Device {
            dev,
            netns,
            ifindex,
            hook,
            slot,
            generation,
        });
        (netns, slot)
    }
}

/// Puts the record into the ring, in the shortest layout that holds it.
#[inline(always)]
pub(super) fn record(full: &mut Full, hook: u32, skb: u64) -> Outcome {
    stamp(full, hook, skb);
    if full.plain.flags & (Flags::DROP | Flags::ICMP_ERROR | Flags::TOLD) != 0 {
        full.plain.kind = Kind::Full as u8;
        submit::<Full>(full)
    } else if full.outer.kind != 0 {
        full.plain.kind = Kind::Encapsulated as u8;
        submit::<Encapsulated>(full)
    } else {
        full.plain.kind = Kind::Plain as u8;
        submit::<Plain>(full)
    }
}

/// Puts the record into the ring, and the draft's prefix with it.
#[inline(always)]
pub(super) fn record_logged(draft: &mut Draft, hook: u32, skb: u64) -> Outcome {
    stamp(&mut draft.record, hook, skb);
    draft.record.plain.kind = Kind::Logged as u8;
    let Some(mut entry) = EVENTS.reserve::<Logged>(0) else {
        return Outcome::RingRefused;
    };
    // SAFETY: both parts lie in the entry, which is aligned to 8, as the prefix in it is.
    unsafe {
        let to = entry.as_mut_ptr();
        copy(&raw const draft.record, &raw mut (*to).full);
        copy(&raw const draft.prefix, (&raw mut (*to).prefix).cast());
    }
    finish(entry)
}

/// Writes down which packet it is, where and when.
#[inline(always)]
fn stamp(full: &mut Full, hook: u32, skb: u64) {
    full.plain.hook = hook as u8;
    full.plain.skb = skb;
    // Where the way to the packet's bytes has not led past it.
    if full.plain.head == 0 {
        full.plain.head = known!(skb_head)
            .and_then(|offset| field(skb, offset))
            .unwrap_or(0);
    }
    // SAFETY: helpers without arguments.
    unsafe {
        full.plain.cpu = bpf_get_smp_processor_id() as u16;
        full.plain.time = bpf_ktime_get_ns();
    }
}

/// Copies the first part of `full`, a `T`, into the ring.
#[inline(always)]
fn submit<T: Copy + 'static>(full: &Full) -> Outcome {
    let Some(mut entry) = EVENTS.reserve::<T>(0) else {
        return Outcome::RingRefused;
    };
    // SAFETY: each kind of record is a prefix of the next (`calitrace_ebpf::record` asserts it), and the ring's entries
    // are aligned to 8.
    unsafe { copy(core::ptr::from_ref(full).cast::<T>(), entry.as_mut_ptr()) };
    finish(entry)
}

/// Hands a record that is written over to the consumer.
#[inline(always)]
fn finish<T>(entry: RingBufEntry<T>) -> Outcome {
    // A wakeup costs more than all else together, so the consumer comes by itself every few milliseconds, and is
    // woken only by the record that takes the unread data over the watermark. Unread data includes this record.
    let unread = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    let watermark = WATERMARK.load();
    let crossed = unread >= watermark && unread < watermark + size_of::<T>() as u64 + 8;
    entry.submit(u64::from(if crossed {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    }));
    Outcome::Recorded
}
