//! The event log and the JSON lines: what is read is what was watched, and every line keeps to the schema.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result, anyhow, ensure};
use calitrace_tests::{
    Lab, Need, Options, Policy, lab::netfilter::Backend, needs::find_program, traffic::traceroute::Kind,
};
use serde_json::Value;

use crate::{
    Test,
    support::{Finished, Watch, run, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("read_prints_the_traces_that_watch_printed", || {
        read_is_watch(Backend::Any)
    }),
    test("read_knows_rules_of_nftables", || read_is_watch(Backend::Native)).needs(&[Need::Program("nft")]),
    test("every_json_line_keeps_to_the_schema", schema),
    test("jc_reads_each_traceroute_block", jc).needs(&[Need::Program("jc")]),
];

/// Some of everything: echo, a service, a transfer, a closed port, a policy, a traceroute.
pub(crate) fn mixed_traffic(lab: &Lab) -> Result<()> {
    let pod2 = lab.pod("pod2")?;
    lab.ping("pod1", pod2.ip(), 5, &[])?;
    lab.ping("pod1", pod2.address_v6.into(), 2, &[])?;
    let server = lab.http_server("pod2", 8080)?;
    lab.http_get("pod1", (pod2.address, 8080).into(), 50_000)?;
    lab.http_get("pod1", "10.96.0.10:80".parse()?, 2_000)?;
    server.stop()?;
    lab.udp_flood("pod1", (pod2.address, 9999).into(), 3, 100)?;
    lab.set_policy("pod4", Policy::Deny)?;
    lab.ping("pod1", lab.pod("pod4")?.ip(), 2, &[])?;
    lab.traceroute("pod1", pod2.ip(), Kind::Udp, &[])?;
    Ok(())
}

fn watched(lab: &Lab, log: &Path) -> Result<Finished> {
    let log = log.to_str().context("a path in UTF-8")?;
    let watch = Watch::start(&with(lab, &["-o", "json", "-w", log]))?;
    mixed_traffic(lab)?;
    watch.stop()
}

fn read_is_watch(netfilter: Backend) -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter,
        ..Options::default()
    })?;
    // So that the rules are known that deny.
    lab.set_policy("pod4", Policy::Deny)?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let log = folder.path().join("mixed.jsonl");
    let watched = by_id(&watched(&lab, &log)?)?;
    // On a machine that knows nothing of the lab.
    lab.down()?;
    let log = log.to_str().context("a path in UTF-8")?;
    let read = run(&["read", log, "-o", "json"])?;
    ensure!(read.status.success() && read.stderr.is_empty(), "{}", read.stderr);
    let read = by_id(&read)?;
    let is_denied = |packet: &Value| packet["drop"]["policy"] == "default/deny-all";
    ensure!(watched.values().any(is_denied), "no policy denied: {watched:#?}");
    for (id, packet) in &watched {
        ensure!(
            read.get(id) == Some(packet),
            "watched: {packet:#}\nread: {:#?}",
            read.get(id)
        );
    }
    ensure!(
        read.len() == watched.len(),
        "{} watched, {} read",
        watched.len(),
        read.len()
    );

    // Cut in the middle of a line: read up to there, and said.
    let whole = fs::read(log).context("read the log")?;
    let cut = folder.path().join("cut.jsonl");
    fs::write(&cut, &whole[..whole.len() * 2 / 3]).context("write the cut log")?;
    let cut = cut.to_str().context("a path in UTF-8")?;
    let partly = run(&["read", cut, "-o", "json"])?;
    ensure!(partly.status.success(), "{partly:?}");
    ensure!(
        partly.stderr.contains(cut) && partly.stderr.contains("cut"),
        "{}",
        partly.stderr
    );
    let partly = partly.packets()?;
    ensure!(
        !partly.is_empty() && partly.len() < read.len(),
        "{} of {}",
        partly.len(),
        read.len()
    );
    Ok(())
}

fn by_id(finished: &Finished) -> Result<BTreeMap<String, Value>> {
    let packets = finished.packets()?;
    let count = packets.len();
    let map: BTreeMap<String, Value> = packets
        .into_iter()
        .map(|packet| (packet["id"].as_str().unwrap_or_default().to_owned(), packet))
        .collect();
    ensure!(
        map.len() == count,
        "ids are not unique: {count} packets, {} ids",
        map.len()
    );
    Ok(map)
}

fn schema() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let finished = watched(&lab, &folder.path().join("log.jsonl"))?;
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../calitrace/schema/calitrace-1.schema.json"
    );
    let mut schemas = boon::Schemas::new();
    let schema = boon::Compiler::new()
        .compile(file, &mut schemas)
        .map_err(|error| anyhow!("compile {file}: {error}"))?;
    let lines = finished.lines()?;
    let kinds: Vec<&str> = lines.iter().filter_map(|line| line["type"].as_str()).collect();
    ensure!(
        kinds.contains(&"packet") && kinds.contains(&"ledger"),
        "{kinds:?}"
    );
    for line in &lines {
        schemas
            .validate(line, schema)
            .map_err(|error| anyhow!("{error}\n{line:#}"))?;
        // A schema that takes everything would prove nothing.
        let mut broken = line.clone();
        broken.as_object_mut().context("an object")?.remove("version");
        broken["type"] = "packets".into();
        ensure!(
            schemas.validate(&broken, schema).is_err(),
            "the schema takes what is no line: {broken:#}"
        );
    }
    Ok(())
}

/// `jc`, from Python's package index: the one that `cargo xtask setup` installs, or the one on the path.
fn jc() -> Result<()> {
    let jc = find_program("jc").context("jc is not there; `cargo xtask setup` installs it")?;
    let lab = Lab::up(&Options::default())?;
    let watch = Watch::start(&with(&lab, &["-o", "traceroute"]))?;
    mixed_traffic(&lab)?;
    let printed = watch.stop()?.stdout;
    let mut blocks = 0;
    for block in printed.trim_end().split("\n\n") {
        let parsed = jc_parse(&jc, block).with_context(|| format!("jc on:\n{block}"))?;
        let lines = block.lines().count() - 1;
        let hops = parsed["hops"].as_array().map_or(0, Vec::len);
        ensure!(
            hops == lines,
            "{lines} lines, {hops} hops by jc:\n{block}\n{parsed:#}"
        );
        ensure!(parsed["destination_ip"].is_string(), "{block}\n{parsed:#}");
        blocks += 1;
    }
    ensure!(blocks >= 4, "{blocks} blocks:\n{printed}");
    Ok(())
}

fn jc_parse(jc: &Path, block: &str) -> Result<Value> {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };
    let mut child = Command::new(jc)
        .arg("--traceroute")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {}", jc.display()))?;
    child
        .stdin
        .take()
        .context("jc's input")?
        .write_all(block.as_bytes())
        .context("write to jc")?;
    let output = child.wait_with_output().context("wait for jc")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).context("jc's output")
}
