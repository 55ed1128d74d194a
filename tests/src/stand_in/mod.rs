//! A stand-in for Felix's eBPF programs ([`xdp`] has the one before all else): TC programs that drop or redirect packets to
//! one address and let all others pass, attached the way Felix attaches its own (`felix/bpf/tc/attach.go`, Calico 3.31). And
//! what else it does to the programs of others. Loaded by bpf(2) from a dozen instructions, so that nothing of the program under test is in it.

pub mod xdp;

use std::ffi::CString;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use crate::inventory::{TCX_EGRESS, TCX_INGRESS, bpf, index_of, tcx};
use crate::namespace::Namespace;

/// Name of the programs, as Felix's begin.
pub const NAME: &str = "cali_stand_in";

/// What happens to the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// Nothing: all pass, as what Felix accepts does.
    Accept,
    /// `TC_ACT_SHOT`, as Felix drops by policy.
    Shoot,
    /// Routed to this interface of the same namespace, past the host's own forwarding (`bpf_redirect_neigh`). The TTL is
    /// lowered as forwarding does.
    Forward(&'a str),
    /// Handed to the other end of this veth, past its egress (`bpf_redirect_peer`). The TTL is lowered, too.
    IntoPod(&'a str),
}

/// On which side of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What comes in.
    Ingress,
    /// What goes out.
    Egress,
}

/// A program that was attached by a link; detached when dropped.
#[derive(Debug)]
pub struct Attached {
    _link: OwnedFd,
}

/// Attaches by TCX with no flags, as Felix does: behind all programs that are there.
pub fn attach(
    namespace: &Namespace,
    interface: &str,
    side: Side,
    to: Ipv4Addr,
    action: Action<'_>,
) -> Result<Attached> {
    attach_with(namespace, interface, side, to, action, 0)
}

/// As [`attach`], in front of all programs that are there.
pub fn attach_in_front(
    namespace: &Namespace,
    interface: &str,
    side: Side,
    to: Ipv4Addr,
    action: Action<'_>,
) -> Result<Attached> {
    attach_with(namespace, interface, side, to, action, BEFORE)
}

fn attach_with(
    namespace: &Namespace,
    interface: &str,
    side: Side,
    to: Ipv4Addr,
    action: Action<'_>,
    flags: u32,
) -> Result<Attached> {
    let attached = namespace.within(|| {
        link(
            &load(SCHED_CLS, &program(to, action)?)?,
            interface,
            attach_type(side),
            flags,
        )
    });
    attached.with_context(|| format!("attach a stand-in to {interface} in {}", namespace.name()))
}

/// In the namespace of the calling thread.
fn link(program: &OwnedFd, interface: &str, attach_type: u32, flags: u32) -> Result<Attached> {
    let mut attributes = LinkCreate {
        program: program.as_raw_fd().cast_unsigned(),
        target: index(interface)?,
        attach_type,
        flags,
        rest: [0; 8],
    };
    let link = bpf(LINK_CREATE, &mut attributes).context("BPF_LINK_CREATE")?;
    Ok(Attached {
        // SAFETY: the kernel has just given this descriptor to us and nobody else.
        _link: unsafe { OwnedFd::from_raw_fd(link) },
    })
}

/// Attaches by a filter on the clsact qdisc, which must be there. A priority of 0 lets the kernel choose, as Felix does
/// before TCX. It stays until the qdisc goes.
pub fn attach_filter(
    namespace: &Namespace,
    interface: &str,
    side: Side,
    to: Ipv4Addr,
    action: Action<'_>,
    priority: u16,
) -> Result<()> {
    let attached = namespace.within(|| {
        let program = load(SCHED_CLS, &program(to, action)?)?;
        add_filter(index(interface)?, side, &program, priority)
    });
    attached.with_context(|| format!("add a stand-in's filter to {interface} in {}", namespace.name()))
}

/// Detaches by force the TCX programs whose name begins with `prefix`; returns how many there were.
pub fn detach_by_force(namespace: &Namespace, interface: &str, side: Side, prefix: &str) -> Result<usize> {
    let names = crate::inventory::programs()?;
    namespace.within(|| {
        let mut detached = 0;
        for (program, link) in tcx(interface, attach_type(side))? {
            if names.get(&program).is_some_and(|name| name.starts_with(prefix)) {
                let mut by_id = [link, 0, 0, 0];
                let link = bpf(LINK_GET_FD_BY_ID, &mut by_id).context("BPF_LINK_GET_FD_BY_ID")?;
                // SAFETY: the kernel has just given this descriptor to us and nobody else.
                let link = unsafe { OwnedFd::from_raw_fd(link) };
                let mut of = [link.as_raw_fd().cast_unsigned(), 0, 0, 0];
                bpf(LINK_DETACH, &mut of).context("BPF_LINK_DETACH")?;
                detached += 1;
            }
        }
        Ok(detached)
    })
}

/// The names of the TCX programs on one side of an interface, in the order they run in.
pub fn attached(namespace: &Namespace, interface: &str, side: Side) -> Result<Vec<String>> {
    let ids = namespace.within(|| tcx(interface, attach_type(side)))?;
    let names = crate::inventory::programs()?;
    Ok(ids
        .into_iter()
        .map(|(program, _)| names.get(&program).cloned().unwrap_or_default())
        .collect())
}

fn attach_type(side: Side) -> u32 {
    match side {
        Side::Ingress => TCX_INGRESS,
        Side::Egress => TCX_EGRESS,
    }
}

fn index(interface: &str) -> Result<u32> {
    index_of(interface)?.with_context(|| format!("there is no interface {interface}"))
}

// Commands and layouts of bpf(2): include/uapi/linux/bpf.h, Linux 6.6.
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const LINK_GET_FD_BY_ID: libc::c_long = 30;
const LINK_DETACH: libc::c_long = 34;
/// `BPF_F_BEFORE`.
const BEFORE: u32 = 1 << 3;
const SCHED_CLS: u32 = 3;

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    rest: [u32; 8],
}

#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

fn load(program_type: u32, instructions: &[Instruction]) -> Result<OwnedFd> {
    let mut log = vec![0_u8; 1 << 16];
    let mut name = [0; 16];
    name[..NAME.len()].copy_from_slice(NAME.as_bytes());
    let mut attributes = ProgramLoad {
        program_type,
        instruction_count: u32::try_from(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 1,
        log_size: u32::try_from(log.len())?,
        log: log.as_mut_ptr() as u64,
        kernel_version: 0,
        flags: 0,
        name,
    };
    let fd = without_memory_limit(|| bpf(PROG_LOAD, &mut attributes))?.with_context(|| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        format!("load a stand-in: {}", String::from_utf8_lossy(&log[..end]))
    })?;
    // SAFETY: the kernel has just given this descriptor to us and nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Before 5.11 programs are locked memory, and of what has ended some is given back only later: what the last run of the
/// program under test held may still count. The limit comes back at once, since that program has to lift it itself. Later
/// kernels do not look at it, so lifting it may be refused there.
fn without_memory_limit<T>(work: impl FnOnce() -> T) -> Result<T> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).context("read the limit on locked memory")?;
    let lifted = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_ok();
    let result = work();
    if lifted {
        setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).context("set the limit on locked memory again")?;
    }
    Ok(result)
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Offsets in `struct __sk_buff`.
const PROTOCOL: i16 = 16;
const DATA: i16 = 76;
const DATA_END: i16 = 80;
/// Offsets in an Ethernet frame with an IPv4 header.
const TTL: i16 = 22;
const CHECKSUM: i16 = 24;
const DESTINATION: i16 = 30;
const HEADERS: i32 = 34;
/// Helpers.
const REDIRECT_NEIGH: i32 = 152;
const REDIRECT_PEER: i32 = 155;
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;

const fn code(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

/// The program, in the notation of the kernel's verifier beside each instruction.
fn program(to: Ipv4Addr, action: Action<'_>) -> Result<Vec<Instruction>> {
    let of_network = |value: u16| i32::from(value.to_be());
    let set = |register, value| code(0xb7, register, 0, 0, value); // r = value
    let exit = code(0x95, 0, 0, 0, 0);
    let pass = [set(0, TC_ACT_UNSPEC), exit];
    let hand_on = |helper: i32, interface: &str| -> Result<Vec<Instruction>> {
        let index = i32::try_from(index(interface)?).context("interface index")?;
        Ok(vec![
            // As ip_decrease_ttl (include/net/ip.h); packets at their end pass, for the kernel to answer.
            code(0x71, 4, 2, TTL, 0),                // r4 = *(u8 *)(r2 + TTL)
            code(0x07, 4, 0, 0, -1),                 // r4 += -1
            code(0x73, 2, 4, TTL, 0),                // *(u8 *)(r2 + TTL) = r4
            code(0x69, 4, 2, CHECKSUM, 0),           // r4 = *(u16 *)(r2 + CHECKSUM)
            code(0x07, 4, 0, 0, of_network(0x0100)), // r4 += 0x0100 in network order
            code(0xa5, 4, 0, 1, 0xffff),             // if r4 < 0xffff goto +1
            code(0x07, 4, 0, 0, 1),                  // r4 += 1
            code(0x6b, 2, 4, CHECKSUM, 0),           // *(u16 *)(r2 + CHECKSUM) = r4
            set(1, index),
            set(2, 0),
            set(3, 0),
            set(4, 0),
            code(0x85, 0, 0, 0, helper), // call helper
            exit,
        ])
    };
    let act = match action {
        Action::Accept => pass.to_vec(),
        Action::Shoot => vec![set(0, TC_ACT_SHOT), exit],
        Action::Forward(interface) => hand_on(REDIRECT_NEIGH, interface)?,
        Action::IntoPod(interface) => hand_on(REDIRECT_PEER, interface)?,
    };
    let past = i16::try_from(act.len())?;
    let address = i32::from_ne_bytes(to.octets());
    // Instructions that follow each of these jumps before the action's end.
    let mut all = vec![
        code(0x61, 2, 1, PROTOCOL, 0),                  // r2 = skb->protocol
        code(0x55, 2, 0, past + 9, of_network(0x0800)), // if r2 != IPv4 goto pass
        code(0x61, 2, 1, DATA, 0),                      // r2 = skb->data
        code(0x61, 3, 1, DATA_END, 0),                  // r3 = skb->data_end
        code(0xbf, 4, 2, 0, 0),                         // r4 = r2
        code(0x07, 4, 0, 0, HEADERS),                   // r4 += HEADERS
        code(0x2d, 4, 3, past + 4, 0),                  // if r4 > r3 goto pass
        code(0x61, 4, 2, DESTINATION, 0),               // r4 = *(u32 *)(r2 + DESTINATION)
        code(0x56, 4, 0, past + 2, address),            // if w4 != address goto pass
        code(0x71, 4, 2, TTL, 0),                       // r4 = *(u8 *)(r2 + TTL)
        code(0xb5, 4, 0, past, 1),                      // if r4 <= 1 goto pass
    ];
    all.extend(act);
    all.extend(pass);
    Ok(all)
}

/// `RTM_NEWTFILTER` with the attributes that libbpf's `bpf_tc_attach` sends.
fn add_filter(ifindex: u32, side: Side, program: &OwnedFd, priority: u16) -> Result<()> {
    const ETH_P_ALL: u16 = 3;
    const KIND: u16 = 1;
    const OPTIONS: u16 = 2;
    const BPF_FD: u16 = 6;
    const BPF_NAME: u16 = 7;
    const BPF_FLAGS: u16 = 8;
    const DIRECT_ACTION: u32 = 1;
    let parent: u32 = match side {
        Side::Ingress => 0xffff_fff2,
        Side::Egress => 0xffff_fff3,
    };
    let attribute = |kind: u16, data: &[u8]| -> Result<Vec<u8>> {
        let length = u16::try_from(4 + data.len()).context("length of an attribute")?;
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Ok(bytes)
    };
    let name = CString::new(NAME).context("the name")?;
    let options = [
        attribute(BPF_FD, &program.as_raw_fd().to_ne_bytes())?,
        attribute(BPF_NAME, name.as_bytes_with_nul())?,
        attribute(BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes())?,
    ]
    .concat();
    let mut body = vec![0; 4];
    let info = u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be());
    for word in [ifindex, 0, parent, info] {
        body.extend(word.to_ne_bytes());
    }
    body.extend(attribute(KIND, b"bpf\0")?);
    body.extend(attribute(OPTIONS, &options)?);
    netlink(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body)
}

/// Sends one request to the route netlink of the calling thread's namespace and reads its acknowledgement.
fn netlink(kind: u16, flags: i32, body: &[u8]) -> Result<()> {
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags).context("flags")?;
    let mut request = u32::try_from(16 + body.len())?.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    // SAFETY: no pointers; the descriptor is owned from here on.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_ROUTE,
        );
        ensure!(
            fd >= 0,
            "open a netlink socket: {}",
            std::io::Error::last_os_error()
        );
        OwnedFd::from_raw_fd(fd)
    };
    let mut answer = [0_u8; 4096];
    // SAFETY: both buffers outlive the calls and have the lengths given.
    let received = unsafe {
        let sent = libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0);
        ensure!(sent >= 0, "send a request: {}", std::io::Error::last_os_error());
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    ensure!(
        received >= 20,
        "read an answer: {}",
        std::io::Error::last_os_error()
    );
    // NLMSG_ERROR: a header, then a negative errno or zero.
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    ensure!(code == 0, "{}", std::io::Error::from_raw_os_error(-code));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_leads_to_the_passing_end() {
        let all = program(Ipv4Addr::LOCALHOST, Action::Shoot).unwrap();
        let pass = all.len() - 2;
        for (at, instruction) in all.iter().enumerate() {
            if matches!(instruction.code, 0x55 | 0x2d | 0x56 | 0xb5) {
                let target = at + 1 + usize::try_from(instruction.offset).unwrap();
                assert_eq!(target, pass, "at {at}");
            }
        }
    }
}
