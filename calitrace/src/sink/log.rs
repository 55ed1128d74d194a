//! `-w FILE.jsonl`: the event log. Writes what the source handed on, not what became of it.

use std::{
    io::{self, Write},
    sync::Arc,
};

use super::Sink;
use crate::{
    correlate::PacketTrace,
    event::{Item, LogWriter},
};

/// The sink.
#[derive(Debug)]
pub(super) struct Log<W> {
    log: LogWriter<W>,
}

impl<W: Write> Log<W> {
    pub(super) fn new(output: W) -> Self {
        Self {
            log: LogWriter::new(output),
        }
    }
}

impl<W: Write + Send> Sink for Log<W> {
    fn item(&mut self, item: &Item) -> io::Result<()> {
        self.log.write(item)
    }

    fn trace(&mut self, _trace: &Arc<PacketTrace>) -> io::Result<()> {
        Ok(())
    }

    fn tick(&mut self, _now: u64) -> io::Result<()> {
        self.log.flush()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.log.flush()
    }
}
