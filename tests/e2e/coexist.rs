//! Beside Felix's eBPF dataplane, as the lab's stand-in for it: its programs keep their say, and what they do is told.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Lab, Namespace, Test, inventory,
    stand_in::{self, Action, Attached, Side},
    test,
};
use serde_json::Value;

use crate::support::{Watch, arrived, at_interfaces, goes, path, quiet, run, with};

pub(crate) const TESTS: &[Test] = &[
    test("a_program_behind_ours_that_shoots_what_comes_in", || {
        shot("minikube", POD1_INTERFACE, Side::Ingress)
    }),
    test("a_program_before_ours_that_shoots_what_goes_out", || {
        shot("minikube-m02", POD2_INTERFACE, Side::Egress)
    }),
    test("a_program_that_forwards_by_itself", forwarded),
    test("a_program_that_hands_packets_into_the_pod", handed_into_the_pod),
];

const POD1: &str = "10.244.120.67";
const POD2: &str = "10.244.205.193";
const POD1_INTERFACE: &str = "cali8d02ed71817";
const POD2_INTERFACE: &str = "cali79f33e4263e";
const TUNNEL: &str = "vxlan.calico";
const PORT: u16 = 5353;

/// Attaches the kernel's best way, as Felix does: by TCX, else by a filter on a clsact qdisc of its own.
fn put(
    node: &Namespace,
    interface: &str,
    side: Side,
    to: &str,
    action: Action<'_>,
) -> Result<Option<Attached>> {
    let to = to.parse().context("an address")?;
    if inventory::has_tcx() {
        return stand_in::attach(node, interface, side, to, action).map(Some);
    }
    let status = node
        .command("tc")
        .args(["qdisc", "add", "dev", interface, "clsact"])
        .status()
        .context("run tc")?;
    ensure!(status.success(), "tc qdisc add dev {interface} clsact: {status}");
    stand_in::attach_filter(node, interface, side, to, action, 0)?;
    Ok(None)
}

fn echo_requests(watch: Watch, count: usize) -> Result<Vec<Value>> {
    watch.until("the packet traces", |watch| {
        let packets = watch.packets();
        packets
            .iter()
            .filter(|packet| goes(packet, "icmp", POD1, POD2))
            .count()
            >= count
    })?;
    let packets = watch.stop()?.packets()?;
    let requests = packets
        .into_iter()
        .filter(|packet| goes(packet, "icmp", POD1, POD2));
    Ok(requests.collect())
}

fn shot(node: &str, interface: &str, side: Side) -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let namespace = lab.namespace(node)?;
    let theirs = put(&namespace, interface, side, POD2, Action::Shoot)?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let ping = lab.ping("pod1", POD2.parse()?, 3, &[])?;
    ensure!(
        ping.received == 0,
        "what their program shoots does not arrive: {ping:?}"
    );
    let requests = echo_requests(watch, 3)?;
    ensure!(requests.len() == 3, "{requests:#?}");
    let (reason, hook) = match side {
        Side::Ingress => ("TC_INGRESS", "workload_ingress"),
        Side::Egress => ("TC_EGRESS", "workload_egress"),
    };
    for packet in &requests {
        ensure!(packet["verdict"] == "dropped", "{packet:#}");
        let drop = &packet["drop"];
        ensure!(
            // Reasons came with 5.17.
            drop["reason"] == reason || drop["reason"].is_null(),
            "{packet:#}"
        );
        ensure!(
            drop["node"] == node && drop["interface"] == interface,
            "{packet:#}"
        );
        let seen = packet["observations"].as_array().context("observations")?;
        let at_hook = seen
            .iter()
            .filter(|seen| seen["interface"] == interface && seen["hook"] == hook)
            .count();
        // First on ingress, ours sees what is shot; last on egress, it does not take for delivered what is.
        ensure!(at_hook == usize::from(side == Side::Ingress), "{packet:#}");
    }
    if let Some(theirs) = theirs {
        // The twin without the fault.
        drop(theirs);
        let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
        let ping = lab.ping("pod1", POD2.parse()?, 3, &[])?;
        ensure!(ping.received == 3, "{ping:?}");
        for packet in echo_requests(watch, 3)? {
            ensure!(arrived(&packet), "{packet:#}");
        }
    }
    Ok(())
}

fn forwarded() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let node = lab.namespace("minikube")?;
    // Both ways, as Felix does: the host's connection tracking sees neither.
    let _there = put(
        &node,
        POD1_INTERFACE,
        Side::Ingress,
        POD2,
        Action::Forward(TUNNEL),
    )?;
    let _back = put(
        &node,
        TUNNEL,
        Side::Ingress,
        POD1,
        Action::Forward(POD1_INTERFACE),
    )?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let ping = lab.ping("pod1", POD2.parse()?, 3, &[])?;
    ensure!(ping.received == 3, "{ping:?}");
    for packet in echo_requests(watch, 3)? {
        ensure!(arrived(&packet), "{packet:#}");
        ensure!(
            path(&packet) == ["10.244.120.64", "10.244.205.192", POD2],
            "{packet:#}"
        );
        let seen = packet["observations"].as_array().context("observations")?;
        let hooks: Vec<&str> = at_interfaces(&packet)
            .filter_map(|seen| seen["hook"].as_str())
            .collect();
        let whole = [
            "workload_ingress",
            "tunnel_egress",
            "uplink_egress",
            "uplink_ingress",
            "tunnel_ingress",
            "workload_egress",
        ];
        ensure!(hooks == whole, "{packet:#}");
        // Past the host's own forwarding.
        ensure!(
            !seen
                .iter()
                .any(|seen| seen["hook"] == "ip_forward" && seen["node"] == "minikube"),
            "{packet:#}"
        );
    }
    Ok(())
}

/// The last hop cannot be seen: said to be so, and no loss.
fn handed_into_the_pod() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let server = lab.udp_server("pod2", PORT, false)?;
    let node = lab.namespace("minikube-m02")?;
    let _there = put(
        &node,
        TUNNEL,
        Side::Ingress,
        POD2,
        Action::IntoPod(POD2_INTERFACE),
    )?;
    let _back = put(
        &node,
        POD2_INTERFACE,
        Side::Ingress,
        POD1,
        Action::Forward(TUNNEL),
    )?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let log = folder.path().join("handed.jsonl");
    let log = log.to_str().context("a path in UTF-8")?;
    let watch = Watch::start(&with(&lab, &["-o", "json", "-w", log]))?;
    let sent = lab.udp_flood("pod1", format!("{POD2}:{PORT}").parse()?, 3, 64)?;
    watch.until("the datagrams", |watch| {
        let packets = watch.packets();
        packets
            .iter()
            .filter(|packet| goes(packet, "udp", POD1, POD2))
            .count()
            >= 3
    })?;
    let ping = lab.ping("pod1", POD2.parse()?, 3, &[])?;
    ensure!(ping.received == 3, "{ping:?}");
    watch.until("the echoes", |watch| {
        let packets = watch.packets();
        packets
            .iter()
            .filter(|packet| goes(packet, "icmp", POD1, POD2))
            .count()
            >= 3
    })?;
    let packets = watch.stop()?.packets()?;
    let counts = server.stop()?;
    ensure!(counts.received == sent, "all of {sent} arrive: {counts:?}");

    for packet in packets.iter().filter(|packet| packet["flow"]["dst"] == POD2) {
        let echo = packet["flow"]["proto"] == "icmp";
        // An echo was answered, so it arrived.
        let verdict = if echo { "delivered" } else { "unknown" };
        ensure!(packet["verdict"] == verdict, "{packet:#}");
        let bypass = &packet["bypass"];
        ensure!(
            bypass["node"] == "minikube-m02"
                && bypass["interface"] == TUNNEL
                && bypass["programs"] == serde_json::json!([stand_in::NAME]),
            "{packet:#}"
        );
        ensure!(
            path(packet) == ["10.244.120.64", "10.244.205.192", POD2],
            "{packet:#}"
        );
        let hops = packet["hops"].as_array().context("hops")?;
        ensure!(hops[2]["certainty"] == "inferred", "{packet:#}");
    }
    for packet in packets.iter().filter(|packet| packet["flow"]["src"] == POD2) {
        ensure!(
            packet["verdict"] == "delivered" && packet["bypass"].is_null(),
            "the way back is the usual one: {packet:#}"
        );
    }
    let read = run(&["read", log])?;
    ensure!(
        read.stdout.contains("may hand packets on past all further hooks"),
        "in words: {}",
        read.stdout
    );
    Ok(())
}
