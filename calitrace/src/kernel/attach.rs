//! Attaching to interfaces and detaching again, in each interface's own network namespace, and the counter slots that
//! go with it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::programs::{
    Link as _, LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use calitrace_ebpf::{Direction, Hook};

use super::{clsact, hooks, load::Kernel, permission::program_io_error, sys};
use crate::{event::Netns, netns};

/// Priorities of our clsact filters: the first that a filter can have on ingress, and one behind all that others
/// commonly use on egress (Felix: below 50000).
const FIRST_PRIORITY: u16 = 1;
const LAST_PRIORITY: u16 = 0xfff0;

/// How attaching went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// The hook observes the interface.
    Yes,
    /// The interface is gone, as a deleted pod's is: nothing to observe, and no error.
    Gone,
}

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

/// What is attached.
#[derive(Default)]
pub(super) struct Attachments {
    tc: BTreeMap<(Netns, u32, Hook), Attachment>,
    /// Interfaces that we added a clsact qdisc to.
    qdiscs: BTreeMap<(Netns, u32), netns::Handle>,
    /// Whether TCX works; `None` before the first attempt.
    tcx: Option<bool>,
    global: bool,
}

struct Attachment {
    netns: netns::Handle,
    ifname: String,
    link: SchedClassifierLink,
    tcx: bool,
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
        let handle = clsact::handle(self.number, hook);
        let instance = self.instance(netns.inode())?;
        // Before the first packet: it must not be counted elsewhere.
        instance.open_slot(netns.inode(), 0, Hook::KfreeSkb)?;
        instance.open_slot(netns.inode(), ifindex, hook)?;
        let classifier = instance.classifier(hook)?;
        let target = Target {
            ifname,
            ifindex,
            hook,
            handle,
            try_tcx,
            tcx_known,
        };
        let attached = netns.run(|| attach(classifier, &target));
        match attached {
            Ok(Some(done)) => {
                if done.tcx {
                    self.attachments.tcx = Some(true);
                } else {
                    self.attachments.tcx = Some(false);
                    if done.added_qdisc {
                        self.attachments
                            .qdiscs
                            .insert((netns.inode(), ifindex), netns.clone());
                    }
                }
                let attachment = Attachment {
                    netns: netns.clone(),
                    ifname: ifname.to_owned(),
                    link: done.link,
                    tcx: done.tcx,
                };
                self.attachments.tc.insert(key, attachment);
                Ok(Attached::Yes)
            }
            Ok(None) => {
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

    /// Detaches a TC hook from an interface and keeps its counts. Not attached, or the interface gone: no error.
    pub fn detach_tc(&mut self, netns: Netns, ifindex: u32, hook: Hook) -> Result<()> {
        let Some(attachment) = self.attachments.tc.remove(&(netns, ifindex, hook)) else {
            return Ok(());
        };
        let last = !self
            .attachments
            .tc
            .keys()
            .any(|&(other, index, _)| (other, index) == (netns, ifindex));
        let qdisc = if last {
            self.attachments.qdiscs.remove(&(netns, ifindex))
        } else {
            None
        };
        let Attachment {
            netns: handle,
            ifname,
            link,
            tcx,
        } = attachment;
        let detached = if tcx {
            detach_tcx(link)
        } else {
            handle.run(|| {
                match link.detach() {
                    Err(error) if gone(&error) || taken_away(&error) => return Ok(()),
                    done => done?,
                }
                sys::wait_for_running_programs();
                if qdisc.is_some() {
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
            }
            sys::wait_for_running_programs();
        }
        result
    }

    /// Looks whether an attachment is still where it should be.
    pub fn check_tc(&self, netns: Netns, ifindex: u32, hook: Hook) -> Result<AttachmentCheck> {
        let Some(attachment) = self.attachments.tc.get(&(netns, ifindex, hook)) else {
            return Ok(AttachmentCheck::Lost);
        };
        let program = self
            .loaded_instance(netns)
            .and_then(|instance| instance.loaded_classifier(hook))
            .context("the program is not loaded")?;
        let id = program.info().context("ask for the program's id")?.id();
        let ifname = &attachment.ifname;
        let direction = direction(hook);
        let handle = clsact::handle(self.number, hook);
        attachment.netns.run(|| {
            if ifindex_of(ifname) != Some(ifindex) {
                return Ok(AttachmentCheck::Gone);
            }
            let place = if attachment.tcx {
                let (_, programs) = SchedClassifier::query_tcx(ifname, direction)
                    .with_context(|| format!("list the TCX programs of {ifname}"))?;
                let at = programs.iter().position(|program| program.id() == id);
                at.map(|at| (at, programs.len()))
            } else {
                let filters = clsact::filters(ifindex, direction)?;
                let at = filters.iter().position(|filter| filter.handle == handle);
                at.map(|at| (at, filters.len()))
            };
            Ok(match (place, hook.direction()) {
                (None, _) => AttachmentCheck::Lost,
                (Some((0, _)), Direction::Ingress) => AttachmentCheck::InPlace,
                (Some((at, count)), Direction::Egress) if at + 1 == count => AttachmentCheck::InPlace,
                (Some(_), _) => AttachmentCheck::Displaced,
            })
        })
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
    added_qdisc: bool,
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

/// What to attach to, and how.
struct Target<'a> {
    ifname: &'a str,
    ifindex: u32,
    hook: Hook,
    /// Handle of a clsact filter.
    handle: u32,
    try_tcx: bool,
    /// TCX has worked before, so that an error does not mean that the kernel lacks it.
    tcx_known: bool,
}

/// Attaches in the calling thread's namespace; `None` if the interface is gone.
fn attach(classifier: &mut SchedClassifier, target: &Target<'_>) -> Result<Option<Done>> {
    let &Target {
        ifname,
        ifindex,
        hook,
        ..
    } = target;
    if ifindex_of(ifname) != Some(ifindex) {
        return Ok(None);
    }
    let ingress = hook.direction() == Direction::Ingress;
    let direction = direction(hook);
    if target.try_tcx {
        let order = if ingress {
            LinkOrder::first()
        } else {
            LinkOrder::last()
        };
        match classifier.attach_with_options(ifname, direction, TcAttachOptions::TcxOrder(order)) {
            Ok(id) => {
                let link = classifier.take_link(id).context("keep the TCX link")?;
                return Ok(Some(Done {
                    link,
                    tcx: true,
                    added_qdisc: false,
                }));
            }
            Err(error) if gone(&error) => return Ok(None),
            // Before 6.6, and without CONFIG_NET_XGRESS.
            Err(error) if !target.tcx_known && unsupported(&error) => {
                log::debug!("no TCX on this kernel ({error}): clsact instead");
            }
            Err(error) => return Err(error).context("attach by TCX"),
        }
    }
    clsact::sweep(ifindex)?;
    let added_qdisc = clsact::add(ifname)?;
    let options = NlOptions {
        priority: if ingress { FIRST_PRIORITY } else { LAST_PRIORITY },
        handle: TcHandle::from(target.handle),
        classid: None,
    };
    match classifier.attach_with_options(ifname, direction, TcAttachOptions::Netlink(options)) {
        // aya tells filters apart by interface index, which is not enough for several namespaces.
        Ok(id) => {
            let link = classifier.take_link(id).context("keep the clsact filter")?;
            Ok(Some(Done {
                link,
                tcx: false,
                added_qdisc,
            }))
        }
        Err(error) if gone(&error) => Ok(None),
        Err(error) => {
            if added_qdisc {
                clsact::remove_if_empty(ifindex)?;
            }
            Err(error).context("attach a clsact filter")
        }
    }
}

fn direction(hook: Hook) -> TcAttachType {
    match hook.direction() {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress | Direction::None => TcAttachType::Egress,
    }
}

fn ifindex_of(ifname: &str) -> Option<u32> {
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
fn gone(error: &ProgramError) -> bool {
    matches!(error, ProgramError::UnknownInterface { .. })
        || matches!(errno(error), Some(libc::ENODEV | libc::ENXIO))
}

/// Whether an error says that a clsact filter, or its qdisc, is there no more.
fn taken_away(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::ENOENT | libc::EINVAL))
}

/// Whether an error says that the kernel has no TCX.
fn unsupported(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EINVAL | libc::EOPNOTSUPP))
}
