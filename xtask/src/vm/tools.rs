//! The programs and settings of this machine that tests use, for a guest to have them, too: with the libraries `ldd` names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::tree::Tree;
use crate::workspace;

/// Programs the lab and the tests run. What is not here is left out: a test that needs it says so and is skipped.
const PROGRAMS: [&str; 77] = [
    "bash",
    "bpftool",
    "bridge",
    "busybox",
    "cat",
    "chmod",
    "chroot",
    "conntrack",
    "cp",
    "curl",
    "cut",
    "dd",
    "dnsmasq",
    "echo",
    "env",
    "ethtool",
    "false",
    "grep",
    "head",
    "hostname",
    "id",
    "ip",
    "ip6tables",
    "ip6tables-legacy",
    "ip6tables-legacy-restore",
    "ip6tables-legacy-save",
    "ip6tables-nft",
    "ip6tables-nft-restore",
    "ip6tables-nft-save",
    "ip6tables-restore",
    "ip6tables-save",
    "iperf3",
    "ipset",
    "iptables",
    "iptables-legacy",
    "iptables-legacy-restore",
    "iptables-legacy-save",
    "iptables-nft",
    "iptables-nft-restore",
    "iptables-nft-save",
    "iptables-restore",
    "iptables-save",
    "ipvsadm",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mount",
    "mtr",
    "mtr-packet",
    "mv",
    "nft",
    "nsenter",
    "ping",
    "ps",
    "readlink",
    "rm",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sleep",
    "sort",
    "ss",
    "stat",
    "sysctl",
    "tail",
    "tc",
    "tcpdump",
    "timeout",
    "touch",
    "tracepath",
    "traceroute",
    "true",
    "unshare",
    "wc",
    "wg",
];

/// Folders and files that those read. Debian's places on this kind of machine.
const FOLDERS: [&str; 4] = [
    "/etc/iproute2",
    "/usr/share/iproute2",
    "/usr/lib/tc",
    "/usr/lib/x86_64-linux-gnu/xtables",
];
const FILES: [&str; 6] = [
    "/etc/ethertypes",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/group",
    "/etc/protocols",
    "/etc/services",
];

/// Puts all of them into the tree.
pub(super) fn add(tree: &mut Tree) -> Result<()> {
    let mut programs = Vec::new();
    for name in PROGRAMS {
        if let Some(file) = workspace::find_program(name) {
            tree.own(&file)?;
            programs.push(file);
        }
    }
    // The lab looks for it there; the kernel starts the other one.
    tree.link(Path::new("/sbin/modprobe"), Path::new("/bin/busybox"));
    for folder in FOLDERS.map(Path::new).iter().filter(|folder| folder.is_dir()) {
        tree.own_folder(folder)?;
    }
    for file in FILES.map(Path::new).iter().filter(|file| file.is_file()) {
        tree.own(file)?;
    }
    add_libraries(tree, &programs)
}

/// Puts the libraries of programs into the tree.
pub(super) fn add_libraries(tree: &mut Tree, programs: &[PathBuf]) -> Result<()> {
    let mut libraries = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd")
            .arg(program)
            .output()
            .with_context(|| format!("cannot run ldd on {}", program.display()))?;
        // It fails on static programs and scripts, which need none.
        libraries.extend(paths(&String::from_utf8_lossy(&output.stdout)));
    }
    for library in libraries {
        tree.own(&library)?;
    }
    Ok(())
}

/// The files that `ldd` names: `libc.so.6 => /lib/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn paths(said: &str) -> Vec<PathBuf> {
    said.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_that_ldd_names() {
        let said = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            paths(said),
            [
                Path::new("/lib/x86_64-linux-gnu/libmnl.so.0"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert!(paths("\tnot a dynamic executable\n").is_empty());
    }
}
