//! Felix' own rule sets (`tests/felix`), loaded on a node of the lab: what the kernel drops by them has the name of the policy, tier or
//! profile that meant it, and what the kernel lets through arrives. The policies and endpoints are those of
//! `tests/felix-rules/scenario.go`.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Lab, Need, command, lab::netfilter::Backend, unhurried};
use serde_json::{Value, json};

use crate::{
    Test,
    support::{Watch, change_nftables, goes, with},
    test,
    traced::lab_with,
};

/// A rule set: its name, and what the tool showed. Guests have no folder of these.
type RuleSet = (&'static str, &'static str);

macro_rules! rule_sets {
    ($($name:literal),+) => {
        &[$(($name, include_str!(concat!("../felix/", $name)))),+]
    };
}

const SETS: &str = include_str!("../felix/ipsets");

pub(crate) const TESTS: &[Test] = &[
    test("rules_of_felix_s_own_in_iptables_legacy", || {
        by_rules(
            Backend::Legacy,
            rule_sets![
                "v3.28/plain.legacy.save",
                "v3.31-by-hand/flow-logs.legacy.save",
                "v3.33-by-hand/plain.legacy.save"
            ],
        )
    })
    .needs(&[Need::Program("ipset")]),
    test("rules_of_felix_s_own_in_iptables_nft", || {
        by_rules(
            Backend::Nft,
            rule_sets![
                "v3.28/plain.nft.save",
                "v3.31-by-hand/flow-logs.nft.save",
                "v3.33-by-hand/plain.nft.save",
                "v3.33-by-hand/reject.nft.save"
            ],
        )
    })
    .needs(&[Need::Program("ipset")]),
    test("rules_of_felix_s_own_in_nftables", || {
        by_rules(
            Backend::Native,
            rule_sets![
                "v3.31-by-hand/flow-logs.json",
                "v3.33-by-hand/plain.json",
                "v3.33-by-hand/reject.json"
            ],
        )
    })
    .needs(&[Need::Program("nft")]),
];

const NODE: &str = "minikube";
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 244, 205, 193);
/// Without rules.
const UNKNOWN: char = 'b';
/// The interfaces of the scenario's endpoints: `cali`, and this letter eleven times.
const ENDPOINTS: [char; 14] = [
    '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', UNKNOWN, 'd', 'e', 'g',
];

/// A packet, and who drops it.
struct Case {
    from: String,
    to: Ipv4Addr,
    proto: &'static str,
    port: u16,
    expected: Option<Blamed>,
    /// The rule rejects where that is configured.
    is_configured: bool,
}

fn pod(endpoint: char) -> String {
    format!("felix-{endpoint}")
}

fn address(endpoint: char) -> Result<Ipv4Addr> {
    let place = ENDPOINTS.iter().position(|known| *known == endpoint);
    let place = u8::try_from(place.context("an endpoint")?)?;
    Ok(Ipv4Addr::new(10, 244, 120, 80 + place))
}

/// The cause, and the name of the policy, profile or tier.
type Blamed = (&'static str, Option<&'static str>);

const NOBODY: Option<Blamed> = None;

fn policy(name: &'static str) -> Blamed {
    ("policy", Some(name))
}

fn end_of(tier: &'static str) -> Blamed {
    ("end_of_tier", Some(tier))
}

/// From another node's pod.
fn to(endpoint: char, proto: &'static str, port: u16, expected: impl Into<Option<Blamed>>) -> Result<Case> {
    Ok(Case {
        from: "pod2".to_owned(),
        to: address(endpoint)?,
        proto,
        port,
        expected: expected.into(),
        is_configured: true,
    })
}

fn from(endpoint: char, proto: &'static str, port: u16, expected: impl Into<Option<Blamed>>) -> Case {
    Case {
        from: pod(endpoint),
        to: ELSEWHERE,
        proto,
        port,
        expected: expected.into(),
        is_configured: true,
    }
}

fn cases(lab: &Lab, has_tiers: bool) -> Result<Vec<Case>> {
    const LONG: &str = "default/a-policy-with-a-name-that-is-too-long-for-its-chain";
    let no_profile = ("no_profile", None);
    let default = end_of("default");
    let mut cases = vec![
        to('1', "udp", 54, policy("default/deny-all"))?,
        to(
            '3',
            "udp",
            54,
            end_of(if has_tiers { "security" } else { "default" }),
        )?,
        to('3', "tcp", 8080, NOBODY)?,
        to('4', "udp", 54, NOBODY)?,
        to('5', "udp", 54, no_profile)?,
        to('6', "udp", 54, ("admin_down", None))?,
        to('7', "tcp", 1111, NOBODY)?,
        to('7', "tcp", 2222, policy("default/second"))?,
        to('7', "tcp", 3333, NOBODY)?,
        to('7', "tcp", 4444, default)?,
        to('8', "udp", 53, policy(LONG))?,
        to('8', "udp", 54, NOBODY)?,
        to('9', "udp", 54, ("profile", Some("no-udp")))?,
        to('9', "tcp", 80, NOBODY)?,
        to('a', "tcp", 22, policy("default/web"))?,
        to('a', "tcp", 80, NOBODY)?,
        to('a', "tcp", 8040, NOBODY)?,
        to('a', "udp", 5353, policy("default/web"))?,
        to(UNKNOWN, "udp", 54, ("unknown_interface", None))?,
        from('1', "tcp", 25, policy("default/blocked-out")),
        from('1', "tcp", 26, NOBODY),
        from('4', "udp", 54, NOBODY),
        from('4', "udp", 4789, ("encapsulated_by_pod", None)),
        from('5', "udp", 54, no_profile),
        from('6', "udp", 54, ("admin_down", None)),
        from('9', "udp", 54, ("profile", Some("no-udp"))),
        from('9', "tcp", 80, NOBODY),
        from(UNKNOWN, "udp", 54, ("unknown_interface", None)),
    ];
    // In the set `frontend`.
    let of_frontend = Case {
        from: "pod4".to_owned(),
        ..to('a', "udp", 5353, NOBODY)?
    };
    // Both have an action of their own: defaultEndpointToHostAction, serviceLoopPrevention.
    let mut into_node = from('4', "udp", 54, ("endpoint_to_host", None));
    (into_node.to, into_node.is_configured) = (lab.node(NODE)?.address, false);
    let mut service = from('2', "udp", 53, ("service_loop", None));
    (service.to, service.is_configured) = (Ipv4Addr::new(10, 96, 0, 10), false);
    cases.extend([of_frontend, into_node, service]);
    if has_tiers {
        cases.extend([
            to('2', "udp", 54, default)?,
            to('d', "tcp", 1111, NOBODY)?,
            to('d', "tcp", 1112, default)?,
            to('e', "tcp", 9100, NOBODY)?,
            to('e', "tcp", 9101, policy("platform.base"))?,
            to('e', "tcp", 2222, policy("default/second"))?,
            to('g', "tcp", 9100, NOBODY)?,
            to('g', "udp", 54, no_profile)?,
        ]);
    }
    Ok(cases)
}

fn by_rules(backend: Backend, rule_sets: &[RuleSet]) -> Result<()> {
    let lab = lab_with(backend)?;
    for endpoint in ENDPOINTS {
        let id = pod(endpoint);
        let interface = format!("cali{}", endpoint.to_string().repeat(11));
        lab.add_pod_with(&id, NODE, &id, address(endpoint)?, interface)?;
    }
    // nftables has its own.
    if backend != Backend::Native {
        command::run_with_input(&mut lab.exec(NODE, ["ipset", "restore"])?, SETS)?;
    }
    for (name, text) in rule_sets {
        load(&lab, text).with_context(|| format!("load {name}"))?;
        let cases = cases(&lab, !name.starts_with("v3.28"))?;
        judge(&lab, &cases, name.contains("/reject.")).with_context(|| format!("by {name}"))?;
    }
    Ok(())
}

/// All tables anew.
fn load(lab: &Lab, text: &str) -> Result<()> {
    let (command, input): (&[&str], String) = match lab.options().netfilter {
        Backend::Native => (
            // Guests have no /dev/stdin, which `-` stands for.
            &["nft", "-j", "-f", "/proc/self/fd/0"],
            json!({ "nftables": in_order(text)? }).to_string(),
        ),
        Backend::Legacy => (&["iptables-legacy-restore", "-w", "10"], text.to_owned()),
        _ => (&["iptables-nft-restore", "-w", "10"], text.to_owned()),
    };
    if lab.options().netfilter == Backend::Native {
        // The service's rules, too, which tables of iptables are replaced with.
        change_nftables(lab, NODE, "flush ruleset\n")?;
    }
    command::run_with_input(&mut lab.exec(NODE, command)?, &input).map(drop)
}

/// As `nft` lists them, maps lead to chains that come later; to load them, each has to be there before what names it.
fn in_order(list: &str) -> Result<Vec<Value>> {
    const ORDER: [&str; 6] = ["metainfo", "table", "chain", "set", "map", "rule"];
    let mut list: Value = serde_json::from_str(list).context("read a list of nft's")?;
    let objects = list["nftables"].as_array_mut().context("objects")?;
    objects.sort_by_key(|object| ORDER.iter().position(|kind| object.get(kind).is_some()));
    Ok(std::mem::take(objects))
}

/// Sends each packet, and looks at what became of it.
fn judge(lab: &Lab, cases: &[Case], rejects: bool) -> Result<()> {
    let watch = Watch::start(&with(lab, &["-o", "json"]))?;
    for case in cases {
        send(lab, case)?;
    }
    std::thread::sleep(unhurried(Duration::from_millis(500)));
    let packets = watch.stop()?.packets()?;
    for case in cases {
        let from = lab.pod(&case.from)?.address.to_string();
        let traces: Vec<&Value> = packets
            .iter()
            .filter(|packet| {
                let is_one = goes(packet, case.proto, &from, &case.to.to_string());
                is_one && packet["flow"]["dst_port"] == case.port
            })
            .collect();
        let what = format!("{} {} to {}:{}", case.proto, case.from, case.to, case.port);
        // Of a connection the first segment: it is what rules are asked of.
        let trace = traces.first().with_context(|| format!("{what}: no trace"))?;
        ensure!(case.proto == "tcp" || traces.len() == 1, "{what}: {traces:#?}");
        let verdict = trace["verdict"].as_str().unwrap_or_default();
        let culprits = trace["drop"]["culprits"].as_array();
        let Some((cause, name)) = case.expected else {
            // Nobody listens in these pods: who says so is the pod itself.
            let by_pod = verdict == "delivered"
                || verdict == "rejected" && trace["answer"]["address"] == case.to.to_string();
            ensure!(
                by_pod && culprits.is_none_or(Vec::is_empty) && trace["drop"]["reason"] != "NETFILTER_DROP",
                "{what}: {trace:#}"
            );
            continue;
        };
        let ends = if rejects && case.is_configured {
            "rejected"
        } else {
            "dropped"
        };
        let culprits = culprits.with_context(|| format!("{what}: no drop: {trace:#}"))?;
        ensure!(
            verdict == ends && trace["drop"]["node"] == NODE && culprits.len() == 1,
            "{what} was not {ends}: {trace:#}"
        );
        ensure!(
            culprits[0]["cause"] == cause && culprits[0]["name"].as_str() == name,
            "{what}, not by {cause} {name:?}: {trace:#}"
        );
    }
    Ok(())
}

fn send(lab: &Lab, case: &Case) -> Result<()> {
    let to = SocketAddr::from((case.to, case.port));
    lab.namespace(&case.from)?.within(|| {
        if case.proto == "udp" {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind a socket")?;
            socket.send_to(b"to be judged", to).context("send a datagram")?;
        } else {
            // A reset is as good an answer as none; a second SYN would come after a second.
            let _ = TcpStream::connect_timeout(&to, Duration::from_millis(100));
        }
        Ok(())
    })
}
