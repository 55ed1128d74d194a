//! Attaching to interfaces and detaching again, in each interface's own network namespace, and the counter slots that
//! go with it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use aya::programs::{
    Link as _, LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use calitrace_ebpf::{Direction, Hook};

use super::{
    clsact, functions, hooks, leftovers,
    load::Kernel,
    owner::{Handle, Owner},
    permission::program_io_error,
    sys,
};
use crate::{event::Netns, netns};

/// What the names of our programs begin with.
pub(super) const OUR_PREFIX: &str = "calitrace_";

/// How attaching went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// The hook observes the interface.
    Yes,
    /// The interface is gone, as a deleted pod's is: nothing to observe, and no error.
    Gone,
}

/// What is attached.
#[derive(Default)]
pub(super) struct Attachments {
    pub(super) tc: BTreeMap<(Netns, u32, Hook), Attachment>,
    /// Our sign of life; made with the first clsact filter.
    owner: Option<Owner>,
    /// Namespaces in which leftovers were looked for.
    swept: BTreeSet<Netns>,
    /// Whether TCX works; `None` before the first attempt.
    tcx: Option<bool>,
    global: bool,
}

pub(super) struct Attachment {
    pub(super) netns: netns::Handle,
    pub(super) ifname: String,
    link: SchedClassifierLink,
    pub(super) tcx: bool,
    /// Handle of a clsact filter.
    pub(super) handle: u32,
}

impl Kernel {
    /// Attaches a TC hook to an interface, in its namespace: first on ingress, so that a packet is seen as it comes,
    /// last on egress, so that one that another program drops is not seen leaving. Attached already: nothing to do.
    ///
    /// The name must still be that of `ifindex`; otherwise the interface counts as gone.
    pub fn attach_tc(
        &mut self,
        netns: &netns::Handle,
        ifname: &str,
        ifindex: u32,
        hook: Hook,
    ) -> Result<Attached> {
        let key = (netns.inode(), ifindex, hook);
        if self.attachments.tc.contains_key(&key) {
            return Ok(Attached::Yes);
        }
        let try_tcx = self.config.tcx && self.attachments.tcx != Some(false);
        let tcx_known = self.attachments.tcx == Some(true);
        self.sweep_once(netns);
        let instance = self.instance(netns.inode())?;
        // Before the first packet: it must not be counted elsewhere.
        for row in hooks::TABLE.iter().filter(|row| row.attach != hooks::Attach::Tc) {
            instance.open_slot(netns.inode(), 0, row.hook)?;
        }
        instance.open_slot(netns.inode(), ifindex, hook)?;
        let classifier = instance.classifier(hook)?;
        let target = Target {
            ifname,
            ifindex,
            hook,
            tcx_known,
        };
        let mut attached = Ok(Tried::NoTcx);
        if try_tcx {
            attached = netns.run(|| attach_tcx(classifier, &target));
        }
        if let Ok(Tried::NoTcx) = attached {
            attached = self.attach_clsact(netns, &target);
        }
        match attached {
            Ok(Tried::Attached(link)) => {
                self.attachments.tcx = Some(link.tcx);
                let attachment = Attachment {
                    netns: netns.clone(),
                    ifname: ifname.to_owned(),
                    link: link.link,
                    tcx: link.tcx,
                    handle: link.handle,
                };
                self.attachments.tc.insert(key, attachment);
                Ok(Attached::Yes)
            }
            Ok(Tried::Gone | Tried::NoTcx) => {
                self.instance(netns.inode())?
                    .close_slot(netns.inode(), ifindex, hook)?;
                Ok(Attached::Gone)
            }
            Err(error) => {
                self.instance(netns.inode())?
                    .close_slot(netns.inode(), ifindex, hook)?;
                Err(error.context(format!("cannot attach {} to {ifname}", hooks::row(hook).name)))
            }
        }
    }

    fn attach_clsact(&mut self, netns: &netns::Handle, target: &Target<'_>) -> Result<Tried> {
        let owner = match &self.attachments.owner {
            Some(owner) => owner,
            None => self.attachments.owner.insert(Owner::new()?),
        };
        let handle = Handle {
            token: owner.token,
            hook: target.hook as u32,
            number: self.number,
            own_qdisc: false,
        };
        let classifier = self.instance(netns.inode())?.classifier(target.hook)?;
        netns.run(|| attach_clsact(classifier, target, handle))
    }

    /// Looks for what a killed run left in a namespace, before anything is attached there, whichever way. Not to
    /// succeed keeps nobody from observing.
    fn sweep_once(&mut self, netns: &netns::Handle) {
        if !self.attachments.swept.insert(netns.inode()) {
            return;
        }
        match leftovers::remove(netns) {
            Ok(found) => {
                for leftover in found {
                    log::info!("removed what a killed run of calitrace left: {leftover}");
                }
            }
            Err(error) => {
                log::warn!("what a killed run of calitrace may have left is still there: {error:#}");
            }
        }
    }

    /// Detaches a TC hook from an interface and keeps its counts. Not attached, or the interface gone: no error.
    pub fn detach_tc(&mut self, netns: Netns, ifindex: u32, hook: Hook) -> Result<()> {
        let Some(attachment) = self.attachments.tc.remove(&(netns, ifindex, hook)) else {
            return Ok(());
        };
        let Attachment {
            netns: namespace,
            ifname,
            link,
            tcx,
            handle,
        } = attachment;
        let detached = if tcx {
            detach_tcx(link)
        } else {
            namespace.run(|| {
                match link.detach() {
                    Err(error) if gone(&error) || taken_away(&error) => return Ok(()),
                    done => done?,
                }
                sys::wait_for_running_programs();
                if Handle::decode(handle).own_qdisc {
                    clsact::remove_if_empty(ifindex)
                } else {
                    Ok(())
                }
            })
        };
        // The program no longer runs there.
        let closed = self.instance(netns)?.close_slot(netns, ifindex, hook);
        detached.with_context(|| format!("cannot detach {} from {ifname}", hooks::row(hook).name))?;
        closed
    }

    /// Detaches everything. Goes on after an error and returns the first.
    pub fn detach_all(&mut self) -> Result<()> {
        let keys: Vec<_> = self.attachments.tc.keys().copied().collect();
        let mut result = Ok(());
        for (netns, ifindex, hook) in keys {
            result = result.and(self.detach_tc(netns, ifindex, hook));
        }
        if std::mem::take(&mut self.attachments.global) {
            for instance in self.instances.values_mut() {
                for row in hooks::TABLE {
                    if let hooks::Attach::RawTracepoint(_) = row.attach {
                        result = result.and(instance.detach_raw_tracepoint(row.hook));
                    }
                }
                result = result.and(functions::detach(instance.ebpf()));
            }
            sys::wait_for_running_programs();
        }
        result
    }

    /// What is attached to interfaces: namespace, interface, hook.
    pub fn attached(&self) -> impl Iterator<Item = (Netns, u32, Hook)> {
        self.attachments.tc.keys().copied()
    }

    pub(super) fn note_global(&mut self) {
        self.attachments.global = true;
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Err(error) = self.detach_all() {
            log::warn!("{error:#}");
        }
    }
}

struct Done {
    link: SchedClassifierLink,
    tcx: bool,
    handle: u32,
}

fn detach_tcx(link: SchedClassifierLink) -> Result<()> {
    let id = <&FdLink>::try_from(&link)
        .context("a TCX link")?
        .info()
        .context("ask for the link's id")?
        .id();
    match sys::detach_link(id) {
        // The link is without an interface since that was deleted.
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::ENOENT)) => {
            Err(error).context("detach the TCX link")
        }
        _ => link.detach().context("close the TCX link"),
    }
}

/// What to attach to.
struct Target<'a> {
    ifname: &'a str,
    ifindex: u32,
    hook: Hook,
    /// TCX has worked before, so that an error does not mean that the kernel lacks it.
    tcx_known: bool,
}

/// How an attempt ended.
enum Tried {
    Attached(Done),
    Gone,
    /// The kernel has no TCX.
    NoTcx,
}

/// Attaches in the calling thread's namespace.
fn attach_tcx(classifier: &mut SchedClassifier, target: &Target<'_>) -> Result<Tried> {
    if ifindex_of(target.ifname) != Some(target.ifindex) {
        return Ok(Tried::Gone);
    }
    let order = if target.hook.direction() == Direction::Ingress {
        LinkOrder::first()
    } else {
        LinkOrder::last()
    };
    let options = TcAttachOptions::TcxOrder(order);
    match classifier.attach_with_options(target.ifname, direction(target.hook), options) {
        Ok(id) => Ok(Tried::Attached(Done {
            link: classifier.take_link(id).context("keep the TCX link")?,
            tcx: true,
            handle: 0,
        })),
        Err(error) if gone(&error) => Ok(Tried::Gone),
        // Before 6.6, and without CONFIG_NET_XGRESS.
        Err(error) if !target.tcx_known && unsupported(&error) => {
            log::debug!("no TCX on this kernel ({error}): clsact instead");
            Ok(Tried::NoTcx)
        }
        Err(error) => Err(error).context("attach by TCX"),
    }
}

/// As [`attach_tcx`], by a filter on a clsact qdisc.
fn attach_clsact(classifier: &mut SchedClassifier, target: &Target<'_>, mut handle: Handle) -> Result<Tried> {
    let &Target {
        ifname,
        ifindex,
        hook,
        ..
    } = target;
    if ifindex_of(ifname) != Some(ifindex) {
        return Ok(Tried::Gone);
    }
    let ingress = hook.direction() == Direction::Ingress;
    let direction = direction(hook);
    let added = clsact::add(ifname)?;
    // On an ingress qdisc a filter for egress would see what comes in.
    if !added
        && !ingress
        && clsact::interfaces()?
            .get(&ifindex)
            .is_some_and(|kind| kind == "ingress")
    {
        bail!(
            "it has an ingress qdisc (a bandwidth limit, as a rule), in whose place a clsact qdisc would have to be:              what leaves it can be observed by TCX only, from Linux 6.6 on"
        );
    }
    let mut all = clsact::filters(ifindex, TcAttachType::Ingress)?;
    all.extend(clsact::filters(ifindex, TcAttachType::Egress)?);
    // A qdisc that another run of calitrace added goes with the last of its and our filters.
    handle.own_qdisc = added
        || all
            .iter()
            .any(|filter| filter.is_akin() && Handle::decode(filter.handle).own_qdisc);
    let beside = clsact::filters(ifindex, direction)?;
    let options = NlOptions {
        priority: clsact::free_priority(&beside, ingress),
        handle: TcHandle::from(handle.encode()),
        classid: None,
    };
    match classifier.attach_with_options(ifname, direction, TcAttachOptions::Netlink(options)) {
        // aya tells filters apart by interface index, which is not enough for several namespaces.
        Ok(id) => Ok(Tried::Attached(Done {
            link: classifier.take_link(id).context("keep the clsact filter")?,
            tcx: false,
            handle: handle.encode(),
        })),
        Err(error) if gone(&error) => Ok(Tried::Gone),
        Err(error) => {
            if added {
                clsact::remove_if_empty(ifindex)?;
            }
            Err(error).context("attach a clsact filter")
        }
    }
}

pub(super) fn direction(hook: Hook) -> TcAttachType {
    match hook.direction() {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress | Direction::None => TcAttachType::Egress,
    }
}

pub(super) fn ifindex_of(ifname: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(ifname).ok()
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::TcError(TcError::NetlinkError(error)) | ProgramError::NetlinkError(error) => {
            error.raw_os_error()
        }
        other => program_io_error(other)?.raw_os_error(),
    }
}

/// Whether an error says that the interface has vanished.
pub(super) fn gone(error: &ProgramError) -> bool {
    matches!(error, ProgramError::UnknownInterface { .. })
        || matches!(errno(error), Some(libc::ENODEV | libc::ENXIO))
}

/// Whether an error says that a clsact filter, or its qdisc, is there no more.
fn taken_away(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::ENOENT | libc::EINVAL))
}

/// Whether an error says that the kernel has no TCX.
pub(super) fn unsupported(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EINVAL | libc::EOPNOTSUPP))
}
