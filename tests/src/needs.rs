//! Tests with a harness of their own, and what they take that a machine may lack. What is missing is told before the test
//! runs: as the reason it is skipped for, or as its failure where it must not be missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::inventory::has_tcx;
use crate::lab::{Encapsulation, Lab};

/// Folders with programs that a plain user's path, or `cargo test`'s, may lack: Debian's for the system, and the one that
/// `cargo xtask setup` puts the tests' own into.
const MORE_FOLDERS: [&str; 3] = [
    "/usr/sbin",
    "/sbin",
    concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/python/bin"),
];

/// What a test takes besides root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A program that `cargo xtask setup` installs.
    Program(&'static str),
    /// A kernel with the devices of this encapsulation.
    Encapsulation(Encapsulation),
    /// A kernel with TCX (6.6 and newer).
    Tcx,
    /// A kernel that tells conntrack's types (most from 5.11 on).
    Conntrack,
    /// A kernel whose veth devices merge packets (`veth_gro_requested`, drivers/net/veth.c, 5.13 and newer), and datagrams
    /// that are forwarded, too, if asked to.
    VethGro,
    /// A kernel with IPVS, and the program that sets it up.
    Ipvs,
    /// A kernel whose functions can be probed.
    Kprobes,
    /// A machine that is thrown away afterwards: settings of the whole kernel are changed.
    Guest,
    /// Such a machine, and a kernel that can be locked down.
    Lockdown,
}

/// Where a kernel is locked down (`security/lockdown/lockdown.c`).
pub const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// A test: its name, what it does, and what it needs.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Unique among the tests of its program.
    pub name: &'static str,
    /// What it does.
    pub run: fn() -> Result<()>,
    needs: &'static [Need],
}

/// A test that needs root and what every lab needs.
pub const fn test(name: &'static str, run: fn() -> Result<()>) -> Test {
    Test {
        name,
        run,
        needs: &[],
    }
}

/// Whether a test can run here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Nothing is missing.
    Ready,
    /// The machine is not made for it, for this reason.
    Skipped(String),
    /// What is missing must not be: CI runs every test its kernel can carry.
    Failed(String),
}

impl Test {
    /// The test, with what it needs.
    #[must_use]
    pub const fn needs(self, needs: &'static [Need]) -> Self {
        Self { needs, ..self }
    }

    /// Looks for what it needs.
    pub fn readiness(&self) -> Readiness {
        // A guest has this machine's programs but neither its Python nor its packages.
        let guest = variable_is("CALITRACE_GUEST", "1");
        let strict = variable_is("CI", "true") && !guest;
        if !nix::unistd::geteuid().is_root() {
            return missing("needs root: for network namespaces and eBPF", strict);
        }
        for need in self.needs {
            match need {
                Need::Program(name) if find_program(name).is_none() => {
                    return missing(
                        &format!("needs {name}, which `cargo xtask setup` installs"),
                        strict,
                    );
                }
                // What cannot be told is shown by the test itself.
                Need::Encapsulation(kind) if !Lab::supports(*kind).unwrap_or(true) => {
                    return missing(&format!("no {kind:?} in this kernel"), false);
                }
                Need::Tcx if !has_tcx() => return missing("no TCX in this kernel", false),
                Need::Conntrack if !has_conntrack_types() => {
                    return missing("no type information of conntrack in this kernel", false);
                }
                Need::VethGro if !has_veth_gro() => {
                    return missing("this kernel's veth devices merge no packets", false);
                }
                Need::Ipvs if !has_ipvs() => return missing("no IPVS in this kernel", false),
                Need::Ipvs if find_program("ipvsadm").is_none() => {
                    return missing("needs ipvsadm, which `cargo xtask setup` installs", strict);
                }
                Need::Kprobes if !has_kprobes() => {
                    return missing("no kprobes in this kernel", false);
                }
                Need::Guest | Need::Lockdown if !guest => {
                    return missing("changes the whole machine: for guests", false);
                }
                Need::Lockdown if !Path::new(LOCKDOWN).exists() => {
                    return missing("no lockdown in this kernel", false);
                }
                _ => {}
            }
        }
        Readiness::Ready
    }
}

/// Whether the kernel lets functions be probed by perf events.
pub fn has_kprobes() -> bool {
    Path::new("/sys/bus/event_source/devices/kprobe").exists()
}

/// By the kernel's version: nothing else tells.
fn has_veth_gro() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().ok());
    let version = (numbers.next().flatten(), numbers.next().flatten());
    version >= (Some(5), Some(13))
}

/// Whether the kernel has virtual servers, built in or as a module, which is loaded for the answer.
fn has_ipvs() -> bool {
    let there = || Path::new("/proc/net/ip_vs").exists();
    // Without modules, or without this one, it fails: then there is none.
    there() || load("ip_vs") && there()
}

/// Whether the kernel's type information, or its module's, has the structure of a connection.
fn has_conntrack_types() -> bool {
    load("nf_conntrack");
    let member = b"\0tuplehash\0";
    ["vmlinux", "nf_conntrack"].iter().any(|name| {
        let types = std::fs::read(Path::new("/sys/kernel/btf").join(name)).unwrap_or_default();
        types.windows(member.len()).any(|window| window == member)
    })
}

/// Asks for a module; false if nothing here could.
fn load(module: &str) -> bool {
    let ask = |modprobe| Command::new(modprobe).args(["-q", module]).status().is_ok();
    find_program("modprobe").is_some_and(ask)
}

/// The first program of that name, on the path or where Debian and `cargo xtask setup` put programs.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(MORE_FOLDERS.map(|folder| Path::new(folder).to_owned()))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Whether the kernel gives reasons for drops (5.17 and newer): its type information has a name for them.
pub fn has_drop_reasons() -> bool {
    knows("skb_drop_reason")
}

/// Whether the kernel has this one among its drop reasons, such as `NO_SOCKET`.
pub fn has_drop_reason(name: &str) -> bool {
    knows(&format!("SKB_DROP_REASON_{name}\0"))
}

/// Whether the kernel's type information has this text.
fn knows(text: &str) -> bool {
    let types = std::fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default();
    types.windows(text.len()).any(|window| window == text.as_bytes())
}

fn missing(what: &str, strict: bool) -> Readiness {
    if strict {
        Readiness::Failed(what.to_owned())
    } else {
        Readiness::Skipped(what.to_owned())
    }
}

fn variable_is(name: &str, value: &str) -> bool {
    std::env::var_os(name).is_some_and(|found| found == value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program").is_none());
        assert_eq!(missing("x", true), Readiness::Failed("x".to_owned()));
        assert_eq!(missing("x", false), Readiness::Skipped("x".to_owned()));
    }

    #[test]
    fn a_test_that_lacks_a_program_does_not_run() {
        static NEEDS: [Need; 1] = [Need::Program("no-such-program")];
        let test = test("a", || Ok(())).needs(&NEEDS);
        // Without root, that is what is missing.
        assert_ne!(test.readiness(), Readiness::Ready);
    }
}
