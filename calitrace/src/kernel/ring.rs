//! Draining the ring: a thread of its own empties it every few milliseconds, or when the kernel side says that it
//! fills up, and hands on batches of raw records. Knows nothing of what is in them.

use std::{
    collections::BTreeMap,
    mem::offset_of,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{MapData, RingBuf};
use calitrace_ebpf::{Hook, Plain};
use nix::{
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
    },
    time::{ClockId, clock_gettime},
};

use crate::event::Netns;

/// Bytes after which a batch is handed on although the ring is not empty.
const BATCH_BYTES: usize = 1 << 20;
/// How long at most passes without a batch, even an empty one.
const IDLE: Duration = Duration::from_millis(10);

/// Rings that the drain is to read: those of instances loaded while it runs arrive here.
pub(super) struct Rings {
    pub(super) arriving: Mutex<Vec<RingBuf<MapData>>>,
}

impl Rings {
    pub(super) fn add(&self, ring: RingBuf<MapData>) {
        self.arriving
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(ring);
    }

    fn take(&self) -> Vec<RingBuf<MapData>> {
        std::mem::take(&mut self.arriving.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The reading end of the kernel side.
pub struct Ring {
    rings: Arc<Rings>,
}

impl Ring {
    pub(super) fn new(rings: Arc<Rings>) -> Self {
        Self { rings }
    }
}

/// Raw records, in the order of the ring.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    /// `CLOCK_MONOTONIC` in nanoseconds when all rings were last begun to be emptied: a record made before it is in this
    /// batch or an earlier one, unless its program was still running then.
    pub time: u64,
}

impl Batch {
    /// The records.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, &end)| &self.bytes[start as usize..end as usize])
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether it only says that time has passed.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether another record fits.
    fn full(&self) -> bool {
        self.bytes.len() >= BATCH_BYTES
    }

    fn push(&mut self, record: &[u8]) {
        self.bytes.extend_from_slice(record);
        self.ends
            .push(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX));
    }
}

/// Records that were read from the ring and that nobody took, by namespace and hook.
#[derive(Debug, Default)]
pub struct Dropped {
    counts: Mutex<BTreeMap<(Netns, Hook), u64>>,
}

impl Dropped {
    /// How many of each were dropped so far.
    pub fn counts(&self) -> BTreeMap<(Netns, Hook), u64> {
        self.lock().clone()
    }

    /// Counts one record that could not be kept.
    pub fn count(&self, record: &[u8]) {
        // Where `calitrace_ebpf::Plain` has them.
        let hook = record
            .get(offset_of!(Plain, hook))
            .and_then(|&number| Hook::from_number(number));
        let netns = record
            .get(offset_of!(Plain, netns)..)
            .and_then(|rest| rest.first_chunk());
        if let (Some(hook), Some(netns)) = (hook, netns) {
            *self
                .lock()
                .entry((Netns::from_ne_bytes(*netns), hook))
                .or_default() += 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Netns, Hook), u64>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running drain. Dropping it stops it as [`Self::stop`] does.
pub struct Drain {
    wake: Arc<EventFd>,
    thread: Option<thread::JoinHandle<Result<()>>>,
    dropped: Arc<Dropped>,
}

impl Drain {
    /// Starts the thread. Every `period`, or earlier when the ring fills up, it hands the records on by `sender`;
    /// without any, an empty batch at least every 10 ms.
    ///
    /// The channel bounds what user space keeps: while it is full the thread waits, the ring fills up behind it, and
    /// the kernel side counts what it then refuses. Once the receiver is gone, records are dropped and counted.
    pub fn start(ring: Ring, period: Duration, sender: mpsc::SyncSender<Batch>) -> Result<Self> {
        Self::start_with(ring, period, move |batch| {
            sender.send(batch).map_err(|mpsc::SendError(batch)| batch)
        })
    }

    /// As [`Self::start`], handing batches to `deliver`, which waits until there is room and returns the batch when
    /// nobody will ever take it.
    pub fn start_with(
        ring: Ring,
        period: Duration,
        deliver: impl FnMut(Batch) -> Result<(), Batch> + Send + 'static,
    ) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags).context("make an eventfd")?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll instance")?;
        epoll
            .add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, STOP))
            .context("watch the stop signal")?;
        let dropped = Arc::new(Dropped::default());
        let worker = Worker {
            incoming: ring.rings,
            rings: Vec::new(),
            epoll,
            period,
            deliver,
            dropped: Arc::clone(&dropped),
            since_batch: Duration::ZERO,
            emptied: 0,
        };
        let thread = thread::Builder::new()
            .name("ring-drain".to_owned())
            .spawn(move || worker.run())
            .context("start the drain thread")?;
        Ok(Self {
            wake,
            thread: Some(thread),
            dropped,
        })
    }

    /// Records dropped in user space.
    pub fn dropped(&self) -> Arc<Dropped> {
        Arc::clone(&self.dropped)
    }

    /// Empties the ring a last time, hands on the last batch (maybe an empty one) and ends the thread. Detach first:
    /// what is recorded afterwards stays in the ring.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.wake.write(1).context("signal the drain thread")?;
        thread
            .join()
            .map_err(|_panic| anyhow!("the drain thread has failed"))?
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::warn!("{error:#}");
        }
    }
}

/// Token of the stop signal in the epoll set; rings have 0.
const STOP: u64 = 1;

struct Worker<F> {
    incoming: Arc<Rings>,
    rings: Vec<RingBuf<MapData>>,
    epoll: Epoll,
    period: Duration,
    deliver: F,
    dropped: Arc<Dropped>,
    /// Time since a batch was handed on.
    since_batch: Duration,
    /// When the last round through all rings began, in nanoseconds.
    emptied: u64,
}

impl<F: FnMut(Batch) -> Result<(), Batch>> Worker<F> {
    fn run(mut self) -> Result<()> {
        let timeout = EpollTimeout::try_from(self.period.max(Duration::from_millis(1)))
            .map_err(|error| anyhow!("the drain period of {:?} is no time-out: {error}", self.period))?;
        loop {
            self.adopt()?;
            let mut events = [EpollEvent::empty(); 4];
            let stop = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => events[..count].iter().any(|event| event.data() == STOP),
                Err(nix::errno::Errno::EINTR) => false,
                Err(error) => return Err(error).context("wait for the ring"),
            };
            // Rings that arrived before the signal are drained, too.
            self.adopt()?;
            self.drain(stop)?;
            if stop {
                return Ok(());
            }
        }
    }

    /// Takes over the rings that arrived.
    fn adopt(&mut self) -> Result<()> {
        for ring in self.incoming.take() {
            // Edge-triggered: only the kernel side's explicit wakeups count. A level-triggered wait would return for
            // every record, of which on a busy node there always is one.
            let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            self.epoll
                .add(ring.as_fd(), EpollEvent::new(events, 0))
                .context("watch the ring")?;
            self.rings.push(ring);
        }
        Ok(())
    }

    fn drain(&mut self, last: bool) -> Result<()> {
        let begun = monotonic()?;
        let mut batch = self.batch();
        let mut handed = false;
        for index in 0..self.rings.len() {
            // What is made meanwhile is for the next round, or a flood at one ring would keep the others waiting.
            let mut behind = true;
            while behind {
                {
                    let Some(record) = self.rings[index].next() else {
                        break;
                    };
                    behind = last || time(&record).is_none_or(|time| time < begun);
                    batch.push(&record);
                }
                if batch.full() {
                    let next = self.batch();
                    self.hand_on(std::mem::replace(&mut batch, next));
                    handed = true;
                }
            }
        }
        self.emptied = begun;
        batch.time = begun;
        self.since_batch += self.period;
        if handed || !batch.is_empty() || last || self.since_batch >= IDLE {
            self.hand_on(batch);
        }
        Ok(())
    }

    fn batch(&self) -> Batch {
        Batch {
            time: self.emptied,
            ..Batch::default()
        }
    }

    fn hand_on(&mut self, batch: Batch) {
        self.since_batch = Duration::ZERO;
        if let Err(batch) = (self.deliver)(batch) {
            batch.iter().for_each(|record| self.dropped.count(record));
        }
    }
}

/// When a record was made.
fn time(record: &[u8]) -> Option<u64> {
    let bytes = record.get(offset_of!(Plain, time)..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

fn monotonic() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the monotonic clock")?;
    Ok(u64::try_from(Duration::from(now).as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gives_its_records_back() {
        let mut batch = Batch::default();
        assert!(batch.is_empty());
        batch.push(b"one");
        batch.push(b"three");
        assert_eq!(batch.iter().collect::<Vec<_>>(), [b"one".as_slice(), b"three"]);
        assert_eq!(batch.len(), 2);
    }

    #[test]
    fn dropped_records_are_counted_by_namespace_and_hook() {
        let dropped = Dropped::default();
        for (netns, hook) in [
            (7_u64, Hook::UplinkEgress),
            (7, Hook::KfreeSkb),
            (7, Hook::UplinkEgress),
        ] {
            let mut record = vec![0; 128];
            record[1] = hook as u8;
            record[32..40].copy_from_slice(&netns.to_ne_bytes());
            dropped.count(&record);
        }
        let expected = [((7, Hook::UplinkEgress), 2), ((7, Hook::KfreeSkb), 1)];
        assert_eq!(dropped.counts(), BTreeMap::from(expected));
    }
}
