//! The summary of a matrix: a line for each kernel, and below it the names of its failed tests. Pure.

use std::time::Duration;

use super::console::Verdict;
use crate::test::{Failures, Totals};

/// What became of one kernel.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) series: String,
    pub(super) release: String,
    pub(super) version: String,
    pub(super) totals: Totals,
    pub(super) took: Duration,
    pub(super) verdict: Verdict,
    /// Names of failed tests.
    pub(super) failed: Vec<String>,
    /// What they said.
    pub(super) failures: Failures,
}

const HEADS: [&str; 8] = [
    "series", "kernel", "package", "passed", "failed", "skipped", "seconds", "verdict",
];

/// The lines of the table.
pub(super) fn lines(outcomes: &[Outcome]) -> Vec<String> {
    let rows: Vec<[String; 8]> = outcomes.iter().map(cells).collect();
    let heads = HEADS.map(str::to_owned);
    let width = |column: usize| {
        let cells = rows.iter().chain([&heads]).map(|row| row[column].len());
        cells.max().unwrap_or_default()
    };
    let widths: [usize; 8] = std::array::from_fn(width);
    let line = |row: &[String; 8]| {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            // Numbers stand right.
            if (3..7).contains(&column) {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&heads)];
    for (outcome, row) in outcomes.iter().zip(&rows) {
        lines.push(line(row));
        lines.extend(outcome.failed.iter().map(|name| format!("    failed: {name}")));
    }
    lines
}

fn cells(outcome: &Outcome) -> [String; 8] {
    [
        outcome.series.clone(),
        outcome.release.clone(),
        outcome.version.clone(),
        outcome.totals.passed.to_string(),
        outcome.totals.failed.to_string(),
        outcome.totals.skipped.to_string(),
        format!("{:.0}", outcome.took.as_secs_f64()),
        outcome.verdict.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_their_heads_and_failures_below_their_kernel() {
        let outcome = |series: &str, verdict, failed: &[&str]| Outcome {
            series: series.to_owned(),
            release: format!("{series}.0-1-cloud-amd64"),
            version: "1-1".to_owned(),
            totals: Totals {
                passed: 12,
                failed: failed.len() as u64,
                skipped: 1,
            },
            took: Duration::from_millis(61_400),
            verdict,
            failed: failed.iter().map(|&name| name.to_owned()).collect(),
            failures: Failures::default(),
        };
        let outcomes = [
            outcome("5.10", Verdict::Failed, &["paths::ipip"]),
            outcome("7", Verdict::Passed, &[]),
        ];
        let expected = "\
series  kernel                package  passed  failed  skipped  seconds  verdict
5.10    5.10.0-1-cloud-amd64  1-1          12       1        1       61  FAILED
    failed: paths::ipip
7       7.0-1-cloud-amd64     1-1          12       0        1       61  passed";
        assert_eq!(lines(&outcomes).join("\n"), expected);
    }
}
