//! Attachments that somebody takes away, or gets in front of, while packets flow: noticed, repaired, and told.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use calitrace_tests::{
    Lab, Namespace, Need, Test,
    stand_in::{self, Action, Attached, Side},
    test,
};
use serde_json::Value;

use crate::support::{Watch, at_interfaces, quiet, with};

pub(crate) const TESTS: &[Test] = &[
    test("links_that_are_detached_by_force", || taken_away(Way::Tcx)).needs(&[Need::Tcx]),
    test("qdiscs_that_are_deleted", || taken_away(Way::Clsact)),
    test("programs_that_get_in_front", || taken_away(Way::Displaced)).needs(&[Need::Tcx]),
];

/// Where hooks are taken away: where packets come to the receiving node, and where they leave it for the pod.
const NODE: &str = "minikube-m02";
const UPLINK: &str = "eth0";
const WORKLOAD: &str = "cali79f33e4263e";
const PORT: u16 = 5353;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Links are detached by force.
    Tcx,
    /// Qdiscs are deleted, as Felix does.
    Clsact,
    /// Programs are attached on the outer side of ours.
    Displaced,
}

fn taken_away(way: Way) -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let server = lab.udp_server("pod2", PORT, false)?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let log = folder.path().join("gap.jsonl");
    let log_name = log.to_str().context("a path in UTF-8")?;
    let mut words = vec!["-o", "json", "-w", log_name];
    if way == Way::Clsact {
        words.extend(["--tc", "clsact"]);
    }
    let watch = Watch::start(&with(&lab, &words))?;
    let sender = Sender::new(&lab)?;
    let node = lab.namespace(NODE)?;
    let mut theirs = Vec::new();
    let sent = sender.during(|| {
        watch.until("packets before", |watch| with_verdict(watch, "delivered") >= 20)?;
        let start = Instant::now();
        theirs = disturb(way, &node)?;
        watch.until("both repairs", |watch| {
            watch.stderr().matches("attaching it again").count() >= 2
        })?;
        println!("noticed within {:?}", start.elapsed());
        let before = with_verdict(&watch, "delivered");
        watch.until("packets after the repairs", |watch| {
            with_verdict(watch, "delivered") >= before + 20
        })
    })?;
    if way != Way::Clsact {
        in_order(&node)?;
    }
    // Displaced, ours observes until it is put back, and then is away for a moment only.
    if way != Way::Displaced {
        watch.until("what passed in the gap to be given up on", |watch| {
            with_verdict(watch, "unknown") > 0
        })?;
    }
    // Afterwards everything is seen again.
    let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 5, &[])?;
    ensure!(ping.received == 5, "{ping:?}");
    let finished = watch.stop()?;
    let counts = server.stop()?;
    drop(theirs);
    ensure!(finished.status.success(), "{finished:?}");

    let packets = finished.packets()?;
    let (echoes, datagrams): (Vec<&Value>, Vec<&Value>) = packets
        .iter()
        .partition(|packet| packet["flow"]["proto"] == "icmp");
    ensure!(echoes.len() == 10, "five requests and five replies: {echoes:#?}");
    for echo in &echoes {
        ensure!(echo["verdict"] == "delivered", "{echo:#}");
        ensure!(at_interfaces(echo).count() == 6, "whole again: {echo:#}");
    }
    ensure!(
        u64::try_from(datagrams.len()).context("a count")? == sent,
        "{sent} sent, {} traced",
        datagrams.len()
    );
    let (mut unknown, mut dropped) = (0_u64, 0_u64);
    for datagram in &datagrams {
        match datagram["verdict"].as_str() {
            Some("delivered" | "unfinished") => {}
            Some("unknown") => unknown += 1,
            // The kernel itself drops what is sent while a clsact qdisc comes or goes (`qdisc_graft` deactivates the
            // device, net/sched/sch_api.c).
            Some("dropped") if way == Way::Clsact && by_noop_qdisc(datagram) => dropped += 1,
            _ => return Err(anyhow!("the gap is nobody's loss: {datagram:#}")),
        }
    }
    println!("{unknown} of {sent} packets passed in the gap, {dropped} were dropped by the kernel");
    ensure!(
        counts.received >= sent - dropped - unknown && counts.received <= sent - dropped,
        "{counts:?} of {sent}, {dropped} dropped, {unknown} unknown"
    );
    let told = told(&log)?;
    for (hook, lost, since, back) in &told {
        ensure!(since <= lost && lost < back, "{told:?}");
        let row = ledger_row(&finished.lines()?, hook)?;
        ensure!(
            row["unobserved_ns"].as_u64() == Some(back - since),
            "{hook} was away from {since} to {back}: {row:#}"
        );
    }
    let mut hooks: Vec<&str> = told.iter().map(|(hook, ..)| hook.as_str()).collect();
    hooks.sort_unstable();
    // With a qdisc both its directions go.
    let expected: &[&str] = if way == Way::Clsact {
        &[
            "uplink_egress",
            "uplink_ingress",
            "workload_egress",
            "workload_ingress",
        ]
    } else {
        &["uplink_ingress", "workload_egress"]
    };
    ensure!(hooks == expected, "{told:?}");
    Ok(())
}

/// Takes away what arrives at the uplink and what leaves for the pod.
fn disturb(way: Way, node: &Namespace) -> Result<Vec<Attached>> {
    let to = "192.0.2.1".parse().context("an address that nobody has")?;
    match way {
        Way::Tcx => {
            for (interface, side) in [(UPLINK, Side::Ingress), (WORKLOAD, Side::Egress)] {
                let detached = stand_in::detach_by_force(node, interface, side, "calitrace_")?;
                ensure!(detached == 1, "{detached} programs of ours on {interface}");
            }
            Ok(Vec::new())
        }
        Way::Clsact => {
            for interface in [UPLINK, WORKLOAD] {
                let status = node
                    .command("tc")
                    .args(["qdisc", "del", "dev", interface, "clsact"])
                    .status()
                    .context("run tc")?;
                ensure!(status.success(), "tc qdisc del dev {interface} clsact: {status}");
            }
            Ok(Vec::new())
        }
        Way::Displaced => Ok(vec![
            stand_in::attach_in_front(node, UPLINK, Side::Ingress, to, Action::Accept)?,
            stand_in::attach(node, WORKLOAD, Side::Egress, to, Action::Accept)?,
        ]),
    }
}

/// Ours is the first on ingress and the last on egress.
fn in_order(node: &Namespace) -> Result<()> {
    let ingress = stand_in::attached(node, UPLINK, Side::Ingress)?;
    let egress = stand_in::attached(node, WORKLOAD, Side::Egress)?;
    ensure!(
        ingress.first().is_some_and(|name| name.starts_with("calitrace_"))
            && egress.last().is_some_and(|name| name.starts_with("calitrace_")),
        "{ingress:?}, {egress:?}"
    );
    Ok(())
}

fn by_noop_qdisc(packet: &Value) -> bool {
    // Before 5.17 there are no reasons.
    ["QDISC_DROP", "NOT_SPECIFIED"]
        .iter()
        .any(|reason| packet["drop"]["reason"] == *reason)
        || packet["drop"]["reason"].is_null()
}

fn with_verdict(watch: &Watch, verdict: &str) -> usize {
    let packets = watch.packets();
    packets
        .iter()
        .filter(|packet| packet["verdict"] == verdict)
        .count()
}

/// What the log tells of each lost attachment: its hook, when it was noticed, since when it may have been away, and when
/// it was back.
fn told(log: &Path) -> Result<Vec<(String, u64, u64, u64)>> {
    let text = fs::read_to_string(log).context("read the log")?;
    let facts: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
        .filter(|line| {
            line.as_ref()
                .map_or(true, |line: &Value| line["fact"] == "attachment")
        })
        .collect::<Result<_>>()?;
    let number =
        |fact: &Value, field: &str| fact[field].as_u64().with_context(|| format!("{field} of {fact}"));
    let mut told = Vec::new();
    for (at, lost) in facts
        .iter()
        .enumerate()
        .filter(|(_, fact)| fact["state"] == "lost")
    {
        let same = |fact: &&Value| {
            ["netns", "ifindex", "hook"]
                .iter()
                .all(|field| fact[*field] == lost[*field])
                && fact["state"] == "attached"
        };
        let back = facts[at..]
            .iter()
            .find(same)
            .with_context(|| format!("never back: {lost}"))?;
        told.push((
            lost["hook"].as_str().context("a hook")?.to_owned(),
            number(lost, "time")?,
            number(lost, "since")?,
            number(back, "time")?,
        ));
    }
    Ok(told)
}

fn ledger_row(lines: &[Value], hook: &str) -> Result<Value> {
    let ledger = lines
        .iter()
        .rfind(|line| line["type"] == "ledger")
        .context("a ledger")?;
    let rows = ledger["rows"].as_array().context("rows")?;
    let row = rows.iter().find(|row| row["node"] == NODE && row["hook"] == hook);
    Ok(row
        .with_context(|| format!("no row for {hook}: {ledger:#}"))?
        .clone())
}

/// Sends a datagram from pod 1 to pod 2 every few milliseconds.
struct Sender {
    socket: UdpSocket,
    sent: AtomicU64,
}

impl Sender {
    fn new(lab: &Lab) -> Result<Self> {
        let to = SocketAddr::from((lab.pod("pod2")?.address, PORT));
        let socket = lab.namespace("pod1")?.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
            socket.connect(to).with_context(|| format!("connect to {to}"))?;
            Ok(socket)
        })?;
        Ok(Self {
            socket,
            sent: AtomicU64::new(0),
        })
    }

    /// Sends while `work` runs; returns how many.
    fn during(&self, work: impl FnOnce() -> Result<()>) -> Result<u64> {
        let stop = AtomicBool::new(false);
        let (worked, sent) = std::thread::scope(|scope| {
            let sending = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::Relaxed) {
                    let number = self.sent.fetch_add(1, Ordering::Relaxed);
                    self.socket
                        .send(&number.to_be_bytes())
                        .context("send a datagram")?;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(())
            });
            let worked = work();
            stop.store(true, Ordering::Relaxed);
            (worked, sending.join())
        });
        worked?;
        sent.map_err(|_panic| anyhow!("the sender panicked"))??;
        Ok(self.sent.load(Ordering::Relaxed))
    }
}
