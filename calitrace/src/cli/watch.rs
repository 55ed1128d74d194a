//! `calitrace watch`: the live source through the pipeline, until enough was seen or somebody says stop.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal as Interrupt};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::plan;
use crate::{
    calico::NodeView,
    error::NothingToTrace,
    filter::Filter,
    kernel,
    source::live::{self, Live},
};

/// A signal within this time after the first one is the same one.
const AGAIN: Duration = Duration::from_secs(1);
/// How often to look for a node that is not there yet.
const PATIENCE: Duration = Duration::from_millis(250);

/// Carries it out.
pub(super) fn run(plan: &plan::Watch) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(watch(plan))
}

async fn watch(plan: &plan::Watch) -> Result<()> {
    // Before anything is attached: from here on a signal ends in order.
    let mut signals = Signals::listen()?;
    kernel::check_permission("watch")?;
    for what in kernel::shortcomings() {
        log::warn!("{what}");
    }
    let mut pipeline = super::open(&plan.view, true)?;
    let mut live = Live::new(options(plan))?;
    for what in live.missing() {
        log::warn!("{what}");
    }
    while let Some(absent) = absent(plan, live.nodes()) {
        if !plan.wait {
            return Err(NothingToTrace { why: absent }.into());
        }
        say(&format!("waiting: {absent}"));
        loop {
            tokio::select! {
                () = signals.any() => return Ok(()),
                () = tokio::time::sleep(PATIENCE) => live.look_again()?,
            }
            if self::absent(plan, live.nodes()).as_ref() != Some(&absent) {
                break;
            }
        }
    }

    for what in strangers(&plan.view.filter, live.nodes()) {
        log::warn!("{what}");
    }

    let stop = async {
        match plan.duration {
            Some(duration) => tokio::select! {
                () = signals.any() => {}
                () = tokio::time::sleep(duration) => return,
            },
            None => signals.any().await,
        }
        // Detaching takes a moment on a node with many pods; who asks again after a while does not want to wait for the
        // last ledger. The kernel takes the hooks away with the process. Not at once: one Ctrl-C may come twice, from
        // the terminal and through `sudo` or `timeout`.
        tokio::spawn(async {
            tokio::time::sleep(AGAIN).await;
            if let Ok(mut again) = Signals::listen() {
                again.any().await;
                std::process::exit(1);
            }
        });
    };
    let ready = |what: &str| say(&format!("observing {what}"));
    live.run(stop, ready, |item| pipeline.push(&item)).await?;
    pipeline.finish()
}

fn options(plan: &plan::Watch) -> live::Options {
    live::Options {
        kernel: kernel::Config {
            ring_bytes: plan.ring_size,
            vxlan_port: plan.vxlan_port,
            verbose: log::log_enabled!(log::Level::Debug),
            btf: plan.btf.clone(),
            tcx: plan.tcx,
            functions: plan.functions,
        },
        discovery: plan.nodes.clone().into(),
        first: plan.view.filter.interface.iter().cloned().collect(),
        filter: Some(plan.view.filter.to_string()).filter(|text| !text.is_empty()),
    }
}

/// What is missing before anything can be traced, as the end of a sentence.
fn absent(plan: &plan::Watch, nodes: &[NodeView]) -> Option<String> {
    if nodes.is_empty() {
        return Some(plan.nodes.absent());
    }
    let wanted = plan.view.filter.interface.as_ref()?;
    let mut names: Vec<&str> = nodes
        .iter()
        .flat_map(|node| &node.interfaces)
        .map(|interface| interface.name.as_str())
        .collect();
    if names.iter().any(|name| name == wanted) {
        return None;
    }
    names.sort_unstable();
    names.dedup();
    Some(format!(
        "no interface {wanted} on any Calico node of this machine; there are {}",
        names.join(", ")
    ))
}

/// A line for each pod that the filter names and no node here has: it may be misspelt, and silence would look like health.
fn strangers(filter: &Filter, nodes: &[NodeView]) -> Vec<String> {
    let names: Vec<&str> = nodes
        .iter()
        .flat_map(|node| &node.pods)
        .filter_map(|pod| pod.name.as_deref())
        .collect();
    let absent = filter.named_pods().filter(|pod| !names.contains(&pod.as_str()));
    absent
        .map(|pod| {
            format!(
                "no pod here is called {pod}, and nothing of it is shown until it comes (`calitrace topology` lists those here; \
                 of other nodes only the addresses are known)"
            )
        })
        .collect()
}

/// A sentence for the person at the terminal, beside the output.
fn say(text: &str) {
    // Without a standard error there is nobody to tell.
    drop(writeln!(io::stderr(), "{text}"));
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        // Whoever started this process may have held them back for itself; a mask is inherited.
        SigSet::from_iter([Interrupt::SIGINT, Interrupt::SIGTERM])
            .thread_unblock()
            .context("let SIGINT and SIGTERM through")?;
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        })
    }

    /// Completes when one comes.
    async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
