//! Network namespaces: finding them, and running code inside one. The only place that enters a namespace.
//!
//! A namespace is entered by a thread made for it, which ends afterwards: a worker thread of an async runtime would
//! carry the namespace on to whatever it runs next. Sockets opened inside keep the namespace for their whole life.

use std::{fs::File, os::unix::fs::MetadataExt as _, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

use crate::event::Netns;

/// An open network namespace. Cheap to clone; holds the namespace alive.
#[derive(Clone, Debug)]
pub struct Handle {
    file: Arc<File>,
    inode: Netns,
}

impl Handle {
    /// Opens the namespace at `path` (`/proc/PID/ns/net`, `/run/netns/NAME`).
    pub fn open(path: &Path) -> Result<Self> {
        let file =
            File::open(path).with_context(|| format!("open the network namespace {}", path.display()))?;
        let inode = file
            .metadata()
            .with_context(|| format!("read the inode of the network namespace {}", path.display()))?
            .ino();
        Ok(Self {
            file: Arc::new(file),
            inode,
        })
    }

    /// Its inode number, by which events name it.
    pub fn inode(&self) -> Netns {
        self.inode
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs `work` inside the namespace, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.file, CloneFlags::CLONE_NEWNET)
                        .with_context(|| format!("enter the network namespace {}", self.inode))?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
