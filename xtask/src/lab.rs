//! `cargo xtask lab`: a lab that stays up until it is taken down, for looking around by hand.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result, bail};
use calitrace_tests::interrupt::Interrupts;
use calitrace_tests::lab::{Record, UNDERLAY};
use calitrace_tests::namespace::Namespace;
use calitrace_tests::{DeviceOrder, Encapsulation, Lab};
use clap::{Args, Subcommand, ValueEnum};
use nix::unistd::Uid;

use crate::root;
use crate::step::say;

/// The id of the lab that stays; part of its namespaces' names.
const ID: &str = "lab";

#[derive(Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build two Calico nodes with two pods each in network namespaces of this machine
    Up {
        /// How pod traffic travels between the nodes
        #[arg(long, value_enum, default_value_t = How::Vxlan)]
        encapsulation: How,
        /// Which device a node has first: it decides what hop 1 of a traceroute shows
        #[arg(long, value_enum, default_value_t = Order::TunnelFirst)]
        order: Order,
        /// The second node is in another subnet than the first: a router is between them
        #[arg(long)]
        routed: bool,
        /// Only nodes of different subnets use the tunnel; with a third node in another subnet, and a fifth pod there
        #[arg(long)]
        cross_subnet: bool,
    },
    /// Take it down again
    Down,
    /// Show its nodes and pods
    Status,
    /// Run a command in one of its parts: minikube, minikube-m02, pod1 to pod4, underlay, minikube-m03 and pod5 where they are
    Exec {
        /// The part
        part: String,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum How {
    /// vxlan.calico
    Vxlan,
    /// tunl0, where the kernel has the ipip module
    Ipip,
    /// Routed by the nodes' own addresses
    None,
    /// wireguard.cali, where the kernel has the wireguard module
    Wireguard,
}

#[derive(Clone, Copy, ValueEnum)]
enum Order {
    /// As in a minikube or kind node: hop 1 shows the tunnel's address
    TunnelFirst,
    /// As on a virtual machine or a host: hop 1 shows the node's address
    UplinkFirst,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if !matches!(options.verb, Verb::Status) && !Uid::effective().is_root() {
        return as_root();
    }
    match &options.verb {
        Verb::Up {
            encapsulation,
            order,
            routed,
            cross_subnet,
        } => up(*encapsulation, *order, *routed, *cross_subnet),
        Verb::Down => down(),
        Verb::Status => status(),
        Verb::Exec { part, command } => exec(part, command),
    }
}

/// Becomes the same command, as root.
fn as_root() -> Result<()> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let mut command = root::command("the lab's network namespaces", program.as_os_str(), &[])?;
    let error = command.args(std::env::args_os().skip(1)).exec();
    Err(error).context("cannot run this command as root")
}

fn up(encapsulation: How, order: Order, routed: bool, cross_subnet: bool) -> Result<()> {
    let options = calitrace_tests::Options {
        encapsulation: match encapsulation {
            How::Vxlan => Encapsulation::Vxlan,
            How::Ipip => Encapsulation::Ipip,
            How::None => Encapsulation::None,
            How::Wireguard => Encapsulation::Wireguard,
        },
        order: match order {
            Order::TunnelFirst => DeviceOrder::TunnelFirst,
            Order::UplinkFirst => DeviceOrder::UplinkFirst,
        },
        routed,
        cross_subnet,
        ..calitrace_tests::Options::default()
    };
    let interrupts = Interrupts::hold()?;
    let lab = Lab::up_to_stay(ID, &options)?;
    if interrupts.came()? {
        lab.down()?;
        bail!("interrupted; the lab is down again");
    }
    drop(lab);
    drop(interrupts);
    status()
}

fn down() -> Result<()> {
    say(if Lab::remove(ID)? {
        "the lab is down"
    } else {
        "the lab is not up"
    });
    Ok(())
}

fn exec(part: &str, words: &[OsString]) -> Result<()> {
    let record = record()?;
    let pods = record.pods.iter().map(|pod| (&*pod.id, &pod.namespace));
    let nodes = record.nodes.iter().map(|node| (&*node.name, &node.namespace));
    let underlay = (UNDERLAY, &record.underlay);
    let mut parts = nodes.chain(pods).chain([underlay]);
    let (_, namespace) = parts
        .find(|(name, _)| *name == part)
        .with_context(|| format!("the lab has no part {part}"))?;
    let (program, arguments) = words.split_first().context("no command was given")?;
    let error = Namespace::open(namespace)?
        .command(program)
        .args(arguments)
        .exec();
    Err(error).with_context(|| format!("cannot run {} in {part}", program.display()))
}

fn status() -> Result<()> {
    let record = record()?;
    let encapsulation = record.options.encapsulation;
    for node in &record.nodes {
        let tunnel = encapsulation.device().map_or_else(
            || "no tunnel".to_owned(),
            |device| format!("{device} {}", node.tunnel_address),
        );
        say(&format!(
            "{:<13} {}  {tunnel}  block {}",
            node.name, node.address, node.block
        ));
        for pod in record.pods.iter().filter(|pod| pod.node == node.name) {
            say(&format!(
                "  {:<11} {:<15} {}  {}",
                pod.id,
                pod.address,
                pod.interface,
                pod.full_name()
            ));
        }
    }
    let [from, to] = [&record.pods[0], &record.pods[1]];
    say("");
    say(&format!(
        "cargo xtask lab exec {} -- ping {}",
        from.id, to.address
    ));
    say(&format!(
        "cargo xtask lab exec {} -- traceroute {}",
        from.id, to.address
    ));
    say("sudo target/release/calitrace watch");
    Ok(())
}

fn record() -> Result<Record> {
    Record::read(ID)?.context("the lab is not up: `cargo xtask lab up`")
}
