//! What came of a layer: how many tests ended how, and what those that failed said.

use std::ops::AddAssign;

use super::failures::Failures;
use super::totals::Totals;

/// What came of some tests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) totals: Totals,
    pub(crate) failures: Failures,
}

impl Report {
    /// Of tests that cannot run here: one that was skipped.
    pub(crate) fn skipped() -> Self {
        Self {
            totals: Totals {
                skipped: 1,
                ..Totals::default()
            },
            ..Self::default()
        }
    }

    /// Counts a failure that no test program told of, with what is known of it.
    pub(crate) fn fail(&mut self, name: &str, text: &str) {
        self.totals.failed += 1;
        self.failures.add(name, text);
    }
}

impl AddAssign for Report {
    fn add_assign(&mut self, other: Self) {
        self.totals += other.totals;
        self.failures.append("", other.failures);
    }
}
