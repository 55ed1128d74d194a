//! The exit codes, in one place: 0 done, 1 error, 2 usage, 3 no permission, 4 nothing to trace.

use std::{
    fmt,
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Error;

use crate::error::{NoPermission, NothingToTrace};

/// What was typed makes no sense; the text is complete, with its own `error: ` and hints.
#[derive(Debug)]
pub struct Usage(pub(super) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.trim_end())
    }
}

impl std::error::Error for Usage {}

/// Says what went wrong on standard error and returns the exit code for it.
pub fn report(error: &Error) -> ExitCode {
    let code = code(error);
    let text = match error.downcast_ref::<Usage>() {
        _ if code == 0 => return ExitCode::SUCCESS,
        Some(usage) => usage.to_string(),
        None => format!("error: {error:#}"),
    };
    // Without a standard error there is nobody left to tell; the exit code still says it.
    drop(writeln!(io::stderr(), "{text}"));
    ExitCode::from(code)
}

fn code(error: &Error) -> u8 {
    if error.downcast_ref::<Usage>().is_some() {
        2
    } else if error.downcast_ref::<NoPermission>().is_some() {
        3
    } else if error.downcast_ref::<NothingToTrace>().is_some() {
        4
    } else {
        // Whoever read our output has seen enough: that is how `calitrace … | head` ends.
        u8::from(!error.chain().any(is_broken_pipe))
    }
}

fn is_broken_pipe(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn under_context<E: std::error::Error + Send + Sync + 'static>(error: E) -> Error {
        Err::<(), E>(error).context("inner").context("outer").unwrap_err()
    }

    #[test]
    fn every_kind_has_its_code_whatever_the_context() {
        assert_eq!(
            code(&under_context(io::Error::from(io::ErrorKind::StorageFull))),
            1
        );
        assert_eq!(code(&under_context(Usage(String::new()))), 2);
        assert_eq!(code(&under_context(NoPermission { what: "x".into() })), 3);
        assert_eq!(code(&under_context(NothingToTrace { why: "x".into() })), 4);
        assert_eq!(
            code(&under_context(io::Error::from(io::ErrorKind::BrokenPipe))),
            0
        );
    }
}
