//! Attaching to functions of the kernel: by a trampoline where there is a program for one and the kernel permits it, else
//! by a kprobe. None of them is needed for tracing; each adds what happens between two interfaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf,
    maps::ProgramArray,
    programs::{FEntry, FExit, KProbe, Program, ProgramError},
};
use calitrace_ebpf::{
    Hook,
    shared::{BODY as SLOT, OFFSET_UNKNOWN, names},
};

use super::{
    hooks::{self, Attach, BODY, ENTER, Function, Row},
    interrupted::retried,
    load::{Kernel, Probes},
    permission::program_io_error,
};

/// How the kernel lets functions be probed by perf events.
const KPROBES: &str = "/sys/bus/event_source/devices/kprobe";

const NO_KPROBES: &str = "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)";
const NOT_YET: &str = "not attached yet";

/// Whether the kernel lets functions be probed.
pub fn has_kprobes() -> bool {
    Path::new(KPROBES).exists()
}

/// By what a function is observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// fentry or fexit.
    Trampoline,
    /// kprobe or kretprobe.
    Kprobe,
}

/// Which functions are observed, and why others are not.
#[derive(Debug, Default)]
pub(super) struct Functions {
    attached: BTreeMap<Hook, Means>,
    /// Tried in vain, and not to be tried again.
    given_up: BTreeSet<Hook>,
    /// Trampolines have been refused; another try is in vain.
    no_trampolines: bool,
    /// The kernel's BTF as aya reads it, for trampolines.
    btf: Option<aya::Btf>,
}

/// Why a function is not observed.
#[derive(Debug)]
enum Refusal {
    /// There is no such function: inlined, or in a module that is not loaded.
    Absent(anyhow::Error),
    Failed(anyhow::Error),
}

impl Kernel {
    /// Attaches the functions that are not attached yet, and gives those that now are. What this kernel lacks is noted
    /// in [`Self::missing`] the first time, a line for all that lack the same, and is no error.
    ///
    /// A function of a module may be there at the next call: the module is loaded with the first tunnel.
    pub fn attach_functions(&mut self) -> Result<Vec<Hook>> {
        let rows: Vec<&Row> = hooks::TABLE
            .iter()
            .filter(|row| matches!(row.attach, Attach::Function(_)))
            .filter(|row| {
                let Functions {
                    attached, given_up, ..
                } = &self.functions;
                !attached.contains_key(&row.hook) && !given_up.contains(&row.hook)
            })
            .collect();
        if self.config.functions == Probes::Off || rows.is_empty() {
            return Ok(Vec::new());
        }
        if !self.has_btf() {
            // Said at load, for drops too.
            for row in rows {
                self.missing
                    .insert(row.hook, "no kernel type information".to_owned());
            }
            return Ok(Vec::new());
        }
        self.note_global();
        let mut attached = Vec::new();
        let mut absent = Vec::new();
        let mut unprobed = Vec::new();
        for row in rows {
            let Attach::Function(function) = row.attach else {
                continue;
            };
            match self.attach_function(row, &function)? {
                Ok(means) => {
                    self.functions.attached.insert(row.hook, means);
                    self.missing.remove(&row.hook);
                    attached.push(row.hook);
                }
                Err(Refusal::Absent(error)) if function.module.is_some() => {
                    // Without the module there are no such packets: nothing is lost.
                    let module = function.module.unwrap_or_default();
                    log::debug!("{}: {error:#}", row.name);
                    self.missing
                        .insert(row.hook, format!("module {module} is not loaded"));
                }
                Err(Refusal::Absent(error)) => {
                    log::debug!("{}: {error:#}", row.name);
                    absent.push(row);
                }
                Err(Refusal::Failed(error)) => {
                    if has_kprobes() {
                        self.miss(&[row], &format!("{error:#}"));
                    } else {
                        unprobed.push(row);
                    }
                }
            }
        }
        self.miss(&absent, "this kernel has no such function");
        self.miss(&unprobed, NO_KPROBES);
        // Tens of megabytes, and of no use any more: functions with trampolines are tried once.
        self.functions.btf = None;
        Ok(attached)
    }

    /// The functions that are observed, and by what.
    pub fn functions(&self) -> &BTreeMap<Hook, Means> {
        &self.functions.attached
    }

    /// Why a function is not observed, as far as that is known before it was tried.
    pub(super) fn untried(&self, row: &Row) -> Option<String> {
        let waits =
            matches!(row.attach, Attach::Function(_)) && !self.functions.attached.contains_key(&row.hook);
        if !waits {
            None
        } else if self.config.functions == Probes::Off {
            Some("not asked for".to_owned())
        } else if has_kprobes() {
            Some(NOT_YET.to_owned())
        } else {
            Some(NO_KPROBES.to_owned())
        }
    }

    /// Notes that these are not observed, a line for all.
    fn miss(&mut self, rows: &[&Row], why: &str) {
        let new: Vec<&&Row> = rows
            .iter()
            .filter(|row| !self.missing.contains_key(&row.hook))
            .collect();
        for row in rows {
            self.functions.given_up.insert(row.hook);
        }
        match new.as_slice() {
            [] => return,
            [row] => self.notes.push(format!(
                "{} is not observed ({why}); not seen: {}",
                row.name, row.lost
            )),
            several => self.notes.push(format!(
                "{why}: what happens between two interfaces is not seen ({} hooks of {}), everything else is; \
                 `calitrace doctor` says what is lost, `--hooks tc` asks for no more",
                several.len(),
                hooks::TABLE.len()
            )),
        }
        for row in rows {
            self.missing.insert(row.hook, why.to_owned());
        }
    }

    fn attach_function(&mut self, row: &Row, function: &Function) -> Result<Result<Means, Refusal>> {
        if let Some(program) = function.trampoline
            && self.config.functions == Probes::Cheapest
            && !self.functions.no_trampolines
        {
            match self.by_trampoline(program, function) {
                Ok(()) => return Ok(Ok(Means::Trampoline)),
                Err(error) => {
                    log::debug!("{}: no trampoline, a kprobe instead: {error:#}", row.name);
                    let refused = error
                        .downcast_ref::<ProgramError>()
                        .and_then(program_io_error)
                        .and_then(io::Error::raw_os_error);
                    self.functions.no_trampolines = refused == Some(libc::EPERM);
                }
            }
        }
        if row.hook == Hook::NfNatSetupInfo && self.offsets.ct_reply_tuple == OFFSET_UNKNOWN {
            return Ok(Err(Refusal::Failed(anyhow!(
                "no type information of nf_conntrack"
            ))));
        }
        if !has_kprobes() {
            return Ok(Err(Refusal::Failed(anyhow!("there is no {KPROBES}"))));
        }
        let ebpf = self.instance(0)?.ebpf();
        Ok(by_kprobe(ebpf, row.program, function)
            .map(|()| Means::Kprobe)
            .map_err(|error| {
                let why = error
                    .downcast_ref::<ProgramError>()
                    .and_then(program_io_error)
                    .and_then(io::Error::raw_os_error);
                match why {
                    Some(libc::ENOENT | libc::EADDRNOTAVAIL) => Refusal::Absent(error),
                    _ => Refusal::Failed(error),
                }
            }))
    }

    fn by_trampoline(&mut self, program: &str, function: &Function) -> Result<()> {
        if self.functions.btf.is_none() {
            let file = self
                .config
                .btf
                .clone()
                .unwrap_or_else(|| PathBuf::from(super::load::VMLINUX));
            let btf = aya::Btf::parse_file(&file, aya::Endianness::default())
                .with_context(|| format!("read {}", file.display()))?;
            self.functions.btf = Some(btf);
        }
        let btf = self.functions.btf.take().context("BTF was read")?;
        let attached = self
            .instance(0)
            .and_then(|instance| trampoline(instance.ebpf(), program, function.symbol, &btf));
        self.functions.btf = Some(btf);
        attached
    }
}

fn trampoline(ebpf: &mut Ebpf, program: &str, symbol: &str, btf: &aya::Btf) -> Result<()> {
    match ebpf
        .program_mut(program)
        .with_context(|| format!("the object has no program {program}"))?
    {
        Program::FEntry(entry) => {
            if entry.fd().is_err() {
                retried(|| FEntry::load(entry, symbol, btf))?;
            }
            entry.attach()?;
        }
        Program::FExit(exit) => {
            if exit.fd().is_err() {
                retried(|| FExit::load(exit, symbol, btf))?;
            }
            exit.attach()?;
        }
        _ => return Err(anyhow!("the program {program} is not for trampolines")),
    }
    Ok(())
}

/// Attaches the stub of a function, and, where the result matters, first the program that notes its arguments.
fn by_kprobe(ebpf: &mut Ebpf, program: &str, function: &Function) -> Result<()> {
    if function.result {
        kprobe(ebpf, ENTER)?.attach(function.symbol, 0)?;
    } else {
        body(ebpf)?;
    }
    kprobe(ebpf, program)?.attach(function.symbol, 0)?;
    Ok(())
}

/// Puts the body of the stubs where they find it.
fn body(ebpf: &mut Ebpf) -> Result<()> {
    let loaded = matches!(ebpf.program(BODY), Some(Program::KProbe(body)) if body.fd().is_ok());
    if loaded {
        return Ok(());
    }
    let body = kprobe(ebpf, BODY)?
        .fd()
        .and_then(|fd| fd.try_clone().map_err(ProgramError::IOError))?;
    let map = ebpf
        .map_mut(names::BODIES)
        .with_context(|| format!("the object has no map {}", names::BODIES))?;
    ProgramArray::try_from(map)
        .context("open the program array")?
        .set(SLOT, &body, 0)
        .context("put the body of the kprobes into the program array")
}

/// A kprobe program, loaded.
fn kprobe<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut KProbe> {
    let program: &mut KProbe = ebpf
        .program_mut(name)
        .with_context(|| format!("the object has no program {name}"))?
        .try_into()
        .with_context(|| format!("program {name}"))?;
    if program.fd().is_err() {
        retried(|| program.load())?;
    }
    Ok(program)
}

/// Detaches all of them.
pub(super) fn detach(ebpf: &mut Ebpf) -> Result<()> {
    let mut result = Ok(());
    for (name, program) in ebpf.programs_mut() {
        let done = match program {
            Program::KProbe(program) if program.fd().is_ok() => program.unload(),
            Program::FEntry(program) if program.fd().is_ok() => program.unload(),
            Program::FExit(program) if program.fd().is_ok() => program.unload(),
            _ => Ok(()),
        };
        result = result.and(done.with_context(|| format!("detach the program {name}")));
    }
    result
}
