//! The check for leftovers sees what is there: one that never finds anything would prove nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Context, Result, ensure};
use calitrace_tests::inventory::Inventory;
use calitrace_tests::namespace::Namespace;
use calitrace_tests::{Lab, Options, wait_until};

/// A name of 15 letters that no other process gives its programs.
fn name() -> String {
    format!("presence{:07}", std::process::id())
}

fn nodes(lab: &Lab) -> Result<Vec<Namespace>> {
    lab.nodes()
        .iter()
        .map(|node| Namespace::open(&node.namespace))
        .collect()
}

pub(crate) fn programs_are_seen() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let namespaces = nodes(&lab)?;
    let program_name = name();
    let take = || Inventory::take(&namespaces, &program_name);
    ensure!(take()?.is_empty(), "before: {:?}", take()?);
    let program = load().context("cannot load a program")?;
    let found = take()?;
    ensure!(
        found.programs.len() == 1 && found.tcx.is_empty(),
        "loaded: {found:?}"
    );
    let link = namespaces[1].within(|| attach(&program, "vxlan.calico").context("cannot attach with TCX"))?;
    let expected = format!("{} vxlan.calico egress {program_name}", namespaces[1].name());
    ensure!(take()?.tcx == [expected], "attached: {:?}", take()?);
    drop(link);
    drop(program);
    // The kernel may free them a moment later.
    wait_until("the program to be gone", || Ok(take()?.is_empty().then_some(())))?;
    Ok(())
}

pub(crate) fn filters_are_seen() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let namespaces = nodes(&lab)?;
    let take = || Inventory::take(&namespaces, "no program begins so");
    let tc = |words: &str| {
        let words = ["tc"].into_iter().chain(words.split(' '));
        calitrace_tests::command::run(&mut lab.exec("minikube", words)?)
    };
    tc("qdisc add dev cali8d02ed71817 clsact")?;
    // Classic BPF, one instruction: match everything.
    let everything = ["bytecode", "1,6 0 0 4294967295", "flowid", "1:1"];
    let filter = "tc filter add dev cali8d02ed71817 ingress bpf"
        .split(' ')
        .chain(everything);
    calitrace_tests::command::run(&mut lab.exec("minikube", filter)?)?;
    let found = take()?;
    let name = namespaces[0].name();
    ensure!(
        found.qdiscs == [format!("{name} cali8d02ed71817 clsact")],
        "{found:?}"
    );
    ensure!(!found.filters.is_empty(), "{found:?}");
    tc("qdisc del dev cali8d02ed71817 clsact")?;
    ensure!(take()?.is_empty(), "after: {:?}", take()?);
    Ok(())
}

/// Loads a program that returns `TCX_NEXT`.
fn load() -> io::Result<File> {
    // r0 = -1; exit: opcode, registers, offset, immediate value.
    let code: [[u8; 8]; 2] = [
        [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        [0x95, 0, 0, 0, 0, 0, 0, 0],
    ];
    let licence = c"GPL";
    let mut attributes = [0_u8; 128];
    let mut put = |at: usize, bytes: &[u8]| attributes[at..at + bytes.len()].copy_from_slice(bytes);
    // prog_type BPF_PROG_TYPE_SCHED_CLS, insn_cnt, insns, license, prog_name (include/uapi/linux/bpf.h).
    put(0, &3_u32.to_ne_bytes());
    put(4, &2_u32.to_ne_bytes());
    put(8, &(code.as_ptr() as u64).to_ne_bytes());
    put(16, &(licence.as_ptr() as u64).to_ne_bytes());
    put(48, name().as_bytes());
    bpf(5, &mut attributes)
}

/// Attaches it to the egress of an interface of the calling thread's namespace; the link lives as long as
/// the file.
fn attach(program: &File, interface: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: the name is a string with its end and outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let mut attributes = [0_u8; 64];
    // prog_fd, target_ifindex, attach_type BPF_TCX_EGRESS.
    attributes[0..4].copy_from_slice(&program.as_raw_fd().to_ne_bytes());
    attributes[4..8].copy_from_slice(&index.to_ne_bytes());
    attributes[8..12].copy_from_slice(&47_u32.to_ne_bytes());
    bpf(28, &mut attributes)
}

/// bpf(2), for commands that return a descriptor.
fn bpf(command: libc::c_long, attributes: &mut [u8]) -> io::Result<File> {
    // SAFETY: the kernel reads the given bytes, whose pointers lead to what is alive in the caller, and
    // returns a descriptor that is nobody else's.
    unsafe {
        let result = libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), attributes.len());
        match libc::c_int::try_from(result) {
            Ok(descriptor) if descriptor >= 0 => Ok(File::from_raw_fd(descriptor)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
