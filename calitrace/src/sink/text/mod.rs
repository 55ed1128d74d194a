//! `-o text`: a block for each flow and probe run, for people.
//!
//! Into a pipe or file, each block is printed when it is due. On a terminal the flows that changed last are redrawn in
//! place, as many as fit; finished probe runs stand above them.

mod reasons;
mod render;
mod screen;
mod sentence;
mod sizes;
#[cfg(test)]
mod tests;

use std::{
    io::{self, Write},
    sync::Arc,
};

pub use screen::Terminal;

use self::render::Row;
use super::Sink;
use crate::{
    correlate::PacketTrace,
    event::Ledger,
    view::{Block, Views},
};

/// The sink for pipes, files, and what is read back.
#[derive(Debug)]
pub(super) struct Text<W> {
    output: W,
    colours: bool,
    sizes: bool,
    views: Views,
    due: Vec<Block>,
    begun: bool,
    lost: u64,
    evicted: u64,
}

impl<W: Write> Text<W> {
    pub(super) fn new(output: W, colours: bool, sizes: bool) -> Self {
        Self {
            output,
            colours,
            sizes,
            views: Views::default(),
            due: Vec::new(),
            begun: false,
            lost: 0,
            evicted: 0,
        }
    }

    fn write(&mut self, rows: &[Row]) -> io::Result<()> {
        let mut text = String::new();
        for row in rows {
            row.append_to(&mut text, self.colours);
        }
        self.output.write_all(text.as_bytes())
    }

    fn write_due(&mut self) -> io::Result<()> {
        for block in std::mem::take(&mut self.due) {
            if std::mem::replace(&mut self.begun, true) {
                self.output.write_all(b"\n")?;
            }
            self.write(&render::block(&block, self.sizes))?;
        }
        Ok(())
    }
}

impl<W: Write + Send> Sink for Text<W> {
    fn trace(&mut self, trace: &Arc<PacketTrace>) -> io::Result<()> {
        self.views.push(trace);
        Ok(())
    }

    fn tick(&mut self, now: u64) -> io::Result<()> {
        self.views.due(now, &mut self.due);
        self.write_due()?;
        self.output.flush()
    }

    fn ledger(&mut self, ledger: &Ledger) -> io::Result<()> {
        if let Some(row) = render::losses(ledger).filter(|_| ledger.lost() > self.lost) {
            self.lost = ledger.lost();
            self.write(&[row])?;
        }
        if let Some(row) = render::evictions(ledger).filter(|_| ledger.evicted > self.evicted) {
            self.evicted = ledger.evicted;
            self.write(&[row])?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.views.finish(&mut self.due);
        self.write_due()?;
        let totals: Vec<Row> = self.views.grown().iter().map(render::total).collect();
        if !totals.is_empty() {
            self.output.write_all(b"\n")?;
        }
        self.write(&totals)?;
        self.output.flush()
    }
}

/// The sink for a terminal.
#[derive(Debug)]
pub(super) struct Live<W> {
    screen: screen::Screen<W>,
    sizes: bool,
    views: Views,
    due: Vec<Block>,
    losses: Vec<Row>,
    drawn: u64,
    changed: bool,
}

/// Nothing is redrawn more often than this, nanoseconds: a person cannot read faster.
const REDRAW: u64 = 250_000_000;

impl<W: Write> Live<W> {
    pub(super) fn new(output: W, terminal: Terminal, sizes: bool) -> Self {
        Self {
            sizes,
            screen: screen::Screen::new(output, terminal),
            views: Views::default(),
            due: Vec::new(),
            losses: Vec::new(),
            drawn: 0,
            changed: false,
        }
    }

    fn draw(&mut self) -> io::Result<()> {
        let runs = self
            .due
            .extract_if(.., |block| block.kind == crate::view::Kind::ProbeRun);
        let above: Vec<Vec<Row>> = runs.map(|block| render::block(&block, self.sizes)).collect();
        self.due.clear();
        let (flows, all) = self.views.latest(self.screen.rows());
        let blocks = flows.iter().map(|block| render::block(block, self.sizes));
        self.screen.draw(&above, blocks, all, &self.losses)
    }
}

impl<W: Write + Send> Sink for Live<W> {
    fn trace(&mut self, trace: &Arc<PacketTrace>) -> io::Result<()> {
        self.views.push(trace);
        self.changed = true;
        Ok(())
    }

    fn tick(&mut self, now: u64) -> io::Result<()> {
        self.views.due(now, &mut self.due);
        self.changed |= !self.due.is_empty();
        if self.changed && now.saturating_sub(self.drawn) >= REDRAW {
            self.drawn = now;
            self.changed = false;
            self.draw()?;
        }
        Ok(())
    }

    fn ledger(&mut self, ledger: &Ledger) -> io::Result<()> {
        self.losses.clear();
        self.losses.extend(render::losses(ledger));
        self.losses.extend(render::evictions(ledger));
        self.changed |= !self.losses.is_empty();
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.views.finish(&mut self.due);
        self.draw()
    }
}
