//! The few system calls that aya has no function for.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_LINK_DETACH: libc::c_int = 34;
/// `enum bpf_map_type`.
const BPF_MAP_TYPE_ARRAY: u32 = 2;
/// `BPF_OBJ_NAME_LEN`, with the zero at its end.
const NAME_BYTES: usize = 16;
/// `enum membarrier_cmd` (include/uapi/linux/membarrier.h).
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// Makes an array of one element. It is closed on exec.
pub(super) fn create_map(name: &str) -> io::Result<OwnedFd> {
    /// The beginning of `union bpf_attr` for this command.
    #[repr(C)]
    struct Attributes {
        /// Type, sizes of keys and values, number of elements, flags, inner map, NUMA node.
        words: [u32; 7],
        name: [u8; NAME_BYTES],
    }
    let mut attributes = Attributes {
        words: [BPF_MAP_TYPE_ARRAY, 4, 4, 1, 0, 0, 0],
        name: [0; NAME_BYTES],
    };
    for (to, from) in attributes.name[..NAME_BYTES - 1].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let fd = bpf(BPF_MAP_CREATE, &mut attributes)?;
    // SAFETY: a descriptor that the call just opened.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The id of a map.
pub(super) fn map_id(map: &OwnedFd) -> io::Result<u32> {
    /// The beginning of `struct bpf_map_info`: type and id.
    type Info = [u32; 2];
    #[repr(C)]
    struct Attributes {
        fd: u32,
        length: u32,
        info: *mut Info,
    }
    let mut info: Info = [0; 2];
    let mut attributes = Attributes {
        fd: map.as_raw_fd().cast_unsigned(),
        length: 8,
        info: &raw mut info,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info[1])
}

/// Detaches a link, whoever else has it open: closing our descriptor would leave it attached for as long as a child
/// process between `fork` and `exec` holds a copy. Programs that run meanwhile have ended when it returns.
pub(super) fn detach_link(id: u32) -> io::Result<()> {
    // What is used of `union bpf_attr` by both: the id or the descriptor, then zeros.
    let fd = bpf(BPF_LINK_GET_FD_BY_ID, &mut [id, 0, 0, 0])?;
    // SAFETY: a descriptor that the call just opened.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    bpf(BPF_LINK_DETACH, &mut [fd.as_raw_fd().cast_unsigned(), 0, 0, 0]).map(|_zero| ())
}

/// bpf(2). `T` is what `union bpf_attr` has for the command.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads and writes no more than the attributes, and what their pointers lead to, which lives in
    // each caller.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    libc::c_int::try_from(result)
        .ok()
        .filter(|&result| result >= 0)
        .ok_or_else(io::Error::last_os_error)
}

/// Waits until every program that is running now has ended: an RCU grace period, which is what a global memory barrier
/// takes (kernel/sched/membarrier.c). A clsact filter and a tracepoint that were removed may run a moment longer.
pub(super) fn wait_for_running_programs() {
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // With nohz_full it is refused; a grace period is a few milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
