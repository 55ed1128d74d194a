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

/// A test program and the tests of it to run.
pub(super) struct Run<'a> {
    program: &'a Executable,
    tests: Tests,
}

enum Tests {
    All,
    /// These, by their whole names.
    Some(Vec<String>),
}

impl<'a> Run<'a> {
    /// All tests of a program.
    pub(super) fn all(program: &'a Executable) -> Self {
        let tests = Tests::All;
        Self { program, tests }
    }

    /// The tests whose names contain one of `filters`, each once and in the program's order, as its last one may leave the
    /// guest unfit for others. `None` if there are none.
    pub(super) fn some(program: &'a Executable, filters: &[impl AsRef<str>]) -> Result<Option<Self>> {
        let listed = output_of(Command::new(&program.file).arg("--list"))?;
        let mut tests = names(&listed);
        tests.retain(|name| filters.iter().any(|filter| name.contains(filter.as_ref())));
        let tests = tests.into_iter().map(str::to_owned).collect::<Vec<_>>();
        Ok((!tests.is_empty()).then_some(Self {
            program,
            tests: Tests::Some(tests),
        }))
    }
}

/// The names in a test program's list: lines `NAME: test`, with a remark in brackets before those that cannot run here.
fn names(listed: &str) -> Vec<&str> {
    let tests = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    tests
        .map(|name| name.rsplit_once("] ").map_or(name, |(_, name)| name))
        .collect()
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

/// Lines of shell that call `run` of `init.sh`: once for each program, or for each of the tests that were asked for.
pub(super) fn script(runs: &[Run<'_>]) -> String {
    let mut text = String::new();
    for Run { program, tests } in runs {
        let words = [&program.package_folder, &program.file].map(|path| quoted(&path.to_string_lossy()));
        let call = format!("run {} --color never", words.join(" "));
        match tests {
            Tests::All => text.extend([call.as_str(), "\n"]),
            Tests::Some(tests) => {
                for test in tests {
                    text.extend([call.as_str(), " --exact ", quoted(test).as_str(), "\n"]);
                }
            }
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
    fn names_are_what_is_left_of_a_list() {
        let listed = "one: test\n[skipped: no Ipip in this kernel] two::three: test\n4 tests, 0 benchmarks\n";
        assert_eq!(names(listed), ["one", "two::three"]);
    }

    #[test]
    fn a_program_is_run_once_or_for_each_test() {
        let program = Executable {
            target: "lab".to_owned(),
            kind: "test".to_owned(),
            package_folder: "/x/it's".into(),
            is_test: true,
            file: "/x/lab".into(),
        };
        let some = Run {
            program: &program,
            tests: Tests::Some(vec!["paths::ipip".to_owned(), "$x".to_owned()]),
        };
        let text = script(&[Run::all(&program), some]);
        let expected = r"run '/x/it'\''s' '/x/lab' --color never
run '/x/it'\''s' '/x/lab' --color never --exact 'paths::ipip'
run '/x/it'\''s' '/x/lab' --color never --exact '$x'
";
        assert_eq!(text, expected);
    }
}
