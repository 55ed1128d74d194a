//! Scenario files: observations in, expected traces out. To add one, put a `NAME.jsonl` (an event log's lines) and a
//! `NAME.expected` into `tests/scenarios`; no Rust is needed. See `tests/scenarios/README.md`.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use calitrace::{
    correlate::{Config, Correlator, Hop, Joint, PacketTrace, Segment},
    event::{Item, protocol_name},
};
use libtest_mimic::{Arguments, Failed, Trial};

mod two_machines;

/// Out of order by more than this is more than a capture promises.
const DRAIN_PERIOD: u64 = 10_000_000;

fn main() -> Result<()> {
    let arguments = Arguments::from_args();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| format!("list {}", folder.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.retain(|file| file.extension().is_some_and(|ending| ending == "jsonl"));
    files.sort();
    ensure!(!files.is_empty(), "no scenario in {}", folder.display());
    let trials = files.into_iter().map(|file| {
        let name = file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Trial::test(name, move || {
            run(&file).map_err(|error| Failed::from(format!("{error:#}")))
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn run(file: &Path) -> Result<()> {
    let mut items = Vec::new();
    read(file, &mut items)?;
    let found = correlate(&items);
    let expected_file = file.with_extension("expected");
    if std::env::var_os("CALITRACE_WRITE_EXPECTED").is_some() {
        return fs::write(&expected_file, found)
            .with_context(|| format!("write {}", expected_file.display()));
    }
    let expected = fs::read_to_string(&expected_file).with_context(|| {
        format!(
            "read {}; this is what was found:\n{found}",
            expected_file.display()
        )
    })?;
    ensure!(found == expected, "{}", difference(&expected, &found));
    // The order in which records come from the ring must not matter, as long as a capture keeps its promise.
    let shuffled = correlate(&out_of_order(items.clone()));
    ensure!(
        shuffled == expected,
        "with records out of order:\n{}",
        difference(&expected, &shuffled)
    );
    // Nor on which machines the nodes are.
    if let Some(logs) = two_machines::split(&items)? {
        let merged = without_times(&correlate(&logs.read()?));
        let expected = without_times(&expected);
        ensure!(
            merged == expected,
            "merged from the logs of two machines:\n{}",
            difference(&expected, &merged)
        );
    }
    Ok(())
}

/// Times on several clocks differ by the error of the estimate, and order that way.
fn without_times(traces: &str) -> String {
    let words = |line: &str| {
        let mut words: Vec<&str> = line.split(' ').collect();
        let is_time = |pair: &[&str]| matches!(pair[0], "arrived" | "left") && pair[1].parse::<u64>().is_ok();
        while let Some(at) = words.windows(2).position(is_time) {
            words.drain(at..at + 2);
        }
        words.join(" ") + "\n"
    };
    traces.lines().map(words).collect()
}

/// The items of a scenario. A line `{"include":"FILE"}` stands for the lines of another file of the folder.
fn read(file: &Path, items: &mut Vec<Item>) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let at = || format!("{} line {}", file.display(), number + 1);
        let value: serde_json::Value = serde_json::from_str(line).with_context(at)?;
        match value.get("include").and_then(|name| name.as_str()) {
            Some(name) => read(&file.with_file_name(name), items)?,
            None => items.push(serde_json::from_value(value).with_context(at)?),
        }
    }
    Ok(())
}

/// Swaps neighbouring observations where they are closer together than a drain period.
fn out_of_order(mut items: Vec<Item>) -> Vec<Item> {
    for index in 1..items.len() {
        if let (Item::Observation(one), Item::Observation(two)) = (&items[index - 1], &items[index])
            && one.time != two.time
            && two.time.saturating_sub(one.time) < DRAIN_PERIOD / 2
        {
            items.swap(index - 1, index);
        }
    }
    items
}

fn correlate(items: &[Item]) -> String {
    let drain_period = match items.first() {
        Some(Item::Header(header)) => header.drain_period,
        _ => DRAIN_PERIOD,
    };
    let mut correlator = Correlator::new(Config {
        drain_period,
        ..Config::default()
    });
    let mut traces = Vec::new();
    for item in items {
        correlator.push(item, &mut traces);
    }
    correlator.finish(&mut traces);
    traces.sort_by_key(|trace| (trace.start_monotonic, trace.id));
    let mut text = String::new();
    for trace in &traces {
        let _infallible = describe(trace, &mut text);
    }
    text
}

/// Where it was dropped or lost.
fn losses(trace: &PacketTrace, text: &mut String) -> std::fmt::Result {
    if let Some(drop) = &trace.drop {
        let (reason, location) = (name(drop.reason.as_deref()), name(drop.location.as_deref()));
        let netfilter = drop
            .netfilter
            .map(|hook| format!(" in netfilter {hook}"))
            .unwrap_or_default();
        writeln!(
            text,
            "  dropped {reason} at {location}{netfilter} on {} {}{}",
            name(drop.node.as_deref()),
            name(drop.interface.as_deref()),
            drop.before
                .as_ref()
                .map(|next| format!(" before {next}"))
                .unwrap_or_default()
        )?;
        if let Some(route) = &drop.route {
            writeln!(text, "    route {} {:?}", route.prefix, route.kind)?;
        }
        for culprit in &drop.culprits {
            writeln!(
                text,
                "    perhaps by {} {}: {culprit}",
                culprit.table, culprit.chain
            )?;
        }
    }
    if let Some(lost) = &trace.lost {
        writeln!(
            text,
            "  lost between {} {} and {}{}, carried by {}",
            name(lost.node.as_deref()),
            name(lost.interface.as_deref()),
            name(lost.next_node.as_deref()),
            lost.xdp
                .as_ref()
                .map(|xdp| format!(" with an XDP program at {xdp}"))
                .into_iter()
                .chain(
                    lost.too_large
                        .as_ref()
                        .map(|at| format!(" whose {} takes {} of {} bytes", at.interface, at.mtu, at.length))
                )
                .collect::<String>(),
            lost.encap
                .map_or_else(|| "nothing".to_owned(), |kind| format!("{kind:?}"))
        )?;
    }
    Ok(())
}

/// A trace in a form that can be read and compared. Absent is `-`, inferred is `~`.
fn describe(trace: &PacketTrace, text: &mut String) -> std::fmt::Result {
    let flow = trace.flow.flow;
    let end = |address, port| {
        if port == 0 {
            format!("{address}")
        } else {
            format!("{address}:{port}")
        }
    };
    let (source, destination) = match flow.proto {
        1 | 58 => (end(flow.src, 0), end(flow.dst, 0)),
        _ => (end(flow.src, flow.src_port), end(flow.dst, flow.dst_port)),
    };
    let verdict = format!("{:?}", trace.verdict).to_lowercase();
    let proto = protocol_name(flow.proto);
    writeln!(
        text,
        "{proto} {source} → {destination} ttl {}: {verdict}",
        trace.ttl
    )?;
    writeln!(
        text,
        "  pods {} → {}",
        name(trace.flow.src_pod.as_deref()),
        name(trace.flow.dst_pod.as_deref())
    )?;
    if let Some(times) = trace.retransmit {
        writeln!(text, "  retransmit {times}")?;
    }
    match (trace.segment, trace.dup_ack) {
        (Some(Segment::KeepAlive), _) => writeln!(text, "  keep-alive")?,
        (Some(Segment::KeepAliveAck), _) => writeln!(text, "  keep-alive ack")?,
        (Some(Segment::DupAck), Some(times)) => writeln!(text, "  dup ack {times}")?,
        (Some(Segment::DupAck), None) => writeln!(text, "  dup ack, not counted")?,
        (Some(Segment::Ack), _) => writeln!(text, "  ack")?,
        (None, _) => {}
    }
    if trace.certainty == Joint::Order {
        writeln!(text, "  which of several alike, their order decided")?;
    }
    for step in &trace.nat {
        let (from, to) = (&step.from, &step.to);
        let kind = format!("{:?}", step.kind).to_lowercase();
        let (from, to) = (
            end(from.address, from.port.unwrap_or(0)),
            end(to.address, to.port.unwrap_or(0)),
        );
        writeln!(text, "  {kind} on {}: {from} → {to}", name(step.node.as_deref()))?;
    }
    hops(trace, text)?;
    losses(trace, text)?;
    if let Some(answer) = &trace.answer {
        let rtt = answer.rtt_ns.map_or_else(|| "-".into(), |rtt| rtt.to_string());
        let mtu = answer.mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
        writeln!(
            text,
            "  answer {:?} from {} after {rtt}{mtu}{}",
            answer.kind,
            answer.address,
            answer
                .dropped
                .as_ref()
                .map(|drop| format!(" dropped on {}", name(drop.node.as_deref())))
                .unwrap_or_default()
        )?;
    }
    if let Some(bypass) = &trace.bypass {
        writeln!(
            text,
            "  may be handed on at {}/{} by {}",
            name(bypass.node.as_deref()),
            name(bypass.interface.as_deref()),
            bypass.programs.join(", ")
        )?;
    }
    sightings(trace, text)
}

/// Where a trace's packet was seen, on one line.
fn sightings(trace: &PacketTrace, text: &mut String) -> std::fmt::Result {
    write!(text, "  seen")?;
    for seen in &trace.observations {
        let encap = seen
            .encap
            .map_or_else(String::new, |encap| format!("[{}→{}]", encap.src, encap.dst));
        write!(
            text,
            " {}/{}:{}{encap}@{}",
            name(seen.node.as_deref()),
            name(seen.interface.as_deref()),
            seen.hook,
            seen.ttl
        )?;
    }
    writeln!(text)?;
    for seen in trace.observations.iter().filter(|seen| seen.logged.is_some()) {
        let said = name(seen.detail.as_deref());
        writeln!(
            text,
            "    {} on {}: {said}",
            seen.hook,
            name(seen.node.as_deref())
        )?;
    }
    Ok(())
}

/// A line for each hop.
fn hops(trace: &PacketTrace, text: &mut String) -> std::fmt::Result {
    for Hop {
        ttl,
        address,
        node,
        pod,
        arrived_ns,
        left_ns,
        rtt_ns,
        clock_bound_ns: _,
        certainty,
        reason,
    } in &trace.hops
    {
        let inferred = if *certainty == calitrace::correlate::Certainty::Inferred {
            "~"
        } else {
            " "
        };
        let address = address.map_or_else(|| "*".into(), |address| address.to_string());
        write!(
            text,
            "  {ttl:>2}{inferred} {address} on {}",
            name(node.as_deref())
        )?;
        if let Some(pod) = pod {
            write!(text, " pod {pod}")?;
        }
        for (what, time) in [("arrived", arrived_ns), ("left", left_ns), ("rtt", rtt_ns)] {
            if let Some(time) = time {
                write!(text, " {what} {time}")?;
            }
        }
        if let Some(reason) = reason {
            write!(text, ": {reason}")?;
        }
        writeln!(text)?;
    }
    Ok(())
}

/// What is not known is `-`.
fn name(name: Option<&str>) -> &str {
    name.unwrap_or("-")
}

/// Both texts from the first line that differs.
fn difference(expected: &str, found: &str) -> String {
    let same = expected
        .lines()
        .zip(found.lines())
        .take_while(|(one, two)| one == two)
        .count();
    let from = |text: &str| text.lines().skip(same).collect::<Vec<_>>().join("\n");
    format!(
        "from line {} on, expected:\n{}\nfound:\n{}",
        same + 1,
        from(expected),
        from(found)
    )
}
