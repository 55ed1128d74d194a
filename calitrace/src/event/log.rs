//! The event log: JSON lines. A [`Header`], then [`super::Item`]s in order of time (each fact before its first use), then an
//! end line. A file without its end line was cut off; it is read up to where it stops, and that is said.
//!
//! Knows readers and writers, and the name to call a file by in a message; opens nothing itself.

use std::io::{self, BufRead, Read as _, Write};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::Item;

/// Value of the header's `format`.
pub const FORMAT: &str = "calitrace-events";
/// Version of the format. Fields only ever get added within one version.
pub const VERSION: u32 = 1;

/// No line is longer: an observation takes under 1 KiB, a ledger or the routes of a large node some hundred.
const LONGEST_LINE: u64 = 64 << 20;

/// The first line of a log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// The machine's boot id: clocks of logs with the same one are the same clock.
    pub boot_id: String,
    /// The machine's host name.
    pub host: String,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// The hooks, and for a missing one why. Functions of the kernel are attached later, and a line says so of each that is
    /// (an `attachment` with no interface).
    pub hooks: Vec<HookStatus>,
    /// The filter of the views as it was typed; null without. The log itself holds everything that was recorded.
    pub filter: Option<String>,
    /// The drain period in nanoseconds: observations may be this much out of order.
    pub drain_period: u64,
}

/// Whether a hook observes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookStatus {
    /// Name of the hook.
    pub hook: String,
    /// Null when it observes, else why not.
    pub missing: Option<String>,
}

/// Writes a log. The caller hands over an [`Item::Header`] first and an [`Item::End`] last; `output` buffers, and names
/// itself in its errors.
#[derive(Debug)]
pub struct LogWriter<W> {
    output: W,
}

impl<W: Write> LogWriter<W> {
    /// A writer to `output`.
    pub fn new(output: W) -> Self {
        Self { output }
    }

    /// Writes one line.
    pub fn write(&mut self, item: &Item) -> io::Result<()> {
        serde_json::to_writer(&mut self.output, item)?;
        self.output.write_all(b"\n")
    }

    /// Hands what is buffered to the operating system.
    pub fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Reads a log. Iterates over its items, the header first; ends at the end line, at an error, or where the file was
/// cut off (see [`LogReader::cut`]).
#[derive(Debug)]
pub struct LogReader<R> {
    input: R,
    name: String,
    header: Option<Header>,
    line: Vec<u8>,
    number: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reading,
    Cut,
    Ended,
}

/// The part of a header that every version of the format has.
#[derive(Deserialize)]
struct AnyHeader {
    format: String,
    version: u32,
    #[serde(default)]
    program: String,
}

impl<R: BufRead> LogReader<R> {
    /// Reads the header of `input`, called `name` in errors.
    pub fn new(input: R, name: impl Into<String>) -> Result<Self> {
        let mut reader = Self {
            input,
            name: name.into(),
            header: None,
            line: Vec::new(),
            number: 0,
            state: State::Reading,
        };
        let header = reader.read_header()?;
        reader.header = Some(header);
        Ok(reader)
    }

    /// Set once the file was found to stop without its end line: a sentence that says where.
    pub fn cut(&self) -> Option<String> {
        (self.state == State::Cut).then(|| {
            format!(
                "{} was cut off after line {}: it has no end line; read up to there",
                self.name, self.number
            )
        })
    }

    /// The name of the log, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn read_header(&mut self) -> Result<Header> {
        let complete = self.read_line()?;
        let name = &self.name;
        if self.line.is_empty() {
            anyhow::bail!("{name} is empty: an event log starts with a header line");
        }
        let any = serde_json::from_slice::<AnyHeader>(&self.line)
            .ok()
            .filter(|any| any.format == FORMAT);
        let Some(any) = any else {
            let reason = if complete {
                "its first line is not a header"
            } else {
                "it has no whole header line"
            };
            anyhow::bail!("{name} is not an event log of calitrace: {reason}");
        };
        if any.version > VERSION {
            anyhow::bail!(
                "{name} has version {} of the event log format (written by calitrace {}); this calitrace reads versions \
                 up to {VERSION}: use a newer one",
                any.version,
                any.program,
            );
        }
        match serde_json::from_slice::<Item>(&self.line) {
            Ok(Item::Header(header)) => Ok(header),
            Ok(_) => anyhow::bail!("{name} is not an event log of calitrace: its first line is not a header"),
            Err(error) => Err(error).with_context(|| format!("read the header of the event log {name}")),
        }
    }

    /// Reads the next line without its end; false if the file stops within it or before it.
    fn read_line(&mut self) -> Result<bool> {
        self.line.clear();
        (&mut self.input)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut self.line)
            .with_context(|| format!("read the event log {}", self.name))?;
        let complete = self.line.pop_if(|last| *last == b'\n').is_some();
        Ok(complete)
    }

    fn next_item(&mut self) -> Result<Option<Item>> {
        if let Some(header) = self.header.take() {
            self.number = 1;
            return Ok(Some(Item::Header(header)));
        }
        if self.state != State::Reading {
            return Ok(None);
        }
        let complete = self.read_line()?;
        match serde_json::from_slice::<Item>(&self.line) {
            Ok(item) => {
                self.number += 1;
                if matches!(item, Item::End { .. }) {
                    self.state = State::Ended;
                }
                Ok(Some(item))
            }
            Err(_) if !complete => {
                self.state = State::Cut;
                Ok(None)
            }
            Err(error) => {
                self.state = State::Ended;
                Err(error).with_context(|| format!("line {} of the event log {}", self.number + 1, self.name))
            }
        }
    }
}

impl<R: BufRead> Iterator for LogReader<R> {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Result<Item>> {
        self.next_item().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Item {
        Item::Header(Header {
            format: FORMAT.into(),
            version: VERSION,
            program: "0.1.0".into(),
            boot_id: "1b4e28ba".into(),
            host: "minikube".into(),
            kernel: "6.18.0".into(),
            hooks: vec![HookStatus {
                hook: "kfree_skb".into(),
                missing: Some("no BTF".into()),
            }],
            filter: None,
            drain_period: 10_000_000,
        })
    }

    fn written(items: &[Item]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut log = LogWriter::new(&mut bytes);
        for item in items {
            log.write(item).unwrap();
        }
        bytes
    }

    fn failure(bytes: &[u8]) -> String {
        let error = match LogReader::new(bytes, "a.jsonl") {
            Err(error) => error,
            Ok(mut reader) => reader.find_map(Result::err).unwrap(),
        };
        format!("{error:#}")
    }

    #[test]
    fn what_is_written_is_read_back() {
        let items = [header(), Item::Tick { time: 5 }, Item::End { time: 6 }];
        let bytes = written(&items);
        let mut reader = LogReader::new(bytes.as_slice(), "a.jsonl").unwrap();
        let read: Vec<Item> = reader.by_ref().collect::<Result<_>>().unwrap();
        assert_eq!(read, items);
        assert_eq!(reader.cut(), None);
    }

    #[test]
    fn a_log_cut_anywhere_is_read_up_to_there() {
        let bytes = written(&[
            header(),
            Item::Tick { time: 5 },
            Item::Tick { time: 6 },
            Item::End { time: 7 },
        ]);
        let header_end = bytes.iter().position(|byte| *byte == b'\n').unwrap();
        // The very last byte is the line end of the end line, without which nothing is missing.
        for length in header_end..bytes.len() - 1 {
            let mut reader = LogReader::new(&bytes[..length], "a.jsonl").unwrap();
            let read: Vec<Item> = reader.by_ref().collect::<Result<_>>().unwrap();
            let lines = bytes[..=length].split(|byte| *byte == b'\n').count() - 1;
            assert_eq!(read.len(), lines, "cut at {length}");
            let cut = reader.cut().unwrap();
            assert!(
                cut.contains(&format!("a.jsonl was cut off after line {lines}:")),
                "{cut}"
            );
        }
    }

    #[test]
    fn what_is_no_log_is_said_to_be_none() {
        insta::assert_snapshot!(failure(b""), @"a.jsonl is empty: an event log starts with a header line");
        insta::assert_snapshot!(failure(b"{\"type\":\"tick\",\"time\":1}\n"), @"a.jsonl is not an event log of calitrace: its first line is not a header");
        insta::assert_snapshot!(failure(b"\x7fELF\x02\x01"), @"a.jsonl is not an event log of calitrace: it has no whole header line");
    }

    #[test]
    fn a_newer_version_is_named() {
        let bytes =
            br#"{"type":"preamble","format":"calitrace-events","version":7,"program":"3.2.0","more":[]}"#;
        insta::assert_snapshot!(failure(bytes), @"a.jsonl has version 7 of the event log format (written by calitrace 3.2.0); this calitrace reads versions up to 1: use a newer one");
    }

    #[test]
    fn a_bad_line_is_named_by_its_number() {
        let mut bytes = written(&[header(), Item::Tick { time: 5 }]);
        bytes.extend_from_slice(b"{\"type\":\"tick\"}\n");
        insta::assert_snapshot!(failure(&bytes), @"line 3 of the event log a.jsonl: missing field `time`");
    }
}
