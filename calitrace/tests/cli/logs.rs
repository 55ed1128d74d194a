//! Reading event logs: as text, as JSON, cut off, broken, too many traces open, nowhere to write to.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
};

use calitrace::event::{FORMAT, Header, Item, Ledger, LedgerRow, LogWriter, VERSION};
use tempfile::TempDir;

use crate::{Run, command, finish};

/// A folder of logs, which stand in messages by their names alone.
struct Logs(TempDir);

impl Logs {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn bytes(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// A log of so many ledgers.
    fn log(&self, name: &str, ledgers: u64) -> PathBuf {
        let mut log = LogWriter::new(File::create(self.path(name)).unwrap());
        log.write(&header()).unwrap();
        for time in 0..ledgers {
            let rows = vec![
                LedgerRow {
                    hook: "kfree_skb".into(),
                    ..LedgerRow::default()
                };
                100
            ];
            log.write(&Item::Ledger(Ledger {
                time,
                exact: false,
                rows,
                evicted: 0,
            }))
            .unwrap();
        }
        log.write(&Item::End { time: ledgers }).unwrap();
        self.path(name)
    }

    /// A log of what happens in a scenario of the workspace's tests.
    fn scenario(&self, name: &str) -> PathBuf {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/scenarios"));
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        let mut log = serde_json::to_string(&header()).unwrap() + "\n";
        for line in read(&format!("{name}.jsonl")).lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            match line["include"].as_str() {
                Some(facts) => log += &read(facts),
                None => log.extend([&line.to_string(), "\n"]),
            }
        }
        log += &serde_json::to_string(&Item::End { time: u64::MAX }).unwrap();
        self.bytes(&format!("{name}.jsonl"), log.as_bytes())
    }

    fn read(&self, args: &[&str]) -> Run {
        let mut run = finish(command(args).current_dir(self.0.path()));
        run.stderr = run.stderr.replace(&self.0.path().display().to_string(), "");
        run
    }
}

fn header() -> Item {
    Item::Header(Header {
        format: FORMAT.into(),
        version: VERSION,
        program: "0.1.0".into(),
        boot_id: "boot".into(),
        host: "minikube".into(),
        kernel: "6.18.0".into(),
        hooks: Vec::new(),
        filter: None,
        drain_period: 10_000_000,
    })
}

#[test]
fn too_many_open_traces_are_counted_and_the_way_out_is_told() {
    let logs = Logs::new();
    // Three packets of one connection under way at once, and a ledger after them.
    let path = logs.scenario("tcp-out-of-order");
    let ledger = Item::Ledger(Ledger {
        time: u64::MAX,
        exact: true,
        rows: Vec::new(),
        evicted: 0,
    });
    let ledger = serde_json::to_string(&ledger).unwrap();
    let log = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<&str> = log.lines().collect();
    let end = lines.iter().position(|line| line.contains(r#""type":"end""#));
    lines.insert(end.unwrap(), &ledger);
    let log = lines.join("\n");
    fs::write(&path, log).unwrap();
    let read = |more: &[&str]| logs.read(&[&["read", "tcp-out-of-order.jsonl"], more].concat());
    let evicted = |run: &Run| -> u64 {
        assert_eq!(run.code, 0, "{}", run.stderr);
        let last: serde_json::Value = serde_json::from_str(run.stdout.lines().last().unwrap()).unwrap();
        assert_eq!(last["type"], "ledger", "{last}");
        last["evicted"].as_u64().unwrap()
    };
    assert_eq!(evicted(&read(&["-o", "json"])), 0);
    let few = read(&["-o", "json", "--max-open", "1"]);
    assert!(evicted(&few) > 0, "{}", few.stdout);
    assert!(few.stdout.contains(r#""verdict":"unknown""#), "{}", few.stdout);
    let text = read(&["--max-open", "1"]).stdout;
    assert!(
        text.contains("closed before their time (try a larger --max-open)"),
        "{text}"
    );
    let wrong = read(&["--max-open", "1e6"]);
    assert_eq!(wrong.code, 2);
    insta::assert_snapshot!(wrong.stderr, @r#"
    error: invalid value '1e6' for '--max-open <COUNT>': expected a number from 1 to 100000000

    For more information, try '--help'.
    "#);
}

#[test]
fn what_cannot_be_read_is_said_so() {
    let logs = Logs::new();
    logs.bytes("empty.jsonl", b"");
    logs.bytes("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
    let Item::Header(mut newer) = header() else {
        unreachable!()
    };
    (newer.version, newer.program) = (9, "4.0.0".into());
    logs.bytes("newer.jsonl", &serde_json::to_vec(&Item::Header(newer)).unwrap());
    let mut bad = serde_json::to_vec(&header()).unwrap();
    bad.extend(b"\n{\"type\":\"observation\"}\n");
    logs.bytes("bad.jsonl", &bad);
    let mut errors = String::new();
    for name in [
        "missing.jsonl",
        "empty.jsonl",
        "picture.png",
        "newer.jsonl",
        "bad.jsonl",
    ] {
        let run = logs.read(&["read", name]);
        assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{name}");
        errors += &run.stderr;
    }
    insta::assert_snapshot!(errors, @r#"
    error: open the event log missing.jsonl: No such file or directory (os error 2)
    error: empty.jsonl is empty: an event log starts with a header line
    error: picture.png is not an event log of calitrace: its first line is not a header
    error: newer.jsonl has version 9 of the event log format (written by calitrace 4.0.0); this calitrace reads versions up to 1: use a newer one
    error: line 2 of the event log bad.jsonl: missing field `time`
    "#);
}

#[test]
fn a_truncated_log_is_read_up_to_where_it_stops() {
    let logs = Logs::new();
    let whole = fs::read(logs.log("whole.jsonl", 3)).unwrap();
    logs.bytes("cut.jsonl", &whole[..whole.len() - 30]);
    let [cut, whole] = ["cut.jsonl", "whole.jsonl"].map(|name| logs.read(&["read", "-o", "json", name]));
    assert_eq!((cut.code, whole.code), (0, 0));
    // The cut goes through the last ledger.
    assert_eq!((cut.stdout.lines().count(), whole.stdout.lines().count()), (2, 3));
    assert_eq!(whole.stderr, "");
    insta::assert_snapshot!(cut.stderr, @"warning: cut.jsonl was cut off after line 3: it has no end line; read up to there");
}

#[test]
fn a_log_is_written_again_as_it_was() {
    let logs = Logs::new();
    let log = logs.log("one.jsonl", 3);
    let run = logs.read(&["read", "one.jsonl", "-w", "two.jsonl"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_eq!(fs::read(log).unwrap(), fs::read(logs.path("two.jsonl")).unwrap());
}

#[test]
fn a_log_is_not_overwritten_while_it_is_read() {
    let logs = Logs::new();
    let before = fs::read(logs.log("one.jsonl", 3)).unwrap();
    symlink("one.jsonl", logs.path("two.jsonl")).unwrap();
    let run = logs.read(&["read", "one.jsonl", "-w", "two.jsonl"]);
    assert_eq!(run.code, 1);
    insta::assert_snapshot!(run.stderr, @"error: one.jsonl would be overwritten while it is read; write to another file");
    assert_eq!(fs::read(logs.path("one.jsonl")).unwrap(), before);
}

#[test]
fn what_cannot_be_written_is_said_so() {
    let logs = Logs::new();
    logs.log("one.jsonl", 3);
    symlink("/dev/full", logs.path("full.jsonl")).unwrap();
    let mut errors = String::new();
    for output in ["/no/such/folder/x.jsonl", "full.jsonl"] {
        let run = logs.read(&["read", "one.jsonl", "-w", output]);
        assert_eq!(run.code, 1, "{output}: {}", run.stderr);
        errors += &run.stderr;
    }
    let full = File::options().write(true).open(Path::new("/dev/full")).unwrap();
    let mut command = command(&["read", "-o", "json", "one.jsonl"]);
    let output = command.current_dir(logs.0.path()).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    errors += &String::from_utf8(output.stderr).unwrap();
    insta::assert_snapshot!(errors, @r#"
    error: create /no/such/folder/x.jsonl: No such file or directory (os error 2)
    error: write to full.jsonl: No space left on device (os error 28)
    error: write to standard output: No space left on device (os error 28)
    "#);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let logs = Logs::new();
    // Far more than a pipe holds.
    logs.log("long.jsonl", 1_000);
    let mut command = command(&["read", "-o", "json", "long.jsonl"]);
    let mut child = command
        .current_dir(logs.0.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.starts_with("{\"type\":\"ledger\""), "{line}");
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(0), b"".as_slice())
    );
}

#[test]
fn the_seed_reads_as_text() {
    let logs = Logs::new();
    logs.scenario("seed");
    let run = logs.read(&["read", "seed.jsonl", "--from", "default/busybox-f5945bfb5-mw26t"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    insta::assert_snapshot!(run.stdout, @r#"
    default/busybox-f5945bfb5-mw26t → default/busybox-f5945bfb5-mwgr6   ICMP echo   1 packet, 0 lost   round trip 0.043 ms
    traceroute to 10.244.205.193 (10.244.205.193), 3 hops max, 84 byte packets
     1  10.244.120.64 (10.244.120.64)  0.007 ms
          minikube: cali8d02ed71817 → tunl0 IPIP 192.168.49.2 → 192.168.49.3 → eth0
     2  10.244.205.192 (10.244.205.192)  0.017 ms
          minikube-m02: eth0 → tunl0 → cali79f33e4263e
     3  10.244.205.193 (10.244.205.193)  0.017 ms
    "#);
}

#[test]
fn the_seed_reads_as_traceroute() {
    let logs = Logs::new();
    logs.scenario("seed-traceroute");
    let run = logs.read(&["read", "seed-traceroute.jsonl", "-o", "traceroute"]);
    insta::assert_snapshot!(run.stdout, @r#"
    traceroute to 10.244.205.193 (10.244.205.193), 3 hops max, 46 byte packets
     1  10.244.120.64 (10.244.120.64)  0.004 ms
     2  10.244.205.192 (10.244.205.192)  0.028 ms
     3  10.244.205.193 (10.244.205.193)  0.032 ms
    "#);
}

#[test]
fn the_seed_reads_as_json_and_the_count_stops_it() {
    let logs = Logs::new();
    logs.scenario("seed");
    let all = logs.read(&["read", "seed.jsonl", "-o", "json"]);
    let first = logs.read(&["read", "seed.jsonl", "-o", "json", "-c", "1"]);
    assert_eq!(all.stdout.lines().count(), 2);
    assert_eq!(
        first.stdout.lines().collect::<Vec<_>>(),
        all.stdout.lines().take(1).collect::<Vec<_>>()
    );
    let dropped = logs.read(&["read", "seed.jsonl", "-o", "json", "--dropped"]);
    assert_eq!((dropped.code, dropped.stdout.as_str()), (0, ""));
}
