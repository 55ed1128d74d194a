//! TC programs run on made-up packets by `BPF_PROG_TEST_RUN` (5.10 and later), to learn what they cost.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::{TestRun as _, programs::TestRunOptions};
use calitrace_ebpf::{Hook, shared::names};

use super::{hooks, load::Kernel};
use crate::netns;

impl Kernel {
    /// Runs the program of a TC hook on an Ethernet frame that came to `lo` of the namespace, `repeat` times over, and
    /// returns the mean time of a run. It counts and records as ever. Without a hook it is a program that only returns:
    /// what a run costs whatever the program does.
    pub fn trial(
        &mut self,
        netns: &netns::Handle,
        hook: Option<Hook>,
        frame: &[u8],
        repeat: u32,
    ) -> Result<Duration> {
        let name = hook.map_or(names::BARE, |hook| hooks::row(hook).program);
        let program = self.instance(netns.inode())?.classifier_named(name)?;
        let options = TestRunOptions {
            data_in: Some(frame),
            repeat,
            ..TestRunOptions::default()
        };
        let result = netns.run(|| {
            program
                .test_run(options)
                .with_context(|| format!("run the program {name} on a packet"))
        })?;
        ensure!(
            result.return_value == u32::MAX,
            "the program {name} returned {}, not TC_ACT_UNSPEC",
            result.return_value.cast_signed()
        );
        Ok(result.duration)
    }

    /// How many instructions the verifier walked when it loaded the program of a TC hook; `None` where the kernel does
    /// not tell (before 5.16).
    pub fn verified_instructions(&mut self, netns: &netns::Handle, hook: Hook) -> Result<Option<u32>> {
        let program = self.instance(netns.inode())?.classifier(hook)?;
        let info = program.info().context("ask about a program")?;
        Ok(info.verified_instruction_count())
    }
}
