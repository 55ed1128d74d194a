//! The kernels of guests: Debian's packages of the "cloud" flavour, the newest of each series, kept by package and version;
//! or files given by path. What was found is written down with its SHA-256, and serves while the archive is out of reach.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use super::apt::{self, Apt, Package};
use crate::step::{run_quietly, say};
use crate::workspace;

/// The series of the whole matrix: each of Debian's kernels since the oldest that calitrace runs on, and whatever is newest.
pub(super) const MATRIX: [&str; 5] = ["5.10", "6.1", "6.12", "6.18", "7"];
/// Small, with all that containers and their networks take.
const FLAVOUR: &str = "cloud-amd64";
/// Packages that a kernel's package may only point to: since 6.19 its image, since 7.2 its modules, too.
const PARTS: [&str; 2] = ["linux-binary-", "linux-modules-"];
/// How long the archive is not asked again what is newest.
const FRESH: Duration = Duration::from_hours(12);
/// Names the folder with kernels, for several checkouts to share one.
const FOLDER: &str = "CALITRACE_VM_CACHE";

/// A kernel that a guest can boot.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// What it was asked for by: the series, or the release.
    pub(super) series: String,
    /// As `uname -r` in the guest will say.
    pub(super) release: String,
    /// The package's version, or that it came from a file.
    pub(super) version: String,
    pub(super) image: PathBuf,
    /// The folder that `/lib/modules/RELEASE` is to be made of.
    pub(super) modules: PathBuf,
}

/// A kernel of files. The folder's name is the release.
pub(super) fn given(image: &Path, modules: &Path) -> Result<Kernel> {
    ensure!(image.is_file(), "{} is no file", image.display());
    let list = modules.join("modules.dep");
    ensure!(
        list.is_file(),
        "{} is not there: name a folder lib/modules/RELEASE after `depmod` was run on it",
        list.display()
    );
    let modules = modules
        .canonicalize()
        .with_context(|| format!("find {}", modules.display()))?;
    let release = modules
        .file_name()
        .context("the folder of modules has no name")?
        .to_string_lossy()
        .into_owned();
    Ok(Kernel {
        series: release.clone(),
        release,
        version: "from a file".to_owned(),
        image: image
            .canonicalize()
            .with_context(|| format!("find {}", image.display()))?,
        modules,
    })
}

/// Kernels on this disk and what is known of them.
pub(super) struct Store {
    folder: PathBuf,
    apt: Option<Apt>,
    /// Several checkouts may share the folder.
    _lock: Flock<File>,
}

impl Store {
    pub(super) fn open() -> Result<Self> {
        let folder =
            env::var_os(FOLDER).map_or_else(|| workspace::root().join("target/vm/kernels"), PathBuf::from);
        fs::create_dir_all(&folder).with_context(|| format!("make the folder {}", folder.display()))?;
        let file = folder.join("lock");
        let lock = File::create(&file).with_context(|| format!("make {}", file.display()))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("lock {}", file.display()))?;
        Ok(Self {
            folder,
            apt: None,
            _lock: lock,
        })
    }

    /// The newest kernel of a series (`6.1`, or `7` for all of 7.x), downloaded if it is not here. None if there is none.
    pub(super) fn newest(&mut self, series: &str) -> Result<Option<Kernel>> {
        let known = self.known(series);
        if let Some((kernel, true)) = &known {
            return Ok(Some(kernel.clone()));
        }
        match self.resolve(series) {
            Ok(Some(kernel)) => Ok(Some(kernel)),
            Ok(None) => {
                say(&format!("kernel {series}: the archive has none any more"));
                Ok(known.map(|(kernel, _)| kernel))
            }
            Err(error) => match known {
                Some((kernel, _)) => {
                    say(&format!(
                        "kernel {series}: the archive cannot be asked what is newest, so the one here is used: {error:#}"
                    ));
                    Ok(Some(kernel))
                }
                None => Err(error.context(format!("kernel {series} is not here and cannot be had"))),
            },
        }
    }

    fn resolve(&mut self, series: &str) -> Result<Option<Kernel>> {
        let apt = match self.apt.take() {
            Some(apt) => apt,
            None => Apt::update(&self.folder.join("apt"))?,
        };
        let packages = candidates(&apt, series);
        let packages = packages.and_then(|packages| {
            let folder = packages.first().map(|image| self.fetched(&apt, image, &packages));
            Ok((folder.transpose()?, packages))
        });
        self.apt = Some(apt);
        let (Some(folder), packages) = packages? else {
            return Ok(None);
        };
        let kernel = unpacked(series, &packages[0].version, &folder)?;
        self.note(series, &kernel, &packages)?;
        Ok(Some(kernel))
    }

    /// The folder with the unpacked packages.
    fn fetched(&self, apt: &Apt, image: &Package, packages: &[Package]) -> Result<PathBuf> {
        let name = format!("{}_{}", image.name, image.version);
        let folder = self.folder.join(&name);
        if folder.exists() {
            return Ok(folder);
        }
        // Under its name only once it is whole.
        let draft = self.folder.join(format!("{name}.draft"));
        if draft.exists() {
            fs::remove_dir_all(&draft).with_context(|| format!("remove {}", draft.display()))?;
        }
        fs::create_dir_all(&draft).with_context(|| format!("make the folder {}", draft.display()))?;
        apt.download(packages, &draft)?;
        for entry in fs::read_dir(&draft).with_context(|| format!("list {}", draft.display()))? {
            let file = entry.with_context(|| format!("list {}", draft.display()))?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                run_quietly("unpack", Command::new("dpkg").arg("-x").arg(&file).arg(&draft))?;
                fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
            }
        }
        // No package brings the list of what depends on what; `depmod` looks below `lib`.
        let (lib, usr) = (draft.join("lib"), draft.join("usr/lib/modules"));
        if !lib.exists() && usr.exists() {
            std::os::unix::fs::symlink("usr/lib", &lib)
                .with_context(|| format!("make the link {}", lib.display()))?;
        }
        let release = release(&draft)?;
        run_quietly(
            "depmod",
            Command::new(workspace::find_program("depmod").context("no depmod on the path")?)
                .arg("-b")
                .arg(&draft)
                .arg(&release),
        )?;
        fs::rename(&draft, &folder).with_context(|| format!("rename {}", draft.display()))?;
        Ok(folder)
    }

    fn notes(&self) -> PathBuf {
        self.folder.join("kernels.json")
    }

    fn read_notes(&self) -> Value {
        fs::read(self.notes())
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_else(|| json!({}))
    }

    /// What was found for a series before, and whether that is recent.
    fn known(&self, series: &str) -> Option<(Kernel, bool)> {
        let notes = self.read_notes();
        let note = &notes[series];
        let version = note["version"].as_str()?;
        let folder = self.folder.join(note["folder"].as_str()?);
        let kernel = unpacked(series, version, &folder).ok()?;
        let age = now().saturating_sub(note["asked"].as_u64()?);
        Some((kernel, age < FRESH.as_secs()))
    }

    /// The packages a kernel came from, as they were noted.
    pub(super) fn packages(&self, series: &str) -> Vec<String> {
        let notes = self.read_notes();
        let packages = notes[series]["packages"].as_array().into_iter().flatten();
        let text = |package: &Value, field: &str| package[field].as_str().unwrap_or("?").to_owned();
        packages
            .map(|package| {
                let [name, version, sha256] = ["name", "version", "sha256"].map(|field| text(package, field));
                format!("{name} {version} SHA-256 {sha256}")
            })
            .collect()
    }

    fn note(&self, series: &str, kernel: &Kernel, packages: &[Package]) -> Result<()> {
        let image = packages.first().context("a kernel of no package")?;
        let listed: Vec<Value> = packages
            .iter()
            .map(
                |package| json!({"name": package.name, "version": package.version, "sha256": package.sha256}),
            )
            .collect();
        let mut notes = self.read_notes();
        notes[series] = json!({
            "release": kernel.release,
            "version": kernel.version,
            "folder": format!("{}_{}", image.name, image.version),
            "packages": listed,
            "asked": now(),
        });
        let text = serde_json::to_vec_pretty(&notes).context("write the list of kernels")?;
        fs::write(self.notes(), text).with_context(|| format!("write {}", self.notes().display()))
    }
}

/// The packages of the newest kernel of a series, that of the image first; empty if the archive has none.
fn candidates(apt: &Apt, series: &str) -> Result<Vec<Package>> {
    let names: Vec<String> = apt
        .names(&format!("linux-image-{series}."))?
        .into_iter()
        .filter(|name| name.ends_with(&format!("-{FLAVOUR}")))
        .collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut newest: Option<Package> = None;
    for package in apt.show(&names)? {
        let beaten = newest
            .as_ref()
            .map(|newest| apt::is_newer(&package.version, &newest.version));
        if beaten.transpose()?.unwrap_or(true) {
            newest = Some(package);
        }
    }
    let image = newest.context("apt knows names of kernels and no package of any")?;
    let parts: Vec<String> = image
        .depends
        .iter()
        .filter(|name| PARTS.iter().any(|part| name.starts_with(part)))
        .cloned()
        .collect();
    let mut packages = vec![image];
    if !parts.is_empty() {
        packages.extend(apt.show(&parts)?);
    }
    Ok(packages)
}

/// Finds image and modules among unpacked packages.
fn unpacked(series: &str, version: &str, folder: &Path) -> Result<Kernel> {
    let release = release(folder)?;
    let modules = folder.join("lib/modules").join(&release);
    let images = [
        folder.join("boot").join(format!("vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ];
    let image = images
        .into_iter()
        .find(|image| image.is_file())
        .with_context(|| format!("no kernel image in {}", folder.display()))?;
    Ok(Kernel {
        series: series.to_owned(),
        release,
        version: version.to_owned(),
        image,
        modules,
    })
}

/// The one name below `lib/modules`.
fn release(folder: &Path) -> Result<String> {
    let folder = folder.join("lib/modules");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .with_context(|| format!("list {}", folder.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    match (names.pop(), names.is_empty()) {
        (Some(name), true) => Ok(name),
        (_, _) => bail!("not one kernel in {}", folder.display()),
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_of_packages_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let modules = folder.path().join("lib/modules/6.1.0-56-cloud-amd64");
        fs::create_dir_all(&modules).unwrap();
        assert!(unpacked("6.1", "6.1.192-2", folder.path()).is_err());
        fs::write(modules.join("vmlinuz"), "").unwrap();
        let kernel = unpacked("6.1", "6.1.192-2", folder.path()).unwrap();
        assert_eq!(
            (kernel.release.as_str(), &kernel.image),
            ("6.1.0-56-cloud-amd64", &modules.join("vmlinuz"))
        );
        let boot = folder.path().join("boot");
        fs::create_dir_all(&boot).unwrap();
        fs::write(boot.join("vmlinuz-6.1.0-56-cloud-amd64"), "").unwrap();
        assert!(
            unpacked("6.1", "6.1.192-2", folder.path())
                .unwrap()
                .image
                .starts_with(&boot)
        );
        fs::create_dir_all(folder.path().join("lib/modules/other")).unwrap();
        assert!(
            unpacked("6.1", "6.1.192-2", folder.path()).is_err(),
            "two kernels"
        );
    }

    #[test]
    fn files_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("bzImage");
        fs::write(&image, "").unwrap();
        let error = given(&image, folder.path()).unwrap_err().to_string();
        assert!(error.contains("depmod"), "{error}");
        fs::write(folder.path().join("modules.dep"), "").unwrap();
        assert!(given(&image, folder.path()).is_ok());
        assert!(given(&folder.path().join("none"), folder.path()).is_err());
    }
}
