//! The machine's apt sources, read for the archives they name, and the suites with kernels in the same archives.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

/// The suites that have kernels for guests, and whether each lies in the security archive: 5.10 comes from bullseye, 6.1
/// from bookworm, 6.12 from trixie, later ones from trixie's backports.
const SUITES: [(&str, bool); 6] = [
    ("bullseye-security", true),
    ("bookworm-security", true),
    ("bookworm", false),
    ("trixie-security", true),
    ("trixie", false),
    ("trixie-backports", false),
];

/// Where a suite is, and the keys it is signed with if the source names them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
    signed_by: Option<String>,
}

/// The text of a `sources.list` with the suites of kernels, in the archives this machine uses.
pub(super) fn list() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no VERSION_CODENAME")?;
    kernels(&machine()?, codename.trim_matches('"'))
}

/// All sources of packages in `/etc/apt`, in both forms (sources.list(5)).
fn machine() -> Result<Vec<Source>> {
    let mut files = vec![Path::new("/etc/apt/sources.list").to_owned()];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    let mut sources = Vec::new();
    for file in files.iter().filter(|file| file.exists()) {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => sources.extend(text.split("\n\n").flat_map(stanza)),
            Some("list") => sources.extend(text.lines().filter_map(line)),
            _ => {}
        }
    }
    Ok(sources)
}

/// `deb [signed-by=KEYS] URI SUITE COMPONENT…`
fn line(text: &str) -> Option<Source> {
    let rest = text.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    Some(Source {
        uri: words.next()?.to_owned(),
        suite: words.next()?.to_owned(),
        signed_by: options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(str::to_owned),
    })
}

/// A stanza of a `.sources` file: one source for each of its suites and URIs.
fn stanza(text: &str) -> Vec<Source> {
    let field = |name: &str| {
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        lines
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    let is_no = |value: &str| value.eq_ignore_ascii_case("no");
    if !field("Types").is_some_and(|types| types.split_whitespace().any(|kind| kind == "deb"))
        || field("Enabled").is_some_and(is_no)
    {
        return Vec::new();
    }
    let (uris, suites) = (
        field("URIs").unwrap_or_default(),
        field("Suites").unwrap_or_default(),
    );
    let mut sources = Vec::new();
    for uri in uris.split_whitespace() {
        sources.extend(suites.split_whitespace().map(|suite| {
            Source {
                uri: uri.to_owned(),
                suite: suite.to_owned(),
                // A key may be written out over several lines; only files are named here.
                signed_by: field("Signed-By")
                    .filter(|keys| keys.starts_with('/'))
                    .map(str::to_owned),
            }
        }));
    }
    sources
}

fn kernels(machine: &[Source], codename: &str) -> Result<String> {
    let of = |suite: &str| machine.iter().find(|source| source.suite == suite);
    let Some(archive) = of(codename) else {
        bail!(
            "the apt sources of this machine have no suite {codename}, so no Debian archive with kernels is known"
        );
    };
    // Debian keeps security updates in an archive beside the main one.
    let security = of(&format!("{codename}-security"))
        .cloned()
        .unwrap_or_else(|| Source {
            uri: archive.uri.trim_end_matches('/').to_owned() + "-security",
            ..archive.clone()
        });
    let mut text = String::new();
    for (suite, is_security) in SUITES {
        let source = if is_security { &security } else { archive };
        let options = match &source.signed_by {
            Some(keys) => format!("[arch=amd64 signed-by={keys}]"),
            None => "[arch=amd64]".to_owned(),
        };
        text.extend(["deb ", &options, " ", &source.uri, " ", suite, " main\n"]);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        let text = "Types: deb\n# URIs: http://other/\nURIs: http://mirror.example/debian\n\
            Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /usr/share/keyrings/k.gpg\n";
        let source = |suite: &str| Source {
            uri: "http://mirror.example/debian".to_owned(),
            suite: suite.to_owned(),
            signed_by: Some("/usr/share/keyrings/k.gpg".to_owned()),
        };
        assert_eq!(stanza(text), [source("bookworm"), source("bookworm-updates")]);
        assert!(stanza(&text.replace("deb\n", "deb-src\n")).is_empty());
        assert!(stanza(&format!("{text}Enabled: no\n")).is_empty());
        let text =
            "deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/debian bookworm main";
        assert_eq!(line(text), Some(source("bookworm")));
        assert_eq!(line("# deb http://mirror.example/debian bookworm main"), None);
        assert_eq!(line("deb-src http://mirror.example/debian bookworm main"), None);
    }

    #[test]
    fn kernels_come_from_the_machines_own_archives() {
        let source = |uri: &str, suite: &str| Source {
            uri: uri.to_owned(),
            suite: suite.to_owned(),
            signed_by: None,
        };
        let machine = [
            source("http://other.example", "nodistro"),
            source("http://a.example/debian", "bookworm"),
            source("http://b.example/sec", "bookworm-security"),
        ];
        let text = kernels(&machine, "bookworm").unwrap();
        assert!(
            text.contains("http://b.example/sec bullseye-security main\n"),
            "{text}"
        );
        assert!(
            text.contains("http://a.example/debian trixie-backports main\n"),
            "{text}"
        );
        let text = kernels(&machine[..2], "bookworm").unwrap();
        assert!(
            text.contains("http://a.example/debian-security bullseye-security main\n"),
            "{text}"
        );
        assert!(kernels(&machine, "trixie").is_err());
    }
}
