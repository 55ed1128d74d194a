//! Which rule dropped a packet, with 10,000 rules as Felix writes them: how long it takes to read what `iptables-save` and
//! `nft -j` show, how long to find the culprits of one drop, and the heap that holds the rules meanwhile.
//!
//! The node has 50 pods, and so many policies that one pod is selected by all of them: a packet to it is asked about by the
//! first one, by the last one, or let through by the last one, so that nobody dropped it. Rules have the form that they have
//! in `tests/felix/v3.33-by-hand`.
//!
//! Measured on a virtual machine with two processors that others used, too: 18 ms for `iptables-save` and 2 ms for `ipset
//! save`, 134 ms to keep of `nft -j` what matters and 83 ms for the rest; a drop's culprits in 1 µs where the first policy
//! dropped it, in 0.32 ms (iptables) and 0.24 ms (nftables) where all were asked; 6.6 and 4.5 MiB of heap.
#![expect(clippy::print_stdout, reason = "a command that prints its results")]

mod heap;

use std::{fmt::Write as _, hint::black_box, net::Ipv4Addr};

use calitrace::netfilter::{Asked, Culprit, Device, Hook, Ruleset, Sets, States, compact_nft};
use criterion::{Criterion, Throughput};
use serde_json::{Value, json};

use heap::{heap, mebibytes};

const PODS: usize = 50;
const POLICIES: u16 = 411;
/// Of each policy; each is two rules of netfilter, as is what the policy denies.
const ALLOWED: u16 = 9;
/// In the set that a policy selects by.
const MEMBERS: u16 = 20;

/// Bits of the mark (`felix/dataplane/driver.go`, Calico 3.34).
const ACCEPT: u32 = 0x1_0000;
const PASS: u32 = 0x2_0000;
const DROP: u32 = 0x4_0000;

/// What the policy of this number denies is sent to this port.
const fn denied(policy: u16) -> u16 {
    20_000 + policy
}

/// What it allows, to this one.
const fn allowed(number: u16) -> u16 {
    8_000 + number
}

/// A condition of a rule.
enum If {
    /// States of the connection: as `iptables` names them, and in `nft`'s numbers.
    State(&'static str, &'static [u32]),
    /// Whether these bits of the mark are set, or all are clear.
    Mark(u32, bool),
    From(String),
    Protocol(u8),
    TcpPort(u16),
}

enum Then {
    Accept,
    Drop,
    Return,
    Jump(String),
    Set(u32),
    Clear(u32),
}

struct Rule {
    chain: String,
    comment: String,
    conditions: Vec<If>,
    then: Then,
}

/// A node's rules in the table `filter`, but for those that tell pods apart.
#[derive(Default)]
struct Rules(Vec<Rule>);

impl Rules {
    fn add(&mut self, chain: &str, comment: &str, conditions: impl Into<Vec<If>>, then: Then) {
        self.0.push(Rule {
            chain: chain.to_owned(),
            comment: comment.to_owned(),
            conditions: conditions.into(),
            then,
        });
    }

    fn of_node() -> Self {
        let mut rules = Self::default();
        rules.add("FORWARD", "", [], Then::Jump("cali-FORWARD".to_owned()));
        let accepted = "Policy explicitly accepted packet.";
        rules.add("FORWARD", accepted, [If::Mark(ACCEPT, true)], Then::Accept);
        rules.add("FORWARD", "", [], Then::Set(ACCEPT));
        rules.add("cali-FORWARD", "", [], Then::Clear(PASS | DROP));
        for way in ["from", "to"] {
            let dispatch = format!("cali-{way}-wl-dispatch");
            rules.add("cali-FORWARD", "", [], Then::Jump(dispatch));
        }
        for pod in 0..PODS {
            rules.pod(pod);
        }
        for policy in 0..POLICIES {
            rules.policy(policy);
        }
        for chain in ["cali-pri-kns.default", "cali-pro-kns.default"] {
            rules.add(chain, "Profile kns.default", [], Then::Set(ACCEPT));
            rules.add(chain, "", [If::Mark(ACCEPT, true)], Then::Return);
        }
        rules
    }

    fn pod(&mut self, pod: usize) {
        let interface = interface(pod);
        for way in ["tw", "fw"] {
            let chain = format!("cali-{way}-{interface}");
            let known = If::State("RELATED,ESTABLISHED", &[2, 4]);
            self.add(&chain, "", [known], Then::Accept);
            self.add(&chain, "", [If::State("INVALID", &[1])], Then::Drop);
            self.add(&chain, "", [], Then::Clear(ACCEPT | PASS));
            let profile = if way == "tw" {
                self.tier(&chain, pod);
                "cali-pri-kns.default"
            } else {
                let no_ipip = "Drop IPinIP encapped packets originating in workloads";
                self.add(&chain, no_ipip, [If::Protocol(4)], Then::Drop);
                "cali-pro-kns.default"
            };
            self.add(&chain, "", [], Then::Jump(profile.to_owned()));
            let by_profile = "Return if profile accepted";
            self.add(&chain, by_profile, [If::Mark(ACCEPT, true)], Then::Return);
            self.add(&chain, "Drop if no profiles matched", [], Then::Drop);
        }
    }

    /// The first pod has all policies, the others one each.
    fn tier(&mut self, chain: &str, pod: usize) {
        self.add(chain, "Start of tier default", [], Then::Clear(PASS));
        let pod = u16::try_from(pod).expect("few pods");
        let policies = if pod == 0 { 0..POLICIES } else { pod..pod + 1 };
        for policy in policies {
            let name = policy_chain(policy);
            self.add(chain, "", [If::Mark(PASS, false)], Then::Jump(name));
            let accepted = "Return if policy accepted";
            self.add(chain, accepted, [If::Mark(ACCEPT, true)], Then::Return);
        }
        let end = "End of tier default. Drop if no policies passed packet";
        self.add(chain, end, [If::Mark(PASS, false)], Then::Drop);
    }

    fn policy(&mut self, policy: u16) {
        let chain = policy_chain(policy);
        let title = format!("NetworkPolicy default/policy-{policy} ingress");
        self.add(&chain, &title, [If::TcpPort(denied(policy))], Then::Set(DROP));
        self.add(&chain, "", [If::Mark(DROP, true)], Then::Drop);
        for number in 0..ALLOWED {
            let from = If::From(set(policy));
            self.add(
                &chain,
                "",
                [from, If::TcpPort(allowed(number))],
                Then::Set(ACCEPT),
            );
            self.add(&chain, "", [If::Mark(ACCEPT, true)], Then::Return);
        }
    }
}

fn interface(pod: usize) -> String {
    format!("cali{pod:011x}")
}

fn policy_chain(policy: u16) -> String {
    format!("cali-pi-np/default/policy-{policy}")
}

fn set(policy: u16) -> String {
    format!("cali40s:policy-{policy}-with-forty-three-characters")
}

fn members(policy: u16) -> impl Iterator<Item = Ipv4Addr> {
    let [high, low] = policy.to_be_bytes();
    (0..MEMBERS).map(move |member| {
        let [_, last] = member.to_be_bytes();
        Ipv4Addr::new(10, 240 + high, low, 1 + last)
    })
}

/// As `iptables-save` writes them. How many there are, too.
fn saved(rules: &Rules) -> (String, usize) {
    let mut chains: Vec<&str> = Vec::new();
    let mut lines = String::new();
    let mut count = 0;
    let mut add = |line: std::fmt::Arguments<'_>| {
        count += 1;
        writeln!(lines, "-A {line}").expect("memory");
    };
    for (number, rule) in rules.0.iter().enumerate() {
        if chains.last() != Some(&rule.chain.as_str()) && !rule.chain.starts_with("FORWARD") {
            chains.push(&rule.chain);
        }
        let protocol = rule.conditions.iter().find_map(|condition| match condition {
            If::Protocol(number) => Some(format!(" -p {number}")),
            If::TcpPort(_) => Some(" -p tcp".to_owned()),
            _ => None,
        });
        let matches: String = rule.conditions.iter().map(matched).collect();
        let then = match &rule.then {
            Then::Accept => "ACCEPT".to_owned(),
            Then::Drop => "DROP".to_owned(),
            Then::Return => "RETURN".to_owned(),
            Then::Jump(chain) => chain.clone(),
            Then::Set(bits) => format!("MARK --set-xmark {bits:#x}/{bits:#x}"),
            Then::Clear(bits) => format!("MARK --set-xmark 0x0/{bits:#x}"),
        };
        let said = match rule.comment.as_str() {
            "" => String::new(),
            comment => format!(" -m comment --comment \"{comment}\""),
        };
        add(format_args!(
            "{}{} -m comment --comment \"cali:{number:016x}\"{said}{matches} -j {then}",
            rule.chain,
            protocol.unwrap_or_default()
        ));
    }
    for (way, ends, option) in [("from", "fw", "-i"), ("to", "tw", "-o")] {
        for interface in (0..PODS).map(interface) {
            let digest = "-m comment --comment \"cali:0123456789abcdef\"";
            add(format_args!(
                "cali-{way}-wl-dispatch {option} {interface} {digest} -g cali-{ends}-{interface}"
            ));
        }
    }
    let mut text = "*filter\n:FORWARD ACCEPT [0:0]\n".to_owned();
    for chain in chains {
        writeln!(text, ":{chain} - [0:0]").expect("memory");
    }
    (format!("{text}{lines}COMMIT\n"), count)
}

fn matched(condition: &If) -> String {
    match condition {
        If::State(states, _) => format!(" -m conntrack --ctstate {states}"),
        If::Mark(bits, true) => format!(" -m mark --mark {bits:#x}/{bits:#x}"),
        If::Mark(bits, false) => format!(" -m mark --mark 0x0/{bits:#x}"),
        If::From(set) => format!(" -m set --match-set {set} src"),
        If::TcpPort(port) => format!(" -m multiport --dports {port}"),
        If::Protocol(_) => String::new(),
    }
}

/// As `ipset save` writes the sets.
fn saved_sets() -> String {
    let mut text = String::new();
    for policy in 0..POLICIES {
        let name = set(policy);
        writeln!(
            text,
            "create {name} hash:net family inet hashsize 1024 maxelem 1048576"
        )
        .expect("memory");
        for member in members(policy) {
            writeln!(text, "add {name} {member}").expect("memory");
        }
    }
    text
}

/// As `nft -j list table ip calico` writes rules and sets. How many rules there are, too.
fn listed(rules: &Rules) -> (String, usize) {
    let place = json!({"family": "ip", "table": "calico"});
    let object = |kind: &str, members: Value| -> Value {
        let mut all = place.clone();
        let both = (all.as_object_mut(), members);
        if let (Some(all), Value::Object(members)) = both {
            all.extend(members);
        }
        json!({ kind: all })
    };
    let mut objects = vec![object(
        "chain",
        json!({"name": "filter-FORWARD", "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}),
    )];
    for policy in 0..POLICIES {
        let elements: Vec<String> = members(policy).map(|member| member.to_string()).collect();
        let name = set(policy).replace(':', "-");
        let members = json!({"name": name, "type": "ipv4_addr", "flags": ["interval"], "elem": elements});
        objects.push(object("set", members));
    }
    for (number, rule) in rules.0.iter().enumerate() {
        let mut statements: Vec<Value> = rule.conditions.iter().map(condition).collect();
        statements.push(json!({"counter": null}));
        statements.push(action(&rule.then));
        let comment = format!("cali:{number:016x}; {}", rule.comment);
        objects.push(object(
            "rule",
            json!({
                "chain": format!("filter-{}", rule.chain),
                "handle": number,
                "comment": comment.trim_end(),
                "expr": statements
            }),
        ));
    }
    let mut count = rules.0.len();
    for (way, ends, key) in [("from", "fw", "iifname"), ("to", "tw", "oifname")] {
        let name = format!("filter-cali-{way}-wl-dispatch");
        let element = |interface: String| {
            let target = format!("filter-cali-{ends}-{interface}");
            json!([interface, {"goto": {"target": target}}])
        };
        let elements: Vec<Value> = (0..PODS).map(interface).map(element).collect();
        objects.push(object(
            "map",
            json!({"name": name, "type": "ifname", "map": "verdict", "elem": elements}),
        ));
        let asks = json!({"vmap": {"key": {"meta": {"key": key}}, "data": format!("@{name}")}});
        objects.push(object("rule", json!({"chain": name, "expr": [asks]})));
        count += 1;
    }
    (json!({ "nftables": objects }).to_string(), count)
}

fn condition(condition: &If) -> Value {
    let mark = json!({"meta": {"key": "mark"}});
    let is = |left: Value, right: Value| json!({"match": {"op": "==", "left": left, "right": right}});
    match condition {
        If::State(_, states) => {
            json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": states}})
        }
        If::Mark(bits, set) => is(json!({"&": [mark, bits]}), json!(if *set { *bits } else { 0 })),
        If::From(set) => is(
            json!({"payload": {"protocol": "ip", "field": "saddr"}}),
            json!(format!("@{}", set.replace(':', "-"))),
        ),
        If::Protocol(number) => is(json!({"meta": {"key": "l4proto"}}), json!(number)),
        If::TcpPort(port) => is(
            json!({"payload": {"protocol": "tcp", "field": "dport"}}),
            json!(port),
        ),
    }
}

fn action(then: &Then) -> Value {
    let mark = json!({"meta": {"key": "mark"}});
    match then {
        Then::Accept => json!({"accept": null}),
        Then::Drop => json!({"drop": null}),
        Then::Return => json!({"return": null}),
        Then::Jump(chain) => json!({"jump": {"target": format!("filter-{chain}")}}),
        Then::Set(bits) => json!({"mangle": {"key": mark, "value": {"|": [mark, bits]}}}),
        Then::Clear(bits) => json!({"mangle": {"key": mark, "value": {"&": [mark, !bits]}}}),
    }
}

/// Rules, and the sets that are not shown with them.
struct Known {
    rules: Ruleset,
    sets: Sets,
}

impl Known {
    /// Of a packet to the pod that has all policies.
    fn culprits(&self, port: u16) -> Vec<Culprit> {
        let interface = interface(0);
        let packet = Asked {
            src: members(POLICIES - 1).next().expect("a member").into(),
            dst: Ipv4Addr::new(10, 244, 120, 67).into(),
            proto: 6,
            ports: Some((Some(40_000), port)),
            icmp: None,
            input: Device::Is("tunl0"),
            output: Device::Is(&interface),
            states: States::OPENING,
            is_from_there: false,
            local: &[],
        };
        self.rules.culprits(&packet, &[Hook::Forward], &self.sets)
    }
}

/// Packets by their destination port, and the policy that drops them.
const PACKETS: [(&str, u16, Option<u16>); 3] = [
    ("the first policy", denied(0), Some(0)),
    ("the last policy", denied(POLICIES - 1), Some(POLICIES - 1)),
    ("nobody", allowed(0), None),
];

/// What is measured is what finds the right policy.
fn assert_right(known: &Known) {
    for (who, port, policy) in PACKETS {
        let found = known.culprits(port);
        let names: Vec<String> = found.iter().map(ToString::to_string).collect();
        let expected = policy.map(|policy| format!("policy default/policy-{policy} (ingress)"));
        assert_eq!(names, Vec::from_iter(expected), "{who}");
    }
}

/// What the heap holds of `known`, and what it was read from.
fn print_heap(name: &str, text: usize, count: usize, read: impl FnOnce() -> Known) -> Known {
    let before = heap();
    let known = read();
    let bytes = heap() - before;
    println!(
        "{name}: {count} rules in {:.1} MiB of text; heap {:.1} MiB with the sets of {POLICIES} policies",
        mebibytes(text),
        mebibytes(bytes),
    );
    known
}

fn main() {
    let rules = Rules::of_node();
    let (iptables, count) = saved(&rules);
    let (nft, count_of_nft) = listed(&rules);
    let sets = saved_sets();
    drop(rules);
    let kept = compact_nft(&nft).expect("a list");
    let of_iptables = print_heap("iptables-save", iptables.len(), count, || Known {
        rules: Ruleset::parse(&iptables),
        sets: Sets::parse(&sets),
    });
    let of_nft = print_heap("nft -j", nft.len(), count_of_nft, || Known {
        rules: Ruleset::parse_nft(&kept, false),
        sets: Sets::default(),
    });
    let both = [("iptables-save", &of_iptables), ("nft -j", &of_nft)];
    for (_, known) in both {
        assert_right(known);
    }

    let mut criterion = Criterion::default().configure_from_args().sample_size(20);
    let mut group = criterion.benchmark_group("read");
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("iptables-save", |bencher| {
        bencher.iter(|| Ruleset::parse(black_box(&iptables)));
    });
    group.bench_function("ipset save", |bencher| {
        bencher.iter(|| Sets::parse(black_box(&sets)));
    });
    group.throughput(Throughput::Elements(count_of_nft as u64));
    group.bench_function("nft -j, what is kept of it", |bencher| {
        bencher.iter(|| compact_nft(black_box(&nft)).expect("a list"));
    });
    group.bench_function("nft -j, rules and sets", |bencher| {
        bencher.iter(|| Ruleset::parse_nft(black_box(&kept), false));
    });
    group.finish();
    let mut group = criterion.benchmark_group("culprits of one drop");
    for (name, known) in both {
        for (who, port, _) in PACKETS {
            group.bench_function(format!("{name}, {who}"), |bencher| {
                bencher.iter(|| known.culprits(black_box(port)));
            });
        }
    }
    group.finish();
    criterion.final_summary();
}
