//! What a user is told when something is not as it should be, and the exit code a script sees.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Lab, Options};

use crate::{
    Test,
    support::{Watch, binary, quiet, run, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("without_privileges", no_privileges),
    test("without_a_node", no_node),
    test("no_such_interface", no_interface),
    test("an_output_that_cannot_be_written", unwritable),
    test("a_full_disk", full_disk),
    test("a_reader_that_has_seen_enough", broken_pipe),
    test("without_type_information_of_the_kernel", no_btf),
    test("an_interface_that_vanishes", vanishing_interface),
    test("counts_and_durations_end_a_run", limits),
];

fn no_privileges() -> Result<()> {
    // The binary may lie where only root may look.
    let folder = tempfile::tempdir().context("make a folder")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))
        .context("open the folder to all")?;
    let copy = folder.path().join("calitrace");
    fs::copy(binary()?, &copy).context("copy the binary")?;
    let output = Command::new(&copy)
        .args(["watch", "--no-wait"])
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .context("run as nobody")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3), "{output:?}");
    ensure!(
        text.starts_with("error: ") && text.contains("CAP_") && text.contains("sudo"),
        "{text}"
    );
    ensure!(text.lines().count() == 1, "one line: {text}");
    Ok(())
}

fn no_node() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let netns = lab.pod("pod1")?.namespace;
    let finished = run(&["watch", "--no-wait", "--netns", &netns])?;
    ensure!(finished.status.code() == Some(4), "{finished:?}");
    ensure!(
        finished.stderr.contains("no Calico node") && finished.stderr.contains(&netns),
        "{}",
        finished.stderr
    );
    let finished = run(&["watch", "--no-wait", "--netns", "nosuchnamespace"])?;
    ensure!(finished.status.code() == Some(1), "{finished:?}");
    ensure!(finished.stderr.contains("nosuchnamespace"), "{}", finished.stderr);
    Ok(())
}

fn no_interface() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let finished = run(&with(
        &lab,
        &["watch", "--no-wait", "--interface", "cali00000000000"],
    ))?;
    ensure!(finished.status.code() == Some(4), "{finished:?}");
    for word in ["cali00000000000", "cali8d02ed71817"] {
        ensure!(
            finished.stderr.contains(word),
            "what is missing and what there is: {}",
            finished.stderr
        );
    }
    Ok(())
}

fn unwritable() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let finished = run(&with(&lab, &["watch", "-w", "/nonexistent/folder/log.jsonl"]))?;
    ensure!(finished.status.code() == Some(1), "{finished:?}");
    ensure!(
        finished.stderr.contains("/nonexistent/folder/log.jsonl"),
        "{}",
        finished.stderr
    );
    Ok(())
}

/// `/dev/full` refuses every write with ENOSPC, as a full disk does.
fn full_disk() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let log = folder.path().join("full.jsonl");
    std::os::unix::fs::symlink("/dev/full", &log).context("point a log at /dev/full")?;
    let log = log.to_str().context("a path in UTF-8")?;
    let finished = run(&with(&lab, &["watch", "-w", log, "--duration", "1s"]))?;
    ensure!(finished.status.code() == Some(1), "{finished:?}");
    ensure!(
        finished.stderr.contains(log) && finished.stderr.contains("No space left on device"),
        "{}",
        finished.stderr
    );
    Ok(())
}

fn broken_pipe() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let mut words = vec![
        binary()?.to_string_lossy().into_owned(),
        "watch".into(),
        "-o".into(),
        "json".into(),
    ];
    words.extend(with(&lab, &["--duration", "20s"]));
    // `head` leaves after the first line; a pipe without a reader then ends the run, in order and without a word.
    let script = format!("{} | head -n 1; exit ${{PIPESTATUS[0]}}", words.join(" "));
    let mut child = Command::new("bash")
        .args(["-c", &script])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .context("run bash")?;
    while child.try_wait().context("wait for bash")?.is_none() {
        lab.ping("pod1", lab.pod("pod2")?.ip(), 2, &[])?;
    }
    let output = child.wait_with_output().context("wait for bash")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(0), "{output:?}");
    ensure!(!errors.contains("error") && !errors.contains("panic"), "{errors}");
    Ok(())
}

/// TC only, with one line that says so.
fn no_btf() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let empty = folder.path().join("empty");
    fs::write(&empty, b"").context("write an empty file")?;
    for file in ["/nonexistent/vmlinux", empty.to_str().context("a path in UTF-8")?] {
        let watch = Watch::start(&with(&lab, &["-o", "json", "--btf", file]))?;
        let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 3, &[])?;
        ensure!(ping.received == 3, "{ping:?}");
        let finished = watch.stop()?;
        let warnings: Vec<&str> = finished
            .stderr
            .lines()
            .filter(|line| line.starts_with("warning: "))
            .collect();
        ensure!(
            warnings.len() == 1 && warnings[0].contains(file),
            "one line that says so: {warnings:?}"
        );
        let packets = finished.packets()?;
        ensure!(
            packets.len() == 6 && packets.iter().all(|packet| packet["verdict"] == "delivered"),
            "three requests and three replies: {packets:#?}"
        );
    }
    Ok(())
}

fn vanishing_interface() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let interface = lab.pod("pod3")?.interface;
    lab.namespace("minikube")?
        .ip(&format!("link delete {interface}\n"))?;
    let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 3, &[])?;
    ensure!(ping.received == 3, "{ping:?}");
    watch.until("traces after an interface vanished", |watch| {
        watch.packets().len() >= 6
    })?;
    let finished = watch.stop()?;
    ensure!(finished.status.success(), "{finished:?}");
    ensure!(!finished.stderr.contains("error"), "{}", finished.stderr);
    Ok(())
}

fn limits() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let mut watch = Watch::start(&with(&lab, &["-o", "json", "-c", "3", "--proto", "icmp"]))?;
    lab.ping("pod1", lab.pod("pod2")?.ip(), 5, &[])?;
    let finished = watch.wait()?;
    ensure!(
        finished.status.success() && finished.packets()?.len() == 3,
        "{finished:?}"
    );
    let finished = run(&with(&lab, &["watch", "-o", "json", "--duration", "300ms"]))?;
    ensure!(finished.status.success(), "{finished:?}");
    Ok(())
}
