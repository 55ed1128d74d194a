//! Maps, and the globals that the loader sets. Their names are in `calitrace_ebpf::shared::names`.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{HashMap, LpmTrie, PerCpuArray, RingBuf},
};
use calitrace_ebpf::{
    Full,
    shared::{Counters, InterfaceKey, OFFSET_UNKNOWN, Offsets, SCOPE_PREFIXES, SLOTS},
};

#[map]
pub(super) static EVENTS: RingBuf = RingBuf::with_byte_size(16 << 20, 0);

#[map]
pub(super) static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(SLOTS, 0);

#[map]
pub(super) static INTERFACES: HashMap<InterfaceKey, u32> = HashMap::with_max_entries(SLOTS, 0);

#[map]
pub(super) static SCOPE_V4: LpmTrie<[u8; 4], u8> = LpmTrie::with_max_entries(SCOPE_PREFIXES, 0);

#[map]
pub(super) static SCOPE_V6: LpmTrie<[u8; 16], u8> = LpmTrie::with_max_entries(SCOPE_PREFIXES, 0);

/// Where records take shape: with the header buffers they would not fit the 512-byte stack. Entry 0 is the TC
/// programs', which never interrupt each other on one CPU; the others the drop program's, one a nesting level.
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
}

const _: () = assert!(size_of::<Draft>() == size_of::<Full>() + 32 + 24);

/// Marks the end of a stage of parsing: what the compiler keeps in registers goes to memory, of which the verifier
/// knows nothing. So all ways through the stage end in one state, and what follows is walked once, not once for each.
#[inline(always)]
pub(super) fn settled(draft: &mut Draft) -> &mut Draft {
    core::hint::black_box(draft)
}

/// How deep the drop program is nested on this CPU: before 6.1 a softirq may run it within itself.
#[map]
static DEPTH: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// Task, softirq, hardirq, NMI.
const LEVELS: u32 = 4;

/// The TC programs' draft, zeroed.
#[inline(always)]
pub(super) fn draft() -> Option<&'static mut Draft> {
    zeroed(0)
}

/// Runs `work` with a draft, zeroed, that no run of the drop program which this one interrupted is using.
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
        for index in 0..size_of::<Draft>() / 8 {
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
