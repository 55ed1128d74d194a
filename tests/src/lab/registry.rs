//! What a lab leaves on the machine and how it goes away again: its record under `/run`, its namespaces,
//! its folder, the processes in its namespaces.
//!
//! A lab's record is locked as long as its process lives (`flock(2)`, which the kernel undoes at any kind
//! of death), so that what an ended process left behind can be told from a lab that is in use.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::plan::{Node, Options, Pod, namespace_prefix};
use crate::namespace::Namespace;
use crate::wait::wait_until;

const FOLDER: &str = "/run/calitrace-lab";

/// What is known of a lab outside of the process that made it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The lab's id.
    pub id: String,
    /// The folder that holds its nodes' roots.
    pub folder: PathBuf,
    /// It stays when the process that made it ends.
    pub kept: bool,
    /// How it was built.
    pub options: Options,
    /// The namespace that connects its nodes.
    pub underlay: String,
    /// Its nodes.
    pub nodes: Vec<Node>,
    /// The pods it was built with.
    pub pods: Vec<Pod>,
}

impl Record {
    /// The record of the lab with this id, if there is one.
    pub fn read(id: &str) -> Result<Option<Self>> {
        let path = record_path(id);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let record =
            serde_json::from_slice(&text).with_context(|| format!("{} is no record", path.display()))?;
        Ok(Some(record))
    }

    /// Writes the record in one step: a reader sees the old one or the new one.
    pub(super) fn write(&self) -> Result<()> {
        let path = record_path(&self.id);
        let draft = path.with_extension("draft");
        let text = serde_json::to_vec_pretty(self).context("cannot write a lab's record")?;
        fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
        fs::rename(&draft, &path).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Takes the id of a lab for this process. `None` if another process has it.
pub(super) fn lock(id: &str) -> Result<Option<Flock<File>>> {
    fs::create_dir_all(FOLDER).with_context(|| format!("cannot make folder {FOLDER}"))?;
    let path = lock_path(id);
    loop {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::Error::EWOULDBLOCK)) => return Ok(None),
            Err((_, error)) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
        };
        // A sweep may have removed the file between the two calls: then the lock is on no name.
        let linked = lock
            .metadata()
            .with_context(|| format!("cannot stat {}", path.display()))?
            .nlink()
            > 0;
        if linked {
            return Ok(Some(lock));
        }
    }
}

/// Removes whatever is there of the lab with this id: processes in its namespaces, namespaces, folder and
/// record. The caller has its lock. Goes on after an error and returns the first.
pub(super) fn remove(id: &str) -> Result<()> {
    let record = Record::read(id);
    let folder = record
        .as_ref()
        .ok()
        .and_then(Option::as_ref)
        .map(|record| record.folder.clone());
    let mut first = record.map(|_| ());
    let mut step = |result: Result<()>| {
        if first.is_ok() {
            first = result;
        }
    };
    match Namespace::named(&namespace_prefix(id)) {
        Ok(names) => {
            for name in names {
                // A leftover of an interrupted `ip netns add` cannot be opened as a namespace.
                if let Ok(namespace) = Namespace::open(&name) {
                    step(end_processes(&namespace));
                }
                step(Namespace::remove(&name));
            }
        }
        Err(error) => step(Err(error)),
    }
    if let Some(folder) = folder {
        step(gone(fs::remove_dir_all(&folder), &folder));
    }
    for path in [record_path(id), lock_path(id)] {
        step(gone(fs::remove_file(&path), &path));
    }
    first
}

/// Removes the labs whose process has ended without doing so, and returns their ids. Labs that were to be
/// kept stay.
pub fn sweep() -> Result<Vec<String>> {
    let mut swept = Vec::new();
    for id in ids()? {
        if Record::read(&id).ok().flatten().is_some_and(|record| record.kept) {
            continue;
        }
        if let Some(lock) = lock(&id)? {
            remove(&id).with_context(|| format!("cannot remove what is left of lab {id}"))?;
            drop(lock);
            swept.push(id);
        }
    }
    Ok(swept)
}

/// The ids of all labs on this machine.
fn ids() -> Result<Vec<String>> {
    let entries = match fs::read_dir(FOLDER) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {FOLDER}")),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names
        .filter_map(|name| name.strip_suffix(".lock").map(str::to_owned))
        .collect())
}

/// Kills what runs in a namespace and waits until it is gone.
pub(super) fn end_processes(namespace: &Namespace) -> Result<()> {
    for pid in namespace.processes()? {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot end process {pid} in {}", namespace.name()));
            }
        }
    }
    wait_until(format!("the processes in {} to end", namespace.name()), || {
        Ok(namespace.processes()?.is_empty().then_some(()))
    })
}

fn gone(result: io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn record_path(id: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{id}.json"))
}

fn lock_path(id: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{id}.lock"))
}
