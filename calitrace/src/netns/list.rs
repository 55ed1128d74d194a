//! All network namespaces of the host: those that a process lives in, and those that only a name under `/run/netns`
//! keeps. Tolerates what vanishes meanwhile.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::statfs;

use super::{Handle, vanished};
use crate::event::Netns;

/// Where `ip netns` and container runtimes keep namespaces by name.
const NAMED: [&str; 2] = ["/run/netns", "/var/run/netns"];

/// A network namespace that was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The open namespace.
    pub handle: Handle,
    /// Its names under `/run/netns`, sorted.
    pub names: Vec<String>,
    /// The processes in it, ascending. Threads that left their process's namespace are not looked for.
    pub pids: Vec<i32>,
}

impl Found {
    /// Its inode number.
    pub fn inode(&self) -> Netns {
        self.handle.inode()
    }
}

/// Every network namespace of the host that this process may see, by inode number.
pub fn list() -> Result<Vec<Found>> {
    let mut found: BTreeMap<Netns, Found> = BTreeMap::new();
    let mut pids = processes()?;
    pids.sort_unstable();
    for pid in pids {
        let path = format!("/proc/{pid}/ns/net");
        let inode = match fs::read_link(&path) {
            Ok(target) => target.to_str().and_then(namespace_inode),
            // Without CAP_SYS_PTRACE other users' processes are hidden; who watches is told so at the start.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied || vanished(&error) => continue,
            Err(error) => return Err(error).with_context(|| format!("read {path}")),
        };
        let Some(inode) = inode else { continue };
        if let Some(known) = found.get_mut(&inode) {
            known.pids.push(pid);
        } else if let Ok(handle) = Handle::open(Path::new(&path)) {
            // Opened after the link was read: the process may have moved on meanwhile.
            let inode = handle.inode();
            let new = || Found {
                handle,
                names: Vec::new(),
                pids: Vec::new(),
            };
            found.entry(inode).or_insert_with(new).pids.push(pid);
        }
    }
    for directory in NAMED {
        for name in names(Path::new(directory))? {
            let Some(handle) = open_named(&Path::new(directory).join(&name)) else {
                continue;
            };
            let new = || Found {
                handle: handle.clone(),
                names: Vec::new(),
                pids: Vec::new(),
            };
            let known = found.entry(handle.inode()).or_insert_with(new);
            if !known.names.contains(&name) {
                known.names.push(name);
            }
        }
    }
    let mut found: Vec<_> = found.into_values().collect();
    for namespace in &mut found {
        namespace.names.sort_unstable();
    }
    Ok(found)
}

/// The namespace that `wanted` names: a name under `/run/netns`, an inode number, or a path.
pub fn resolve(wanted: &str, found: &[Found]) -> Result<Found> {
    if wanted.contains('/') {
        let handle = Handle::open(Path::new(wanted))?;
        let known = found.iter().find(|namespace| namespace.inode() == handle.inode());
        return Ok(known.cloned().unwrap_or(Found {
            handle,
            names: Vec::new(),
            pids: Vec::new(),
        }));
    }
    let by_name = found
        .iter()
        .find(|namespace| namespace.names.iter().any(|name| name == wanted));
    let inode = wanted.parse::<Netns>().ok();
    let by_inode = || found.iter().find(|namespace| Some(namespace.inode()) == inode);
    match by_name.or_else(by_inode) {
        Some(namespace) => Ok(namespace.clone()),
        None => bail!(
            "there is no network namespace {wanted:?}: give a name under /run/netns, an inode number or a path"
        ),
    }
}

fn processes() -> Result<Vec<i32>> {
    let entries = fs::read_dir("/proc").context("list the processes in /proc")?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

/// `net:[4026531840]` → 4026531840.
fn namespace_inode(link: &str) -> Option<Netns> {
    link.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

fn names(directory: &Path) -> Result<Vec<String>> {
    match fs::read_dir(directory) {
        Ok(entries) => Ok(entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error).with_context(|| format!("list {}", directory.display())),
    }
}

/// Opens a named namespace; `None` for what is none: a name whose mount is gone, or a file somebody left there.
fn open_named(path: &Path) -> Option<Handle> {
    let file = File::open(path).ok()?;
    let kind = statfs::fstatfs(&file).ok()?.filesystem_type();
    if kind != statfs::NSFS_MAGIC {
        return None;
    }
    Handle::open(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_of_a_link() {
        assert_eq!(namespace_inode("net:[4026531840]"), Some(4_026_531_840));
        for other in [
            "mnt:[4026531840]",
            "net:[]",
            "net:[12",
            "",
            "net:[99999999999999999999999]",
        ] {
            assert_eq!(namespace_inode(other), None, "{other}");
        }
    }

    #[test]
    fn our_own_namespace_is_found_by_inode_and_path() {
        let own = Handle::open(Path::new("/proc/self/ns/net")).unwrap();
        let found = vec![Found {
            handle: own.clone(),
            names: vec!["one".to_owned()],
            pids: vec![1],
        }];
        for wanted in [
            own.inode().to_string(),
            "/proc/self/ns/net".to_owned(),
            "one".to_owned(),
        ] {
            assert_eq!(resolve(&wanted, &found).unwrap().pids, [1], "{wanted}");
        }
        let error = resolve("nowhere", &found).unwrap_err().to_string();
        assert!(error.contains("\"nowhere\""), "{error}");
    }
}
