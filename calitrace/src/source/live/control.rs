//! The control thread: keeps the hooks on the interfaces that are there, and says what it knows.
//!
//! An attach takes milliseconds and discovery some more, so both stay off the thread that handles records. Everything
//! it learns goes to that thread as a [`Message`], a fact always before the hook that makes its first use possible.

use std::{
    collections::BTreeSet,
    os::fd::AsFd as _,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};
use rustc_hash::FxHashMap;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    attach::{Site, changes},
    clock,
    repair::Watched,
    rules::{self, Reader, Wanted},
    saying_what_is_missing,
};
use crate::{
    calico::{self, NodeView, facts_changed, facts_gone},
    event::{Attachment, AttachmentState, Fact, Netns},
    kernel::{Attached, Count, Kernel},
    netns,
    route::{Lookup, Monitor},
};

/// Netlink tells of changes in a known namespace at once; new namespaces and clocks are looked for this often.
const ROUND: Duration = Duration::from_secs(1);
/// A namespace may become a node without a new namespace appearing: all are looked at this often at least.
const THOROUGH: Duration = Duration::from_secs(10);
/// Changes come in bursts (a pod: link, address, route, neighbour); one look after the burst sees them all.
const SETTLE: Duration = Duration::from_millis(20);

/// Functions of modules that were not loaded are tried again this often.
const AGAIN: Duration = Duration::from_secs(5);
/// Rules are read again this often at least: what leads to pods may have changed, and nothing was dropped.
const RULES: Duration = Duration::from_secs(30);
/// How long the rules of the nodes found at start are waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long drops are still observed after the last interface is not.
const LAST_DROPS: Duration = Duration::from_millis(60);

/// What the control thread tells the record thread.
#[derive(Debug)]
pub(super) enum Message {
    /// Something known from now on.
    Fact(Fact),
    /// A node whose kernel can be asked for hop addresses.
    Lookup(Netns, Arc<Lookup>),
    /// A node's links, addresses or routes changed.
    Changed(Netns),
    /// A node is gone.
    Gone(Netns),
    /// The kernel's counters.
    Counts(u64, Vec<Count>),
    /// Every hook of every node found at start is attached.
    Ready(String),
    /// The control thread failed.
    Failed(anyhow::Error),
}

/// What netlink told.
#[derive(Debug, Default, PartialEq, Eq)]
struct News {
    /// Nodes whose tables changed.
    changed: BTreeSet<Netns>,
    /// TC filters changed somewhere.
    filters: bool,
}

impl News {
    fn merge(&mut self, more: Self) {
        self.changed.extend(more.changed);
        self.filters |= more.filters;
    }
}

/// What the record thread tells the control thread.
#[derive(Debug)]
pub(super) struct Signals {
    /// Stop.
    pub(super) stop: Arc<EventFd>,
}

/// Settings of the control thread.
#[derive(Debug)]
pub(super) struct Settings {
    /// Where to look for nodes.
    pub(super) discovery: calico::Options,
    /// Interfaces to attach first.
    pub(super) first: Vec<String>,
}

/// The state of the control thread.
pub(super) struct Control {
    pub(super) kernel: Kernel,
    settings: Settings,
    messages: UnboundedSender<Message>,
    signals: Signals,
    rules: Reader,
    /// Closed when the rules of the nodes that came last were read.
    rules_read: Option<Receiver<()>>,
    views: Vec<NodeView>,
    monitors: FxHashMap<Netns, Monitor>,
    pub(super) sites: FxHashMap<Site, String>,
    /// What is known of each site from looking at it.
    pub(super) watched: FxHashMap<Site, Watched>,
    /// The namespaces there were when all were last looked at, and when that was.
    looked: (BTreeSet<Netns>, Instant),
    /// When the functions that are missing were last tried.
    tried: Instant,
    /// Addresses that lead to pods, by the rules.
    translated: BTreeSet<IpNet>,
    /// When the rules were asked for without a drop.
    rules_asked: Instant,
    /// Said once each: a namespace may vanish while it is looked at, a kernel may refuse every interface alike.
    warned: BTreeSet<String>,
}

impl Control {
    /// Takes over the loaded programs and the nodes found so far.
    pub(super) fn new(
        kernel: Kernel,
        settings: Settings,
        views: Vec<NodeView>,
        messages: UnboundedSender<Message>,
        rules: Reader,
        signals: Signals,
    ) -> Self {
        Self {
            kernel,
            settings,
            rules,
            rules_read: None,
            messages,
            signals,
            views,
            monitors: FxHashMap::default(),
            sites: FxHashMap::default(),
            watched: FxHashMap::default(),
            looked: (BTreeSet::new(), Instant::now()),
            tried: Instant::now(),
            translated: BTreeSet::new(),
            rules_asked: Instant::now(),
            warned: BTreeSet::new(),
        }
    }

    /// Attaches, watches and repairs until stopped; then detaches everything and gives the programs back, so that the
    /// counters can be read after the ring was drained.
    pub(super) fn run(mut self) -> Kernel {
        if let Err(error) = self.observe() {
            self.send(Message::Failed(error));
        }
        // A packet counts as delivered when no drop followed, so drops are observed a while longer than interfaces.
        for site in self.sites.keys().copied().collect::<Vec<_>>() {
            self.detach(site, AttachmentState::Detached);
        }
        std::thread::sleep(LAST_DROPS);
        if let Err(error) = self.kernel.detach_all() {
            log::warn!("{error:#}");
        }
        self.kernel
    }

    fn observe(&mut self) -> Result<()> {
        self.send(Message::Fact(Fact::Clock(clock::both())));
        let found = std::mem::take(&mut self.views);
        self.adopt(found)?;
        self.attach()?;
        // Whose programs stand beside ours.
        self.check();
        self.attach_functions()?;
        // What is dropped from now on is named, unless reading takes too long. Nothing is ever sent.
        if let Some(read) = self.rules_read.take()
            && read.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout)
        {
            log::warn!("policies that drop are not named yet: reading netfilter's rules takes long");
        }
        self.take_translated()?;
        self.send(Message::Ready(self.summary()));
        let mut round = Instant::now();
        while !self.wait(ROUND.saturating_sub(round.elapsed()))? {
            let mut news = self.news();
            if round.elapsed() >= ROUND {
                round = Instant::now();
                self.round()?;
            } else if news != News::default() {
                std::thread::sleep(SETTLE);
                // What came in meanwhile is part of the same burst.
                news.merge(self.news());
                if news.filters {
                    self.check();
                }
                self.refresh(&news.changed)?;
            }
        }
        Ok(())
    }

    /// Once a second: clocks, counters, new and vanished namespaces, lost attachments.
    fn round(&mut self) -> Result<()> {
        self.send(Message::Fact(Fact::Clock(clock::both())));
        let time = clock::monotonic();
        // Before the counts: a ledger says of the time before it which hooks were not there.
        self.check();
        let counts = self.kernel.counters()?;
        self.send(Message::Counts(time, counts));
        let namespaces: BTreeSet<Netns> = netns::list()?.iter().map(netns::Found::inode).collect();
        if namespaces != self.looked.0 || self.looked.1.elapsed() >= THOROUGH {
            let found = calico::discover(&self.settings.discovery).context("look for Calico nodes")?;
            self.looked = (namespaces, Instant::now());
            self.adopt(found)?;
        } else {
            // No notice tells of the files that name a pod.
            let unnamed = self.views.iter().filter(|view| view.has_unnamed_pods());
            let unnamed: BTreeSet<Netns> = unnamed.map(NodeView::netns).collect();
            self.look_again(&unnamed)?;
        }
        self.take_translated()?;
        if self.rules_asked.elapsed() >= RULES {
            self.rules_asked = Instant::now();
            self.rules.asker().ask(rules::ALL);
        }
        if self.tried.elapsed() >= AGAIN {
            self.tried = Instant::now();
            self.attach_functions()?;
        }
        self.attach()
    }

    /// Addresses that lead to pods, by the rules that were read meanwhile.
    fn take_translated(&mut self) -> Result<()> {
        let translated = self.rules.translated();
        if translated == self.translated {
            return Ok(());
        }
        self.translated = translated;
        self.adopt(self.views.clone())
    }

    /// Looks again at the nodes that said they changed.
    fn refresh(&mut self, changed: &BTreeSet<Netns>) -> Result<()> {
        for &netns in changed {
            self.send(Message::Changed(netns));
        }
        self.look_again(changed)?;
        self.attach()
    }

    /// Reads the tables of these nodes anew.
    fn look_again(&mut self, which: &BTreeSet<Netns>) -> Result<()> {
        if which.is_empty() {
            return Ok(());
        }
        let mut found = Vec::with_capacity(self.views.len());
        for view in &self.views {
            if which.contains(&view.netns()) {
                match view.refresh() {
                    Ok(fresh) => found.extend(fresh),
                    // A namespace may vanish while it is looked at; the next round finds out.
                    Err(error) => {
                        log::debug!("node {} cannot be looked at again: {error:#}", view.node.name);
                        found.push(view.clone());
                    }
                }
            } else {
                found.push(view.clone());
            }
        }
        self.adopt(found)
    }

    /// Makes `found` the known nodes, and says what is new.
    fn adopt(&mut self, mut found: Vec<NodeView>) -> Result<()> {
        let time = clock::monotonic();
        calico::add_services(&mut found, &self.translated);
        for gone in self
            .views
            .iter()
            .filter(|old| found.iter().all(|new| new.netns() != old.netns()))
        {
            self.monitors.remove(&gone.netns());
            for fact in facts_gone(gone, time) {
                self.send(Message::Fact(fact));
            }
            self.send(Message::Gone(gone.netns()));
        }
        let is_new = |view: &&NodeView| !self.monitors.contains_key(&view.netns());
        if found.len() != self.monitors.len() || found.iter().any(|view| is_new(&view)) {
            self.rules_read = Some(self.rules.adopt(found.iter().map(wanted).collect()));
        }
        let mut unwatched = Vec::new();
        for view in &found {
            let netns = view.netns();
            let old = self.views.iter().find(|old| old.netns() == netns);
            if !self.monitors.contains_key(&netns) {
                self.send(Message::Lookup(netns, Arc::clone(&view.lookup)));
                let opened = Monitor::open(&view.handle).map(|monitor| self.monitors.insert(netns, monitor));
                if let Err(error) = opened {
                    unwatched.push(format!(
                        "changes of node {} go unnoticed: {error:#}",
                        view.node.name
                    ));
                }
            }
            for fact in facts_changed(old, view, time) {
                self.send(Message::Fact(fact));
            }
        }
        for text in unwatched {
            self.warn(text);
        }
        let scope: BTreeSet<_> = found.iter().flat_map(|view| view.scope.iter().copied()).collect();
        self.kernel
            .set_scope(&scope.into_iter().collect::<Vec<_>>())
            .context("tell the programs which addresses are pods', blocks' and services'")?;
        self.views = found;
        Ok(())
    }

    /// Attaches what is missing, and lets go of what vanished. Comes back early when asked to stop.
    fn attach(&mut self) -> Result<()> {
        let changes = changes(&self.views, &self.sites, &self.settings.first);
        for site in changes.detach {
            self.detach(site, AttachmentState::Detached);
        }
        for (site, name) in changes.attach {
            if self.wait(Duration::ZERO)? {
                return Ok(());
            }
            let Some(view) = self.views.iter().find(|view| view.netns() == site.netns) else {
                continue;
            };
            match self
                .kernel
                .attach_tc(&view.handle, &name, site.ifindex, site.hook)
            {
                Ok(Attached::Yes) => {
                    self.sites.insert(site, name);
                    self.put_in_place(site);
                    self.attachment(site, AttachmentState::Attached);
                }
                Ok(Attached::Gone) => {}
                Err(error) => {
                    let text = format!(
                        "interface {name} of node {} is not observed: {error:#}",
                        view.node.name
                    );
                    self.warn(text);
                }
            }
        }
        Ok(())
    }

    /// Attaches functions of the kernel that are not attached yet, and says which there are and which are missing.
    fn attach_functions(&mut self) -> Result<()> {
        let attached = saying_what_is_missing(&mut self.kernel, Kernel::attach_functions)
            .context("attach to functions of the kernel")?;
        for hook in attached {
            let (netns, ifindex) = (0, 0);
            self.attachment(Site { netns, ifindex, hook }, AttachmentState::Attached);
        }
        Ok(())
    }

    fn detach(&mut self, site: Site, state: AttachmentState) {
        if let Err(error) = self.kernel.detach_tc(site.netns, site.ifindex, site.hook) {
            log::debug!("{error:#}");
        }
        self.sites.remove(&site);
        self.watched.remove(&site);
        self.attachment(site, state);
    }

    /// Waits for a change or the end of `patience`; true when asked to stop.
    fn wait(&self, patience: Duration) -> Result<bool> {
        let mut fds = vec![PollFd::new(self.signals.stop.as_fd(), PollFlags::POLLIN)];
        fds.extend(
            self.monitors
                .values()
                .map(|monitor| PollFd::new(monitor.as_fd(), PollFlags::POLLIN)),
        );
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for netlink changes"),
        }
        Ok(fds[0].any().unwrap_or(false))
    }

    /// What the netlink sockets have to tell.
    fn news(&mut self) -> News {
        let mut news = News::default();
        for (netns, monitor) in &mut self.monitors {
            match monitor.drain() {
                Ok(changes) => {
                    news.filters |= changes.filters || changes.resync;
                    if changes.tables() {
                        news.changed.insert(*netns);
                    }
                }
                Err(error) => log::debug!("netlink monitor of node {netns}: {error:#}"),
            }
        }
        news
    }

    /// What is observed, for a person.
    fn summary(&self) -> String {
        let names: Vec<&str> = self.views.iter().map(|view| view.node.name.as_str()).collect();
        let pods: usize = self.views.iter().map(|view| view.pods.len()).sum();
        format!(
            "{} node{} ({}) with {pods} pod{} through {} hooks",
            names.len(),
            if names.len() == 1 { "" } else { "s" },
            names.join(", "),
            if pods == 1 { "" } else { "s" },
            self.sites.len() + self.kernel.global_hooks(),
        )
    }

    fn attachment(&self, site: Site, state: AttachmentState) {
        self.send_attachment(site, state, None, Vec::new());
    }

    pub(super) fn send_attachment(
        &self,
        site: Site,
        state: AttachmentState,
        since: Option<u64>,
        others: Vec<String>,
    ) {
        let Site { netns, ifindex, hook } = site;
        self.send(Message::Fact(Fact::Attachment(Attachment {
            time: clock::monotonic(),
            netns,
            ifindex,
            hook,
            state,
            since,
            others,
        })));
    }

    /// The name of a node, for a person.
    pub(super) fn node_name(&self, netns: Netns) -> String {
        let view = self.views.iter().find(|view| view.netns() == netns);
        view.map_or_else(|| netns.to_string(), |view| view.node.name.clone())
    }

    fn warn(&mut self, text: String) {
        if !self.warned.contains(&text) {
            log::warn!("{text}");
            self.warned.insert(text);
        }
    }

    fn send(&self, message: Message) {
        // The record thread only goes away after it asked this one to stop.
        if self.messages.send(message).is_err() {
            log::debug!("nobody listens to the control thread any more");
        }
    }
}

fn wanted(view: &NodeView) -> Wanted {
    Wanted {
        handle: view.handle.clone(),
        name: view.node.name.clone(),
    }
}
