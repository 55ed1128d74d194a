//! The live source: real packets of this host.
//!
//! Three threads. The *control* thread finds nodes, attaches hooks and learns facts; the *drain* thread empties the
//! rings in batches; the caller's thread decodes, puts facts in front of observations and hands [`Item`]s on, in order of
//! time.

mod attach;
mod clock;
mod control;
mod enrich;
mod ledger;
mod pending;
mod repair;
mod rules;
mod told;

use std::{ops::ControlFlow, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, channel, unbounded_channel};

use self::{
    control::{Control, Message, Settings, Signals},
    enrich::HopAddresses,
    ledger::Books,
    pending::Pending,
    rules::{Asker, Reader},
};
use crate::{
    calico::{self, NodeView},
    event::{self, Fact, Header, Item, Pod},
    kernel::{self, Batch, Count, Drain, Dropped, Kernel, Names},
};

/// How often the ring is emptied. Waking per record costs half the packet rate; 16 MiB hold far more than this.
pub const DRAIN_PERIOD: Duration = Duration::from_millis(5);
/// Batches that may wait for the caller. While they do, the ring fills up behind them, and what it then refuses is
/// counted.
const BATCHES: usize = 64;

/// Settings of a live capture.
#[derive(Debug)]
pub struct Options {
    /// The programs.
    pub kernel: kernel::Config,
    /// Where to look for nodes.
    pub discovery: calico::Options,
    /// Interfaces to attach before all others.
    pub first: Vec<String>,
    /// The filter as typed, for the header.
    pub filter: Option<String>,
}

/// A live capture: programs loaded, nodes found, nothing attached yet.
pub struct Live {
    kernel: Kernel,
    views: Vec<NodeView>,
    options: Options,
}

impl Live {
    /// Loads the programs. Nodes may come later.
    pub fn new(options: Options) -> Result<Self> {
        let kernel = Kernel::load(&options.kernel)?;
        let views = calico::discover(&options.discovery).context("look for Calico nodes")?;
        Ok(Self {
            kernel,
            views,
            options,
        })
    }

    /// The nodes found so far.
    pub fn nodes(&self) -> &[NodeView] {
        &self.views
    }

    /// What does not observe on this machine and what is lost, a sentence each.
    pub fn missing(&self) -> &[String] {
        self.kernel.missing()
    }

    /// Looks again for nodes.
    pub fn look_again(&mut self) -> Result<()> {
        self.views = calico::discover(&self.options.discovery).context("look for Calico nodes")?;
        Ok(())
    }

    /// Observes until `stop` completes or `take` breaks. `ready` is told what is observed once every interface found at
    /// start has its hooks; records flow from the first hook on. Hands every item to `take`: the header first, then facts and
    /// observations, at the end the exact ledger and the end item (also after `take` broke; what it then says is
    /// ignored).
    pub async fn run(
        mut self,
        stop: impl Future<Output = ()>,
        ready: impl FnOnce(&str) + 'static,
        mut take: impl FnMut(Item) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        // Before the header, which says what observes. What is dropped now is out of scope: no node is known yet.
        saying_what_is_missing(&mut self.kernel, Kernel::attach_global)
            .context("attach the tracepoint skb:kfree_skb")?;
        let header = header(&self.kernel, self.options.filter.take());
        let names = self.kernel.names();
        let ring = self.kernel.take_ring()?;
        let (batch_sender, batches) = channel(BATCHES);
        let drain = Drain::start_with(ring, DRAIN_PERIOD, move |batch| {
            batch_sender.blocking_send(batch).map_err(|refused| refused.0)
        })?;
        let (sender, messages) = unbounded_channel();
        let halt = Arc::new(
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("make an eventfd")?,
        );
        let settings = Settings {
            discovery: self.options.discovery,
            first: self.options.first,
        };
        let signals = Signals {
            stop: Arc::clone(&halt),
        };
        let rules = Reader::start(sender.clone())?;
        let asker = rules.asker().clone();
        let control = Control::new(self.kernel, settings, self.views, sender, rules, signals);
        let control = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || control.run())
            .context("start the control thread")?;

        let mut stream = Stream {
            books: Books::default(),
            hops: HopAddresses::default(),
            ready: Some(Box::new(ready)),
            messages,
            batches,
            pending: Pending::default(),
            rules: asker,
            names,
            dropped: drain.dropped(),
        };
        let outcome = match take(Item::Header(header)) {
            Ok(ControlFlow::Continue(())) => stream.follow(stop, &mut take).await,
            other => other.map(|_| ()),
        };

        // Detach, drain, then read the counters: only so is the ledger exact.
        halt.write(1).context("ask the control thread to stop")?;
        let kernel = tokio::task::spawn_blocking(move || control.join())
            .await
            .context("wait for the control thread")?
            .map_err(|_panic| anyhow!("the control thread panicked"))?;
        stream.rest(drain, &kernel, &mut take).await.and(outcome)
    }
}

/// What the caller's thread reads from.
struct Stream {
    books: Books,
    hops: HopAddresses,
    ready: Option<Ready>,
    messages: UnboundedReceiver<Message>,
    batches: Receiver<Batch>,
    pending: Pending,
    /// Told when netfilter dropped something.
    rules: Asker,
    names: Names,
    dropped: Arc<Dropped>,
}

/// Told once what is observed.
type Ready = Box<dyn FnOnce(&str)>;
/// Takes items.
type Take<'a> = &'a mut dyn FnMut(Item) -> Result<ControlFlow<()>>;

impl Stream {
    /// Hands on what comes until `stop` completes or `take` breaks.
    async fn follow(
        &mut self,
        stop: impl Future<Output = ()>,
        take: &mut impl FnMut(Item) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let mut stop = std::pin::pin!(stop);
        loop {
            // Biased: a fact always goes before the records that need it, and a flood cannot keep a signal out.
            let flow = tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                Some(message) = self.messages.recv() => self.message(message, take)?,
                Some(batch) = self.batches.recv() => self.batch(&batch, take)?,
                else => return Ok(()),
            };
            if flow.is_break() {
                return Ok(());
            }
        }
    }

    /// What is left after the hooks are gone: the last records, the exact ledger, the end.
    async fn rest(&mut self, drain: Drain, kernel: &Kernel, take: Take<'_>) -> Result<()> {
        // On a thread of its own: it waits for room in the channel that is emptied here.
        let stopping = tokio::task::spawn_blocking(move || drain.stop());
        while let Some(batch) = self.batches.recv().await {
            while let Ok(message) = self.messages.try_recv() {
                let _: ControlFlow<()> = self.message(message, take)?;
            }
            let _: ControlFlow<()> = self.batch(&batch, take)?;
        }
        stopping.await.context("wait for the drain thread")??;
        let _: ControlFlow<()> = self.release(u64::MAX, take)?;
        let counts = kernel.counters().context("read the last counters")?;
        let time = clock::monotonic();
        let _: ControlFlow<()> = self.ledger(time, true, &counts, take)?;
        let _: ControlFlow<()> = take(Item::Tick { time })?;
        let _: ControlFlow<()> = take(Item::End { time })?;
        Ok(())
    }

    fn message(&mut self, message: Message, take: Take<'_>) -> Result<ControlFlow<()>> {
        match message {
            Message::Fact(fact) => {
                match &fact {
                    Fact::Node(node) => self.books.name(node.netns, node.name.clone()),
                    Fact::Pod(Pod {
                        pod_netns: Some(own),
                        netns,
                        ..
                    }) => self.books.pod(*own, *netns),
                    Fact::Attachment(attachment) => self.books.attachment(attachment),
                    _ => {}
                }
                return take(Item::Fact(fact));
            }
            Message::Lookup(netns, lookup) => self.hops.add(netns, lookup),
            Message::Changed(netns) => self.hops.invalidate(netns),
            Message::Gone(netns) => self.hops.remove(netns),
            Message::Counts(time, counts) => return self.ledger(time, false, &counts, take),
            Message::Ready(summary) => {
                if let Some(ready) = self.ready.take() {
                    ready(&summary);
                }
            }
            Message::Failed(error) => return Err(error),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn batch(&mut self, batch: &Batch, take: Take<'_>) -> Result<ControlFlow<()>> {
        // After a break the rest is still decoded, or the ledger would not add up.
        let mut flow = ControlFlow::Continue(());
        for record in batch.iter() {
            match event::decode(record, &self.names) {
                Ok(observation) => {
                    self.books.decoded(observation.netns, observation.hook);
                    // Drops are seen in all namespaces; what happens in those of others is not ours to tell.
                    if !self.books.is_ours(observation.netns) {
                        continue;
                    }
                    if observation.drop.as_ref().is_some_and(event::Drop::is_netfilter) {
                        self.rules.ask(observation.netns);
                    }
                    if let Some(fact) = self.hops.before(&observation) {
                        flow = either(flow, take(Item::Fact(fact))?);
                    }
                    self.pending.push(observation);
                }
                Err(error) => {
                    log::error!("a record of the ring cannot be decoded: {error}");
                    self.dropped.count(record);
                }
            }
        }
        let released = self.release(batch.time, take)?;
        Ok(either(flow, released))
    }

    /// Hands on, in order of time, the observations made before all rings were last begun to be emptied. Without any, that
    /// time has passed.
    fn release(&mut self, time: u64, take: Take<'_>) -> Result<ControlFlow<()>> {
        let released = self.pending.before(time);
        if released.len() == 0 && time != u64::MAX {
            return take(Item::Tick { time });
        }
        let mut flow = ControlFlow::Continue(());
        for observation in released {
            flow = either(flow, take(Item::Observation(observation))?);
        }
        Ok(flow)
    }

    fn ledger(&self, time: u64, exact: bool, counts: &[Count], take: Take<'_>) -> Result<ControlFlow<()>> {
        take(Item::Ledger(self.books.ledger(
            time,
            exact,
            counts,
            &self.dropped.counts(),
        )))
    }
}

fn either(one: ControlFlow<()>, other: ControlFlow<()>) -> ControlFlow<()> {
    if one.is_break() { one } else { other }
}

/// Attaches hooks, and says which turned out to be missing.
fn saying_what_is_missing<T>(
    kernel: &mut Kernel,
    attach: impl FnOnce(&mut Kernel) -> Result<T>,
) -> Result<T> {
    let said = kernel.missing().len();
    let attached = attach(kernel)?;
    for what in &kernel.missing()[said..] {
        log::warn!("{what}");
    }
    Ok(attached)
}

fn header(kernel: &Kernel, filter: Option<String>) -> Header {
    Header {
        format: event::FORMAT.to_owned(),
        version: event::VERSION,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: read_line("/proc/sys/kernel/random/boot_id"),
        host: read_line("/proc/sys/kernel/hostname"),
        kernel: read_line("/proc/sys/kernel/osrelease"),
        hooks: kernel.hooks(),
        filter,
        drain_period: u64::try_from(DRAIN_PERIOD.as_nanos()).unwrap_or(u64::MAX),
    }
}

/// A one-line file of the kernel; empty where it cannot be read.
fn read_line(path: &str) -> String {
    std::fs::read_to_string(path)
        .map(|text| text.trim_end().to_owned())
        .unwrap_or_default()
}
