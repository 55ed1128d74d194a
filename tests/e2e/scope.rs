//! What is no pod's is not recorded, and what is another cluster's is not mixed in.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Lab, Options};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, arrived, goes, only, quiet, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("traffic_of_the_node_itself_makes_no_record", node_traffic),
    test("two_clusters_with_the_same_addresses_never_mix", two_labs),
    test("pods_that_come_and_go_while_watching", pods_come_and_go),
    test("a_pod_that_is_not_there_costs_a_line", misspelt),
];

/// A name that no pod has is told; the right one beside it is not, and its packets are shown.
fn misspelt() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let (one, two) = (lab.pod("pod1")?.full_name(), lab.pod("pod2")?);
    let arguments = ["-o", "json", "--pod", &one, "--to", "default/typo"];
    for (arguments, lines) in [(&arguments[..], 1), (&arguments[..4], 0)] {
        let watch = Watch::start(&with(&lab, arguments))?;
        lab.ping("pod1", two.ip(), 1, &[])?;
        let finished = watch.stop()?;
        let told = finished.stderr.matches(
            "warning: no pod here is called default/typo, and nothing of it is shown until it comes",
        );
        ensure!(told.count() == lines, "{}", finished.stderr);
        ensure!(!finished.stderr.contains(&one), "{}", finished.stderr);
        ensure!(
            finished.packets()?.is_empty() == (lines == 1),
            "{}",
            finished.stdout
        );
    }
    Ok(())
}

/// Like the SSH session that shows the traces: both ends on the uplink, neither a pod's.
fn node_traffic() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let there = lab.namespace("minikube-m02")?;
    let listener = there.within(|| TcpListener::bind("192.168.49.3:2222").context("listen like sshd"))?;
    let server = std::thread::spawn(move || -> Result<usize> {
        let (mut stream, _) = listener.accept().context("accept")?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).context("read")
    });
    lab.namespace("minikube")?.within(|| {
        let mut stream = TcpStream::connect("192.168.49.3:2222").context("connect like ssh")?;
        for _ in 0..50 {
            stream.write_all(&[7; 100]).context("write")?;
        }
        Ok(())
    })?;
    let read = server
        .join()
        .map_err(|_panic| anyhow::anyhow!("the server panicked"))??;
    ensure!(read == 5_000, "{read} bytes arrived");
    let finished = watch.stop()?;
    let packets = finished.packets()?;
    ensure!(packets.is_empty(), "recorded: {packets:#?}");
    let lines = finished.lines()?;
    let ledger = lines
        .iter()
        .rfind(|line| line["type"] == "ledger")
        .context("a ledger")?;
    ensure!(ledger["exact"] == true, "{ledger:#}");
    let uplinks: Vec<&Value> = ledger["rows"]
        .as_array()
        .context("rows")?
        .iter()
        .filter(|row| {
            row["hook"]
                .as_str()
                .is_some_and(|hook| hook.starts_with("uplink"))
        })
        .collect();
    ensure!(uplinks.len() == 4, "two nodes, two directions: {ledger:#}");
    for row in uplinks {
        ensure!(
            row["out_of_scope"].as_u64() >= Some(3),
            "it passed here: {ledger:#}"
        );
        ensure!(row["recorded"] == 0, "it made a record: {ledger:#}");
    }
    Ok(())
}

/// The same addresses, the same pods, the same ping identifier and sequence numbers, at the same time.
fn two_labs() -> Result<()> {
    let labs = [Lab::up(&Options::default())?, Lab::up(&Options::default())?];
    let mut arguments = vec!["-o".to_owned(), "json".to_owned()];
    for lab in &labs {
        arguments.extend(only(lab, &[]));
    }
    let watch = Watch::start(&arguments)?;
    std::thread::scope(|scope| -> Result<()> {
        let pings: Vec<_> = labs
            .iter()
            .map(|lab| {
                scope.spawn(|| -> Result<u64> {
                    let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 20, &["-e", "4711"])?;
                    Ok(ping.received)
                })
            })
            .collect();
        for ping in pings {
            let received = ping.join().map_err(|_panic| anyhow::anyhow!("ping panicked"))??;
            ensure!(received == 20, "{received} of 20 pings answered");
        }
        Ok(())
    })?;
    let packets = watch.stop()?.packets()?;
    let mut per_lab = [0, 0];
    let inodes = labs
        .iter()
        .map(|lab| {
            lab.nodes()
                .iter()
                .map(|node| lab.namespace(&node.name)?.inode())
                .collect::<Result<BTreeSet<u64>>>()
        })
        .collect::<Result<Vec<_>>>()?;
    for packet in packets
        .iter()
        .filter(|packet| goes(packet, "icmp", "10.244.120.67", "10.244.205.193"))
    {
        ensure!(arrived(packet), "{packet:#}");
        let seen: BTreeSet<u64> = packet["observations"]
            .as_array()
            .context("observations")?
            .iter()
            .filter_map(|sighting| sighting["netns"].as_u64())
            .collect();
        let lab = inodes.iter().position(|inodes| seen.is_subset(inodes));
        per_lab[lab.with_context(|| format!("two clusters in one trace: {packet:#}"))?] += 1;
    }
    ensure!(per_lab == [20, 20], "requests of each lab: {per_lab:?}");
    Ok(())
}

/// A pod made while watching is traced from about a second on; one that is deleted leaves no error.
fn pods_come_and_go() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let pod = lab.add_pod(
        "late",
        "minikube",
        "late-6d4cf56db6-x7x2x",
        "10.244.120.90".parse()?,
    )?;
    watch.until("a trace of the new pod, with its name", |watch| {
        lab.ping("late", "10.244.205.193".parse().expect("an address"), 1, &[])
            .is_ok()
            && watch.packets().iter().any(|packet| {
                goes(packet, "icmp", "10.244.120.90", "10.244.205.193")
                    && packet["flow"]["src_pod"] == pod.full_name().as_str()
                    && packet["verdict"] == "delivered"
            })
    })?;
    lab.delete_pod("late")?;
    let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 3, &[])?;
    ensure!(ping.received == 3, "{ping:?}");
    watch.until("packets after the pod is gone", |watch| {
        watch
            .packets()
            .iter()
            .filter(|packet| goes(packet, "icmp", "10.244.120.67", "10.244.205.193"))
            .count()
            >= 3
    })?;
    let finished = watch.stop()?;
    ensure!(finished.status.success(), "{finished:?}");
    // That this machine has no kprobes is said once, and is no trouble with the pods.
    let troubles = |line: &&str| {
        (line.contains("warning") || line.contains("error"))
            && !line.starts_with("warning: this kernel has no kprobes ")
    };
    ensure!(
        finished.stderr.lines().find(troubles).is_none(),
        "{}",
        finished.stderr
    );
    Ok(())
}
