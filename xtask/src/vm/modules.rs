//! Which of a kernel's modules a guest gets: those that labs and calitrace use, and what they depend on. The kernel asks
//! for them by `modprobe`, as on any machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::kernels::Kernel;
use super::tree::Tree;
use crate::step::output_of;
use crate::workspace;

/// Names of modules, those with `*` the beginnings of names. What a kernel lacks is left out: it is built in, or younger.
const WANTED: [&str; 38] = [
    "ipip",
    "vxlan",
    "wireguard",
    "netkit",
    "veth",
    "dummy",
    "tun",
    "bridge",
    "br_netfilter",
    "ip6_tunnel",
    "sch_*",
    "cls_*",
    "act_*",
    "em_*",
    "ip_tables",
    "ip6_tables",
    "iptable_*",
    "ip6table_*",
    "ipt_*",
    "ip6t_*",
    "x_tables",
    "xt_*",
    "ip_set*",
    "ip_vs*",
    "nf_conntrack*",
    "nf_defrag*",
    "nf_log*",
    "nf_nat*",
    "nf_reject*",
    "nf_socket*",
    "nf_tables*",
    "nf_tproxy*",
    "nfnetlink*",
    "nft_*",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "af_packet_diag",
];

/// Files besides modules that `depmod` reads.
const LISTS: [&str; 3] = ["modules.order", "modules.builtin", "modules.builtin.modinfo"];

/// Puts the modules and their lists into the tree; `scratch` is a folder to unpack them in.
pub(super) fn add(tree: &mut Tree, kernel: &Kernel, scratch: &Path) -> Result<()> {
    let list = kernel.modules.join("modules.dep");
    let text = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    if scratch.exists() {
        fs::remove_dir_all(scratch).with_context(|| format!("remove {}", scratch.display()))?;
    }
    let folder = scratch.join("lib/modules").join(&kernel.release);
    for file in chosen(&text) {
        copy(&kernel.modules.join(file), &folder.join(file))?;
    }
    unpack(&folder)?;
    for name in LISTS {
        let file = kernel.modules.join(name);
        if file.exists() {
            copy(&file, &folder.join(name))?;
        }
    }
    let depmod = workspace::find_program("depmod").context("no depmod on the path")?;
    // Without progress messages: this is done for each guest.
    output_of(Command::new(depmod).arg("-b").arg(scratch).arg(&kernel.release))?;
    tree.copied_folder(&Path::new("/lib/modules").join(&kernel.release), &folder)
}

/// The files of the wanted modules and of those they depend on, as `modules.dep` names them: `FILE: FILE…`, the second
/// part with all that the first one needs.
fn chosen(dependencies: &str) -> BTreeSet<&str> {
    let lines: BTreeMap<&str, &str> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .collect();
    let mut files = BTreeSet::new();
    for (file, needed) in &lines {
        let name = module(file);
        let wanted = WANTED.iter().any(|wanted| match wanted.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == *wanted,
        });
        if wanted {
            files.insert(*file);
            files.extend(needed.split_whitespace());
        }
    }
    files
}

/// A module's name by that of its file: `kernel/net/ipv4/ipip.ko.xz` is `ipip`.
fn module(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make the folder {}", folder.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Unpacks `*.xz` below a folder: busybox loads plain modules only.
fn unpack(folder: &Path) -> Result<()> {
    let mut packed = Vec::new();
    find(folder, &mut packed)?;
    packed.retain(|file| file.extension().is_some_and(|extension| extension == "xz"));
    if packed.is_empty() {
        return Ok(());
    }
    let xz = workspace::find_program("xz").context("no xz on the path")?;
    // Too many names to show.
    let output = Command::new(&xz)
        .arg("-d")
        .args(&packed)
        .output()
        .with_context(|| format!("cannot run {}", xz.display()))?;
    ensure!(
        output.status.success(),
        "unpacking {} modules with xz failed ({}): {}",
        packed.len(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry
            .with_context(|| format!("list {}", folder.display()))?
            .path();
        if path.is_dir() {
            find(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_modules_come_with_what_they_need() {
        let list = "kernel/net/ipv4/ipip.ko.xz: kernel/net/ipv4/tunnel4.ko.xz kernel/net/ipv4/ip_tunnel.ko.xz\n\
            kernel/net/ipv4/tunnel4.ko.xz:\n\
            kernel/net/ipv4/ip_tunnel.ko.xz:\n\
            kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz\n\
            kernel/net/netfilter/xt_mark.ko: kernel/net/netfilter/x_tables.ko\n";
        let files: Vec<&str> = chosen(list).into_iter().collect();
        assert_eq!(
            files,
            [
                "kernel/net/ipv4/ip_tunnel.ko.xz",
                "kernel/net/ipv4/ipip.ko.xz",
                "kernel/net/ipv4/tunnel4.ko.xz",
                "kernel/net/netfilter/x_tables.ko",
                "kernel/net/netfilter/xt_mark.ko",
            ]
        );
    }

    #[test]
    fn a_module_is_called_as_the_kernel_calls_it() {
        assert_eq!(module("kernel/net/sched/act-x.ko"), "act_x");
        assert_eq!(module("kernel/lib/crc16.ko.xz"), "crc16");
    }
}
