//! Programs whose loading a signal interrupts.

use std::io;

use aya::programs::ProgramError;

use super::permission::program_io_error;

/// How often a load is tried. libbpf tries five times (`PROG_LOAD_ATTEMPTS` in its `libbpf_internal.h`); more cost nothing,
/// and each fails only for a signal of its own.
const ATTEMPTS: usize = 20;

/// Loads a program, and again where a signal came meanwhile.
///
/// The verifier gives up with EAGAIN when its thread has a signal pending (`do_check` in kernel/bpf/verifier.c, v5.10).
/// It need be none that anybody waits for: where a tool is not installed, the child that should have become it exits while
/// the thread that started it blocks all signals, and then the kernel does not discard the SIGCHLD at once, but wakes
/// another thread for it. Measured on 6.18: of 3,000 loads 1,676 failed beside a thread that starts a missing program all
/// the time, 25 beside one that starts a program that is there, none beside an idle one.
pub(super) fn retried(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..ATTEMPTS {
        match load() {
            Err(error) if is_interrupted(&error) => log::debug!("a signal interrupted the verifier; again"),
            done => return done,
        }
    }
    load()
}

fn is_interrupted(error: &ProgramError) -> bool {
    program_io_error(error).is_some_and(|why| why.kind() == io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: i32) -> ProgramError {
        ProgramError::IOError(io::Error::from_raw_os_error(code))
    }

    /// How often `load` is called if it fails so often with this error, and what comes of it.
    fn tries(code: i32, failures: usize) -> (usize, bool) {
        let mut calls = 0;
        let done = retried(|| {
            calls += 1;
            if calls > failures {
                Ok(())
            } else {
                Err(failed(code))
            }
        });
        (calls, done.is_ok())
    }

    #[test]
    fn a_signal_does_not_keep_a_program_out_and_any_other_error_does() {
        assert_eq!(tries(libc::EAGAIN, 0), (1, true));
        assert_eq!(tries(libc::EAGAIN, 3), (4, true));
        assert_eq!(tries(libc::EAGAIN, usize::MAX), (ATTEMPTS, false));
        assert_eq!(tries(libc::EINVAL, 1), (1, false));
    }
}
