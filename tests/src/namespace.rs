//! Network namespaces by name: making, entering, leaving and removing them. Knows nothing of Calico.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

use crate::command;

/// Where iproute2 keeps its named network namespaces.
pub const FOLDER: &str = "/run/netns";

/// A named network namespace, held open: it exists as long as this value or its name does.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Makes namespaces of these names with `ip netns add`, which also prepares `/run/netns`.
    pub fn create(names: &[String]) -> Result<()> {
        let batch: String = names.iter().flat_map(|name| ["netns add ", name, "\n"]).collect();
        command::run_with_input(Command::new("ip").args(["-batch", "-"]), &batch)
            .context("cannot make network namespaces")?;
        Ok(())
    }

    /// Opens an existing namespace.
    pub fn open(name: &str) -> Result<Self> {
        let path = path_of(name);
        let file = File::open(&path).with_context(|| format!("cannot open namespace {}", path.display()))?;
        Ok(Self {
            name: name.to_owned(),
            file: Arc::new(file),
        })
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its inode number, by which the kernel and tracing tools call it.
    pub fn inode(&self) -> Result<u64> {
        let metadata = self
            .file
            .metadata()
            .with_context(|| format!("cannot stat namespace {}", self.name))?;
        Ok(metadata.ino())
    }

    /// A command that will run in this namespace. Names are not looked up there (`/etc/resolv.conf` is
    /// empty for it, as an `/etc/netns` file would make it): the packets of a look-up are not the ones a
    /// test asked for.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let file = Arc::clone(&self.file);
        let mut command = Command::new(program);
        // SAFETY: only system calls between fork and exec; no allocation, no lock. The descriptor lives
        // in the closure.
        unsafe {
            command.pre_exec(move || {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
                hide_name_servers()
            });
        }
        command
    }

    /// Runs `work` on a thread of its own inside this namespace and returns its result. What it opens
    /// there (sockets, `/proc/sys/net`) belongs to the namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let entered = scope.spawn(|| {
                self.enter()?;
                work()
            });
            entered
                .join()
                .unwrap_or_else(|_| Err(anyhow!("a thread in namespace {} panicked", self.name)))
        })
    }

    /// Moves the calling thread into this namespace for the rest of its life.
    pub fn enter(&self) -> Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter namespace {}", self.name))
    }

    /// Runs a batch of `ip` commands, one a line, in this namespace.
    pub fn ip(&self, batch: &str) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        command::run_with_input(self.command("ip").args(["-batch", "-"]), batch)
            .with_context(|| format!("in namespace {}", self.name))?;
        Ok(())
    }

    /// Writes settings below `/proc/sys`, given as (`net/ipv4/ip_forward`, `1`). A setting this kernel does
    /// not have in a namespace is left out if its name ends with `?`.
    pub fn sysctls<'a>(&self, settings: impl IntoIterator<Item = (String, &'a str)> + Send) -> Result<()> {
        self.within(|| {
            for (name, value) in settings {
                let optional = name.ends_with('?');
                let path = Path::new("/proc/sys").join(name.trim_end_matches('?'));
                if optional && !path.exists() {
                    continue;
                }
                fs::write(&path, value).with_context(|| {
                    format!("cannot write {value} to {} in {}", path.display(), self.name)
                })?;
            }
            Ok(())
        })
    }

    /// The processes whose namespace this is, this one left out.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let inode = self.inode()?;
        let own = std::process::id().cast_signed();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("cannot list /proc")? {
            let Ok(entry) = entry else { continue };
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            // A process may end while it is looked at, and a zombie has no namespace.
            let Ok(metadata) = fs::metadata(entry.path().join("ns/net")) else {
                continue;
            };
            if metadata.ino() == inode && pid != own {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Removes the name of a namespace. The kernel frees the namespace and its devices once nothing else
    /// holds it. No such name is not an error.
    pub fn remove(name: &str) -> Result<()> {
        let path = path_of(name);
        if !path.exists() {
            return Ok(());
        }
        // Not mounted: a leftover of an interrupted `ip netns add`; its file goes all the same.
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot unmount {}", path.display())),
        }
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// The names under `/run/netns` that begin with `prefix`, in order.
    pub fn named(prefix: &str) -> Result<Vec<String>> {
        let entries = match fs::read_dir(FOLDER) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("cannot list {FOLDER}")),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        Ok(names)
    }
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

fn path_of(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

fn hide_name_servers() -> io::Result<()> {
    const NONE: Option<&str> = None;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    match mount(
        Some("/dev/null"),
        "/etc/resolv.conf",
        NONE,
        MsFlags::MS_BIND,
        NONE,
    ) {
        // Without the file the resolver asks 127.0.0.1, where nobody listens: as good as none.
        Ok(()) | Err(nix::Error::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
