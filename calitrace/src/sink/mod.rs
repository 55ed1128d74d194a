//! Where packet traces go: one file for each kind. A new one is a file, a variant of [`Format`] or [`FileFormat`], and
//! an arm where they are opened.
//!
//! A sink writes to the writer it is given and learns the time from what it is told ([`Sink::tick`]): it neither
//! opens files nor reads clocks.

mod json;
mod log;
mod output;
mod text;
mod traceroute;

use std::{io, path::Path, sync::Arc};

pub use output::Output;
pub use text::Terminal;

use crate::{
    correlate::PacketTrace,
    event::{Item, Ledger},
};

/// Takes packet traces and what goes with them.
///
/// Times are `CLOCK_MONOTONIC` nanoseconds of the observed machine.
pub trait Sink: Send {
    /// Everything that the source handed on, in its order, before the traces that close with it.
    fn item(&mut self, item: &Item) -> io::Result<()> {
        let _ = item;
        Ok(())
    }

    /// A packet trace that closed and passed the filter.
    fn trace(&mut self, trace: &Arc<PacketTrace>) -> io::Result<()>;

    /// Time went on to `now`: what is due is written, and what was written is handed to the operating system.
    fn tick(&mut self, now: u64) -> io::Result<()>;

    /// The loss ledger so far, about once a second; the last one is exact.
    fn ledger(&mut self, ledger: &Ledger) -> io::Result<()> {
        let _ = ledger;
        Ok(())
    }

    /// Nothing more will come.
    fn finish(&mut self) -> io::Result<()>;
}

/// A form of standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Blocks for people.
    Text {
        /// With the sizes of packets and the MTUs at each interface.
        sizes: bool,
    },
    /// A line for each packet trace.
    Json,
    /// Blocks as traceroute prints them.
    Traceroute,
}

impl Format {
    /// A sink of this form; `terminal` if it is one that `output` writes to.
    #[must_use]
    pub fn sink(self, output: Output, terminal: Option<Terminal>) -> Box<dyn Sink> {
        match (self, terminal) {
            (Self::Text { sizes }, Some(terminal)) if terminal.redraw => {
                Box::new(text::Live::new(output, terminal, sizes))
            }
            (Self::Text { sizes }, terminal) => Box::new(text::Text::new(
                output,
                terminal.is_some_and(|terminal| terminal.colours),
                sizes,
            )),
            (Self::Json, _) => Box::new(json::Json::new(output)),
            (Self::Traceroute, _) => Box::new(traceroute::Traceroute::new(output)),
        }
    }
}

/// A format of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// The event log, `.jsonl`.
    EventLog,
}

impl FileFormat {
    /// Every format.
    pub const ALL: [Self; 1] = [Self::EventLog];

    /// The ending of its files.
    #[must_use]
    pub const fn ending(self) -> &'static str {
        match self {
            Self::EventLog => ".jsonl",
        }
    }

    /// The format that the ending of a path tells.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        Self::ALL
            .into_iter()
            .find(|format| name.len() > format.ending().len() && name.ends_with(format.ending()))
    }

    /// A sink of this format.
    #[must_use]
    pub fn sink(self, output: Output) -> Box<dyn Sink> {
        match self {
            Self::EventLog => Box::new(log::Log::new(output)),
        }
    }
}
