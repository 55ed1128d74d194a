//! Maps, and the globals that the loader sets. Their names are in `calitrace_ebpf::shared::names`.

use core::mem::offset_of;

use aya_ebpf::{
    Global,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf},
};
use calitrace_ebpf::{
    Full,
    record::PREFIX,
    shared::{Counters, InterfaceKey, OFFSET_UNKNOWN, Offsets, SCOPE_PREFIXES, SLOTS},
};

#[map]
pub(super) static EVENTS: RingBuf = RingBuf::with_byte_size(16 << 20, 0);

#[map]
pub(super) static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(SLOTS, 0);

#[map]
pub(super) static INTERFACES: HashMap<InterfaceKey, u32> = HashMap::with_max_entries(SLOTS, 0);

/// How often [`INTERFACES`] has changed. What was looked up there before its last change does not hold any more.
#[map]
static GENERATION: Array<u32> = Array::with_max_entries(1, 0);

/// What the TC programs know of devices, as a cache: see [`device`].
#[map]
static DEVICES: PerCpuArray<Device> = PerCpuArray::with_max_entries(DEVICES_KNOWN, 0);

/// A power of two.
const DEVICES_KNOWN: u32 = 1024;

#[map]
pub(super) static SCOPE_V4: LpmTrie<[u8; 4], u8> = LpmTrie::with_max_entries(SCOPE_PREFIXES, 0);

#[map]
pub(super) static SCOPE_V6: LpmTrie<[u8; 16], u8> = LpmTrie::with_max_entries(SCOPE_PREFIXES, 0);

/// The body of the kprobes: see `functions`.
#[map]
pub(super) static BODIES: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// What a kprobe hands to the body.
#[map]
static CALLS: PerCpuArray<Call> = PerCpuArray::with_max_entries(1, 0);

/// What was noted at the entry of functions whose return is looked at, by the address of their frame.
#[map]
pub(super) static FRAMES: LruHashMap<u64, Frame> = LruHashMap::with_max_entries(4096, 0);

/// The address of the last packet whose drop was recorded on this CPU.
#[map]
static LAST_DROP: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// A packet that a function has, and what its arguments tell.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Call {
    pub(super) skb: u64,
    /// As `Tail::location`.
    pub(super) location: u64,
    /// Address of the text that a rule logs; 0: none does.
    pub(super) prefix: u64,
    pub(super) hook: u32,
    /// Not 0: `reason` and `location` are set.
    pub(super) told: u32,
    /// As `Plain::reason`.
    pub(super) reason: u32,
    /// Outer IPv4 addresses, in network order.
    pub(super) outer_src: u32,
    pub(super) outer_dst: u32,
    pub(super) vni: u32,
    /// As `Outer::kind`; 0 without an outer header.
    pub(super) outer_kind: u8,
    pub(super) outer_ttl: u8,
    pub(super) pad: [u8; 6],
}

impl Call {
    pub(super) const EMPTY: Self = Self {
        skb: 0,
        location: 0,
        prefix: 0,
        hook: 0,
        told: 0,
        reason: 0,
        outer_src: 0,
        outer_dst: 0,
        vni: 0,
        outer_kind: 0,
        outer_ttl: 0,
        pad: [0; 6],
    };
}

/// Arguments of a function, until it returns.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Frame {
    pub(super) skb: u64,
    /// The second argument.
    pub(super) second: u64,
}

/// A device as a TC program sees it, and what was found out about it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Device {
    /// Address of the `struct net_device`.
    pub(super) dev: u64,
    /// Inode number of its namespace.
    pub(super) netns: u64,
    pub(super) ifindex: u32,
    pub(super) hook: u32,
    /// Where its packets are counted.
    pub(super) slot: u32,
    /// Of [`INTERFACES`], when it was looked up there.
    pub(super) generation: u32,
}

/// Where in the cache of this CPU a device has its place. TC programs never interrupt each other on one CPU.
#[inline(always)]
pub(super) fn device(dev: u64, hook: u32) -> Option<*mut Device> {
    // Devices are large: addresses differ above the lowest bits.
    DEVICES.get_ptr_mut(((dev >> 10) as u32 ^ (dev >> 20) as u32 ^ hook << 5) & (DEVICES_KNOWN - 1))
}

/// How often the map of interfaces has changed.
#[inline(always)]
pub(super) fn generation() -> u32 {
    // SAFETY: one word, written as a whole.
    GENERATION
        .get_ptr(0)
        .map_or(0, |generation| unsafe { generation.read_volatile() })
}

/// What a kprobe hands to the body on this CPU.
#[inline(always)]
pub(super) fn call() -> Option<*mut Call> {
    CALLS.get_ptr_mut(0)
}

/// Notes that the drop of this packet was recorded.
#[inline(always)]
pub(super) fn remember_drop(skb: u64) {
    if let Some(last) = LAST_DROP.get_ptr_mut(0) {
        // SAFETY: a map value of this CPU.
        unsafe { last.write(skb) };
    }
}

/// Whether this is the packet whose drop was recorded last on this CPU.
#[inline(always)]
pub(super) fn was_dropped(skb: u64) -> bool {
    // SAFETY: a map value of this CPU.
    LAST_DROP
        .get_ptr(0)
        .is_some_and(|last| unsafe { last.read() } == skb)
}

/// Where records take shape: with the header buffers they would not fit the 512-byte stack. Entry 0 is the TC
/// programs', which never interrupt each other on one CPU; the others those of drops and functions, one a nesting level.
#[map]
static DRAFTS: PerCpuArray<Draft> = PerCpuArray::with_max_entries(1 + LEVELS, 0);

/// A record in the making, and what is known of its packet meanwhile. All integers; a multiple of 8 bytes.
#[repr(C)]
pub(super) struct Draft {
    pub(super) record: Full,
    /// The first bytes of the payload.
    pub(super) payload: [u64; 4],
    /// Bytes from the network header to the transport header.
    pub(super) transport: u32,
    /// Bytes from the network header to the end of the packet.
    pub(super) end: u32,
    /// Bytes from the network header to what the digest begins with; 0: no digest.
    pub(super) digested: u32,
    /// Bytes from the network header to an inner IP header.
    pub(super) inner: u32,
    /// How that is carried, as in `Outer::kind`.
    pub(super) inner_kind: u32,
    /// 1 if it is IPv6.
    pub(super) inner_v6: u32,
    /// Whether an address of the outermost header is in scope, where that was looked up: a number of [`Scope`].
    pub(super) scope: u32,
    pub(super) pad: u32,
    /// The part of an `sk_buff` that tells where its bytes are. Not zeroed.
    pub(super) window: [u64; 6],
    /// As `Logged::prefix`. Not zeroed.
    pub(super) prefix: [u64; PREFIX / 8],
}

const _: () = assert!(size_of::<Draft>() == size_of::<Full>() + 32 + 32 + 48 + PREFIX);

/// What is known of an address of the outermost header.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// It was not looked up.
    Unknown = 0,
    /// One is in scope.
    Inside = 1,
    /// None is.
    Outside = 2,
    /// None is, but the packet is of a translated connection that has one.
    Translated = 3,
}

/// Marks the end of a stage of parsing: what the compiler keeps in registers goes to memory, of which the verifier
/// knows nothing. So all ways through the stage end in one state, and what follows is walked once, not once for each.
#[inline(always)]
pub(super) fn settled(draft: &mut Draft) -> &mut Draft {
    core::hint::black_box(draft)
}

/// How deep the programs for drops and functions are nested on this CPU: a softirq may run them within one another.
#[map]
static DEPTH: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// Task, softirq, hardirq, NMI.
const LEVELS: u32 = 4;

/// The TC programs' draft, zeroed.
#[inline(always)]
pub(super) fn draft() -> Option<&'static mut Draft> {
    zeroed(0)
}

/// Runs `work` with a draft, zeroed, that no run of a program which this one interrupted is using.
#[inline(always)]
pub(super) fn nested_draft<T>(work: impl FnOnce(&mut Draft) -> T) -> Option<T> {
    let depth = DEPTH.get_ptr_mut(0)?;
    // SAFETY: a value of this CPU; who interrupts between load and store restores what it found.
    let level = unsafe { *depth };
    if level >= LEVELS {
        return None;
    }
    // SAFETY: as above.
    unsafe { *depth = level + 1 };
    let done = zeroed(1 + level).map(work);
    // SAFETY: as above.
    unsafe { *depth = level };
    done
}

#[inline(always)]
fn zeroed(index: u32) -> Option<&'static mut Draft> {
    let draft = DRAFTS.get_ptr_mut(index)?;
    let words = draft.cast::<u64>();
    // SAFETY: a map value of this CPU, valid while the program runs and used by one run at a time (see `DRAFTS`); made
    // of integers, so zeros are a value of it.
    unsafe {
        for index in 0..offset_of!(Draft, window) / 8 {
            words.add(index).write_volatile(0);
        }
        Some(&mut *draft)
    }
}

/// Copies a record word by word. Volatile here and in [`zeroed`], or the compiler makes calls of `memcpy` and `memset`
/// of such loops; see the top of `programs` on calls.
///
/// # Safety
/// Both are valid for a `T` and aligned to 8.
#[inline(always)]
pub(super) unsafe fn copy<T>(from: *const T, to: *mut T) {
    for index in 0..size_of::<T>() / 8 {
        // SAFETY: within the two.
        unsafe {
            let word = from.cast::<u64>().add(index).read();
            to.cast::<u64>().add(index).write_volatile(word);
        }
    }
}

/// Read field by field through [`offset`]: `Global::load` would copy all of it to the stack each time.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
pub(super) static NETNS: Global<u64> = Global::new(0);

#[unsafe(no_mangle)]
pub(super) static VXLAN_PORT: Global<u32> = Global::new(4789);

#[unsafe(no_mangle)]
pub(super) static WATERMARK: Global<u64> = Global::new(4 << 20);

/// One of the [`Offsets`], if it is known. The verifier sees a constant and removes the branch that is not taken.
#[inline(always)]
pub(super) fn offset(field: impl FnOnce(*const Offsets) -> *const u32) -> Option<usize> {
    // SAFETY: `field` projects into the static. Volatile, because the loader replaces the value.
    let value = unsafe { field(&raw const OFFSETS).read_volatile() };
    if value == OFFSET_UNKNOWN {
        None
    } else {
        Some(value as usize)
    }
}

/// Projects [`Offsets`] to one field, for [`offset`].
macro_rules! known {
    ($field:ident) => {
        // SAFETY: a projection inside the struct, without a read.
        $crate::programs::maps::offset(|offsets| unsafe { &raw const (*offsets).$field })
    };
}
pub(super) use known;
