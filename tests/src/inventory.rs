//! What BPF programs and classifier qdiscs are on a machine, asked of the kernel itself by bpf(2): proof that
//! nothing is left behind must not come from the program that may have left it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::command;
use crate::namespace::Namespace;

/// What is attached or loaded, each thing in words; empty when there is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// TCX programs: `NAMESPACE INTERFACE ingress|egress PROGRAM`.
    pub tcx: Vec<String>,
    /// Qdiscs that exist to carry filters: `NAMESPACE INTERFACE clsact|ingress`.
    pub qdiscs: Vec<String>,
    /// Filters on these qdiscs, one line each.
    pub filters: Vec<String>,
    /// Loaded programs with a name that begins as asked: `ID NAME`.
    pub programs: Vec<String>,
}

impl Inventory {
    /// Looks at every interface of these namespaces, and for loaded programs whose name begins with
    /// `prefix` on the whole machine.
    pub fn take(namespaces: &[Namespace], prefix: &str) -> Result<Self> {
        let programs = programs()?;
        let mut found = Self {
            programs: programs
                .iter()
                .filter(|(_, name)| name.starts_with(prefix))
                .map(|(id, name)| format!("{id} {name}"))
                .collect(),
            ..Self::default()
        };
        for namespace in namespaces {
            found.look_at(namespace, &programs)?;
        }
        Ok(found)
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn look_at(&mut self, namespace: &Namespace, programs: &BTreeMap<u32, String>) -> Result<()> {
        let name = namespace.name();
        for interface in interfaces(namespace)? {
            for (direction, attach_type) in [("ingress", TCX_INGRESS), ("egress", TCX_EGRESS)] {
                let attached = namespace
                    .within(|| tcx_programs(&interface, attach_type))
                    .with_context(|| format!("cannot list TCX programs of {interface} in {name}"))?;
                for id in attached {
                    let program = programs.get(&id).map_or("?", String::as_str);
                    self.tcx.push(format!("{name} {interface} {direction} {program}"));
                }
            }
        }
        let list = command::run(namespace.command("tc").args(["-j", "qdisc", "show"]))?;
        let qdiscs: Vec<serde_json::Value> =
            serde_json::from_slice(&list.stdout).context("tc -j qdisc show printed something else")?;
        for qdisc in qdiscs {
            let (kind, interface) = (qdisc["kind"].as_str(), qdisc["dev"].as_str());
            if let (Some(kind @ ("clsact" | "ingress")), Some(interface)) = (kind, interface) {
                self.qdiscs.push(format!("{name} {interface} {kind}"));
                // Filters of packets that come and go hang on these two alone (tc-bpf(8)).
                for direction in ["ingress", "egress"] {
                    let mut filters = namespace.command("tc");
                    filters.args(["filter", "show", "dev", interface, direction]);
                    // An interface that is gone since has none.
                    let listed = command::text(&command::output(&mut filters)?);
                    let lines = listed.lines().filter(|line| !line.trim().is_empty());
                    self.filters
                        .extend(lines.map(|line| format!("{name} {interface} {direction} {line}")));
                }
            }
        }
        Ok(())
    }
}

/// The names of all interfaces of a namespace.
pub fn interfaces(namespace: &Namespace) -> Result<Vec<String>> {
    let list = command::run(namespace.command("ip").args(["-j", "link", "show"]))?;
    let links: Vec<serde_json::Value> =
        serde_json::from_slice(&list.stdout).context("ip -j link show printed something else")?;
    Ok(links
        .iter()
        .filter_map(|link| link["ifname"].as_str().map(str::to_owned))
        .collect())
}

/// All loaded programs by id, with the name the kernel knows (15 letters at most).
pub fn programs() -> Result<BTreeMap<u32, String>> {
    let mut found = BTreeMap::new();
    let mut id = 0;
    loop {
        let mut next = NextId {
            start_id: id,
            ..NextId::default()
        };
        match bpf(PROG_GET_NEXT_ID, &mut next) {
            Ok(_) => id = next.following,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            Err(error) => return Err(error).context("cannot list BPF programs"),
        }
        match program_name(id) {
            Ok(name) => found.insert(id, name),
            // Unloaded since.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot ask for BPF program {id}")),
        };
    }
}

/// Whether this kernel has TCX: 6.6 and later, as a rule.
pub fn has_tcx() -> bool {
    // Of the loopback device, which is the first of every namespace.
    let mut query = Query {
        target_ifindex: 1,
        attach_type: TCX_INGRESS,
        ..Query::default()
    };
    bpf(PROG_QUERY, &mut query).is_ok()
}

// Commands, attach types and layouts of bpf(2): include/uapi/linux/bpf.h, Linux 6.6.
const PROG_GET_NEXT_ID: libc::c_long = 11;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
pub(crate) const TCX_INGRESS: u32 = 46;
pub(crate) const TCX_EGRESS: u32 = 47;
/// Where `name` begins in `struct bpf_prog_info`, and its size.
const INFO_NAME: (usize, usize) = (64, 16);

#[repr(C)]
#[derive(Default)]
struct NextId {
    start_id: u32,
    following: u32,
    open_flags: u32,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    size: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    padding: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// bpf(2). `T` must be a struct that bpf(2) takes for the command, without padding.
pub(crate) fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads and writes at most the given size of a struct that outlives the call; what
    // its pointers lead to is alive in each caller.
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
        .filter(|result| *result >= 0)
        .ok_or_else(io::Error::last_os_error)
}

fn program_name(id: u32) -> io::Result<String> {
    let mut by_id = NextId {
        start_id: id,
        ..NextId::default()
    };
    let descriptor = bpf(PROG_GET_FD_BY_ID, &mut by_id)?;
    // SAFETY: the kernel has just given this descriptor to us and nobody else.
    let program = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let mut info = [0_u8; INFO_NAME.0 + INFO_NAME.1];
    let mut attributes = GetInfo {
        fd: program.as_raw_fd().cast_unsigned(),
        size: u32::try_from(info.len()).map_err(io::Error::other)?,
        info: info.as_mut_ptr() as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let name = &info[INFO_NAME.0..];
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

/// The ids of the programs on one side of an interface of the calling thread's namespace, in order.
fn tcx_programs(interface: &str, attach_type: u32) -> Result<Vec<u32>> {
    Ok(tcx(interface, attach_type)?
        .into_iter()
        .map(|(program, _)| program)
        .collect())
}

/// The ids of the programs on one side of an interface of the calling thread's namespace and of the links that hold
/// them, in order.
pub(crate) fn tcx(interface: &str, attach_type: u32) -> Result<Vec<(u32, u32)>> {
    // Gone since it was listed: nothing is attached to it.
    let Some(index) = index_of(interface)? else {
        return Ok(Vec::new());
    };
    let mut ids = vec![0_u32; 64];
    let mut links = vec![0_u32; 64];
    let mut query = Query {
        target_ifindex: index,
        attach_type,
        program_ids: ids.as_mut_ptr() as u64,
        link_ids: links.as_mut_ptr() as u64,
        count: u32::try_from(ids.len()).context("a buffer of 64 ids")?,
        ..Query::default()
    };
    match bpf(PROG_QUERY, &mut query) {
        Ok(_) => {}
        // Before 6.6 there is no TCX, and no such attach type.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Vec::new()),
        Err(error) => return Err(error).context("BPF_PROG_QUERY"),
    }
    ensure!(
        query.count as usize <= ids.len(),
        "{} programs on one hook",
        query.count
    );
    ids.truncate(query.count as usize);
    Ok(ids.into_iter().zip(links).collect())
}

/// The index of an interface of the calling thread's namespace; `None` if there is none of that name.
pub(crate) fn index_of(interface: &str) -> Result<Option<u32>> {
    let name = CString::new(interface).context("an interface's name holds a zero byte")?;
    // SAFETY: the name is a string with its end and outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    Ok((index != 0).then_some(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_kernels_layout() {
        assert_eq!(std::mem::offset_of!(Query, program_ids), 16);
        assert_eq!(std::mem::offset_of!(Query, program_attach_flags), 32);
        assert_eq!(
            (size_of::<Query>(), size_of::<GetInfo>(), size_of::<NextId>()),
            (64, 16, 12)
        );
    }
}
