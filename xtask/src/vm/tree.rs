//! What a guest finds in its root: a tree of files, links and folders, taken from this machine or made here, and written
//! as one archive. Files of one tree can be put into another, so that what all guests share is gathered once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::cpio::Writer;

/// Folders that are links into `/usr` on every Debian since 12; their files are put where the links lead.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Paths are kept without their leading slash; order is that of the paths, so a folder comes before its files.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Clone, Debug)]
enum Entry {
    Folder,
    Link(PathBuf),
    Device(u32, u32),
    Made { mode: u32, content: Vec<u8> },
    Copied(PathBuf),
}

impl Tree {
    /// An empty root with Debian's merged folders and a console.
    pub(super) fn new() -> Self {
        let mut tree = Self::default();
        for name in MERGED {
            tree.folder(&Path::new("/usr").join(name));
            tree.entries
                .insert(name.into(), Entry::Link(Path::new("usr").join(name)));
        }
        tree.put(Path::new("/dev/console"), Entry::Device(5, 1));
        tree
    }

    pub(super) fn folder(&mut self, path: &Path) {
        self.put(path, Entry::Folder);
    }

    pub(super) fn made(&mut self, path: &Path, mode: u32, content: impl Into<Vec<u8>>) {
        let content = content.into();
        self.put(path, Entry::Made { mode, content });
    }

    pub(super) fn link(&mut self, path: &Path, target: &Path) {
        self.put(path, Entry::Link(target.to_owned()));
    }

    /// The content and mode of `source` under the name `path`.
    pub(super) fn copied(&mut self, path: &Path, source: &Path) {
        self.put(path, Entry::Copied(source.to_owned()));
    }

    /// A file of this machine under its own name, with the links that lead to it.
    pub(super) fn own(&mut self, path: &Path) -> Result<()> {
        let mut path = path.to_owned();
        // As many links in a row as the kernel follows (`MAXSYMLINKS`).
        for _ in 0..40 {
            let kind = fs::symlink_metadata(&path)
                .with_context(|| format!("look at {}", path.display()))?
                .file_type();
            if !kind.is_symlink() {
                self.copied(&path, &path);
                return Ok(());
            }
            let target =
                fs::read_link(&path).with_context(|| format!("follow the link {}", path.display()))?;
            self.link(&path, &target);
            path = path.parent().unwrap_or(Path::new("/")).join(target);
        }
        bail!("{} is a link that leads nowhere", path.display())
    }

    /// A folder of this machine with all that lies below it.
    pub(super) fn own_folder(&mut self, folder: &Path) -> Result<()> {
        self.copied_folder(folder, folder)
    }

    /// All that lies below `source`, under the name `path`.
    pub(super) fn copied_folder(&mut self, path: &Path, source: &Path) -> Result<()> {
        let entries =
            fs::read_dir(source).with_context(|| format!("list the folder {}", source.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("list the folder {}", source.display()))?;
            let (name, from) = (path.join(entry.file_name()), entry.path());
            let kind = entry
                .file_type()
                .with_context(|| format!("look at {}", from.display()))?;
            if kind.is_dir() {
                self.copied_folder(&name, &from)?;
            } else if kind.is_symlink() {
                let target =
                    fs::read_link(&from).with_context(|| format!("follow the link {}", from.display()))?;
                self.link(&name, &target);
            } else if kind.is_file() {
                self.copied(&name, &from);
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &Path, entry: Entry) {
        let path = plain(path);
        let folders = path
            .ancestors()
            .skip(1)
            .filter(|folder| !folder.as_os_str().is_empty());
        for folder in folders {
            self.entries.entry(folder.to_owned()).or_insert(Entry::Folder);
        }
        // What is there and holds other things stays a folder.
        if matches!(entry, Entry::Folder) && self.entries.contains_key(&path) {
            return;
        }
        self.entries.insert(path, entry);
    }

    /// Writes the archive.
    pub(super) fn write(&self, file: &Path) -> Result<()> {
        let output = File::create(file).with_context(|| format!("make {}", file.display()))?;
        let mut writer = Writer::new(BufWriter::new(output));
        for (path, entry) in &self.entries {
            let name = text(path)?;
            let written = match entry {
                Entry::Folder => writer.folder(name),
                Entry::Link(target) => writer.link(name, text(target)?),
                Entry::Device(major, minor) => writer.device(name, *major, *minor),
                Entry::Made { mode, content } => writer.file(name, *mode, content),
                Entry::Copied(source) => {
                    let content = fs::read(source).with_context(|| format!("read {}", source.display()))?;
                    let metadata =
                        fs::metadata(source).with_context(|| format!("look at {}", source.display()))?;
                    writer.file(name, metadata.permissions().mode() & 0o7777, &content)
                }
            };
            written.with_context(|| format!("write {name} into {}", file.display()))?;
        }
        writer
            .finish()
            .with_context(|| format!("write {}", file.display()))?;
        Ok(())
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is no UTF-8, which names in the guest must be", path.display()))
}

/// The path without `.`, `..`, its leading slash, and the links of merged folders.
fn plain(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if MERGED.iter().any(|folder| plain.starts_with(folder)) {
        return Path::new("usr").join(plain);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tree: &Tree) -> Vec<&str> {
        tree.entries.keys().filter_map(|path| path.to_str()).collect()
    }

    #[test]
    fn folders_come_before_what_lies_in_them_and_merged_ones_are_followed() {
        let mut tree = Tree::new();
        tree.made(Path::new("/lib/x/../y/module"), 0o644, "");
        let names = names(&tree);
        let place = |name| names.iter().position(|other| *other == name);
        assert!(
            place("usr/lib/y").is_some() && place("usr/lib/y") < place("usr/lib/y/module"),
            "{names:?}"
        );
        assert!(place("lib/y").is_none() && place("lib").is_some(), "{names:?}");
    }

    #[test]
    fn a_program_comes_with_the_links_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let (program, link) = (folder.path().join("program"), folder.path().join("link"));
        fs::write(&program, "x").unwrap();
        std::os::unix::fs::symlink("program", &link).unwrap();
        let mut tree = Tree::default();
        tree.own(&link).unwrap();
        let kinds: Vec<bool> = [&link, &program]
            .map(|path| matches!(tree.entries.get(&plain(path)), Some(Entry::Link(_))))
            .into();
        assert_eq!(kinds, [true, false]);
    }

    #[test]
    fn a_link_that_leads_to_itself_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("link", &link).unwrap();
        assert!(Tree::default().own(&link).is_err());
    }
}
