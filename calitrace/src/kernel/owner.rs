//! Whose a clsact filter is, and whether its owner still lives. A filter outlives the process that added it, and a
//! process id says little: it is used again, and in a container it is another one than outside.
//!
//! So each process that attaches filters holds a small map of its own that no program uses. It goes with the process,
//! however that ends, and while it is there the kernel lists it, on the whole machine and for every PID namespace. Its
//! id is part of the filters' handles.

use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result};
use aya::maps::{MapError, loaded_maps};

use super::sys;

/// Name of the map: the longest that the kernel keeps, 15 bytes.
const NAME: &str = "calitrace_owner";

/// Bits of a handle that hold the map's id. Ids count up through all 31 bits (`idr_alloc_cyclic`, kernel/bpf/syscall.c);
/// of more than this many maps the upper bits are left out.
const BITS: u32 = 24;
const MASK: u32 = (1 << BITS) - 1;

/// The sign of life of this process.
#[derive(Debug)]
pub(super) struct Owner {
    /// The same in every handle of this process.
    pub(super) token: u32,
    /// Open for as long as the process lives.
    _map: OwnedFd,
}

impl Owner {
    /// Makes the map.
    pub(super) fn new() -> Result<Self> {
        let map = sys::create_map(NAME).context("make a map as a sign of life")?;
        let id = sys::map_id(&map).context("ask for the id of a map")?;
        Ok(Self {
            token: id & MASK,
            _map: map,
        })
    }
}

/// The tokens of all processes that are alive.
pub(super) fn alive() -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    for map in loaded_maps() {
        match map {
            Ok(map) if map.name_as_str() == Some(NAME) => tokens.push(map.id() & MASK),
            Ok(_) => {}
            // Freed since it was listed: it belongs to nobody who lives.
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            // Not to know who lives must not look like nobody does.
            Err(error) => return Err(error).context("list the BPF maps"),
        }
    }
    Ok(tokens)
}

/// The handle of a clsact filter. Handles have 31 bits: the owner's token, the hook, the number of the loading in the
/// process (two of them may observe the same interface), and whether calitrace added the qdisc that the filter is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    pub(super) token: u32,
    pub(super) hook: u32,
    pub(super) number: u32,
    /// The qdisc goes with the last filter.
    pub(super) own_qdisc: bool,
}

const HOOK_BITS: u32 = 3;
const NUMBER_BITS: u32 = 3;
const QDISC_BIT: u32 = BITS + HOOK_BITS + NUMBER_BITS;

impl Handle {
    pub(super) fn encode(self) -> u32 {
        let field = |value: u32, bits: u32| value & ((1 << bits) - 1);
        field(self.token, BITS)
            | field(self.hook, HOOK_BITS) << BITS
            // From 1 on: the kernel takes a handle of 0 for none.
            | (self.number % ((1 << NUMBER_BITS) - 1) + 1) << (BITS + HOOK_BITS)
            | u32::from(self.own_qdisc) << QDISC_BIT
    }

    pub(super) fn decode(handle: u32) -> Self {
        let field = |shift: u32, bits: u32| handle >> shift & ((1 << bits) - 1);
        Self {
            token: field(0, BITS),
            hook: field(BITS, HOOK_BITS),
            number: field(BITS + HOOK_BITS, NUMBER_BITS).saturating_sub(1),
            own_qdisc: field(QDISC_BIT, 1) == 1,
        }
    }
}

const _: () = {
    assert!(QDISC_BIT < 31, "handles have 31 bits");
    assert!(
        (calitrace_ebpf::Hook::UplinkEgress as u32) < 1 << HOOK_BITS,
        "TC hooks have the lowest numbers"
    );
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_tells_what_was_put_in() {
        for own_qdisc in [false, true] {
            let handle = Handle {
                token: 0x00ab_cdef,
                hook: 6,
                number: 5,
                own_qdisc,
            };
            assert!(handle.encode() < 1 << 31);
            assert_eq!(Handle::decode(handle.encode()), handle);
        }
    }
}
