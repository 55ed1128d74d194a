//! `-o traceroute`: blocks in the form that Linux traceroute prints, an empty line between two.

use std::{
    fmt::Write as _,
    io::{self, Write},
    sync::Arc,
};

use super::Sink;
use crate::{
    correlate::PacketTrace,
    view::{Block, Line, Views},
};

/// The sink.
#[derive(Debug)]
pub(super) struct Traceroute<W> {
    output: W,
    views: Views,
    due: Vec<Block>,
    begun: bool,
}

impl<W: Write> Traceroute<W> {
    pub(super) fn new(output: W) -> Self {
        Self {
            output,
            views: Views::default(),
            due: Vec::new(),
            begun: false,
        }
    }

    fn write_due(&mut self) -> io::Result<()> {
        for block in self.due.drain(..) {
            if std::mem::replace(&mut self.begun, true) {
                self.output.write_all(b"\n")?;
            }
            writeln!(self.output, "{}", header(&block))?;
            if block.lines.is_empty() {
                // It was seen nowhere but at its sender's node: traceroute would wait for an answer in vain, too.
                writeln!(self.output, " 1  * * *")?;
            }
            for line in &block.lines {
                writeln!(self.output, "{}", hop(line))?;
            }
        }
        Ok(())
    }
}

impl<W: Write + Send> Sink for Traceroute<W> {
    fn trace(&mut self, trace: &Arc<PacketTrace>) -> io::Result<()> {
        self.views.push(trace);
        Ok(())
    }

    fn tick(&mut self, now: u64) -> io::Result<()> {
        self.views.due(now, &mut self.due);
        self.write_due()?;
        self.output.flush()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.views.finish(&mut self.due);
        self.write_due()?;
        self.output.flush()
    }
}

/// The first line of a block.
pub(super) fn header(block: &Block) -> String {
    let destination = block.flow.flow.dst;
    format!(
        "traceroute to {destination} ({destination}), {} hops max, {} byte packets",
        block.hops_max, block.length
    )
}

/// The line of a hop: an address stands before the first of its times, as traceroute prints it when several routers
/// answer for one hop. A router that is known without having been observed stands there with `*` for its times.
pub(super) fn hop(line: &Line) -> String {
    let mut text = format!("{:2} ", line.ttl);
    if line.readings.is_empty() {
        text.push_str(" * * *");
    }
    let mut last = None;
    for reading in &line.readings {
        let Some(reading) = reading else {
            text.push_str(" *");
            continue;
        };
        if last != Some(reading.address) {
            last = Some(reading.address);
            append(&mut text, format_args!(" {0} ({0})", reading.address));
        }
        match reading.time {
            Some(time) => append(&mut text, format_args!("  {}", milliseconds(time))),
            None => text.push_str(" *"),
        }
        if let Some(mark) = &reading.mark {
            append(&mut text, format_args!(" {mark}"));
        }
    }
    text
}

/// Nanoseconds as traceroute prints them.
pub(super) fn milliseconds(nanoseconds: u64) -> String {
    let microseconds = (nanoseconds + 500) / 1000;
    format!("{}.{:03} ms", microseconds / 1000, microseconds % 1000)
}

fn append(text: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _: std::fmt::Result = text.write_fmt(what);
}
