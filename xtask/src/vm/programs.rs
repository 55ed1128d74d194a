//! The test programs of this machine as guests run them: the same files at the same paths, without debugging symbols, and
//! the script that runs them.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::tools;
use super::tree::Tree;
use crate::cargo::Executable;
use crate::step::output_of;
use crate::workspace;

/// Files that tests read below the workspace's top folder.
const DATA: [&str; 1] = ["calitrace/schema"];

/// A test program and the beginnings of names to run; all of them if there are none.
pub(super) struct Run<'a> {
    pub(super) program: &'a Executable,
    pub(super) filters: Vec<String>,
}

/// Puts the programs, `product` (the calitrace binary) and the data files into the tree.
pub(super) fn add(tree: &mut Tree, runs: &[Run<'_>], product: &Path, scratch: &Path) -> Result<()> {
    let mut files: Vec<&Path> = runs.iter().map(|run| run.program.file.as_path()).collect();
    files.push(product);
    files.sort_unstable();
    files.dedup();
    for file in &files {
        tree.copied(file, &stripped(file, scratch)?);
    }
    for run in runs {
        tree.folder(&run.program.package_folder);
    }
    for folder in DATA.map(|folder| workspace::root().join(folder)) {
        tree.own_folder(&folder)?;
    }
    let files: Vec<PathBuf> = files.into_iter().map(Path::to_owned).collect();
    tools::add_libraries(tree, &files)
}

/// A copy without symbols: a tenth of the size, which the guest has in memory.
fn stripped(file: &Path, scratch: &Path) -> Result<PathBuf> {
    let name = file.file_name().context("a program has a name")?;
    let copy = scratch.join(name);
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    if modified(&copy).is_none() || modified(&copy) < modified(file) {
        output_of(Command::new("strip").arg("-o").arg(&copy).arg(file))?;
    }
    Ok(copy)
}

/// Lines of shell: the environment of the tests.
pub(super) fn environment(variables: &[(&str, &OsStr)]) -> String {
    let mut text = String::new();
    for (name, value) in variables {
        // Writing to a string does not fail.
        let _ = writeln!(text, "export {name}={}", quoted(&value.to_string_lossy()));
    }
    text
}

/// Lines of shell that call `run` of `init.sh`: once for each filter, since a test program takes one.
pub(super) fn script(runs: &[Run<'_>]) -> String {
    let mut text = String::new();
    for Run { program, filters } in runs {
        let words = [&program.package_folder, &program.file].map(|path| quoted(&path.to_string_lossy()));
        let call = format!("run {} --color never", words.join(" "));
        if filters.is_empty() {
            text.extend([call.as_str(), "\n"]);
        }
        for filter in filters {
            text.extend([call.as_str(), " ", quoted(filter).as_str(), "\n"]);
        }
    }
    text
}

/// A word that the shell takes as it is.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_run_once_for_each_filter() {
        let program = Executable {
            target: "lab".to_owned(),
            kind: "test".to_owned(),
            package_folder: "/x/it's".into(),
            is_test: true,
            file: "/x/lab".into(),
        };
        let run = |filters: &[&str]| Run {
            program: &program,
            filters: filters.iter().map(|&filter| filter.to_owned()).collect(),
        };
        let text = script(&[run(&[]), run(&["paths::", "$x"])]);
        let expected = r"run '/x/it'\''s' '/x/lab' --color never
run '/x/it'\''s' '/x/lab' --color never 'paths::'
run '/x/it'\''s' '/x/lab' --color never '$x'
";
        assert_eq!(text, expected);
    }
}
