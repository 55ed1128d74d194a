//! Debian's archive, asked through an apt configuration of its own: the machine's package lists, archives and sources
//! stay as they are. Where the archive is, and the keys it is signed with, the machine's own sources say.

mod sources;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::step::{output_of, run_quietly};

/// A package as the archive describes it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    /// Names of the packages it depends on, alternatives left out.
    pub(super) depends: Vec<String>,
    /// Of the `.deb` file, as apt verifies it.
    pub(super) sha256: String,
}

/// apt with state, cache and sources in a folder.
pub(super) struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Prepares the folder and fetches the package lists.
    pub(super) fn update(folder: &Path) -> Result<Self> {
        let list = sources::list()?;
        let apt = Self {
            folder: folder.to_owned(),
        };
        for part in ["state/lists/partial", "cache/archives/partial"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("make the folder {}", part.display()))?;
        }
        // Nothing is installed as far as this apt knows.
        for (name, text) in [("status", ""), ("sources.list", list.as_str())] {
            let file = folder.join(name);
            fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        }
        run_quietly("package lists", apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    /// The names of all packages that begin so.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = output_of(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The newest version of each of these packages.
    pub(super) fn show(&self, names: &[String]) -> Result<Vec<Package>> {
        let text = output_of(
            self.command("apt-cache")
                .args(["show", "--no-all-versions"])
                .args(names),
        )?;
        text.split("\n\n")
            .filter(|stanza| !stanza.trim().is_empty())
            .map(|stanza| package(stanza).with_context(|| format!("apt-cache said:\n{stanza}")))
            .collect()
    }

    /// Downloads packages into a folder. apt checks them against the signed lists.
    pub(super) fn download(&self, packages: &[Package], folder: &Path) -> Result<()> {
        let names = packages
            .iter()
            .map(|package| format!("{}={}", package.name, package.version));
        run_quietly(
            "download",
            self.command("apt-get")
                .arg("download")
                .args(names)
                .current_dir(folder),
        )
    }

    fn command(&self, program: &str) -> Command {
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        let mut command = Command::new(program);
        for option in [
            option("Dir::State", &self.folder.join("state")),
            option("Dir::State::status", &self.folder.join("status")),
            option("Dir::Cache", &self.folder.join("cache")),
            option("Dir::Etc::sourcelist", &self.folder.join("sources.list")),
            option("Dir::Etc::sourceparts", Path::new("/dev/null")),
            // Its user has no access to folders of ours.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // An archive out of reach is an error, not a reason to go on with old lists or none.
            "APT::Update::Error-Mode=any".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.args(["-q"]);
        command
    }
}

/// Whether `left` is a newer version than `right`, as dpkg orders them.
pub(super) fn is_newer(left: &str, right: &str) -> Result<bool> {
    let status = Command::new("dpkg")
        .args(["--compare-versions", left, "gt", right])
        .status()
        .context("cannot run dpkg to compare versions")?;
    Ok(status.success())
}

/// A stanza of `apt-cache show`.
fn package(stanza: &str) -> Option<Package> {
    let field = |name: &str| {
        stanza
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let depends = field("Depends").unwrap_or_default().split(", ");
    Some(Package {
        name: field("Package")?.to_owned(),
        version: field("Version")?.to_owned(),
        depends: depends
            .filter(|clause| !clause.contains('|'))
            .filter_map(|clause| clause.split_whitespace().next().map(str::to_owned))
            .collect(),
        sha256: field("SHA256")?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stanza_is_read() {
        let stanza = "Package: linux-image-7.3.4+deb13-cloud-amd64\nVersion: 7.3.4-1~bpo13+1\nInstalled-Size: 27\n\
            Depends: dracut | linux-initramfs-tool, linux-base-7.3.4 (= 7.3.4-1), linux-modules-7.3.4 (= 7.3.4-1)\n\
            SHA256: 4545cd\nDescription: Linux\n more\n";
        let expected = Package {
            name: "linux-image-7.3.4+deb13-cloud-amd64".to_owned(),
            version: "7.3.4-1~bpo13+1".to_owned(),
            depends: vec!["linux-base-7.3.4".to_owned(), "linux-modules-7.3.4".to_owned()],
            sha256: "4545cd".to_owned(),
        };
        assert_eq!(package(stanza), Some(expected));
        assert_eq!(package("Package: x\nVersion: 1\n"), None);
    }
}
