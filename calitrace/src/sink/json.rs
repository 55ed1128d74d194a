//! `-o json`: a line for each packet trace and each ledger. Its form is a promise, kept by
//! `calitrace/schema/calitrace-1.schema.json`.

use std::{
    io::{self, Write},
    sync::Arc,
};

use serde::Serialize;

use super::Sink;
use crate::{correlate::PacketTrace, event::Ledger};

/// The sink.
#[derive(Debug)]
pub(super) struct Json<W> {
    output: W,
}

#[derive(Serialize)]
struct LedgerLine<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    version: u32,
    #[serde(flatten)]
    ledger: &'a Ledger,
}

impl<W: Write> Json<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output }
    }

    fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.output, value)?;
        self.output.write_all(b"\n")
    }
}

impl<W: Write + Send> Sink for Json<W> {
    fn trace(&mut self, trace: &Arc<PacketTrace>) -> io::Result<()> {
        self.line(&**trace)
    }

    fn tick(&mut self, _now: u64) -> io::Result<()> {
        self.output.flush()
    }

    fn ledger(&mut self, ledger: &Ledger) -> io::Result<()> {
        self.line(&LedgerLine {
            kind: "ledger",
            version: 1,
            ledger,
        })
    }

    fn finish(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
