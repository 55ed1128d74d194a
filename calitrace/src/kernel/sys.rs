//! The few system calls that aya has no function for.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_LINK_DETACH: libc::c_int = 34;
/// `enum membarrier_cmd` (include/uapi/linux/membarrier.h).
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// Detaches a link, whoever else has it open: closing our descriptor would leave it attached for as long as a child
/// process between `fork` and `exec` holds a copy. Programs that run meanwhile have ended when it returns.
pub(super) fn detach_link(id: u32) -> io::Result<()> {
    // What is used of `union bpf_attr` by both: the id or the descriptor, then zeros.
    let fd = bpf(BPF_LINK_GET_FD_BY_ID, &[id, 0, 0, 0])?;
    // SAFETY: a descriptor that the call just opened.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    bpf(BPF_LINK_DETACH, &[fd.as_raw_fd().cast_unsigned(), 0, 0, 0]).map(|_zero| ())
}

fn bpf(command: libc::c_int, attributes: &[u32; 4]) -> io::Result<libc::c_int> {
    // SAFETY: both commands read the attributes and write nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of_val(attributes),
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
