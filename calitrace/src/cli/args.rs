//! What can be typed. Only this module knows clap; it hands on a [`Plan`].

use std::{ffi::OsString, num::NonZeroU64, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum, error::ErrorKind};
use ipnet::IpNet;

use super::{
    exit::Usage,
    plan::{self, OutputFile, Plan},
};
use crate::{
    calico::topology::Place,
    correlate::Config,
    filter::{End, Filter, PodName, Protocol},
    kernel::Probes,
    sink::{FileFormat, Format},
};

/// What a command line comes to.
#[derive(Debug)]
pub(super) enum Parsed {
    /// Something to do.
    Plan(Box<Plan>),
    /// Only this text was asked for: help, version.
    Text(String),
}

/// Reads a command line, the program's name first.
pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Parsed, Usage> {
    match Cli::try_parse_from(args) {
        Ok(cli) => Ok(Parsed::Plan(Box::new(cli.into()))),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Ok(
            Parsed::Text(rendered(&error, anstream_choice(&std::io::stdout()))),
        ),
        Err(error) => Err(Usage(rendered(&error, anstream_choice(&std::io::stderr())))),
    }
}

/// Whether a stream takes colours.
fn anstream_choice(stream: &impl std::io::IsTerminal) -> bool {
    stream.is_terminal() && super::colours_wanted()
}

fn rendered(error: &clap::Error, colours: bool) -> String {
    let text = error.render();
    if colours {
        text.ansi().to_string()
    } else {
        text.to_string()
    }
}

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 error, 2 usage, 3 no permission, 4 nothing to trace.";

const WATCH_ABOUT: &str = "\
Trace live traffic

Attaches to the Calico nodes in all network namespaces of this machine and prints the traces of the packets that pods \
send and receive, until interrupted. Needs root, or CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN.";

const WATCH_AFTER: &str = "\
Examples:
  calitrace watch                                   every flow of every pod of this machine
  calitrace watch --pod default/web-0 --dropped     what fails on its way from or to a pod
  calitrace watch --to 10.96.0.10 --proto udp       queries to a service, wherever they end up
  calitrace watch -o json -c 100 > packets.jsonl    a hundred packet traces for a script
  calitrace watch -w capture.jsonl --duration 1m    a minute for `calitrace read`

Exit codes: 0 done, 1 error, 2 usage, 3 no permission, 4 nothing to trace.";

const READ_AFTER: &str = "\
Examples:
  calitrace read capture.jsonl
  calitrace read node-1.jsonl node-2.jsonl -o traceroute
  calitrace read capture.jsonl --dropped -o json

Exit codes: 0 done, 1 error, 2 usage.";

const TOPOLOGY_AFTER: &str = "\
Examples:
  calitrace topology                                              all nodes, and a few paths
  calitrace topology --from default/web-0 --to shop/cart-0        the path between two pods
  calitrace topology --from default/web-0 --to 10.96.0.10         to each pod behind a service
  calitrace topology --from default/web-0 --to 1.1.1.1 -o json    out of the cluster, for a script

Exit codes: 0 done, 1 error, 2 usage, 3 no permission, 4 no Calico node.";

/// Traces the real packets of Calico pods, hop by hop.
///
/// Shows for the traffic of pods what traceroute shows for its probes: every router a packet crosses, with addresses
/// and times, and what traceroute cannot show: interfaces, encapsulation, address translation, and where and why a
/// packet dies. It only observes: nothing on the node is changed, and nothing is left behind.
#[derive(Debug, Parser)]
#[command(name = "calitrace", version, after_help = AFTER_HELP, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Says more on standard error; twice for the kernel side's own logs
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Trace live traffic
    #[command(long_about = WATCH_ABOUT, after_help = WATCH_AFTER)]
    Watch(Box<WatchArgs>),
    /// Trace what event logs hold
    ///
    /// Prints for logs written with `watch -w` what `watch` would have printed. Several logs are merged in order of
    /// time. Needs no privileges and looks nothing up on this machine.
    #[command(after_help = READ_AFTER)]
    Read(ReadArgs),
    /// Show the Calico nodes of this machine
    ///
    /// Shows devices, addresses, routes, blocks and pods of each node, and the path and MTU to expect between them. With
    /// --from and --to the path between these two: what traceroute would print, the devices and outer headers on the way,
    /// the largest packet that passes whole, and what calitrace would not see. It is what the tables say: no packet is
    /// sent.
    #[command(after_help = TOPOLOGY_AFTER)]
    Topology(TopologyArgs),
    /// Show what works on this machine, what does not and why
    ///
    /// Tries the hooks on this kernel, and looks at each Calico node for what loses packets: gateway and forwarding,
    /// reverse path filters, tunnels, nodes that the rules take for strangers, MTUs that do not fit together, a full table
    /// of connections, wrong checksums in VXLAN, other network plugins. Says with each what would mend it; without --clean
    /// it changes nothing.
    Doctor(DoctorArgs),
}

#[derive(Debug, Args)]
struct WatchArgs {
    #[command(flatten)]
    filter: FilterArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Stop after this time (10s, 2m, 1h)
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Output")]
    duration: Option<Duration>,
    #[command(flatten)]
    nodes: NodeArgs,
    /// End with exit code 4 where there is no Calico node, instead of waiting for one
    #[arg(long, help_heading = "Where")]
    no_wait: bool,
    /// What to observe: all, or tc
    ///
    /// all: also functions of the kernel, which show what happens between two interfaces (forwarding, tunnels, ICMP
    /// errors, netfilter's verdicts, translations, clones); as many as this kernel lets be probed. tc: interfaces and
    /// drops only, which costs the packets less.
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Hooks::All, hide_possible_values = true)]
    #[arg(help_heading = "Kernel")]
    hooks: Hooks,
    /// UDP port by which VXLAN is recognised
    #[arg(long, value_name = "PORT", default_value_t = 4789, value_parser = port, help_heading = "Kernel")]
    vxlan_port: u16,
    /// Type information (BTF) of the running kernel [default: /sys/kernel/btf/vmlinux]
    ///
    /// Without it drops are not seen; all else works.
    #[arg(long, value_name = "FILE", help_heading = "Kernel")]
    btf: Option<PathBuf>,
    /// How programs are attached to interfaces: auto or clsact
    ///
    /// auto: by TCX where the kernel has it (Linux 6.6), else by filters on a clsact qdisc. clsact: always by these, on a
    /// kernel whose TCX misbehaves.
    #[arg(long, value_enum, value_name = "WAY", default_value_t = Tc::Auto, hide_possible_values = true, help_heading = "Kernel")]
    tc: Tc,
    /// Size of the ring buffer, a power of two from 4KiB to 1GiB
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = ring_size, help_heading = "Kernel")]
    ring_size: u32,
}

#[derive(Debug, Args)]
struct ReadArgs {
    /// Event logs
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    filter: FilterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct TopologyArgs {
    /// Form of the output
    #[arg(
        short,
        long,
        value_name = "FORM",
        default_value = "text",
        hide_possible_values = true
    )]
    #[arg(help = "Form of the output: text or json", value_parser = ["text", "json"])]
    output: String,
    /// Show the path from this pod, by name or address
    #[arg(long, value_name = "END", value_parser = place, requires = "to", help_heading = "Which path")]
    from: Option<Place>,
    /// Show the path to this pod, service address or other address
    #[arg(long, value_name = "END", value_parser = place, requires = "from", help_heading = "Which path")]
    to: Option<Place>,
    #[command(flatten)]
    nodes: NodeArgs,
}

#[derive(Debug, Args)]
struct DoctorArgs {
    /// Remove what killed runs of calitrace left on interfaces, and say what it was
    ///
    /// That is filters on clsact qdiscs (as on kernels before 6.6) whose owner is gone, and the qdisc where calitrace
    /// added it and nothing else is on it. Nothing else is touched, and nothing else is done.
    #[arg(long)]
    clean: bool,
    #[command(flatten)]
    nodes: NodeArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Which packets")]
struct FilterArgs {
    /// Packets from or to this pod; repeat for more pods
    #[arg(long = "pod", value_name = "NS/NAME")]
    pods: Vec<PodName>,
    /// Packets from this pod, address or prefix
    #[arg(long, value_name = "END")]
    from: Option<End>,
    /// Packets to this pod, address or prefix; a service address, too
    #[arg(long, value_name = "END")]
    to: Option<End>,
    /// tcp, udp, icmp, icmpv6, sctp or a protocol number
    #[arg(long, value_name = "PROTOCOL")]
    proto: Option<Protocol>,
    /// Packets from or to this port
    #[arg(long, value_parser = port)]
    port: Option<u16>,
    /// Packets that passed this interface of a node
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// Only packets that were dropped, rejected, or lost between nodes
    #[arg(long)]
    dropped: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
struct OutputArgs {
    /// Form of the output: text, json or traceroute
    ///
    /// text: a block for each flow; on a terminal the latest ones, redrawn in place. json: a line for each packet,
    /// as calitrace-1.schema.json in the sources says. traceroute: blocks in the form that traceroute prints.
    #[arg(short, long, value_enum, value_name = "FORM", default_value_t = Form::Text, hide_possible_values = true)]
    output: Form,
    /// With the packet's bytes and the MTU at each interface (text)
    ///
    /// Before and after encapsulation. Always shown of a packet that is too large; json has them of every packet.
    #[arg(long)]
    sizes: bool,
    /// Write all that is observed to a file; may be repeated
    ///
    /// The ending tells the format: .jsonl is an event log for `calitrace read`. The filter does not restrict it.
    #[arg(short, long = "write", value_name = "FILE")]
    write: Vec<OutputFile>,
    /// Stop after so many packets that match the filter
    #[arg(short, long)]
    count: Option<NonZeroU64>,
    /// Packet traces that may be open at once
    ///
    /// One takes about 1 KiB and is open for up to two seconds. Where more packets are under way, the oldest traces are
    /// closed before their time, with the verdict unknown, and counted (`evicted` in the ledger).
    #[arg(long, value_name = "COUNT", default_value_t = Config::MAX_OPEN, value_parser = max_open)]
    max_open: usize,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Where")]
struct NodeArgs {
    /// Only the network namespace with this name, inode number or path; may be repeated
    #[arg(long, value_name = "NETNS")]
    netns: Vec<String>,
    /// Only the node with this name; may be repeated
    #[arg(long, value_name = "NAME")]
    node: Vec<String>,
    /// Prefix of service addresses; may be repeated [default: the cluster's]
    #[arg(long, value_name = "PREFIX")]
    service_cidr: Vec<IpNet>,
    /// What names of workload interfaces begin with; may be repeated
    #[arg(long, value_name = "PREFIX", default_value = "cali")]
    interface_prefix: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Hooks {
    Tc,
    All,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Form {
    Text,
    Json,
    Traceroute,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tc {
    Auto,
    Clsact,
}

impl From<Cli> for Plan {
    fn from(cli: Cli) -> Self {
        let command = match cli.verb {
            Verb::Watch(args) => plan::Command::Watch((*args).into()),
            Verb::Read(args) => plan::Command::Read(plan::Read {
                files: args.files,
                view: view(args.filter, args.output),
            }),
            Verb::Topology(args) => plan::Command::Topology(plan::Topology {
                json: args.output == "json",
                between: args.from.zip(args.to),
                nodes: args.nodes.into(),
            }),
            Verb::Doctor(args) => plan::Command::Doctor(plan::Doctor {
                clean: args.clean,
                nodes: args.nodes.into(),
            }),
        };
        Self {
            command,
            verbose: cli.verbose,
        }
    }
}

impl From<WatchArgs> for plan::Watch {
    fn from(args: WatchArgs) -> Self {
        Self {
            nodes: args.nodes.into(),
            view: view(args.filter, args.output),
            duration: args.duration,
            wait: !args.no_wait,
            functions: match args.hooks {
                Hooks::Tc => Probes::Off,
                Hooks::All => Probes::Cheapest,
            },
            btf: args.btf,
            tcx: args.tc == Tc::Auto,
            ring_size: args.ring_size,
            vxlan_port: args.vxlan_port,
        }
    }
}

impl From<NodeArgs> for plan::Nodes {
    fn from(args: NodeArgs) -> Self {
        Self {
            netns: args.netns,
            names: args.node,
            service_cidrs: args.service_cidr,
            interface_prefixes: args.interface_prefix,
        }
    }
}

fn view(filter: FilterArgs, output: OutputArgs) -> plan::View {
    let FilterArgs {
        pods,
        from,
        to,
        proto,
        port,
        interface,
        dropped,
    } = filter;
    plan::View {
        filter: Filter {
            pods,
            from,
            to,
            protocol: proto,
            port,
            interface,
            dropped,
        },
        format: match output.output {
            Form::Text => Format::Text { sizes: output.sizes },
            Form::Json => Format::Json,
            Form::Traceroute => Format::Traceroute,
        },
        files: output.write,
        count: output.count,
        max_open: output.max_open,
    }
}

impl FromStr for OutputFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        let format = FileFormat::of(&path).ok_or_else(|| {
            let known: Vec<&str> = FileFormat::ALL.iter().map(|format| format.ending()).collect();
            format!(
                "the ending tells the format, and the known ones are: {}",
                known.join(", ")
            )
        })?;
        Ok(Self { path, format })
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("it must be longer than nothing".into()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(format!(
            "{error}; expected a number with its unit, for example 10s, 2m or 1h"
        )),
    }
}

fn max_open(text: &str) -> Result<usize, String> {
    /// Some 100 GiB of them.
    const MOST: usize = 100_000_000;
    match text.parse() {
        Ok(count) if (1..=MOST).contains(&count) => Ok(count),
        _ => Err(format!("expected a number from 1 to {MOST}")),
    }
}

/// An end of a path: as of a filter, but one receiver and no prefix.
fn place(text: &str) -> Result<Place, String> {
    match text.parse() {
        Ok(End::Pod(name)) => Ok(Place::Pod(name.to_string())),
        Ok(End::Net(net)) if net.prefix_len() == net.max_prefix_len() => Ok(Place::Address(net.addr())),
        _ => Err("expected a pod (NAMESPACE/NAME) or an address".into()),
    }
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number from 1 to 65535".into()),
        Ok(port) => Ok(port),
    }
}

fn ring_size(text: &str) -> Result<u32, String> {
    const EXPECTED: &str = "expected a power of two from 4KiB to 1GiB, for example 16MiB";
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u32 = match &text[digits.len()..] {
        "" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        _ => return Err(EXPECTED.into()),
    };
    digits
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .filter(|size| size.is_power_of_two() && (1 << 12..=1 << 30).contains(size))
        .ok_or_else(|| EXPECTED.into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ring_sizes_are_powers_of_two() {
        assert_eq!(ring_size("16MiB"), Ok(16 << 20));
        assert_eq!(ring_size("4096"), Ok(4096));
        assert_eq!(ring_size("1G"), Ok(1 << 30));
        for bad in [
            "",
            "MiB",
            "3MiB",
            "2048",
            "2GiB",
            "8GiB",
            "16MB",
            "-4KiB",
            "99999999999",
        ] {
            assert!(ring_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_whole_command_line_becomes_a_plan() {
        let line = "calitrace watch --pod default/web-0 --from 10.0.0.7 --to 10.244.3.9/16 --proto udp --port 53 \
                    --dropped -o json -w a.jsonl -c 3 --max-open 5000 --duration 2m --netns 17 --node n1 --no-wait -vv";
        let Ok(Parsed::Plan(plan)) = parse(line.split_whitespace().map(OsString::from)) else {
            panic!("{line}")
        };
        let plan::Command::Watch(watch) = plan.command else {
            panic!("{plan:?}")
        };
        assert_eq!(
            watch.view.filter.to_string(),
            "--pod default/web-0 --from 10.0.0.7 --to 10.244.0.0/16 --proto udp --port 53 --dropped"
        );
        assert_eq!(watch.view.format, Format::Json);
        assert_eq!(watch.view.files, ["a.jsonl".parse().unwrap()]);
        assert_eq!(watch.view.count, NonZeroU64::new(3));
        assert_eq!(watch.view.max_open, 5000);
        assert_eq!(watch.duration, Some(Duration::from_mins(2)));
        assert_eq!(
            (watch.nodes.netns, watch.nodes.names),
            (vec!["17".into()], vec!["n1".into()])
        );
        assert_eq!(
            (watch.ring_size, watch.vxlan_port, watch.wait, plan.verbose),
            (16 << 20, 4789, false, 2)
        );
    }
}
