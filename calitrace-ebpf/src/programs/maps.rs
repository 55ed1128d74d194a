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

/// Where records take shape before they go to the ring: with the header buffers they would not fit the 512-byte stack.
/// Entry 0 is the TC programs', which never interrupt each other on one CPU; the others the drop program's, one a
/// nesting level.
#[map]
static DRAFTS: PerCpuArray<Full> = PerCpuArray::with_max_entries(1 + LEVELS, 0);

/// How deep the drop program is nested on this CPU: before 6.1 a softirq may run it within itself.
#[map]
static DEPTH: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// Task, softirq, hardirq, NMI.
const LEVELS: u32 = 4;

/// The TC programs' draft, zeroed.
#[inline(always)]
pub(super) fn draft() -> Option<&'static mut Full> {
    zeroed(0)
}

/// Runs `work` with a draft, zeroed, that no run of the drop program which this one interrupted is using.
#[inline(always)]
pub(super) fn nested_draft<T>(work: impl FnOnce(&mut Full) -> T) -> Option<T> {
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
fn zeroed(index: u32) -> Option<&'static mut Full> {
    let draft = DRAFTS.get_ptr_mut(index)?;
    // SAFETY: a map value of this CPU, valid while the program runs and used by one run at a time (see `DRAFTS`); made
    // of integers, so zeros are a value of it.
    unsafe {
        draft.write(core::mem::zeroed());
        Some(&mut *draft)
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
