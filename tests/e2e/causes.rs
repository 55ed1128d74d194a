//! A thousand packets of one pod, delivered, rejected and dropped for eleven causes in any order: each verdict is right, each
//! cause has its name, and the rules' own counters are the numbers of drops. Beside it the twin: the same packets without the
//! faults.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Lab, Options, Policy, command, lab::netfilter::Backend};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, change_rules, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("a_thousand_packets_of_many_fates", || thousand(Backend::Nft)),
    test("a_thousand_packets_with_iptables_legacy", || {
        thousand(Backend::Legacy)
    }),
    test("the_first_drop_after_a_change_is_named", changes),
    test("rules_that_are_rewritten_all_the_time", rewritten),
];

/// What becomes of a kind of packets, and by which it is known: nothing else is sent to that address and port.
struct Kind {
    name: &'static str,
    to: SocketAddr,
    /// Another source address than the pod's, or another TTL.
    src: Option<Ipv4Addr>,
    ttl: Option<u32>,
    expected: Expected,
    /// Without the faults; one of several, with `|` between them.
    verdict_without: &'static str,
}

struct Expected {
    verdict: &'static str,
    /// The node that drops it.
    node: &'static str,
    /// What netfilter's rule means, and the name of the policy or tier.
    cause: Option<(&'static str, Option<&'static str>)>,
    /// The rule, by its chain and what else it has.
    rule: Option<(&'static str, String)>,
}

const ONE: &str = "minikube";
const TWO: &str = "minikube-m02";
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const DISABLED: (&str, Ipv4Addr) = ("pod6", Ipv4Addr::new(10, 244, 205, 210));
const UNKNOWN: (&str, Ipv4Addr) = ("pod7", Ipv4Addr::new(10, 244, 205, 211));
const OPEN: u16 = 5353;

#[expect(clippy::too_many_lines, reason = "a table")]
fn kinds(lab: &Lab) -> Result<Vec<Kind>> {
    let address = |pod: &str| lab.pod(pod).map(|pod| pod.address);
    let kind = |name, to: (Ipv4Addr, u16), expected, verdict_without| Kind {
        name,
        to: to.into(),
        src: None,
        ttl: None,
        expected,
        verdict_without,
    };
    let by_rule = |node, cause, called, chain, text: &str| Expected {
        verdict: "dropped",
        node,
        cause: Some((cause, called)),
        rule: Some((chain, text.to_owned())),
    };
    let plain = |verdict, node| Expected {
        verdict,
        node,
        cause: None,
        rule: None,
    };
    let pod2 = address("pod2")?;
    let rejects = Expected {
        verdict: "rejected",
        ..by_rule(
            TWO,
            "policy",
            Some("default/picky"),
            "cali-pi-np/default/picky",
            "-j REJECT",
        )
    };
    let end = by_rule(TWO, "end_of_tier", Some("default"), "cali-tw-", "End of tier");
    let chain = format!("cali-tw-{}", lab.pod("pod3")?.interface);
    let own = lab.node(ONE)?.tunnel_address;
    let mut kinds = vec![
        kind("delivered", (pod2, OPEN), plain("delivered", TWO), "delivered"),
        kind("closed", (pod2, 9999), plain("rejected", TWO), "rejected"),
        kind(
            "policy",
            (pod2, 1001),
            by_rule(
                TWO,
                "policy",
                Some("default/picky"),
                "cali-pi-np/default/picky",
                "-j DROP",
            ),
            "rejected",
        ),
        kind("rejecting policy", (pod2, 1003), rejects, "rejected"),
        kind("end of tier", (address("pod4")?, OPEN), end, "delivered"),
        kind(
            "no profile",
            (address("pod3")?, OPEN),
            by_rule(ONE, "no_profile", None, "cali-tw-", &format!("-A {chain} ")),
            "delivered",
        ),
        kind(
            "disabled",
            (DISABLED.1, OPEN),
            by_rule(TWO, "admin_down", None, "cali-tw-", "admin disabled"),
            "delivered",
        ),
        kind(
            "unknown interface",
            (UNKNOWN.1, OPEN),
            by_rule(
                TWO,
                "unknown_interface",
                None,
                "cali-to-wl-dispatch",
                "Unknown interface",
            ),
            "delivered",
        ),
        kind(
            "encapsulated",
            (pod2, 4789),
            by_rule(ONE, "encapsulated_by_pod", None, "cali-fw-", "VXLAN encapped"),
            "dropped",
        ),
        kind(
            "to the node",
            (own, 7777),
            by_rule(ONE, "endpoint_to_host", None, "cali-wl-to-host", "-j DROP"),
            "rejected",
        ),
        kind(
            "service loop",
            (Ipv4Addr::new(10, 96, 200, 200), 80),
            by_rule(ONE, "service_loop", None, "cali-cidr-block", "-j DROP"),
            // It is masqueraded, and nobody there has the address.
            "rejected|left",
        ),
        kind(
            "no pod",
            (lab.node(TWO)?.unused_address, OPEN),
            plain("dropped", TWO),
            "dropped",
        ),
    ];
    let mut spoofed = kind(
        "not its address",
        (pod2, 1004),
        by_rule(ONE, "reverse_path", None, "cali-PREROUTING", "rpfilter"),
        "dropped",
    );
    spoofed.src = Some(ELSEWHERE);
    let mut short = kind("short-lived", (pod2, 1005), plain("expired", ONE), "expired");
    short.ttl = Some(1);
    kinds.extend([spoofed, short]);
    Ok(kinds)
}

/// A lab with two more pods, in which every pod takes datagrams.
fn lab(netfilter: Backend) -> Result<Lab> {
    let lab = Lab::up(&Options {
        netfilter,
        ipv6: false,
        ..Options::default()
    })?;
    for (id, address) in [DISABLED, UNKNOWN] {
        lab.add_pod(id, TWO, &format!("busybox-{id}"), address)?;
    }
    lab.namespace("pod1")?
        .ip(&format!("address add {ELSEWHERE}/32 dev eth0\n"))?;
    for part in [ONE, "pod2"] {
        // Each one is answered.
        let limit = "net/ipv4/icmp_ratelimit".to_owned();
        lab.namespace(part)?.sysctls([(limit, "0")])?;
    }
    lab.namespace(TWO)?
        .sysctls([("net/ipv4/icmp_ratelimit".to_owned(), "0")])?;
    Ok(lab)
}

fn change(lab: &Lab, node: &str, filter: &str) -> Result<()> {
    change_rules(lab, node, &format!("*filter\n{filter}COMMIT\n"))
}

fn break_it(lab: &Lab) -> Result<()> {
    lab.set_policy("pod4", Policy::EndOfTier)?;
    let interface = |pod: &str| lab.pod(pod).map(|pod| pod.interface);
    let picky = |port: u16, target: &str| {
        format!(
            "-A cali-pi-np/default/picky -p udp -m udp --dport {port} \
             -m comment --comment \"NetworkPolicy default/picky ingress\" -j {target}\n"
        )
    };
    let (pod2, disabled, unknown) = (interface("pod2")?, interface(DISABLED.0)?, interface(UNKNOWN.0)?);
    change(
        lab,
        TWO,
        &format!(
            ":cali-pi-np/default/picky -\n{}{}\
             -I cali-tw-{pod2} 4 -j cali-pi-np/default/picky\n\
             -F cali-tw-{disabled}\n\
             -A cali-tw-{disabled} -m comment --comment \"Endpoint admin disabled\" -j DROP\n\
             -D cali-to-wl-dispatch -o {unknown} -g cali-tw-{unknown}\n",
            picky(1001, "DROP"),
            picky(1003, "REJECT"),
        ),
    )?;
    let pod3 = interface("pod3")?;
    change(
        lab,
        ONE,
        &format!(
            ":cali-cidr-block -\n\
             -A cali-cidr-block -d 10.96.0.0/12 -j DROP\n\
             -A cali-FORWARD -j cali-cidr-block\n\
             -R cali-wl-to-host 2 -m comment --comment \"Configured DefaultEndpointToHostAction\" -j DROP\n\
             -D cali-tw-{pod3} -j cali-pri-kns.default\n"
        ),
    )
}

/// Sends a packet of each number's kind, in the order of the numbers, and returns how many of each kind went.
fn send(lab: &Lab, kinds: &[Kind], numbers: impl Iterator<Item = usize>) -> Result<Vec<u64>> {
    let sockets: Vec<UdpSocket> = lab.namespace("pod1")?.within(|| {
        kinds
            .iter()
            .map(|kind| {
                let socket = UdpSocket::bind((kind.src.unwrap_or(Ipv4Addr::UNSPECIFIED), 0))?;
                if let Some(ttl) = kind.ttl {
                    socket.set_ttl(ttl)?;
                }
                Ok(socket)
            })
            .collect()
    })?;
    let mut sent = vec![0; kinds.len()];
    for (count, number) in numbers.enumerate() {
        // An ICMP error that came meanwhile is told by the next call, which then sends nothing.
        let mut datagram = [0; 64];
        datagram[..8].copy_from_slice(&count.to_be_bytes());
        let mut left = 3;
        while let Err(error) = sockets[number].send_to(&datagram, kinds[number].to) {
            left -= 1;
            ensure!(left > 0, "cannot send to {}: {error}", kinds[number].to);
        }
        sent[number] += 1;
        // As many errors a second as the kernel sends (`net.ipv4.icmp_msgs_per_sec`: 1000).
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(sent)
}

/// The traces of each kind.
fn by_kind<'a>(packets: &'a [Value], kinds: &[Kind], pod: Ipv4Addr) -> Vec<Vec<&'a Value>> {
    let is_of = |packet: &Value, kind: &Kind| {
        let flow = &packet["flow"];
        flow["proto"] == "udp"
            && flow["src"] == kind.src.unwrap_or(pod).to_string()
            && flow["dst"] == kind.to.ip().to_string()
            && flow["dst_port"] == kind.to.port()
    };
    kinds
        .iter()
        .map(|kind| packets.iter().filter(|packet| is_of(packet, kind)).collect())
        .collect()
}

/// Packets that the rules of a chain (by its beginning) with this text have counted on a node.
fn counted(lab: &Lab, node: &str, chain: &str, text: &str) -> Result<u64> {
    let tool = match lab.options().netfilter {
        Backend::Legacy => "iptables-legacy-save",
        _ => "iptables-nft-save",
    };
    let mut save = lab.exec(node, [tool, "-c"])?;
    let rules = command::text(&command::run(&mut save)?);
    let mut count = None;
    for line in rules.lines() {
        // `[3:252] -A cali-tw-cali1 … -j DROP`
        let Some((counters, rule)) = line.strip_prefix('[').and_then(|line| line.split_once("] ")) else {
            continue;
        };
        let drops = rule.ends_with("-j DROP") || rule.contains("-j REJECT");
        if drops && rule.starts_with(&format!("-A {chain}")) && rule.contains(text) {
            let (packets, _) = counters.split_once(':').context("counters")?;
            count = Some(count.unwrap_or(0) + packets.parse::<u64>()?);
        }
    }
    count.with_context(|| format!("{node} has no rule {chain} … {text}:\n{rules}"))
}

fn thousand(backend: Backend) -> Result<()> {
    const COUNT: usize = 1_000;
    let lab = lab(backend)?;
    let (kinds, pod) = (kinds(&lab)?, lab.pod("pod1")?.address);
    let pods = ["pod2", "pod3", "pod4", DISABLED.0, UNKNOWN.0];
    let servers = pods.map(|pod| lab.udp_server(pod, OPEN, false));
    let servers: Vec<_> = servers.into_iter().collect::<Result<_>>()?;
    // The twin: what is dropped by faults arrives where there are none.
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    send(
        &lab,
        &kinds,
        (0..3 * kinds.len()).map(|number| number % kinds.len()),
    )?;
    let packets = watch.stop()?.packets()?;
    for (kind, traces) in kinds.iter().zip(by_kind(&packets, &kinds, pod)) {
        ensure!(traces.len() == 3, "{}: {} traces", kind.name, traces.len());
        for trace in traces {
            ensure!(
                trace["verdict"]
                    .as_str()
                    .is_some_and(|verdict| kind.verdict_without.split('|').any(|one| one == verdict)),
                "{} without the faults: {trace:#}",
                kind.name
            );
        }
    }

    break_it(&lab)?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let counts_before = counts(&lab, &kinds)?;
    // Any order, the same each time (Knuth, MMIX).
    let mut state = 1_u64;
    let numbers = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % kinds.len()
    });
    let sent = send(&lab, &kinds, numbers.take(COUNT))?;
    let packets = watch.stop()?.packets()?;
    let counts_after = counts(&lab, &kinds)?;
    servers
        .into_iter()
        .try_for_each(|server| server.stop().map(drop))?;
    let mut wrong: BTreeMap<&str, (usize, &Value)> = BTreeMap::new();
    for (index, traces) in by_kind(&packets, &kinds, pod).into_iter().enumerate() {
        let kind = &kinds[index];
        ensure!(
            traces.len() as u64 == sent[index],
            "{}: {} packets, {} traces",
            kind.name,
            sent[index],
            traces.len()
        );
        for trace in traces {
            if !is_right(trace, &kind.expected) {
                wrong.entry(kind.name).or_insert((0, trace)).0 += 1;
            }
        }
        let counted = counts_after[index] - counts_before[index];
        ensure!(
            kind.expected.rule.is_none() || counted == sent[index],
            "{}: {} packets, {counted} by the rule's counter",
            kind.name,
            sent[index]
        );
    }
    ensure!(
        wrong.is_empty(),
        "how many are wrong, and one of each: {wrong:#?}"
    );
    Ok(())
}

/// The counters of the kinds' rules; 0 where there is none.
fn counts(lab: &Lab, kinds: &[Kind]) -> Result<Vec<u64>> {
    kinds
        .iter()
        .map(|kind| match &kind.expected.rule {
            Some((chain, text)) => counted(lab, kind.expected.node, chain, text),
            None => Ok(0),
        })
        .collect()
}

fn is_right(trace: &Value, expected: &Expected) -> bool {
    let drop = &trace["drop"];
    let named = expected.cause.is_none_or(|(cause, name)| {
        let culprits = drop["culprits"].as_array().map(Vec::as_slice).unwrap_or_default();
        drop["node"] == expected.node
            && culprits.len() == 1
            && culprits[0]["cause"] == cause
            && culprits[0]["name"].as_str() == name
    });
    trace["verdict"] == expected.verdict && named
}

/// The policies that may have dropped the packets from pod 1 to pod 2, by their names.
fn policies(packets: &[Value]) -> Vec<Vec<&str>> {
    let echo =
        |packet: &&Value| packet["flow"]["proto"] == "icmp" && packet["flow"]["dst"] == "10.244.205.193";
    packets.iter().filter(echo).map(names).collect()
}

fn names(packet: &Value) -> Vec<&str> {
    let culprits = packet["drop"]["culprits"].as_array();
    culprits
        .into_iter()
        .flatten()
        .filter_map(|culprit| culprit["name"].as_str())
        .collect()
}

/// A policy is there and denies before its rules were ever read: the packet that shows it has its name all the same. Where
/// another one went meanwhile, it may have been either.
fn changes() -> Result<()> {
    let lab = lab(Backend::Nft)?;
    let pod2 = lab.pod("pod2")?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    for name in ["default/first", "default/second"] {
        let chain = format!("cali-pi-np/{name}");
        change(
            &lab,
            TWO,
            &format!(
                ":{chain} -\n\
                 -A {chain} -m comment --comment \"NetworkPolicy {name} ingress\" -j DROP\n\
                 -I cali-tw-{} 4 -j {chain}\n",
                pod2.interface
            ),
        )?;
        lab.ping("pod1", pod2.ip(), 1, &[])?;
        change(&lab, TWO, &format!("-D cali-tw-{} -j {chain}\n", pod2.interface))?;
        lab.ping("pod1", pod2.ip(), 1, &[])?;
    }
    let packets = watch.stop()?.packets()?;
    let found = policies(&packets);
    let expected = [
        &["default/first"][..],
        &[],
        &["default/first", "default/second"],
        &[],
    ];
    ensure!(found == expected, "{expected:?}, not {found:?}: {packets:#?}");
    Ok(())
}

/// As Felix does when endpoints come and go: chains are written anew, each time as a whole.
fn rewritten() -> Result<()> {
    let lab = lab(Backend::Nft)?;
    lab.set_policy("pod2", Policy::Deny)?;
    let pod2 = lab.pod("pod2")?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    for round in 0..20 {
        let other = if round % 2 == 0 {
            Policy::EndOfTier
        } else {
            Policy::Allow
        };
        lab.set_policy("pod4", other)?;
        lab.ping("pod1", pod2.ip(), 2, &["-W", "0.1"])?;
    }
    let packets = watch.stop()?.packets()?;
    let found = policies(&packets);
    ensure!(
        found.len() == 40 && found.iter().all(|policies| policies == &["default/deny-all"]),
        "{found:?}: {packets:#?}"
    );
    Ok(())
}
