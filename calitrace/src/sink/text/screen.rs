//! Drawing on a terminal: what was drawn last is replaced in place.
//!
//! Knows rows and the terminal's size, not what rows mean.

use std::io::{self, Write};

use super::render::{Look, Row, row};

/// A terminal to draw on.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// Whether it takes colours.
    pub colours: bool,
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
        losses: Option<&Row>,
    ) -> io::Result<()> {
        let (columns, rows) = self.size();
        let mut frame: Vec<Row> = Vec::new();
        let mut shown = 0;
        // A line for the rest, one for losses, and one for the cursor.
        let most = rows.saturating_sub(3).max(1);
        for block in blocks {
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
        frame.extend(losses.cloned());
        let mut text = match self.drawn {
            0 => String::new(),
            // Up to where the last frame began; clear from there.
            drawn => format!("\x1b[{drawn}A\r\x1b[J"),
        };
        for block in above {
            self.append(&mut text, block, columns);
            text.push('\n');
        }
        self.append(&mut text, &frame, columns);
        self.drawn = frame.len();
        self.output.write_all(text.as_bytes())?;
        self.output.flush()
    }

    /// Rows cut to the width: one that wraps would take two, and the next frame would leave one of them behind.
    fn append(&self, text: &mut String, rows: &[Row], columns: usize) {
        for row in rows {
            let style = match row.look {
                Look::Title if self.terminal.colours => "\x1b[1m",
                Look::Faint if self.terminal.colours => "\x1b[2m",
                Look::Alarm if self.terminal.colours => "\x1b[31m",
                _ => "",
            };
            text.push_str(style);
            text.extend(row.text.chars().take(columns));
            text.push_str(if style.is_empty() { "\n" } else { "\x1b[0m\n" });
        }
    }

    fn size(&self) -> (usize, usize) {
        let (columns, rows) = (self.terminal.size)().unwrap_or(USUAL_SIZE);
        (usize::from(columns), usize::from(rows))
    }
}
