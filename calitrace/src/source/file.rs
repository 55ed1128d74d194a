//! Event logs as a source: one, or several merged in order of time.
//!
//! Knows files and their clocks, nothing of what items are for. Within a file the order stays as it is (facts before
//! their first use); between files the item with the lowest time comes first. What makes them comparable is
//! [`super::machine`]'s: files of other machines (of another boot id) are moved to the first file's clock, by the packets
//! that went between them, else by the clock facts of both.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::machine::{Machine, join_clusters};
use crate::{
    correlate::{Crossings, Offset},
    event::{Fact, Header, Item, Ledger, LogReader},
};

/// Nanoseconds by which the observations of one of several files may be late, whatever it promises. Alone it would not
/// matter, as all are late alike. A processor may stand still between the time it notes and the record, and those who wait
/// for the record with it: virtual ones do for a tenth of a second when the machine is busy.
const LATENESS: u64 = 500_000_000;

/// Event logs, read together.
#[derive(Debug)]
pub struct Files {
    files: Vec<Log>,
    header: Option<Header>,
}

/// One of them.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    reader: LogReader<BufReader<File>>,
    header: Header,
    /// What was read ahead.
    ahead: VecDeque<Item>,
    /// When what follows the facts at the front of that was seen, once it was looked for.
    following: Option<u64>,
    /// What its numbers mean beside those of the others.
    machine: Machine,
    /// Highest time handed on: a file's place in the order never goes back.
    time: u64,
    /// Its latest ledger.
    ledger: Option<Ledger>,
    /// Its end line.
    end: Option<u64>,
}

impl Files {
    /// Opens the logs at `paths`.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut files = paths
            .iter()
            .map(|path| Log::open(path))
            .collect::<Result<Vec<Log>>>()?;
        if files.len() > 1 {
            make_comparable(&mut files)?;
        }
        let header = files.first().map(|first| {
            let mut header = first.header.clone();
            let longest = files.iter().map(|file| file.header.drain_period).max();
            let lateness = if files.len() > 1 { LATENESS } else { 0 };
            header.drain_period = longest.unwrap_or_default().max(lateness);
            header
        });
        Ok(Self { files, header })
    }

    /// A sentence for each file that was cut off.
    pub fn cuts(&self) -> impl Iterator<Item = String> + '_ {
        self.files.iter().filter_map(|file| file.reader.cut())
    }

    fn next_item(&mut self) -> Result<Option<Item>> {
        if let Some(header) = self.header.take() {
            return Ok(Some(Item::Header(header)));
        }
        loop {
            let mut earliest: Option<(u64, usize)> = None;
            for (index, file) in self.files.iter_mut().enumerate() {
                if let Some(time) = file.peek()? {
                    earliest = Some(earliest.map_or((time, index), |earliest| earliest.min((time, index))));
                }
            }
            let Some((_, index)) = earliest else {
                return Ok(self.end());
            };
            let alone = self.files.len() == 1;
            let drain_period = self.files[index].header.drain_period;
            match self.files[index].pop() {
                Some(Item::End { time }) => self.files[index].end = Some(time),
                Some(Item::Ledger(ledger)) => {
                    self.files[index].ledger = Some(ledger);
                    return Ok(self.ledger(index).map(Item::Ledger));
                }
                // One file's promise says nothing of what the others may hand on late.
                Some(Item::Tick { time }) if !alone => {
                    return Ok(Some(Item::Tick {
                        time: time.saturating_sub(drain_period),
                    }));
                }
                Some(Item::Header(_)) | None => {}
                Some(item) => return Ok(Some(item)),
            }
        }
    }

    /// The rows of all files, at the time of the ledger that came last. Exact when all are.
    fn ledger(&self, latest: usize) -> Option<Ledger> {
        Some(Ledger {
            time: self.files[latest].ledger.as_ref()?.time,
            exact: self
                .files
                .iter()
                .all(|file| file.ledger.as_ref().is_some_and(|ledger| ledger.exact)),
            rows: self
                .files
                .iter()
                .filter_map(|file| file.ledger.as_ref())
                .flat_map(|ledger| ledger.rows.clone())
                .collect(),
            evicted: 0,
        })
    }

    /// One end line when every file had one, and only once.
    fn end(&mut self) -> Option<Item> {
        let ends: Option<Vec<u64>> = self.files.iter_mut().map(|file| file.end.take()).collect();
        ends?.into_iter().max().map(|time| Item::End { time })
    }
}

/// Puts several logs on one clock and tells their namespaces and clusters apart.
fn make_comparable(files: &mut [Log]) -> Result<()> {
    let mut boots: Vec<String> = Vec::new();
    for file in files.iter_mut() {
        file.read_first_facts()?;
        let boot = boots.iter().position(|boot| *boot == file.header.boot_id);
        file.machine.number = u32::try_from(boot.unwrap_or(boots.len())).unwrap_or(u32::MAX);
        if boot.is_none() {
            boots.push(file.header.boot_id.clone());
        }
    }
    if boots.len() > 1 {
        set_clocks(files, boots.len())?;
    }
    let (mut machines, logs): (Vec<&mut Machine>, Vec<&[Item]>) = files
        .iter_mut()
        .map(|file| (&mut file.machine, file.ahead.make_contiguous() as &[Item]))
        .unzip();
    join_clusters(&mut machines, &logs);
    Ok(())
}

/// Finds how far the clock of each machine is ahead of the first one's.
fn set_clocks(files: &mut [Log], machines: usize) -> Result<()> {
    let mut crossings: Vec<Crossings> = (0..machines).map(|_| Crossings::default()).collect();
    for file in files.iter() {
        let name = file.path.display();
        if !fs::metadata(&file.path).is_ok_and(|data| data.is_file()) {
            log::warn!("{name} can be read only once: its clock is compared by its clock facts alone");
            continue;
        }
        for item in open(&file.path)? {
            if let Item::Observation(observation) = item? {
                crossings[file.machine.number as usize].note(&observation);
            }
        }
    }
    // Machine by machine, each by one that is known already.
    let mut ahead: Vec<Option<Vec<Offset>>> = vec![None; machines];
    ahead[0] = Some(Vec::new());
    let mut known = vec![0];
    while let Some(here) = known.pop() {
        for there in 0..machines {
            if ahead[there].is_none()
                && let Some(offset) = Offset::between(&crossings[here], &crossings[there])
            {
                ahead[there] = ahead[here].as_ref().map(|ahead| [&[offset], &ahead[..]].concat());
                known.push(there);
            }
        }
    }
    for index in 0..files.len() {
        let machine = files[index].machine.number as usize;
        files[index].machine.ahead = if let Some(ahead) = &ahead[machine] {
            ahead.clone()
        } else {
            // No packets went between them: what their clocks showed has to do.
            let ahead = i64::try_from(files[0].clock()? - files[index].clock()?);
            vec![Offset::constant(ahead.context("the clocks are centuries apart")?)]
        };
    }
    Ok(())
}

/// Opens the log at `path`, behind no item.
fn open(path: &Path) -> Result<LogReader<BufReader<File>>> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| format!("open the event log {name}"))?;
    LogReader::new(BufReader::with_capacity(256 << 10, file), name)
}

impl Iterator for Files {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Result<Item>> {
        self.next_item().transpose()
    }
}

impl Log {
    fn open(path: &Path) -> Result<Self> {
        let mut reader = open(path)?;
        let Some(Item::Header(header)) = reader.next().transpose()? else {
            anyhow::bail!("{} has no header", path.display());
        };
        Ok(Self {
            path: path.to_owned(),
            reader,
            header,
            ahead: VecDeque::new(),
            following: None,
            machine: Machine::default(),
            time: 0,
            ledger: None,
            end: None,
        })
    }

    /// Reads ahead what it was known to begin with: up to the first observation.
    fn read_first_facts(&mut self) -> Result<()> {
        while !matches!(self.ahead.back(), Some(Item::Observation(_)))
            && let Some(item) = self.reader.next().transpose()?
        {
            self.ahead.push_back(item);
        }
        Ok(())
    }

    /// Realtime minus monotonic time, by the first clock fact; it stands before the first observation.
    fn clock(&self) -> Result<i128> {
        let clock = self.ahead.iter().find_map(|item| match item {
            Item::Fact(Fact::Clock(clock)) => Some(i128::from(clock.realtime) - i128::from(clock.time)),
            _ => None,
        });
        clock.with_context(|| {
            format!(
                "{} does not say what its clock shows: it cannot be merged with a log of another machine",
                self.reader.name()
            )
        })
    }

    /// Its place in the order; none when it has ended.
    fn peek(&mut self) -> Result<Option<u64>> {
        if self.ahead.is_empty() {
            self.ahead.extend(self.reader.next().transpose()?);
        }
        let Some(item) = self.ahead.front() else {
            return Ok(None);
        };
        let mut time = item.time().map_or(0, |time| self.machine.time(time));
        // A fact may stand before older observations: that a hook was taken away is known before the ring is empty.
        if let Item::Fact(_) = item {
            time = time.min(self.following()?);
        }
        self.time = self.time.max(time);
        Ok(Some(self.time))
    }

    /// When what follows the facts at the front was seen; the end of time if nothing follows.
    fn following(&mut self) -> Result<u64> {
        if let Some(known) = self.following {
            return Ok(known);
        }
        let is_fact = |item: &Item| matches!(item, Item::Fact(_));
        let item = match self.ahead.iter().find(|item| !is_fact(item)) {
            Some(item) => Some(item),
            None => loop {
                let Some(item) = self.reader.next().transpose()? else {
                    break None;
                };
                self.ahead.push_back(item);
                if let Some(last) = self.ahead.back().filter(|item| !is_fact(item)) {
                    break Some(last);
                }
            },
        };
        let time = item.and_then(Item::time);
        let time = time.map_or(u64::MAX, |time| self.machine.time(time));
        self.following = Some(time);
        Ok(time)
    }

    fn pop(&mut self) -> Option<Item> {
        let mut item = self.ahead.pop_front()?;
        if !matches!(item, Item::Fact(_)) {
            self.following = None;
        }
        if let Item::Fact(Fact::Node(node)) = &item
            && let Some(clock) = self.machine.clock_of(node)
        {
            self.ahead.push_front(clock);
        }
        self.machine.adopt(&mut item);
        // The time of day is the first machine's, too.
        let is_clock = matches!(item, Item::Fact(Fact::Clock(_)));
        (self.machine.number == 0 || !is_clock).then_some(item)
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::event::{Clock, FORMAT, LedgerRow, LogWriter, Node, VERSION};

    /// Writes a log of `host` with this boot id; its items follow its header.
    fn log(folder: &TempDir, name: &str, boot_id: &str, items: &[Item]) -> PathBuf {
        let path = folder.path().join(name);
        let mut log = LogWriter::new(File::create(&path).unwrap());
        let header = Header {
            format: FORMAT.into(),
            version: VERSION,
            program: "0.1.0".into(),
            boot_id: boot_id.into(),
            host: name.into(),
            kernel: "6.18.0".into(),
            hooks: Vec::new(),
            filter: None,
            drain_period: 10,
        };
        log.write(&Item::Header(header)).unwrap();
        items.iter().try_for_each(|item| log.write(item)).unwrap();
        path
    }

    fn node(time: u64, name: &str) -> Item {
        Item::Fact(Fact::Node(Node {
            time,
            netns: 1,
            name: name.into(),
            cluster: 0,
            addresses: Vec::new(),
        }))
    }

    fn clock(time: u64, realtime: u64) -> Item {
        Item::Fact(Fact::Clock(Clock { time, realtime }))
    }

    fn read(paths: &[PathBuf]) -> (Vec<String>, Vec<String>) {
        let mut files = Files::open(paths).unwrap();
        let items = files.by_ref().map(|item| match item.unwrap() {
            Item::Header(header) => format!("header of {}", header.host),
            Item::Fact(Fact::Node(node)) => format!("{} {}", node.time, node.name),
            Item::Tick { time } => format!("{time} tick"),
            Item::Ledger(ledger) => format!("{} ledger {} {}", ledger.time, ledger.rows.len(), ledger.exact),
            Item::End { time } => format!("{time} end"),
            other => format!("{} other", other.time().unwrap()),
        });
        (items.collect(), files.cuts().collect())
    }

    #[test]
    fn files_are_merged_in_order_of_time_and_each_keeps_its_own() {
        let folder = TempDir::new().unwrap();
        // The second fact of the first file is late: it stays behind the first one.
        let ledger = |time, exact| {
            Item::Ledger(Ledger {
                time,
                exact,
                rows: vec![LedgerRow::default()],
                evicted: 0,
            })
        };
        let one = [
            node(100, "a"),
            node(90, "b"),
            node(300, "c"),
            ledger(310, true),
            Item::End { time: 320 },
        ];
        let two = [
            node(95, "d"),
            Item::Tick { time: 250 },
            ledger(315, true),
            Item::End { time: 400 },
        ];
        let paths = [
            log(&folder, "one", "boot", &one),
            log(&folder, "two", "boot", &two),
        ];
        let (items, cuts) = read(&paths);
        let expected = [
            "header of one",
            "95 d",
            "100 a",
            "90 b",
            "240 tick",
            "300 c",
            "310 ledger 1 false",
            "315 ledger 2 true",
            "400 end",
        ];
        assert_eq!(items, expected);
        assert!(cuts.is_empty());
    }

    #[test]
    fn a_fact_before_older_observations_does_not_delay_them() {
        let folder = TempDir::new().unwrap();
        let one = [
            Item::Tick { time: 100 },
            node(300, "a"),
            node(301, "b"),
            Item::Tick { time: 120 },
            node(310, "c"),
        ];
        let paths = [
            log(&folder, "one", "boot", &one),
            log(&folder, "two", "boot", &[Item::Tick { time: 200 }]),
        ];
        let (items, _) = read(&paths);
        assert_eq!(
            items[1..],
            ["90 tick", "300 a", "301 b", "110 tick", "190 tick", "310 c"]
        );
    }

    #[test]
    fn one_file_is_handed_on_as_it_is() {
        let folder = TempDir::new().unwrap();
        let items = [node(100, "a"), Item::Tick { time: 250 }, Item::End { time: 400 }];
        let (items, _) = read(&[log(&folder, "one", "boot", &items)]);
        assert_eq!(items, ["header of one", "100 a", "250 tick", "400 end"]);
    }

    #[test]
    fn another_machine_is_moved_to_the_first_ones_clock() {
        let folder = TempDir::new().unwrap();
        let one = [
            clock(1_000, 51_000),
            node(1_100, "a"),
            node(1_300, "c"),
            Item::End { time: 1_400 },
        ];
        // This machine was started later: the same moment has a lower time.
        let two = [clock(200, 51_200), node(200, "b"), Item::End { time: 250 }];
        let paths = [
            log(&folder, "one", "boot", &one),
            log(&folder, "two", "other", &two),
        ];
        let (items, _) = read(&paths);
        assert_eq!(
            items[1..],
            [
                "1000 other",
                "1100 a",
                "1200 b",
                "1200 other",
                "1300 c",
                "1400 end"
            ]
        );
    }

    #[test]
    fn without_a_clock_another_machine_cannot_be_merged() {
        let folder = TempDir::new().unwrap();
        let paths = [
            log(&folder, "one", "boot", &[clock(1, 2)]),
            log(&folder, "two", "other", &[node(1, "b")]),
        ];
        let error = format!("{:#}", Files::open(&paths).unwrap_err());
        assert!(error.contains("two does not say what its clock shows"), "{error}");
    }

    #[test]
    fn one_cut_file_of_two_leaves_no_end_line() {
        let folder = TempDir::new().unwrap();
        let paths = [
            log(&folder, "one", "boot", &[node(1, "a")]),
            log(&folder, "two", "boot", &[Item::End { time: 5 }]),
        ];
        let (items, cuts) = read(&paths);
        assert_eq!(items, ["header of one", "1 a"]);
        assert_eq!(cuts.len(), 1);
        assert!(cuts[0].contains("one was cut off after line 2"), "{cuts:?}");
    }
}
