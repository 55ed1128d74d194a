//! Holding back Ctrl-C while something is built that has to be taken down again.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Holds back SIGINT and SIGTERM from the thread that made it and those it starts, until dropped. Commands
/// started meanwhile get them as always, so a Ctrl-C at a terminal makes them fail, not wait.
#[derive(Debug)]
pub struct Interrupts {
    before: SigSet,
}

impl Interrupts {
    /// Begins holding back.
    pub fn hold() -> Result<Self> {
        let held = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        let before = held
            .thread_swap_mask(SigmaskHow::SIG_BLOCK)
            .context("cannot block signals")?;
        Ok(Self { before })
    }

    /// Whether one came. It will be delivered when this is dropped.
    pub fn came(&self) -> Result<bool> {
        let mut pending = SigSet::empty().as_ref().to_owned();
        // SAFETY: the kernel writes a signal set into one that lives here.
        let result = unsafe { libc::sigpending(&raw mut pending) };
        nix::errno::Errno::result(result).context("cannot ask for pending signals")?;
        // SAFETY: the set was written by the kernel a moment ago.
        let pending = unsafe { SigSet::from_sigset_t_unchecked(pending) };
        Ok(pending.contains(Signal::SIGINT) || pending.contains(Signal::SIGTERM))
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        // Fails only for a `how` that does not exist.
        let _ = self.before.thread_set_mask();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_that_one_came() {
        let interrupts = Interrupts::hold().unwrap();
        assert!(!interrupts.came().unwrap());
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(interrupts.came().unwrap());
        // Taken from the queue, so that it does not end the test run.
        let taken = SigSet::from_iter([Signal::SIGTERM]).wait().unwrap();
        assert_eq!(taken, Signal::SIGTERM);
    }
}
