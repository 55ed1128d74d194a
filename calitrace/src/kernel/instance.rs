//! The programs and maps as loaded once. Normally there is one instance for all namespaces; without BTF a program
//! cannot tell in which namespace it runs, so each namespace has an instance that was told at load.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, RingBuf, lpm_trie::Key},
    programs::{RawTracePoint, SchedClassifier},
};
use aya_log::EbpfLogger;
use calitrace_ebpf::{
    Hook,
    shared::{Counters, FIRST_SLOT, InterfaceKey, Offsets, SCOPE_PREFIXES, SLOTS, names},
};
use ipnet::IpNet;

use super::{interrupted::retried, load::Config, logs::Logs, permission};
use crate::{event::Netns, kernel::hooks};

/// The object with the programs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/calitrace-ebpf"));

/// Counts of an interface or namespace, by hook.
pub(super) type Totals = BTreeMap<(Netns, u32, Hook), Counters>;

/// Loaded programs and maps.
pub(super) struct Instance {
    ebpf: Ebpf,
    free_slots: Vec<u32>,
    next_slot: u32,
    slots: BTreeMap<(Netns, u32, Hook), u32>,
    /// How often the map of interfaces has changed.
    generation: u32,
    /// Counts of slots that were given back.
    folded: Totals,
    /// Shows the programs' own log; kept for as long as the programs run.
    _logs: Option<Logs>,
}

impl Instance {
    /// Loads maps and programs. `netns` is 0 where the programs find their namespace through `offsets`.
    pub(super) fn load(config: &Config, offsets: &Offsets, netns: Netns) -> Result<Self> {
        let loaded = load(config, offsets, netns).or_else(|error| {
            // Before 5.11 maps count against RLIMIT_MEMLOCK, which is 64 KiB by default.
            match permission::io_error(&error).and_then(std::io::Error::raw_os_error) {
                Some(libc::EPERM | libc::ENOMEM) if lift_memlock() => load(config, offsets, netns),
                _ => Err(error),
            }
        });
        let mut ebpf = loaded.map_err(|error| permission::explain(error, "load eBPF programs"))?;
        let logs = if config.verbose {
            // Before the programs: the logger takes its map out of `ebpf`, which must stay open.
            Some(Logs::start(
                EbpfLogger::init(&mut ebpf).context("read the programs' log")?,
            )?)
        } else {
            None
        };
        Ok(Self {
            ebpf,
            free_slots: Vec::new(),
            next_slot: FIRST_SLOT,
            slots: BTreeMap::new(),
            generation: 0,
            folded: Totals::new(),
            _logs: logs,
        })
    }

    /// The object.
    pub(super) fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// The ring, once.
    pub(super) fn take_ring(&mut self) -> Result<RingBuf<MapData>> {
        let map = self
            .ebpf
            .take_map(names::EVENTS)
            .ok_or_else(|| anyhow!("the ring is taken already"))?;
        RingBuf::try_from(map).context("map the ring buffer")
    }

    /// The TC program of a hook, loaded into the kernel at its first use.
    pub(super) fn classifier(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        self.classifier_named(hooks::row(hook).program)
    }

    /// A TC program, loaded into the kernel at its first use.
    pub(super) fn classifier_named(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        let program: &mut SchedClassifier = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| anyhow!("the object has no program {name}"))?
            .try_into()
            .with_context(|| format!("program {name}"))?;
        if program.fd().is_err() {
            retried(|| program.load()).map_err(|error| {
                permission::explain(
                    EbpfError::ProgramError(error),
                    &format!("load the program {name}"),
                )
            })?;
        }
        Ok(program)
    }

    /// The TC program of a hook, if it was loaded.
    pub(super) fn loaded_classifier(&self, hook: Hook) -> Option<&SchedClassifier> {
        let program: &SchedClassifier = self.ebpf.program(hooks::row(hook).program)?.try_into().ok()?;
        program.fd().is_ok().then_some(program)
    }

    /// Loads the raw tracepoint program of a hook and attaches it.
    pub(super) fn attach_raw_tracepoint(&mut self, hook: Hook, tracepoint: &str) -> Result<()> {
        let name = hooks::row(hook).program;
        let program: &mut RawTracePoint = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| anyhow!("the object has no program {name}"))?
            .try_into()
            .with_context(|| format!("program {name}"))?;
        let explain =
            |error, operation: String| permission::explain(EbpfError::ProgramError(error), &operation);
        if program.fd().is_err() {
            retried(|| program.load()).map_err(|error| explain(error, format!("load the program {name}")))?;
        }
        program
            .attach(tracepoint)
            .map_err(|error| explain(error, format!("attach to the raw tracepoint {tracepoint}")))?;
        Ok(())
    }

    /// Detaches the raw tracepoint program of a hook.
    pub(super) fn detach_raw_tracepoint(&mut self, hook: Hook) -> Result<()> {
        let name = hooks::row(hook).program;
        if let Some(program) = self.ebpf.program_mut(name) {
            let program: &mut RawTracePoint =
                program.try_into().with_context(|| format!("program {name}"))?;
            if program.fd().is_ok() {
                program
                    .unload()
                    .with_context(|| format!("detach the program {name}"))?;
            }
        }
        Ok(())
    }

    /// Gives an interface (0: the drops of a namespace) a slot of its own at a hook.
    pub(super) fn open_slot(&mut self, netns: Netns, ifindex: u32, hook: Hook) -> Result<()> {
        if self.slots.contains_key(&(netns, ifindex, hook)) {
            return Ok(());
        }
        let slot = self.free_slots.pop().or_else(|| {
            let slot = self.next_slot;
            (slot < SLOTS).then(|| self.next_slot += 1)?;
            Some(slot)
        });
        let slot = slot.ok_or_else(|| anyhow!("more than {} hooks are attached", SLOTS - FIRST_SLOT))?;
        let key = InterfaceKey {
            netns,
            ifindex,
            hook: hook as u32,
        };
        self.interfaces()?
            .insert(key, slot, 0)
            .context("write the map of interfaces")?;
        self.renew()?;
        self.slots.insert((netns, ifindex, hook), slot);
        Ok(())
    }

    /// Takes the slot back after its hook was detached; its counts are kept.
    pub(super) fn close_slot(&mut self, netns: Netns, ifindex: u32, hook: Hook) -> Result<()> {
        let Some(slot) = self.slots.remove(&(netns, ifindex, hook)) else {
            return Ok(());
        };
        let key = InterfaceKey {
            netns,
            ifindex,
            hook: hook as u32,
        };
        match self.interfaces()?.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error).context("write the map of interfaces"),
        }
        self.renew()?;
        let counted = self.read_slot(slot)?;
        add(self.folded.entry((netns, ifindex, hook)).or_default(), &counted);
        let cpus =
            aya::util::nr_cpus().map_err(|(path, error)| anyhow!(error).context(format!("read {path}")))?;
        let zeros =
            aya::maps::PerCpuValues::try_from(vec![Counters::default(); cpus]).context("count the CPUs")?;
        self.counters_mut()?
            .set(slot, zeros, 0)
            .context("reset a counter slot")?;
        self.free_slots.push(slot);
        Ok(())
    }

    /// Adds every count of this instance to `totals`; what no slot was known for goes to namespace 0, interface 0.
    pub(super) fn collect(&self, totals: &mut Totals) -> Result<()> {
        for (key, counters) in &self.folded {
            add(totals.entry(*key).or_default(), counters);
        }
        for (key, slot) in &self.slots {
            add(totals.entry(*key).or_default(), &self.read_slot(*slot)?);
        }
        for hook in Hook::ALL {
            let counters = self.read_slot(hook as u32)?;
            if counters.seen != 0 {
                add(totals.entry((0, 0, hook)).or_default(), &counters);
            }
        }
        Ok(())
    }

    /// Adds a prefix to the scope, or takes it out.
    pub(super) fn change_scope(&mut self, prefix: &IpNet, add: bool) -> Result<()> {
        let length = u32::from(prefix.prefix_len());
        let change = || {
            if add {
                "add a prefix to the scope"
            } else {
                "take a prefix out of the scope"
            }
        };
        match prefix {
            IpNet::V4(v4) => {
                let mut map = LpmTrie::<_, [u8; 4], u8>::try_from(self.map_mut(names::SCOPE_V4)?)?;
                let key = Key::new(length, v4.network().octets());
                if add {
                    map.insert(&key, 1, 0)
                } else {
                    map.remove(&key)
                }
            }
            IpNet::V6(v6) => {
                let mut map = LpmTrie::<_, [u8; 16], u8>::try_from(self.map_mut(names::SCOPE_V6)?)?;
                let key = Key::new(length, v6.network().octets());
                if add {
                    map.insert(&key, 1, 0)
                } else {
                    map.remove(&key)
                }
            }
        }
        .with_context(|| format!("{}: {prefix} (there is room for {SCOPE_PREFIXES})", change()))
    }

    fn map_mut(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.ebpf
            .map_mut(name)
            .ok_or_else(|| anyhow!("the object has no map {name}"))
    }

    /// Makes the programs look into the map of interfaces again.
    fn renew(&mut self) -> Result<()> {
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        Array::<_, u32>::try_from(self.map_mut(names::GENERATION)?)
            .and_then(|mut map| map.set(0, generation, 0))
            .context("write the generation of the map of interfaces")
    }

    fn interfaces(&mut self) -> Result<HashMap<&mut MapData, InterfaceKey, u32>> {
        HashMap::try_from(self.map_mut(names::INTERFACES)?).context("open the map of interfaces")
    }

    fn counters_mut(&mut self) -> Result<PerCpuArray<&mut MapData, Counters>> {
        PerCpuArray::try_from(self.map_mut(names::COUNTERS)?).context("open the map of counters")
    }

    fn read_slot(&self, slot: u32) -> Result<Counters> {
        let map = self
            .ebpf
            .map(names::COUNTERS)
            .ok_or_else(|| anyhow!("the object has no map of counters"))?;
        let map = PerCpuArray::<_, Counters>::try_from(map).context("open the map of counters")?;
        let mut sum = Counters::default();
        for counters in map.get(&slot, 0).context("read the counters")?.iter() {
            add(&mut sum, counters);
        }
        Ok(sum)
    }
}

fn load(config: &Config, offsets: &Offsets, netns: Netns) -> Result<Ebpf, EbpfError> {
    let vxlan_port = u32::from(config.vxlan_port);
    // A quarter: enough room for what arrives while the consumer wakes up.
    let watermark = u64::from(config.ring_bytes / 4);
    // The level of the programs' log messages; below it the verifier removes the calls.
    let level: u8 = if config.verbose {
        aya_log::Level::Debug as u8
    } else {
        0
    };
    EbpfLoader::new()
        .btf(None)
        .override_global(names::OFFSETS, offsets, true)
        .override_global(names::NETNS, &netns, true)
        .override_global(names::VXLAN_PORT, &vxlan_port, true)
        .override_global(names::WATERMARK, &watermark, true)
        .override_global(aya_log::LEVEL, &level, true)
        .map_max_entries(names::EVENTS, config.ring_bytes)
        .load(OBJECT)
}

/// Lifts the limit on locked memory; false if that is not permitted.
fn lift_memlock() -> bool {
    let unlimited = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: reads the struct only.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) == 0 }
}

/// Adds the counts of `more` to `sum`.
pub(super) fn add(sum: &mut Counters, more: &Counters) {
    sum.seen += more.seen;
    sum.non_ip += more.non_ip;
    sum.out_of_scope += more.out_of_scope;
    sum.filtered += more.filtered;
    sum.ring_refused += more.ring_refused;
    sum.recorded += more.recorded;
}
