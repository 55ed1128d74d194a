//! Where things lie, and which programs are on the path. Reads the machine; changes nothing.

use std::env;
use std::path::{Path, PathBuf};

/// The folders with the system's programs, which Debian leaves out of an ordinary user's path.
const SYSTEM_FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// The workspace's top folder.
pub(crate) fn root() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Tools of this workspace's own. `calitrace/build.rs` looks here for bpf-linker, so it does not follow
/// `CARGO_TARGET_DIR`.
pub(crate) fn tools() -> PathBuf {
    root().join("target/tools")
}

/// The search path, with the system's folders at its end.
pub(crate) fn search_path() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    for folder in SYSTEM_FOLDERS.map(PathBuf::from) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// The first file of that name on the search path.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    search_path()
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}
