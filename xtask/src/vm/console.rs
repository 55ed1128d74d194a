//! What a guest's console tells: lines of the kernel, of `init.sh` and of test programs become counts and a verdict. Pure.

use std::fmt;
use std::time::Duration;

use crate::test::{Failures, Totals};

/// Marks that `init.sh` writes at the beginning of lines.
const KERNEL: &str = "@@KERNEL ";
const RAN: &str = "@@RAN rc=";
const EXIT: &str = "@@EXIT rc=";

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    /// Tests failed.
    Failed,
    /// The kernel gave up; the line that says so.
    Panicked(String),
    /// It ended without telling how, or told it more than once.
    Unclear(usize),
    /// It was ended after this time, or after this long a silence.
    TimedOut(Duration),
    /// It said that all is well, and no test was run.
    RanNothing,
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => formatter.write_str("passed"),
            Self::Failed => formatter.write_str("FAILED"),
            Self::Panicked(line) => write!(formatter, "FAILED: {line}"),
            Self::Unclear(count) => write!(formatter, "FAILED: {count} exit marks instead of one"),
            Self::TimedOut(after) => {
                write!(formatter, "FAILED: timed out after {:.0} s", after.as_secs_f64())
            }
            Self::RanNothing => formatter.write_str("FAILED: ran no test"),
        }
    }
}

/// What has been read so far.
#[derive(Debug, Default)]
pub(super) struct Console {
    /// What `uname -r` said there.
    pub(super) release: Option<String>,
    pub(super) totals: Totals,
    /// Names of failed tests, and of programs that ended badly without telling of one.
    pub(super) failed: Vec<String>,
    /// What failed tests said.
    pub(super) failures: Failures,
    /// Failures that the program that runs now has told of.
    told: u64,
    listing: bool,
    panic: Option<String>,
    exits: Vec<String>,
}

impl Console {
    /// Takes a line without its end.
    pub(super) fn line(&mut self, line: &str) {
        if self.panic.is_none() && line.contains("Kernel panic - not syncing") {
            self.panic = Some(line.trim().to_owned());
        }
        if let Some(release) = line.strip_prefix(KERNEL) {
            self.release = Some(release.trim().to_owned());
        } else if let Some(code) = line.strip_prefix(EXIT) {
            self.exits.push(code.trim().to_owned());
        } else if let Some(rest) = line.strip_prefix(RAN) {
            let (code, program) = rest.split_once(' ').unwrap_or((rest, ""));
            if code != "0" && self.told == 0 {
                self.totals.failed += 1;
                self.failed.push(format!("`{program}` ended with {code}"));
            }
            self.told = 0;
        } else if let Some(totals) = Totals::parse(line) {
            self.told += totals.failed;
            self.totals += totals;
        }
        self.failures.line(line);
        // Test programs end with a list of failed tests, one a line, indented, up to an empty line.
        if let Some(name) = line.strip_prefix("    ").filter(|_| self.listing) {
            self.failed.push(name.trim().to_owned());
        } else {
            self.listing = line.trim_end() == "failures:";
        }
    }

    /// A panic before the first process ran: worth another try, since the emulator may be to blame.
    pub(super) fn panicked_early(&self) -> bool {
        self.panic.is_some() && self.release.is_none()
    }

    /// The verdict once the guest has ended; `ended_after` if it had to be made to.
    pub(super) fn verdict(&self, ended_after: Option<Duration>) -> Verdict {
        if let Some(line) = &self.panic {
            return Verdict::Panicked(line.clone());
        }
        if let Some(after) = ended_after {
            return Verdict::TimedOut(after);
        }
        match self.exits.as_slice() {
            [code] if code == "0" && self.totals.failed == 0 => {
                if self.totals.passed == 0 {
                    Verdict::RanNothing
                } else {
                    Verdict::Passed
                }
            }
            [_] => Verdict::Failed,
            exits => Verdict::Unclear(exits.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Console {
        let mut console = Console::default();
        for line in text.lines() {
            console.line(line);
        }
        console
    }

    const GOOD: &str = "@@KERNEL 6.1.0-56-cloud-amd64\n\
        test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.00s\n\
        @@RAN rc=0 /x/lab\n@@EXIT rc=0\n";
    const BAD: &str = "@@KERNEL 6.1\nfailures:\n\n---- a::b ----\n    indented\n\nfailures:\n    a::b\n    c\n\n\
        test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.00s\n\
        @@RAN rc=101 /x/lab\n@@EXIT rc=1\n";

    #[test]
    fn a_good_run_is_counted() {
        let console = read(GOOD);
        assert_eq!(console.verdict(None), Verdict::Passed);
        assert_eq!(console.release.as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!((console.totals.passed, console.totals.skipped), (3, 1));
        assert!(console.failed.is_empty());
    }

    #[test]
    fn failed_tests_are_named_once() {
        let console = read(BAD);
        assert_eq!(console.verdict(None), Verdict::Failed);
        assert_eq!(console.failed, ["a::b", "c"]);
        assert_eq!(console.totals.failed, 2);
    }

    #[test]
    fn a_program_that_crashes_is_a_failed_test() {
        let console = read("@@KERNEL 6.1\n@@RAN rc=139 /x/e2e ways\n@@EXIT rc=1\n");
        assert_eq!(console.totals.failed, 1);
        assert_eq!(console.failed, ["`/x/e2e ways` ended with 139"]);
        // One that follows a program with failures of its own counts for itself.
        let more = BAD.replace("@@EXIT", "@@RAN rc=139 /x/e2e\n@@EXIT");
        assert_eq!(read(&more).totals.failed, 3);
    }

    #[test]
    fn anything_but_one_good_end_is_a_failure() {
        assert_eq!(read("").verdict(None), Verdict::Unclear(0));
        assert_eq!(
            read(&format!("{GOOD}@@EXIT rc=0\n")).verdict(None),
            Verdict::Unclear(2)
        );
        assert_eq!(read("@@EXIT rc=0\n").verdict(None), Verdict::RanNothing);
        assert_eq!(
            read(&GOOD.replace("EXIT rc=0", "EXIT rc=1")).verdict(None),
            Verdict::Failed
        );
        let limit = Duration::from_secs(9);
        assert_eq!(read(GOOD).verdict(Some(limit)), Verdict::TimedOut(limit));
    }

    #[test]
    fn a_panic_is_worth_another_try_before_the_first_process_only() {
        let panic = "[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs\n";
        let console = read(panic);
        assert!(console.panicked_early());
        assert!(matches!(console.verdict(None), Verdict::Panicked(line) if line.contains("VFS")));
        let console = read(&format!("{GOOD}{panic}"));
        assert!(!console.panicked_early());
        assert!(matches!(console.verdict(None), Verdict::Panicked(_)));
    }
}
