//! Counts of tests, read from the closing lines of test programs (those of libtest, which libtest-mimic prints, too).

use std::fmt;
use std::ops::AddAssign;

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Totals {
    /// Reads a closing line, `test result: ok. 3 passed; 0 failed; 1 ignored; …`. None for any other line.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let mut totals = Self::default();
        for count in counts.split(';') {
            let Some((number, word)) = count.trim().split_once(' ') else {
                continue;
            };
            let Ok(number) = number.parse() else { continue };
            match word {
                "passed" => totals.passed = number,
                "failed" => totals.failed = number,
                "ignored" => totals.skipped = number,
                _ => {}
            }
        }
        Some(totals)
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_both_harnesses_are_read() {
        let libtest = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s";
        assert_eq!(
            Totals::parse(libtest),
            Some(Totals {
                passed: 3,
                failed: 2,
                skipped: 1
            })
        );
        let mimic =
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s";
        assert_eq!(
            Totals::parse(mimic),
            Some(Totals {
                passed: 12,
                failed: 0,
                skipped: 0
            })
        );
        assert_eq!(Totals::parse("test a ... ok"), None);
    }

    #[test]
    fn the_sum_is_printed_as_one_plain_line() {
        let mut sum = Totals {
            passed: 3,
            failed: 0,
            skipped: 1,
        };
        sum += Totals {
            passed: 4,
            failed: 2,
            skipped: 0,
        };
        assert_eq!(sum.to_string(), "7 passed, 2 failed, 1 skipped");
    }
}
