//! Nothing is lost silently: a flood that overruns a small ring, and the ledger beside what the socket sent.

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::Lab;
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, quiet, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[test(
    "a_flood_that_overruns_the_ring_is_counted_to_the_packet",
    || flood(20_000),
)];

fn flood(mut datagrams: u64) -> Result<()> {
    // How much a ring of 16 KiB refuses depends on the machine: more, until it is 5 % at least.
    loop {
        let refused = one_flood(datagrams)?;
        println!("{datagrams} datagrams: {refused} records refused at the sender's interface");
        if refused * 20 >= datagrams {
            return Ok(());
        }
        ensure!(
            datagrams < 1_000_000,
            "a ring of 16 KiB took {datagrams} datagrams"
        );
        datagrams *= 4;
    }
}

fn one_flood(datagrams: u64) -> Result<u64> {
    let lab = Lab::up(&quiet())?;
    let server = lab.udp_server("pod2", 5353, false)?;
    let watch = Watch::start(&with(&lab, &["-o", "json", "--ring-size", "16KiB"]))?;
    let to = format!("{}:5353", lab.pod("pod2")?.address);
    let sent = lab.udp_flood("pod1", to.parse()?, datagrams, 64)?;
    let finished = watch.stop()?;
    server.stop()?;
    ensure!(finished.status.success(), "{}", finished.stderr);

    let lines = finished.lines()?;
    let ledger = lines
        .iter()
        .rfind(|line| line["type"] == "ledger")
        .context("a ledger")?;
    ensure!(ledger["exact"] == true, "the last ledger is exact: {ledger:#}");
    let rows = ledger["rows"].as_array().context("rows")?;
    for row in rows {
        adds_up(row).with_context(|| format!("{row:#}"))?;
    }
    let row = rows
        .iter()
        .find(|row| row["node"] == "minikube" && row["hook"] == "workload_ingress")
        .context("the sender's row")?;
    let (recorded, refused) = (number(row, "recorded"), number(row, "ring_refused"));
    ensure!(
        recorded + refused == sent,
        "{sent} sent, {recorded} recorded and {refused} refused: {row:#}"
    );

    // What was lost makes verdicts unknown, never lost or dropped.
    for packet in lines.iter().filter(|line| line["type"] == "packet") {
        let verdict = packet["verdict"].as_str().unwrap_or_default();
        ensure!(
            ["delivered", "unknown", "unfinished"].contains(&verdict),
            "{packet:#}"
        );
    }
    Ok(refused)
}

fn number(row: &Value, field: &str) -> u64 {
    row[field].as_u64().unwrap_or_default()
}

fn adds_up(row: &Value) -> Result<()> {
    let ways = [
        "non_ip",
        "out_of_scope",
        "filtered",
        "sampled_away",
        "over_budget",
        "ring_refused",
        "recorded",
    ];
    let sum: u64 = ways.iter().map(|way| number(row, way)).sum();
    ensure!(
        sum == number(row, "seen"),
        "seen is not the sum of what became of it"
    );
    let handled = number(row, "decoded") + number(row, "user_dropped");
    ensure!(
        handled == number(row, "recorded"),
        "recorded is not what was decoded and dropped"
    );
    Ok(())
}
