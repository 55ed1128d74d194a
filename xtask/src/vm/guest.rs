//! One guest: QEMU with a kernel and an archive as its root, its console read line by line, ended at a time limit, at
//! Ctrl-C, and with this process.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::num::NonZeroUsize;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use calitrace_tests::interrupt::Interrupts;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::kernels::Kernel;
use super::tree::Tree;
use crate::step::{say, text_of};
use crate::workspace;

/// The kernel's command line. A panic ends the guest (`-no-reboot`); the crash of a guest is no security problem, and the
/// clock of an emulated machine needs no calibration. Random numbers at once: 5.10 waits for them otherwise.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet loglevel=3 mitigations=off nokaslr tsc=reliable \
     random.trust_cpu=on";
/// With labs, libraries and test programs in memory.
const MEGABYTES: &str = "3072";
/// More than one, since a ring and a counter for each is what nodes have.
const PROCESSORS: usize = 2;
/// How long KVM has for a guest that does nothing. It takes two seconds where it works.
const TRIAL: Duration = Duration::from_secs(20);

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's translator: five or six times slower.
    Tcg,
}

impl Accelerator {
    /// KVM where a guest gets to its first process with it; the device alone says little.
    pub(super) fn choose(kernel: &Kernel, scratch: &Path, interrupts: &Interrupts) -> Result<Self> {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let busybox = workspace::find_program("busybox").context("no busybox on the path")?;
        let mut tree = Tree::new();
        tree.copied(Path::new("/bin/busybox"), &busybox);
        let script = "#!/bin/busybox sh\necho @@EXIT rc=0\n/bin/busybox poweroff -f\n";
        tree.made(Path::new("/init"), 0o755, script);
        let root = scratch.join("trial.cpio");
        tree.write(&root)?;
        let guest = Guest {
            kernel,
            root,
            accelerator: Self::Kvm,
            limit: TRIAL,
            messages: Stdio::null,
        };
        let mut works = false;
        let ended = guest.run(interrupts, &mut |line| works |= line.starts_with("@@EXIT"))?;
        if works && ended.is_none() {
            return Ok(Self::Kvm);
        }
        say(
            "guests: /dev/kvm is there, but a guest does not get to its first process with it: emulation, then",
        );
        Ok(Self::Tcg)
    }

    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // Both of the guest's processors in one thread. With a thread for each, QEMU before 8.1 may translate code
            // that the other is changing, and Linux, which changes its own (jump labels, trampolines), then dies of a
            // breakpoint that was already taken away ("Oops: int3"; mended by QEMU's "Always lock pages before translation").
            Self::Tcg => ["-accel", "tcg,thread=single", "-cpu", "max"],
        }
    }

    /// How many guests keep this machine's processors busy.
    pub(super) fn guests_at_once(self) -> usize {
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        match self {
            Self::Kvm => processors.div_ceil(PROCESSORS),
            Self::Tcg => processors,
        }
    }

    /// How many times longer than on this machine tests wait.
    pub(super) fn time_scale(self) -> u32 {
        match self {
            Self::Kvm => 2,
            Self::Tcg => 6,
        }
    }
}

/// What to boot.
pub(super) struct Guest<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) root: PathBuf,
    pub(super) accelerator: Accelerator,
    pub(super) limit: Duration,
    /// Where QEMU's own messages go.
    pub(super) messages: fn() -> Stdio,
}

impl Guest<'_> {
    /// Boots it and hands on each line of its console until it ends. The time after which it had to be ended, if so.
    pub(super) fn run(
        &self,
        interrupts: &Interrupts,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Option<Duration>> {
        let start = Instant::now();
        let (machine, lines) = self.start()?;
        loop {
            if interrupts.came()? {
                bail!("interrupted");
            }
            if start.elapsed() > self.limit {
                drop(machine);
                return Ok(Some(start.elapsed()));
            }
            match lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) => on_line(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }

    fn start(&self) -> Result<(Machine, Receiver<String>)> {
        let program = workspace::find_program("qemu-system-x86_64")
            .context("no qemu-system-x86_64 on the path (package qemu-system-x86)")?;
        let mut command = Command::new(program);
        command
            .args(["-machine", "q35", "-m", MEGABYTES])
            .args(["-smp", &PROCESSORS.to_string()])
            .args(self.accelerator.arguments())
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(&self.root)
            .args(["-append", COMMAND_LINE])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr((self.messages)());
        // SAFETY: a system call between fork and exec. It ends with the thread that started it, whatever ends that.
        unsafe {
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
        }
        let mut machine = Machine(
            command
                .spawn()
                .with_context(|| format!("cannot run `{}`", text_of(&command)))?,
        );
        let console = machine.0.stdout.take().context("the console of a guest")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(console).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line);
                if sender.send(line.trim_end_matches('\r').to_owned()).is_err() {
                    break;
                }
            }
        });
        Ok((machine, lines))
    }
}

/// A running QEMU, ended when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended by itself and been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
