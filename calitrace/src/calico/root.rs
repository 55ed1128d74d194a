//! A node's own file system, read as untrusted input: paths cannot leave it, only regular files are read, and no more of
//! them than a limit. Knows nothing of what the files mean.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};

/// The longest file that is read. The longest of those wanted is a kube-apiserver manifest of some 5 KiB.
const FILE_BYTES: u64 = 256 * 1024;
/// The most entries of a directory that are looked at: forty times the kubelet's limit of 110 pods.
const DIRECTORY_ENTRIES: usize = 4096;

/// The root directory of a node.
#[derive(Debug)]
pub(super) struct Root {
    directory: File,
}

impl Root {
    /// The root directory at `path` (`/`, `/proc/PID/root`); `None` if the process is gone or hidden from us.
    pub(super) fn open(path: &Path) -> Result<Option<Self>> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        match fs::OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(directory) => Ok(Some(Self { directory })),
            Err(error) if absent(&error) || error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
            Err(error) => Err(error).with_context(|| format!("open the root directory {}", path.display())),
        }
    }

    /// Device and inode: the same for the same directory.
    pub(super) fn identity(&self) -> Result<(u64, u64)> {
        let metadata = self.directory.metadata().context("read a root directory")?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// The text of a regular file; `None` if there is none, or it is longer than any that is wanted.
    pub(super) fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        // Non-blocking, because a FIFO may have been put in the place of the file.
        let Some(file) = self.enter(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)? else {
            return Ok(None);
        };
        let metadata = file
            .metadata()
            .with_context(|| format!("read {}", path.display()))?;
        if !metadata.is_file() || metadata.len() > FILE_BYTES {
            return Ok(None);
        }
        let mut text = Vec::new();
        file.take(FILE_BYTES)
            .read_to_end(&mut text)
            .with_context(|| format!("read {}", path.display()))?;
        Ok(Some(text))
    }

    /// The names in a directory, sorted; none if it is not there.
    pub(super) fn list(&self, path: &Path) -> Result<Vec<OsString>> {
        let Some(directory) = self.enter(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)? else {
            return Ok(Vec::new());
        };
        // Through the open descriptor, so that nothing can be exchanged in between.
        let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))
            .with_context(|| format!("list {}", path.display()))?;
        let mut names: Vec<_> = entries
            .flatten()
            .take(DIRECTORY_ENTRIES)
            .map(|entry| entry.file_name())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    fn enter(&self, path: &Path, flags: OFlag) -> Result<Option<File>> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(&self.directory, path, how) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENXIO | Errno::EACCES) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("open {} in a node's root", path.display())),
        }
    }
}

fn absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn paths_cannot_leave_the_root() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let inside = outside.path().join("root");
        fs::create_dir_all(inside.join("var/run")).unwrap();
        fs::create_dir(inside.join("run")).unwrap();
        fs::write(inside.join("run/inside"), "inside").unwrap();
        symlink(outside.path().join("secret"), inside.join("absolute")).unwrap();
        symlink("../secret", inside.join("relative")).unwrap();
        symlink("/proc/self/root/etc/passwd", inside.join("magic")).unwrap();
        symlink("/run", inside.join("link")).unwrap();
        symlink("loop", inside.join("loop")).unwrap();
        let root = Root::open(&inside).unwrap().unwrap();
        for path in [
            "absolute",
            "relative",
            "magic",
            "loop",
            "../secret",
            "missing",
            "run/inside/deeper",
        ] {
            assert_eq!(root.read(Path::new(path)).unwrap(), None, "{path}");
        }
        // An absolute link is taken inside the root, as a process there would see it.
        assert_eq!(
            root.read(Path::new("link/inside")).unwrap().as_deref(),
            Some(&b"inside"[..])
        );
        assert_eq!(root.list(Path::new("link")).unwrap(), ["inside"]);
        assert!(root.list(Path::new("missing")).unwrap().is_empty());
    }

    #[test]
    fn only_regular_files_of_a_sane_length() {
        let directory = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&directory.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let long = usize::try_from(FILE_BYTES).unwrap() + 1;
        fs::write(directory.path().join("long"), vec![b'x'; long]).unwrap();
        let root = Root::open(directory.path()).unwrap().unwrap();
        for path in ["fifo", "long", "."] {
            assert_eq!(root.read(Path::new(path)).unwrap(), None, "{path}");
        }
    }
}
