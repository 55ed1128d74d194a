//! Loading: BTF, offsets, programs, and what cannot be observed on this kernel.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Result, bail};
use calitrace_ebpf::{
    Hook,
    shared::{OFFSET_UNKNOWN, Offsets},
};
use ipnet::IpNet;

use super::{
    attach::Attachments,
    btf::Btf,
    functions::Functions,
    hooks,
    instance::Instance,
    names::Names,
    offsets, permission,
    ring::{Ring, Rings},
};
use crate::event::{HookStatus, Netns};

/// The kernel's own description of its types.
pub(super) const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// The types of conntrack, where that is a module (from 5.11 on).
const NF_CONNTRACK: &str = "/sys/kernel/btf/nf_conntrack";

/// The same of the modules whose rules log.
const LOGS: [&str; 2] = ["/sys/kernel/btf/xt_NFLOG", "/sys/kernel/btf/nft_log"];

/// How many times programs were loaded in this process.
static LOADED: AtomicU32 = AtomicU32::new(0);

/// How to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Size of the ring in bytes: a power of two and a multiple of the page size.
    pub ring_bytes: u32,
    /// UDP port of VXLAN (Calico's `vxlanPort`, 4789 by default).
    pub vxlan_port: u16,
    /// Show the programs' own log messages (through `log`, at level debug).
    pub verbose: bool,
    /// BTF file in place of the kernel's own.
    pub btf: Option<PathBuf>,
    /// Attach by TCX where the kernel has it; false: always by clsact.
    pub tcx: bool,
    /// By what to observe functions of the kernel.
    pub functions: Probes,
}

/// By what functions of the kernel are observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probes {
    /// Not at all.
    Off,
    /// kprobes and kretprobes.
    Kprobes,
    /// Trampolines (fentry, fexit) where there are programs for them and the kernel permits them, else kprobes.
    #[default]
    Cheapest,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ring_bytes: 16 << 20,
            vxlan_port: 4789,
            verbose: false,
            btf: None,
            tcx: true,
            functions: Probes::default(),
        }
    }
}

/// The programs, loaded; nothing is attached yet. Dropping it detaches everything.
pub struct Kernel {
    pub(super) config: Config,
    pub(super) offsets: Offsets,
    /// By the namespace it is for; 0: all.
    pub(super) instances: BTreeMap<Netns, Instance>,
    pub(super) attachments: Attachments,
    pub(super) scope: BTreeSet<IpNet>,
    pub(super) missing: BTreeMap<Hook, String>,
    pub(super) rings: Arc<Rings>,
    /// Which loading in this process it is.
    pub(super) number: u32,
    pub(super) functions: Functions,
    pub(super) notes: Vec<String>,
    has_btf: bool,
    ring_taken: bool,
    names: Names,
}

impl Kernel {
    /// Loads the programs. Fails with [`crate::error::NoPermission`] in the error chain where privileges are missing.
    pub fn load(config: &Config) -> Result<Self> {
        permission::check("load eBPF programs")?;
        if !config.ring_bytes.is_power_of_two() || config.ring_bytes < 4096 {
            bail!(
                "the ring's size of {} bytes is not a power of two of at least 4096",
                config.ring_bytes
            );
        }
        let mut notes = Vec::new();
        let mut missing = BTreeMap::new();
        let path = config.btf.as_deref().unwrap_or(Path::new(VMLINUX));
        let readable = permission::may_read_kernel();
        let btf = readable
            .and_then(|()| read_btf(path).map_err(|why| format!("no kernel type information: {why}")));
        let btf = btf.map_err(|why| {
            notes.push(format!(
                "{why}: only TC hooks observe; where and why packets are dropped is not seen"
            ));
            missing.insert(Hook::KfreeSkb, why);
        });
        let offsets = btf.as_ref().map_or(Offsets::UNKNOWN, |(_, offsets)| *offsets);
        let names = Names::new(
            btf.as_ref().ok().map(|(btf, _)| btf),
            offsets.kfree_has_reason == 1,
        );
        if btf.is_ok() {
            names.prepare();
        }
        let mut kernel = Self {
            config: config.clone(),
            offsets,
            instances: BTreeMap::new(),
            attachments: Attachments::default(),
            scope: BTreeSet::new(),
            missing,
            rings: Arc::new(Rings {
                arriving: Mutex::new(Vec::new()),
            }),
            number: LOADED.fetch_add(1, Ordering::Relaxed),
            functions: Functions::default(),
            notes,
            has_btf: btf.is_ok(),
            ring_taken: false,
            names,
        };
        if kernel.has_btf {
            kernel.instance(0)?;
        }
        Ok(kernel)
    }

    /// The instance for a namespace, loaded at its first use.
    pub(super) fn instance(&mut self, netns: Netns) -> Result<&mut Instance> {
        let key = if self.has_btf { 0 } else { netns };
        match self.instances.entry(key) {
            Entry::Occupied(loaded) => Ok(loaded.into_mut()),
            Entry::Vacant(vacant) => {
                let mut instance = Instance::load(&self.config, &self.offsets, key)?;
                for prefix in &self.scope {
                    instance.change_scope(prefix, true)?;
                }
                self.rings.add(instance.take_ring()?);
                Ok(vacant.insert(instance))
            }
        }
    }

    /// The instance for a namespace, if it is loaded.
    pub(super) fn loaded_instance(&self, netns: Netns) -> Option<&Instance> {
        self.instances.get(&if self.has_btf { 0 } else { netns })
    }

    /// Attaches the hooks that are not bound to an interface. One that this kernel lacks is noted in
    /// [`Self::missing`] and is no error.
    pub fn attach_global(&mut self) -> Result<()> {
        for row in hooks::TABLE {
            let hooks::Attach::RawTracepoint(tracepoint) = row.attach else {
                continue;
            };
            if self.missing.contains_key(&row.hook) {
                continue;
            }
            self.note_global();
            if let Err(error) = self.instance(0)?.attach_raw_tracepoint(row.hook, tracepoint) {
                self.notes.push(format!(
                    "{} is not observed ({error:#}): {} are lost",
                    row.name, row.lost
                ));
                self.missing.insert(row.hook, format!("{error:#}"));
            }
        }
        Ok(())
    }

    /// Whether the programs find namespaces and packets by themselves.
    pub(super) fn has_btf(&self) -> bool {
        self.has_btf
    }

    /// Tries every hook: loads its program, and attaches it where it is not bound to an interface. What then is missing
    /// is what would be missing while watching.
    pub fn try_hooks(&mut self) -> Result<Vec<HookStatus>> {
        self.attach_global()?;
        self.attach_functions()?;
        for row in hooks::TABLE.iter().filter(|row| row.attach == hooks::Attach::Tc) {
            if let Err(error) = self.instance(0)?.classifier(row.hook) {
                self.missing.insert(row.hook, format!("{error:#}"));
            }
        }
        let hooks = self.hooks();
        self.detach_all()?;
        Ok(hooks)
    }

    /// One line for each thing that this kernel or configuration keeps from being observed.
    pub fn missing(&self) -> &[String] {
        &self.notes
    }

    /// Every hook and, for a missing one, why.
    pub fn hooks(&self) -> Vec<HookStatus> {
        hooks::TABLE
            .iter()
            .map(|row| HookStatus {
                hook: row.name.to_owned(),
                missing: self.why_missing(row),
            })
            .collect()
    }

    /// How many of the hooks that are not bound to an interface are there.
    pub fn global_hooks(&self) -> usize {
        let global = hooks::TABLE.iter().filter(|row| row.attach != hooks::Attach::Tc);
        global.filter(|row| self.why_missing(row).is_none()).count()
    }

    fn why_missing(&self, row: &hooks::Row) -> Option<String> {
        self.missing.get(&row.hook).cloned().or_else(|| self.untried(row))
    }

    /// The words for drop reasons and locations.
    pub fn names(&self) -> Names {
        self.names.clone()
    }

    /// The records, once.
    pub fn take_ring(&mut self) -> Result<Ring> {
        if std::mem::replace(&mut self.ring_taken, true) {
            bail!("the ring is drained already");
        }
        Ok(Ring::new(Arc::clone(&self.rings)))
    }

    /// Makes `prefixes` the scope: at tunnels, uplinks and drops only packets with an address in it are recorded.
    ///
    /// No node's own address may be in it: a packet between nodes is looked into only if neither of its addresses is
    /// in scope.
    pub fn set_scope(&mut self, prefixes: &[IpNet]) -> Result<()> {
        let wanted: BTreeSet<IpNet> = prefixes.iter().map(IpNet::trunc).collect();
        for instance in self.instances.values_mut() {
            // New ones first: where a block replaces a wider one, nothing is out of scope in between.
            for prefix in wanted.difference(&self.scope) {
                instance.change_scope(prefix, true)?;
            }
            for prefix in self.scope.difference(&wanted) {
                instance.change_scope(prefix, false)?;
            }
        }
        self.scope = wanted;
        Ok(())
    }
}

/// Reads the offsets of conntrack's types, which may be a module's. Without them translations are not told of, and the
/// rest goes on.
fn conntrack(btf: &Btf, path: &Path, offsets: &mut Offsets) {
    offsets::read_conntrack(btf, offsets);
    if offsets.ct_reply_tuple == OFFSET_UNKNOWN
        && path == Path::new(VMLINUX)
        && let Some(both) = with_module(btf, NF_CONNTRACK)
    {
        offsets::read_conntrack(&both, offsets);
    }
}

/// The same of the modules whose rules log, as far as they are loaded: with flow logs they are.
fn logs(btf: &Btf, path: &Path, offsets: &mut Offsets) {
    offsets::read_logs(btf, offsets);
    if path == Path::new(VMLINUX) {
        for both in LOGS.iter().filter_map(|module| with_module(btf, module)) {
            offsets::read_logs(&both, offsets);
        }
    }
}

fn with_module(btf: &Btf, module: &str) -> Option<Btf> {
    btf.with_module(&fs::read(module).ok()?).ok()
}

/// Reads BTF and the offsets in it; the error is a reason in words.
fn read_btf(path: &Path) -> Result<(Btf, Offsets), String> {
    let describe = |why: String| format!("{}: {why}", path.display());
    let data = fs::read(path).map_err(|error| describe(error.to_string()))?;
    let btf = Btf::parse(data).map_err(|error| describe(error.to_string()))?;
    let mut offsets = offsets::read(&btf);
    conntrack(&btf, path, &mut offsets);
    logs(&btf, path, &mut offsets);
    if !offsets::suffice(&offsets) {
        return Err(describe(
            "it lacks members of sk_buff, net_device or net".to_owned(),
        ));
    }
    Ok((btf, offsets))
}
