//! From a source's items to the sinks: correlate, filter, count, hand on. `watch` and `read` share it, so that a log
//! prints what the run that wrote it printed.
//!
//! Knows neither where items come from nor what sinks write. Its time is the items' own.

use std::{ops::ControlFlow, sync::Arc};

use anyhow::{Context as _, Result};

use crate::{
    correlate::{Config, Correlator, PacketTrace},
    event::Item,
    filter::Filter,
    sink::Sink,
};

/// How far the items' time goes on between two ticks of the sinks, in nanoseconds: what is due is shown this soon, and
/// a burst of observations does not flush for each of them.
const TICK: u64 = 10_000_000;

/// The way from items to sinks.
pub struct Pipeline {
    correlator: Option<Correlator>,
    max_open: usize,
    filter: Filter,
    remaining: Option<u64>,
    sinks: Vec<Box<dyn Sink>>,
    closed: Vec<PacketTrace>,
    now: u64,
    ticked: u64,
}

impl Pipeline {
    /// A pipeline into `sinks`. With a `count`, so many packet traces that pass the filter are handed on, no more.
    #[must_use]
    pub fn new(filter: Filter, count: Option<u64>, sinks: Vec<Box<dyn Sink>>) -> Self {
        Self {
            correlator: None,
            max_open: Config::MAX_OPEN,
            filter,
            remaining: count,
            sinks,
            closed: Vec::new(),
            now: 0,
            ticked: 0,
        }
    }

    /// With room for so many open packet traces; see [`Config::max_open`].
    #[must_use]
    pub fn with_max_open(self, max_open: usize) -> Self {
        Self { max_open, ..self }
    }

    /// Takes the next item, the header first. Breaks as soon as the count is reached; what the source hands on after
    /// that (the last, exact ledger; the end) still goes to logs and ledgers.
    pub fn push(&mut self, item: &Item) -> Result<ControlFlow<()>> {
        for sink in &mut self.sinks {
            sink.item(item)?;
        }
        match item {
            Item::Header(header) => {
                self.correlator = Some(Correlator::new(Config {
                    drain_period: header.drain_period,
                    max_open: self.max_open,
                }));
            }
            Item::Ledger(ledger) => {
                let mut ledger = ledger.clone();
                ledger.evicted = self.correlator.as_ref().map_or(0, Correlator::evicted);
                for sink in &mut self.sinks {
                    sink.ledger(&ledger)?;
                }
            }
            _ => {}
        }
        let correlator = self
            .correlator
            .as_mut()
            .context("the source handed on an item before its header")?;
        correlator.push(item, &mut self.closed);
        self.hand_on()?;
        self.now = self.now.max(item.time().unwrap_or_default());
        if self.now - self.ticked >= TICK {
            self.ticked = self.now;
            for sink in &mut self.sinks {
                sink.tick(self.now)?;
            }
        }
        Ok(if self.remaining == Some(0) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    }

    /// The source has ended: closes what is open, and the sinks.
    pub fn finish(mut self) -> Result<()> {
        if let Some(correlator) = &mut self.correlator {
            correlator.finish(&mut self.closed);
        }
        self.hand_on()?;
        for sink in &mut self.sinks {
            sink.finish()?;
        }
        Ok(())
    }

    fn hand_on(&mut self) -> Result<()> {
        for trace in self.closed.drain(..) {
            if !self.filter.matches(&trace) {
                continue;
            }
            match &mut self.remaining {
                Some(0) => continue,
                Some(remaining) => *remaining -= 1,
                None => {}
            }
            let trace = Arc::new(trace);
            for sink in &mut self.sinks {
                sink.trace(&trace)?;
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipeline")
            .field("now", &self.now)
            .field("sinks", &self.sinks.len())
            .finish_non_exhaustive()
    }
}
