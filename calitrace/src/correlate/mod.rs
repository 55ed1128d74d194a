//! The heart: observations and facts in, packet traces out.
//!
//! Pure: no I/O, no runtime, no clock reads. Time is the observations' own.

mod trace;

pub use trace::{
    Answer, AnswerKind, Certainty, DropReport, Endpoint, FlowName, Hop, NatKind, NatStep, PacketTrace,
    SightedEncap, Sighting, Verdict,
};

use crate::event::Item;

/// Settings of a [`Correlator`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Nanoseconds by which observations may be out of order; the correlator's time lags the newest by this much.
    pub drain_period: u64,
}

/// Joins observations into packet traces.
#[derive(Debug)]
pub struct Correlator {
    config: Config,
}

impl Correlator {
    /// A correlator that knows nothing yet.
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// Takes the next item; traces that close with it are appended to `closed`.
    pub fn push(&mut self, item: &Item, closed: &mut Vec<PacketTrace>) {
        let _: (&Config, &Item, &Vec<PacketTrace>) = (&self.config, item, closed);
    }

    /// Observing ended: closes what is open, as unfinished where nothing better is known.
    pub fn finish(&mut self, closed: &mut Vec<PacketTrace>) {
        let _: (&Config, &Vec<PacketTrace>) = (&self.config, closed);
    }
}
