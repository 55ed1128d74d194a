//! Network namespaces: finding them, and running code inside one. The only place that enters a namespace.
//!
//! A namespace is entered by a thread made for it, which ends afterwards: a worker thread of an async runtime would
//! carry the namespace on to whatever it runs next. Sockets opened inside keep the namespace for their whole life.

mod list;

use std::{fs::File, io, os::unix::fs::MetadataExt as _, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};

pub use list::{Found, list, resolve};

use crate::{error::NoPermission, event::Netns};

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

    /// Runs `work` inside the namespace, on a thread of its own. Without the privilege to enter it, the error is
    /// [`NoPermission`].
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    match setns(&self.file, CloneFlags::CLONE_NEWNET) {
                        Err(Errno::EPERM) => Err(anyhow::Error::new(NoPermission {
 what: format!("entering the network namespace {} needs CAP_SYS_ADMIN; run calitrace as root", self.inode),
})),
                        entered => {
                            entered.with_context(|| format!("enter the network namespace {}", self.inode))
                        }
                    }?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// The host name of a process's UTS namespace; `None` if that is ours, or the process is gone.
pub fn host_name(pid: i32) -> Result<Option<String>> {
    let path = format!("/proc/{pid}/ns/uts");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if vanished(&error) || error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("open {path}")),
    };
    let inode = |file: io::Result<std::fs::Metadata>| file.map(|metadata| metadata.ino());
    let ours = inode(std::fs::metadata("/proc/self/ns/uts")).context("read our own UTS namespace")?;
    if inode(file.metadata()).with_context(|| format!("read {path}"))? == ours {
        return Ok(None);
    }
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWUTS).with_context(|| format!("enter {path}"))?;
                let name =
                    nix::unistd::gethostname().with_context(|| format!("read the host name of {path}"))?;
                Ok(name.into_string().ok())
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What the kernel answers about a process that ended while it was looked at.
fn vanished(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
