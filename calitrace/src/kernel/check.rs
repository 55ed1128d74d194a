//! Whether attachments are still where they should be, and whose programs stand beside them: Felix's eBPF dataplane
//! attaches its own to the same interfaces, and takes whole qdiscs away when it does (`felix/bpf/tc/attach.go`,
//! Calico 3.31 and later).

use std::collections::{BTreeMap, btree_map::Entry};

use anyhow::{Context as _, Result};
use aya::programs::{ProgramError, SchedClassifier};
use calitrace_ebpf::{Direction, Hook};

use super::{
    attach::{self, OUR_PREFIX},
    clsact,
    load::Kernel,
};
use crate::{event::Netns, netns};

/// What has become of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentCheck {
    /// It is where it should be.
    InPlace,
    /// It observes, but another program has come before it on ingress, or behind it on egress.
    Displaced,
    /// Somebody took it away.
    Lost,
    /// The interface is gone.
    Gone,
}

/// An attachment as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The namespace.
    pub netns: Netns,
    /// Interface index there.
    pub ifindex: u32,
    /// The hook.
    pub hook: Hook,
    /// What has become of it.
    pub state: AttachmentCheck,
    /// Names of the TC programs of others in the same direction of the interface, as far as the kernel keeps them (15
    /// bytes by TCX); other kinds of filters by their kind. Programs of calitrace, this one or another, are left out:
    /// they change nothing.
    pub others: Vec<String>,
}

/// An attachment as it should be.
struct Wanted<'a> {
    ifname: &'a str,
    ifindex: u32,
    hook: Hook,
    tcx: bool,
    program: u32,
    /// Handle of a clsact filter.
    handle: u32,
}

impl Kernel {
    /// Looks at every attachment, with one visit to each namespace. What cannot be looked at is told to `failed` and
    /// left out.
    pub fn check(&self, mut failed: impl FnMut(Netns, anyhow::Error)) -> Vec<Checked> {
        let mut found = Vec::new();
        for (netns, (handle, keys)) in self.by_namespace() {
            match self.check_namespace(&handle, &keys) {
                Ok(checked) => found.extend(checked),
                Err(error) => failed(netns, error),
            }
        }
        found
    }

    /// Looks whether one attachment is still where it should be.
    pub fn check_tc(&self, netns: Netns, ifindex: u32, hook: Hook) -> Result<AttachmentCheck> {
        let Some(attachment) = self.attachments.tc.get(&(netns, ifindex, hook)) else {
            return Ok(AttachmentCheck::Lost);
        };
        let checked = self.check_namespace(&attachment.netns, &[(netns, ifindex, hook)])?;
        let [Checked { state, .. }] = checked[..] else {
            return Ok(AttachmentCheck::Lost);
        };
        Ok(state)
    }

    #[expect(
        clippy::type_complexity,
        reason = "the keys of a namespace's attachments, with its handle"
    )]
    fn by_namespace(&self) -> BTreeMap<Netns, (netns::Handle, Vec<(Netns, u32, Hook)>)> {
        let mut namespaces = BTreeMap::new();
        for (key, attachment) in &self.attachments.tc {
            namespaces
                .entry(key.0)
                .or_insert_with(|| (attachment.netns.clone(), Vec::new()))
                .1
                .push(*key);
        }
        namespaces
    }

    fn check_namespace(&self, handle: &netns::Handle, keys: &[(Netns, u32, Hook)]) -> Result<Vec<Checked>> {
        let mut programs: BTreeMap<Hook, u32> = BTreeMap::new();
        for &(netns, _, hook) in keys {
            let program = self
                .loaded_instance(netns)
                .and_then(|instance| instance.loaded_classifier(hook))
                .context("the program is not loaded")?;
            if let Entry::Vacant(vacant) = programs.entry(hook) {
                vacant.insert(program.info().context("ask for the program's id")?.id());
            }
        }
        let wanted: Vec<Wanted<'_>> = keys
            .iter()
            .filter_map(|key| {
                let attachment = self.attachments.tc.get(key)?;
                Some(Wanted {
                    ifname: &attachment.ifname,
                    ifindex: key.1,
                    hook: key.2,
                    tcx: attachment.tcx,
                    program: *programs.get(&key.2)?,
                    handle: attachment.handle,
                })
            })
            .collect();
        let netns = handle.inode();
        handle.run(|| {
            let with_qdisc = clsact::interfaces()?;
            let mut checked = Vec::with_capacity(wanted.len());
            for wanted in &wanted {
                let (state, others) = look(wanted, with_qdisc.contains_key(&wanted.ifindex))?;
                checked.push(Checked {
                    netns,
                    ifindex: wanted.ifindex,
                    hook: wanted.hook,
                    state,
                    others,
                });
            }
            Ok(checked)
        })
    }
}

/// One program or filter on an interface.
struct Neighbour {
    ours: bool,
    /// A program of another run of calitrace.
    akin: bool,
    name: String,
}

/// Looks at one attachment, in the calling thread's namespace. Filters are listed only where there is a qdisc for them.
fn look(wanted: &Wanted<'_>, with_qdisc: bool) -> Result<(AttachmentCheck, Vec<String>)> {
    if attach::ifindex_of(wanted.ifname) != Some(wanted.ifindex) {
        return Ok((AttachmentCheck::Gone, Vec::new()));
    }
    let direction = attach::direction(wanted.hook);
    let ingress = wanted.hook.direction() == Direction::Ingress;
    let by_tcx: Vec<Neighbour> = match SchedClassifier::query_tcx(wanted.ifname, direction) {
        Ok((_, programs)) => programs
            .iter()
            .map(|program| {
                let name = program.name_as_str().unwrap_or_default().to_owned();
                Neighbour {
                    ours: wanted.tcx && program.id() == wanted.program,
                    akin: name.starts_with(OUR_PREFIX),
                    name,
                }
            })
            .collect(),
        Err(error) if attach::gone(&error) => return Ok((AttachmentCheck::Gone, Vec::new())),
        // Before 6.6 there is none.
        Err(error) if !wanted.tcx && attach::unsupported(&error) => Vec::new(),
        // One that was there when they were counted has been unloaded since.
        Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
            return look(wanted, with_qdisc);
        }
        Err(error) => {
            return Err(error).with_context(|| format!("list the TCX programs of {}", wanted.ifname));
        }
    };
    let filters = if with_qdisc {
        clsact::filters(wanted.ifindex, direction)?
    } else {
        Vec::new()
    };
    let by_clsact: Vec<Neighbour> = filters
        .into_iter()
        .filter(|filter| filter.chain == 0)
        .map(|filter| Neighbour {
            ours: !wanted.tcx && filter.handle == wanted.handle && filter.is_akin(),
            akin: filter.is_akin(),
            name: filter.label(),
        })
        .collect();
    let chain = if wanted.tcx { &by_tcx } else { &by_clsact };
    let state = match chain.iter().position(|neighbour| neighbour.ours) {
        None => AttachmentCheck::Lost,
        Some(at) => {
            let outside = if ingress { &chain[..at] } else { &chain[at + 1..] };
            if outside.iter().all(|neighbour| neighbour.akin) {
                AttachmentCheck::InPlace
            } else {
                AttachmentCheck::Displaced
            }
        }
    };
    let others = by_tcx.into_iter().chain(by_clsact);
    let others = others.filter(|neighbour| !neighbour.ours && !neighbour.akin);
    Ok((state, others.map(|neighbour| neighbour.name).collect()))
}
