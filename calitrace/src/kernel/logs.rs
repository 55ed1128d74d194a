//! Shows the programs' own log messages (aya-log), for `--verbose`.

use std::{
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result};
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Passes the messages to `log` until it is dropped.
pub(super) struct Logs {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Logs {
    pub(super) fn start(mut logger: EbpfLogger<&'static dyn log::Log>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("ebpf-log".to_owned())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    // The time-out is for noticing the end only: each message wakes.
                    let _: nix::Result<i32> = poll(
                        &mut [PollFd::new(logger.as_fd(), PollFlags::POLLIN)],
                        PollTimeout::from(100_u8),
                    );
                    logger.flush();
                }
            })
            .context("start the thread for the programs' log")?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::warn!("the thread for the programs' log has failed");
        }
    }
}
