//! Drawing on a terminal: what was drawn last is replaced in place.
//!
//! Knows rows and the terminal's size, not what rows mean.

use std::io::{self, Write};

use super::render::{Look, Row, row};

/// A terminal to print to.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// Whether it takes colours.
    pub colours: bool,
    /// Whether what is live is redrawn in place; else everything scrolls by, so that it can be read back.
    pub redraw: bool,
    /// Its columns and rows now; none if it does not say.
    pub size: fn() -> Option<(u16, u16)>,
}

/// What a terminal has that does not say (VT100).
const USUAL_SIZE: (u16, u16) = (80, 24);

/// Draws frames.
#[derive(Debug)]
pub(super) struct Screen<W> {
    output: W,
    terminal: Terminal,
    /// Rows of the last frame, which the next one replaces.
    drawn: usize,
}

impl<W: Write> Screen<W> {
    pub(super) fn new(output: W, terminal: Terminal) -> Self {
        Self {
            output,
            terminal,
            drawn: 0,
        }
    }

    /// Rows of the terminal.
    pub(super) fn rows(&self) -> usize {
        self.size().1
    }

    /// Draws one frame: `above` once, to scroll away; below it as many `blocks` as fit, and a line that counts the
    /// rest of `all` of them.
    pub(super) fn draw(
        &mut self,
        above: &[Vec<Row>],
        blocks: impl Iterator<Item = Vec<Row>>,
        all: usize,
        losses: &[Row],
    ) -> io::Result<()> {
        let (columns, rows) = self.size();
        let mut frame: Vec<Row> = Vec::new();
        let mut shown = 0;
        // A line for the rest, one or two for losses, and one for the cursor.
        let most = rows.saturating_sub(2 + losses.len().max(1)).max(1);
        for block in blocks {
            let block: Vec<Row> = block.iter().flat_map(|row| row.wrapped(columns)).collect();
            let gap = usize::from(shown > 0);
            if shown > 0 && frame.len() + gap + block.len() > most {
                break;
            }
            frame.extend((0..gap).map(|_| row(Look::Plain, String::new())));
            frame.extend(block);
            frame.truncate(most);
            shown += 1;
        }
        if all > shown {
            frame.push(row(Look::Faint, format!("and {} more flows", all - shown)));
        }
        frame.extend(losses.iter().flat_map(|row| row.wrapped(columns)));
        let mut text = match self.drawn {
            0 => String::new(),
            // Up to where the last frame began; clear from there.
            drawn => format!("\x1b[{drawn}A\r\x1b[J"),
        };
        for block in above {
            for row in block {
                row.append_to(&mut text, self.terminal.colours);
            }
            text.push('\n');
        }
        for row in &frame {
            row.append_to(&mut text, self.terminal.colours);
        }
        self.drawn = frame.len();
        self.output.write_all(text.as_bytes())?;
        self.output.flush()
    }

    fn size(&self) -> (usize, usize) {
        let (columns, rows) = (self.terminal.size)().unwrap_or(USUAL_SIZE);
        (usize::from(columns), usize::from(rows))
    }
}
