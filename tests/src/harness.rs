//! Runs [`Test`]s: those that lack what they need are skipped or fail, with the reason, before they begin.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use crate::{Readiness, Test};

/// Runs the tests that the command line asks for, as `cargo test`'s own harness would, several at once.
pub fn run(tests: impl IntoIterator<Item = Test>) -> ExitCode {
    run_with(&Arguments::from_args(), tests)
}

/// As [`run`], one after the other unless the command line says otherwise: for tests that look at the whole machine.
pub fn run_singly(tests: impl IntoIterator<Item = Test>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(1));
    run_with(&arguments, tests)
}

#[expect(clippy::print_stderr, reason = "what failed is told at once")]
fn run_with(arguments: &Arguments, tests: impl IntoIterator<Item = Test>) -> ExitCode {
    let trials = tests.into_iter().map(|test| match test.readiness() {
        Readiness::Ready => Trial::test(test.name, move || {
            (test.run)().map_err(|error| {
                let error = format!("{error:?}");
                // At the end all errors are printed again, but a guest may not get there.
                eprintln!("{}: {error}", test.name);
                error.into()
            })
        }),
        Readiness::Skipped(reason) => Trial::test(test.name, || Ok(()))
            .with_ignored_flag(true)
            .with_kind(format!("skipped: {reason}")),
        Readiness::Failed(reason) => Trial::test(test.name, move || Err(reason.into())),
    });
    libtest_mimic::run(arguments, trials.collect()).exit_code()
}
