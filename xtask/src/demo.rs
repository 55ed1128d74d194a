//! `cargo xtask demo`: sets up what is missing, builds, raises a lab of two Calico nodes, makes its pods talk, and shows
//! `calitrace watch` live beside `traceroute`. Ends with 0 only if the two agree, and takes everything down again.

mod compare;
mod watch;

use std::ffi::OsString;
use std::io::{IsTerminal as _, stdout};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use calitrace_tests::interrupt::Interrupts;
use calitrace_tests::traffic::traceroute::Kind;
use calitrace_tests::{Lab, Options as LabOptions, Pod};
use nix::unistd::Uid;

use crate::step::say;
use crate::{build, root, setup};
use compare::side_by_side;
use watch::Watch;

/// How long pods talk while the live view is on a terminal.
const LIVE: Duration = Duration::from_secs(12);
/// Where nobody watches, one round of each is enough to read.
const PLAIN: Duration = Duration::ZERO;

/// How to show it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The binary, built already: the demo calls itself so as root
    #[arg(long, hide = true)]
    binary: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let binary = if let Some(binary) = &options.binary {
        binary.clone()
    } else {
        setup::for_build()?;
        setup::for_lab()?;
        build::binary()?
    };
    if !Uid::effective().is_root() {
        return as_root(&binary);
    }
    let interrupts = Interrupts::hold()?;
    let start = Instant::now();
    let lab = Lab::up(&LabOptions::default())?;
    say(&format!("lab: up in {:.1} s", start.elapsed().as_secs_f64()));
    let outcome = show(&lab, &binary, &interrupts);
    lab.down().context("take the lab down")?;
    say("lab: down");
    if interrupts.came()? {
        bail!("interrupted");
    }
    outcome
}

/// Becomes the same command, as root.
fn as_root(binary: &Path) -> Result<()> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let mut command = root::command("the lab and the eBPF programs", program.as_os_str(), &[])?;
    let error = command.args(["demo", "--binary"]).arg(binary).exec();
    Err(error).context("cannot run the demo as root")
}

fn show(lab: &Lab, binary: &Path, interrupts: &Interrupts) -> Result<()> {
    let (from, to) = (lab.pod("pod1")?, lab.pod("pod2")?);
    for node in lab.nodes() {
        say(&format!(
            "  node {:<13} {:<13} tunnel {}",
            node.name, node.address, node.tunnel_address
        ));
        for pod in lab.pods().iter().filter(|pod| pod.node == node.name) {
            say(&format!(
                "    pod {:<40} {:<15} {}",
                pod.full_name(),
                pod.address,
                pod.interface
            ));
        }
    }
    let real = real_traffic(lab, binary, interrupts, [&from, &to])?;
    if interrupts.came()? {
        return Ok(());
    }
    let probes = traceroutes(lab, binary, [&from, &to])?;
    let mut agree = true;
    for Comparison { what, said, traced } in &probes {
        agree &= said == traced;
        if said != traced {
            say(&format!("{what}: traceroute says {said:?}, calitrace {traced:?}"));
        }
    }
    let path = &probes.first().context("a traceroute")?.said;
    let different: Vec<&Vec<String>> = real.iter().filter(|real| *real != path).collect();
    if let Some(different) = different.first() {
        say(&format!(
            "real packets: traceroute says {path:?}, calitrace {different:?}"
        ));
    }
    if !agree || !different.is_empty() || real.is_empty() {
        bail!("calitrace and traceroute do not agree");
    }
    say(&format!(
        "calitrace and traceroute agree: {} (traceroute's probes, and {} real packets of ping, TCP and UDP before them)",
        path.join(", "),
        real.len()
    ));
    Ok(())
}

/// Ping, HTTP and UDP while `calitrace watch` shows them. The paths of the packets from one pod to the other.
fn real_traffic(
    lab: &Lab,
    binary: &Path,
    interrupts: &Interrupts,
    [from, to]: [&Pod; 2],
) -> Result<Vec<Vec<String>>> {
    let folder = tempfile::tempdir().context("make a folder for the log")?;
    let log = folder.path().join("demo.jsonl");
    let arguments: [OsString; 2] = ["-w".into(), log.clone().into()];
    let terminal = stdout().is_terminal();
    say(&format!(
        "\npods talk (ping, TCP, UDP), and this is `calitrace watch`{}:\n",
        if terminal { ", live" } else { "" }
    ));
    let watch = if terminal {
        Watch::shown(binary, lab, &arguments)?
    } else {
        Watch::kept(binary, lab, &arguments)?
    };
    let end = Instant::now() + if terminal { LIVE } else { PLAIN };
    let outcome = talk(lab, to, end, interrupts);
    let printed = watch.stop()?;
    outcome?;
    if !terminal {
        say(printed.trim_end());
    }
    let read = watch::read(binary, &log, [from, to])?;
    Ok(read)
}

fn talk(lab: &Lab, to: &Pod, end: Instant, interrupts: &Interrupts) -> Result<()> {
    let http = lab.http_server(&to.id, 8080)?;
    let udp = lab.udp_server(&to.id, 5353, true)?;
    loop {
        lab.ping("pod1", to.ip(), 3, &[])?;
        lab.http_get("pod1", (to.address, 8080).into(), 50_000)?;
        lab.udp_exchange("pod1", (to.address, 5353).into(), 3, 100)?;
        if Instant::now() >= end || interrupts.came()? {
            break;
        }
        // Slow enough to read along.
        std::thread::sleep(Duration::from_millis(500));
    }
    http.stop()?;
    udp.stop()?;
    Ok(())
}

/// The path of one traceroute, as both tell it.
struct Comparison {
    what: &'static str,
    said: Vec<String>,
    traced: Vec<String>,
}

/// Traceroutes of three kinds with `calitrace watch -o traceroute` beside them.
fn traceroutes(lab: &Lab, binary: &Path, [from, to]: [&Pod; 2]) -> Result<Vec<Comparison>> {
    let mut paths = Vec::new();
    for (kind, what) in [
        (Kind::Udp, "traceroute (UDP)"),
        (Kind::Icmp, "traceroute -I (ICMP)"),
        (Kind::Tcp(8080), "traceroute -T (TCP)"),
    ] {
        let arguments = [
            "-o",
            "traceroute",
            "--from",
            &from.full_name(),
            "--to",
            &to.full_name(),
        ];
        let watch = Watch::kept(binary, lab, &arguments.map(OsString::from))?;
        let said = lab.traceroute("pod1", to.ip(), kind, &[])?;
        let printed = watch.stop()?;
        let traced = compare::path(&printed).with_context(|| format!("calitrace printed:\n{printed}"))?;
        say("");
        for line in side_by_side([what, "calitrace watch -o traceroute"], [&said.raw, &printed]) {
            say(&line);
        }
        paths.push(Comparison {
            what,
            said: said.path(),
            traced,
        });
    }
    say("");
    Ok(paths)
}
