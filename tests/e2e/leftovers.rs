//! Nothing is left behind, however `calitrace watch` ends; and while it runs, the same look finds it.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Inventory, Lab, Namespace, Options, has_kprobes,
    inventory::has_tcx,
    stand_in::{self, Action, Side},
    wait_until,
};
use nix::sys::signal::Signal;

use crate::{
    Test,
    support::{Watch, run, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("nothing_is_left_after_sigint", || left_after(Signal::SIGINT)),
    test("nothing_is_left_after_sigterm", || left_after(Signal::SIGTERM)),
    test("nothing_is_left_after_kill_9", || left_after(Signal::SIGKILL)),
    test("what_kill_9_leaves_by_clsact_is_cleaned", left_by_clsact),
    test("nothing_of_the_lab_is_left", lab_is_gone),
    test("nothing_of_the_node_is_changed", node_is_unchanged),
];

fn left_after(signal: Signal) -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let look = || -> Result<Inventory> {
        let namespaces = lab
            .namespaces()?
            .iter()
            .map(|name| Namespace::open(name))
            .collect::<Result<Vec<_>>>()?;
        Inventory::take(&namespaces, "calitrace_")
    };
    let before = look()?;
    ensure!(before.is_empty(), "before: {before:?}");
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    lab.ping("pod1", lab.pod("pod2")?.ip(), 2, &[])?;
    let during = look()?;
    // Two nodes with two pods, a tunnel and an uplink each, two directions; six TC programs and one for drops, more for
    // functions of the kernel where it lets them be probed.
    let ours = during.filters.iter().filter(|line| line.contains(" calitrace_"));
    let attached = if has_tcx() { during.tcx.len() } else { ours.count() };
    ensure!(
        attached == 16 && (during.programs.len() == 7) != has_kprobes() && during.programs.len() >= 7,
        "{attached} attachments during: {during:?}"
    );
    let pid = watch.pid();
    let finished = watch.signal(signal)?;
    ensure!(
        (signal == Signal::SIGKILL) != finished.status.success(),
        "{finished:?}"
    );
    ensure!(
        !Path::new(&format!("/proc/{pid}")).exists(),
        "process {pid} is still there"
    );
    if signal == Signal::SIGKILL && !has_tcx() {
        // Filters belong to no process: the next start takes them away.
        ensure!(!look()?.is_empty(), "without TCX, what is killed leaves filters");
        Watch::start(&with(&lab, &["-o", "json"]))?.stop()?;
    }
    // The kernel frees the programs of a killed process a moment later.
    wait_until("the kernel to free what the process held", || {
        let after = look()?;
        Ok(after.is_empty().then_some(()))
    })
    .with_context(|| format!("after {signal}: {:?}", look()))
}

/// By clsact a killed run leaves its filters and qdiscs. The next start takes them away, and so does `doctor --clean`;
/// what is somebody else's stays.
fn left_by_clsact() -> Result<()> {
    const FILTERS: usize = 16;
    let lab = Lab::up(&Options::default())?;
    let look = || -> Result<(usize, usize, usize)> {
        let namespaces = lab
            .namespaces()?
            .iter()
            .map(|name| Namespace::open(name))
            .collect::<Result<Vec<_>>>()?;
        let found = Inventory::take(&namespaces, "calitrace_")?;
        let ours = found.filters.iter().filter(|line| line.contains("calitrace_"));
        let theirs = found.filters.iter().filter(|line| line.contains(stand_in::NAME));
        Ok((ours.count(), theirs.count(), found.qdiscs.len()))
    };
    let doctor = |clean: &[&str]| -> Result<String> {
        let finished = run(&with(&lab, &[&["doctor"][..], clean].concat()))?;
        ensure!(finished.status.success(), "{finished:?}");
        Ok(finished.stdout)
    };
    let killed = || -> Result<()> {
        let watch = Watch::start(&with(&lab, &["--tc", "clsact"]))?;
        lab.ping("pod1", lab.pod("pod2")?.ip(), 2, &[])?;
        // Two nodes with two pods, a tunnel and an uplink each, two directions.
        ensure!(look()? == (FILTERS, 0, 8), "during: {:?}", look()?);
        let during = doctor(&[])?;
        ensure!(!during.contains("killed run"), "its owner lives: {during}");
        watch.signal(Signal::SIGKILL)?;
        ensure!(look()? == (FILTERS, 0, 8), "after: {:?}", look()?);
        Ok(())
    };
    ensure!(look()? == (0, 0, 0), "before: {:?}", look()?);
    killed()?;
    let watch = Watch::start(&with(&lab, &[]))?;
    let (ours, ..) = look()?;
    ensure!(ours == if has_tcx() { 0 } else { FILTERS }, "{ours} filters");
    watch.stop()?;
    ensure!(look()? == (0, 0, 0), "after the next start: {:?}", look()?);

    killed()?;
    let told = doctor(&[])?;
    ensure!(
        told.matches("left by a killed run").count() == 8 && told.contains("calitrace doctor --clean"),
        "{told}"
    );
    let node = lab.namespace("minikube")?;
    let nobody = "192.0.2.1".parse().context("an address")?;
    stand_in::attach_filter(&node, "eth0", Side::Ingress, nobody, Action::Accept, 0)?;
    let told = doctor(&["--clean"])?;
    ensure!(told.matches("✓ removed").count() == 8, "{told}");
    ensure!(
        told.contains("cali8d02ed71817") && told.matches("and their clsact qdisc").count() == 7,
        "{told}"
    );
    ensure!(look()? == (0, 1, 1), "theirs stays: {:?}", look()?);
    let told = doctor(&["--clean"])?;
    ensure!(told.contains("nothing"), "{told}");
    Ok(())
}

fn lab_is_gone() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let names = lab.namespaces()?;
    ensure!(
        names
            .iter()
            .all(|name| Path::new("/run/netns").join(name).exists()),
        "{names:?}"
    );
    lab.down()?;
    ensure!(
        names
            .iter()
            .all(|name| !Path::new("/run/netns").join(name).exists()),
        "{names:?}"
    );
    Ok(())
}

/// Rules, routes, addresses, qdiscs and settings of a node before, during and after, and after what only asks. Where there is no TCX, `clsact`
/// qdiscs are there while it observes.
fn node_is_unchanged() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let look = || -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for words in [
            &["ip", "rule"][..],
            &["ip", "route", "show", "table", "all"],
            &["ip", "-d", "address"],
            &["tc", "qdisc"],
            &[
                "sysctl",
                "-a",
                "--pattern",
                "^net\\.(ipv4|ipv6|netfilter)\\.(conf|ip_|icmp)",
            ],
        ] {
            let output = lab
                .exec("minikube", words)?
                .output()
                .with_context(|| format!("run {words:?}"))?;
            ensure!(
                output.status.success(),
                "{words:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            let text = String::from_utf8_lossy(&output.stdout);
            lines.extend(text.lines().map(str::to_owned));
        }
        Ok(lines)
    };
    let before = look()?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let mut during = look()?;
    watch.stop()?;
    if !has_tcx() {
        let all = during.len();
        during.retain(|line| !line.starts_with("qdisc clsact "));
        ensure!(during.len() < all, "no clsact qdisc while observing without TCX");
    }
    same(&before, &during, "during")?;
    same(&before, &look()?, "after")?;
    let pods = [lab.pod("pod1")?.full_name(), lab.pod("pod2")?.full_name()];
    for words in [
        &["doctor"][..],
        &["topology"],
        &["topology", "--from", &pods[0], "--to", &pods[1]],
    ] {
        let finished = run(&with(&lab, words))?;
        ensure!(finished.status.success(), "{finished:?}");
        same(&before, &look()?, &format!("after {words:?}, not"))?;
    }
    Ok(())
}

fn same(before: &[String], now: &[String], when: &str) -> Result<()> {
    let gone: Vec<_> = before.iter().filter(|line| !now.contains(line)).collect();
    let new: Vec<_> = now.iter().filter(|line| !before.contains(line)).collect();
    ensure!(before == now, "{when} observing, gone: {gone:#?}\nnew: {new:#?}");
    Ok(())
}
