//! A lab's life: it changes, others are beside it, and it leaves nothing.

use std::fs;
use std::net::Ipv4Addr;
use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Context, Result, ensure};
use calitrace_tests::command;
use calitrace_tests::lab::{Record, plan, sweep};
use calitrace_tests::namespace::Namespace;
use calitrace_tests::traffic::traceroute::Kind;
use calitrace_tests::{Lab, Options};

const TOLD_TO_DIE: &str = "CALITRACE_TESTS_BUILD_A_LAB_AND_DIE";

/// Whether this process is the one that [`a_killed_process_is_swept_after`] started.
pub(crate) fn is_told_to_die() -> bool {
    std::env::var_os(TOLD_TO_DIE).is_some()
}

/// Ends without taking down what it built, as `kill -9` would have it.
#[expect(
    clippy::print_stdout,
    reason = "the id is what the process that waits for this one reads"
)]
pub(crate) fn build_a_lab_and_die() -> ExitCode {
    if let Ok(lab) = Lab::up(&Options::default()) {
        print!("{}", lab.id());
        std::mem::forget(lab);
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

pub(crate) fn a_killed_process_is_swept_after() -> Result<()> {
    let mut dying = Command::new(std::env::current_exe()?);
    let id = command::text(&command::run(dying.env(TOLD_TO_DIE, "1"))?);
    let prefix = format!("ct{id}-");
    let folder = Record::read(&id)?.map(|record| record.folder);
    // Another lab that starts at this moment may have swept it already: the labs of this test run are many.
    sweep()?;
    ensure!(
        Namespace::named(&prefix)?.is_empty(),
        "namespaces are left: {:?}",
        Namespace::named(&prefix)?
    );
    ensure!(Record::read(&id)?.is_none());
    ensure!(folder.is_none_or(|folder| !folder.exists()));
    Ok(())
}

pub(crate) fn nothing_is_left() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let (id, root) = (lab.id().to_owned(), lab.root("minikube"));
    let namespace = lab.namespace("minikube")?;
    let names = lab.namespaces()?;
    ensure!(names.len() == 7, "{names:?}");
    ensure!(namespace.processes()?.len() == 1 && root.exists());
    let straggler = lab.spawn("minikube", ["sleep", "1000"])?;
    lab.down()?;
    ensure!(Namespace::named(&format!("ct{id}-"))?.is_empty());
    ensure!(namespace.processes()?.is_empty() && !root.exists() && Record::read(&id)?.is_none());
    drop(straggler);
    Ok(())
}

pub(crate) fn pods_come_and_go() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let pod = lab.add_pod("pod5", "minikube-m02", "web-0", Ipv4Addr::new(10, 244, 205, 210))?;
    ensure!(pod.interface == plan::interface_name("default", "web-0"));
    let trace = lab.traceroute("pod1", pod.ip(), Kind::Udp, &[])?;
    ensure!(
        trace.path() == ["10.244.120.64", "10.244.205.192", "10.244.205.210"],
        "{}",
        trace.raw
    );
    lab.delete_pod("pod5")?;
    let links = command::run(&mut lab.exec("minikube-m02", ["ip", "link", "show"])?)?;
    ensure!(
        !command::text(&links).contains(&pod.interface),
        "{}",
        command::text(&links)
    );
    ensure!(lab.pod("pod5").is_err() && Namespace::open(&pod.namespace).is_err());
    let ping = lab.ping("pod1", pod.ip(), 1, &[])?;
    ensure!(ping.received == 0, "{}", ping.raw);
    // The same name and address may come again.
    lab.add_pod("pod5", "minikube-m02", "web-0", Ipv4Addr::new(10, 244, 205, 210))?;
    ensure!(lab.ping("pod1", pod.ip(), 1, &[])?.received == 1);
    Ok(())
}

pub(crate) fn two_labs_at_once() -> Result<()> {
    let (first, second) = (Lab::up(&Options::default())?, Lab::up(&Options::default())?);
    ensure!(first.pod("pod2")?.address == second.pod("pod2")?.address);
    thread::scope(|scope| {
        let runs = [&first, &second].map(|lab| {
            scope.spawn(move || {
                let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 20, &["-e", "7"])?;
                ensure!(ping.received == 20, "{}", ping.raw);
                Ok(())
            })
        });
        runs.into_iter()
            .try_for_each(|run| run.join().ok().context("a ping panicked")?)
    })?;
    // What is gone from one is there in the other.
    first.delete_pod("pod2")?;
    ensure!(second.ping("pod1", second.pod("pod2")?.ip(), 1, &[])?.received == 1);
    drop(first);
    ensure!(second.ping("pod1", second.pod("pod2")?.ip(), 1, &[])?.received == 1);
    Ok(())
}

pub(crate) fn roots() -> Result<()> {
    let lab = Lab::up(&Options {
        felix_files: false,
        ..Options::default()
    })?;
    for node in lab.nodes() {
        let processes = lab.namespace(&node.name)?.processes()?;
        ensure!(processes.len() == 1, "{processes:?}");
        let root = format!("/proc/{}/root", processes[0]);
        ensure!(fs::read_to_string(format!("{root}/var/lib/calico/nodename"))? == node.name);
        let host =
            command::run(Command::new("nsenter").args(["-t", &processes[0].to_string(), "-u", "hostname"]))?;
        ensure!(command::text(&host).trim() == node.name);
        ensure!(fs::read_dir(format!("{root}/var/run/calico/endpoint-status"))?.count() == 0);
        ensure!(fs::read_dir(format!("{root}/var/lib/cni/results"))?.count() == 2);
    }
    Ok(())
}
