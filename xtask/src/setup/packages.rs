//! System programs, looked for by name and installed with Debian's packages. On other systems it says what is missing.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::step::{run_quietly, say};
use crate::{root, workspace};

/// A program, the Debian package (bookworm's names) that brings it, and how it is told that it is there.
#[derive(Debug)]
pub(crate) struct Program {
    name: &'static str,
    package: &'static str,
    /// Whether the program found is of use; none where its name suffices.
    check: Option<fn(&Path) -> bool>,
}

const fn program(name: &'static str, package: &'static str) -> Program {
    Program {
        name,
        package,
        check: None,
    }
}

/// What the lab is made of, and what talks in it.
pub(crate) static LAB: [Program; 12] = [
    program("ip", "iproute2"),
    program("tc", "iproute2"),
    program("bridge", "iproute2"),
    program("iptables-restore", "iptables"),
    program("ip6tables-restore", "iptables"),
    program("traceroute", "traceroute"),
    program("ping", "iputils-ping"),
    program("tcpdump", "tcpdump"),
    program("ethtool", "ethtool"),
    program("curl", "curl"),
    program("wg", "wireguard-tools"),
    // The lab copies it into the nodes' own roots, where no library is: it has to be the static one.
    Program {
        name: "busybox",
        package: "busybox-static",
        check: Some(is_static),
    },
];

/// What builds libFuzzer, which is written in C++ and carried by its crate.
pub(crate) static FUZZ: [Program; 1] = [program("c++", "g++")];

/// What tests make further traffic with, and translate it with.
pub(crate) static TRAFFIC: [Program; 8] = [
    program("nft", "nftables"),
    program("ipset", "ipset"),
    program("conntrack", "conntrack"),
    program("ipvsadm", "ipvsadm"),
    program("mtr", "mtr-tiny"),
    program("tracepath", "iputils-tracepath"),
    program("iperf3", "iperf3"),
    program("dnsmasq", "dnsmasq-base"),
];

/// What builds the generator of Felix' rule sets. Calico's modules want it newer than bookworm has it, where it is in the
/// backports.
pub(crate) static GO: [Program; 1] = [Program {
    name: "go",
    package: "golang-go",
    check: Some(is_go_with_toolchains),
}];

/// What virtual machines are made with, and what tests use in them only.
pub(crate) static GUESTS: [Program; 7] = [
    program("qemu-system-x86_64", "qemu-system-x86"),
    program("depmod", "kmod"),
    program("xz", "xz-utils"),
    program("dpkg", "dpkg"),
    program("strip", "binutils"),
    program("ldd", "libc-bin"),
    program("bpftool", "bpftool"),
];

/// What makes the tests' Python environment.
pub(crate) static PYTHON: [Program; 1] = [Program {
    name: "python3",
    package: "python3-venv",
    check: Some(can_make_environments),
}];

/// Installs the packages of those programs that are missing.
pub(crate) fn require(programs: &[Program]) -> Result<()> {
    let missing = missing_packages(programs);
    if missing.is_empty() {
        let names: Vec<&str> = programs.iter().map(|program| program.name).collect();
        say(&format!("programs there: {}", names.join(", ")));
        return Ok(());
    }
    let list = missing.join(" ");
    say(&format!("programs: missing: {list}"));
    if workspace::find_program("apt-get").is_none() {
        bail!(
            "missing programs, and no apt-get to install them with: install what corresponds to Debian's {list}"
        );
    }
    run_quietly("package list", apt_get(&list)?.arg("update"))?;
    run_quietly(
        "packages",
        apt_get(&list)?
            .args(["install", "--yes", "--no-install-recommends"])
            .args(&missing),
    )?;
    let missing = missing_packages(programs);
    if !missing.is_empty() {
        bail!(
            "the packages {} are installed, but their programs are not found",
            missing.join(" ")
        );
    }
    Ok(())
}

fn missing_packages(programs: &[Program]) -> Vec<&'static str> {
    let mut packages: Vec<&str> = programs
        .iter()
        .filter(|program| !program.is_there())
        .map(|program| program.package)
        .collect();
    packages.dedup();
    packages
}

impl Program {
    fn is_there(&self) -> bool {
        workspace::find_program(self.name).is_some_and(|file| self.check.is_none_or(|check| check(&file)))
    }
}

fn apt_get(packages: &str) -> Result<Command> {
    let why = format!("apt-get (packages {packages})");
    let quiet = [("DEBIAN_FRONTEND", OsStr::new("noninteractive"))];
    let mut command = root::command(&why, OsStr::new("apt-get"), &quiet)?;
    // Another apt may be at work, as on a machine that has just been started.
    command.args(["-q", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=3"]);
    Ok(command)
}

/// `ldd` fails on a program without dynamic libraries.
fn is_static(file: &Path) -> bool {
    Command::new("ldd")
        .arg(file)
        .output()
        .is_ok_and(|output| !output.status.success())
}

/// From 1.21 on Go gets itself the toolchain that a module asks for; those before do not know the word `toolchain`.
fn is_go_with_toolchains(file: &Path) -> bool {
    Command::new(file)
        .args(["env", "GOTOOLCHAIN"])
        .output()
        .is_ok_and(|output| output.status.success() && !output.stdout.trim_ascii().is_empty())
}

/// Debian splits `ensurepip` from Python.
fn can_make_environments(file: &Path) -> bool {
    Command::new(file)
        .args(["-c", "import venv, ensurepip"])
        .output()
        .is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_there_needs_no_package() {
        assert!(missing_packages(&[program("sh", "dash")]).is_empty());
    }

    #[test]
    fn a_package_is_named_once() {
        let programs = [
            program("no-such-a", "a-package"),
            program("no-such-b", "a-package"),
        ];
        assert_eq!(missing_packages(&programs), ["a-package"]);
    }

    #[test]
    fn a_program_of_no_use_counts_as_missing() {
        let useless = Program {
            name: "sh",
            package: "dash",
            check: Some(|_| false),
        };
        assert_eq!(missing_packages(&[useless]), ["dash"]);
    }
}
