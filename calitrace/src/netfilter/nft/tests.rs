//! Rules of nftables in many forms, and packets that they drop.

use std::fmt::Write as _;

use crate::netfilter::{Asked, Cause, Culprit, Device, Direction, Hook, Ruleset, Sets, States, compact_nft};

/// Tables of others as `nft -j -n -s list ruleset` (1.0.6) wrote them: kube-proxy's, that of a distribution's firewall, and
/// Calico's for IPv6.
const OTHERS: &str = include_str!("others.json");

fn packet<'a>(src: &str, dst: &str, proto: u8, ports: Option<(u16, u16)>) -> Asked<'a> {
    Asked {
        src: src.parse().unwrap(),
        dst: dst.parse().unwrap(),
        proto,
        ports: ports.map(|(source, destination)| (Some(source), destination)),
        icmp: None,
        input: Device::Is("eth0"),
        output: Device::Is("cali1"),
        states: States(States::NEW),
        is_from_there: false,
        local: &[],
    }
}

fn udp<'a>(src: &str, port: u16) -> Asked<'a> {
    packet(src, "10.244.120.67", 17, Some((40_000, port)))
}

fn culprits(packet: &Asked<'_>, hook: Hook) -> Vec<Culprit> {
    let text = compact_nft(OTHERS).unwrap();
    let rules = Ruleset::parse_nft(&text, packet.src.is_ipv6());
    rules.culprits(packet, &[hook], &Sets::default())
}

/// The rules that may have dropped it, with their tables.
fn said(packet: &Asked<'_>, hook: Hook) -> Vec<String> {
    let said = culprits(packet, hook);
    said.iter().map(ToString::to_string).collect()
}

/// Rules that are written here: of each, its JSON.
fn dropped_by(expressions: &str, packet: &Asked<'_>) -> usize {
    let text = format!(
        "{{\"chain\":{{\"family\":\"ip\",\"table\":\"t\",\"name\":\"f\",\"type\":\"filter\",\"hook\":\"forward\",\"prio\":0}}}}\n\
         {{\"rule\":{{\"family\":\"ip\",\"table\":\"t\",\"chain\":\"f\",\"expr\":[{expressions}]}}}}\n"
    );
    let rules = Ruleset::parse_nft(&text, false);
    rules.culprits(packet, &[Hook::Forward], &Sets::default()).len()
}

const FORWARD: Hook = Hook::Forward;

#[test]
fn what_only_translates_is_left_out_and_what_changes_too() {
    let text = compact_nft(OTHERS).unwrap();
    for gone in [
        "service-CDGG",
        "service-ips",
        "nat-prerouting",
        "counter",
        "handle",
        "metainfo",
    ] {
        assert!(!text.contains(gone), "{gone}");
    }
    for kept in [
        "no-endpoint-services",
        "reject-chain",
        "\"@guests\"",
        "192.168.0.9",
    ] {
        assert!(text.contains(kept), "{kept}");
    }
    assert!(text.lines().all(|line| line.starts_with('{')), "{text}");
    // A table that only translates.
    let list = r#"{"nftables": [{"metainfo": {"json_schema_version": 1}}, {"table": {"family": "ip", "name": "n", "handle": 1}},
        {"chain": {"family": "ip", "table": "n", "name": "p", "handle": 1, "type": "nat", "hook": "prerouting", "prio": -100, "policy": "accept"}},
        {"rule": {"family": "ip", "table": "n", "chain": "p", "handle": 2, "expr": [{"drop": null}]}}]}"#;
    assert_eq!(compact_nft(list).unwrap(), "");
    assert!(compact_nft("Error: no such table").is_err());
}

#[test]
fn services_without_end_points_reject() {
    let asked = packet("10.244.205.193", "10.96.0.20", 6, Some((40_000, 80)));
    let found = culprits(&asked, FORWARD);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        found[0].to_string(),
        "not Calico: `reject with icmp` in table ip kube-proxy"
    );
    assert!(found[0].rejects);
    let other_port = Asked {
        ports: Some((Some(40_000), 8081)),
        ..asked
    };
    assert_eq!(
        said(&other_port, FORWARD),
        [
            "not Calico: `ip daddr @cluster-ips reject with icmp comment \"Reject traffic to invalid ports of ClusterIPs\"` \
             in table ip kube-proxy"
        ]
    );
    let known = Asked {
        states: States(States::ESTABLISHED),
        ..other_port
    };
    assert!(said(&known, FORWARD).is_empty());
}

#[test]
fn rules_for_both_families() {
    let ipv6 = packet("fd00::1", "fd00::2", 17, Some((1, 2)));
    assert_eq!(
        said(&ipv6, FORWARD),
        ["not Calico: `ip6 saddr fd00::/8 drop` in table inet filter"]
    );
    // Neighbours are found by ICMPv6; the same type of ICMP is something else.
    let solicit = Asked {
        icmp: Some((135, 0)),
        ..packet("2001:db8::1", "2001:db8::2", 58, None)
    };
    assert!(said(&solicit, Hook::Input).is_empty());
    let policy = ["the policy of chain input in table inet filter"];
    let other = Asked {
        icmp: Some((130, 0)),
        ..solicit
    };
    assert_eq!(said(&other, Hook::Input), policy);
    let ipv4 = Asked {
        icmp: Some((135, 0)),
        ..packet("192.0.2.1", "192.0.2.2", 1, None)
    };
    assert_eq!(said(&ipv4, Hook::Input), policy);
}

#[test]
fn policies_of_ipv6_have_names() {
    let from = |src| Asked {
        output: Device::Is("cali6"),
        ..packet(src, "2001:db8::2", 6, Some((1, 2)))
    };
    assert_eq!(
        said(&from("fd00:10:244:1::7"), FORWARD),
        ["policy default/six (ingress)"]
    );
    assert!(said(&from("2001:db8:1::7"), FORWARD).is_empty());
}

#[test]
fn maps_say_what_becomes_of_ports() {
    let to = |port| Asked {
        output: Device::None,
        ..packet("192.0.2.1", "192.0.2.2", 6, Some((40_000, port)))
    };
    assert!(said(&to(22), Hook::Input).is_empty());
    assert_eq!(
        said(&to(23), Hook::Input),
        ["not Calico: `tcp dport vmap @doors` in table inet filter"]
    );
    // By the chain that it leads to, perhaps; and by the policy.
    assert_eq!(
        said(&to(8005), Hook::Input),
        [
            "not Calico: `meta l4proto 6 {\"ct count\":{\"inv\":true,\"val\":5}} reject with tcp reset` in table inet filter",
            "the policy of chain input in table inet filter"
        ]
    );
    assert!(said(&to(53), Hook::Input).is_empty());
    let lost = Asked {
        states: States(States::INVALID),
        ..to(22)
    };
    assert_eq!(said(&lost, Hook::Input).len(), 1);
    let amid = Asked {
        states: States::ANY,
        ..to(9)
    };
    assert_eq!(
        said(&amid, Hook::Input).len(),
        2,
        "invalid, or new and dropped by the policy"
    );
}

#[test]
fn ports_ranges_and_sets() {
    let tcp = |src, port| packet(src, "10.244.120.67", 6, Some((40_000, port)));
    let guests = ["not Calico: `ip saddr @guests tcp dport != { 80, 443 } drop` in table inet filter"];
    assert_eq!(said(&tcp("172.20.1.1", 22), FORWARD), guests);
    assert_eq!(said(&tcp("192.168.0.9", 22), FORWARD), guests);
    assert!(said(&tcp("172.20.1.1", 443), FORWARD).is_empty());
    assert!(said(&tcp("192.168.0.10", 22), FORWARD).is_empty());
    assert!(said(&udp("172.20.1.1", 22), FORWARD).is_empty(), "it is no TCP");
    let pairs = ["not Calico: `ip saddr . tcp dport @pairs drop` in table inet filter"];
    assert_eq!(said(&tcp("10.5.5.5", 85), FORWARD), pairs);
    assert_eq!(said(&tcp("10.1.0.1", 443), FORWARD), pairs);
    assert!(said(&tcp("10.1.0.2", 443), FORWARD).is_empty());
    assert_eq!(
        said(&udp("198.51.100.1", 60_001), FORWARD),
        ["not Calico: `udp dport > 60000 drop` in table inet filter"]
    );
    assert!(said(&udp("198.51.100.1", 60_000), FORWARD).is_empty());
    assert_eq!(said(&udp("198.51.100.1", 510), FORWARD).len(), 1);
    assert!(said(&udp("198.51.100.1", 511), FORWARD).is_empty());
    assert_eq!(said(&udp("10.9.0.5", 511), FORWARD).len(), 1);
    assert!(said(&udp("10.9.0.6", 511), FORWARD).is_empty());
    let last_fragment = Asked {
        ports: None,
        ..udp("10.9.0.5", 0)
    };
    assert!(
        said(&last_fragment, FORWARD).len() > 2,
        "any of those that ask for ports"
    );
}

#[test]
fn what_packets_put_into_sets_is_not_known() {
    assert_eq!(
        culprits(&udp("198.51.100.1", 4444), FORWARD).len(),
        1,
        "over its limit, or not"
    );
    assert!(culprits(&udp("198.51.100.1", 4445), FORWARD).is_empty());
    let text = r#"{"set":{"family":"ip","table":"t","name":"s","type":"ipv4_addr","flags":["timeout"],"elem":["10.0.0.1"]}}
{"chain":{"family":"ip","table":"t","name":"f","type":"filter","hook":"forward","prio":0}}
{"rule":{"family":"ip","table":"t","chain":"f","expr":[{"match":{"op":"!=","left":{"payload":{"protocol":"ip","field":"saddr"}},"right":"@s"}},{"drop":null}]}}"#;
    let dropped = |text: &str| {
        let rules = Ruleset::parse_nft(text, false);
        let packet = udp("10.0.0.1", 53);
        rules.culprits(&packet, &[FORWARD], &Sets::default()).len()
    };
    assert_eq!(dropped(text), 1);
    assert_eq!(dropped(&text.replace("timeout", "interval")), 0);
    assert_eq!(
        dropped(&text.replace("\"s\"", "\"other\"")),
        1,
        "a set that is not shown"
    );
}

#[test]
fn marks_go_from_chain_to_chain_by_priority() {
    // Set at priority 10, asked for at 20.
    assert_eq!(
        said(&udp("198.51.100.1", 9999), FORWARD),
        ["not Calico: `meta mark & 255 == 7 udp dport 9999 drop` in table inet filter"]
    );
    let mark = r#"{"meta":{"key":"mark"}}"#;
    let asks = |first: &str, operator: &str, right: &str| {
        let set = format!(r#"{{"mangle":{{"key":{mark},"value":{first}}}}}"#);
        let asked = format!(
            r#"{{"match":{{"op":"{operator}","left":{{"&":[{mark},255]}},"right":{right}}}}},{{"drop":null}}"#
        );
        dropped_by(&format!("{set},{asked}"), &udp("10.0.0.1", 53))
    };
    let seven = format!(r#"{{"|":[{{"&":[{mark},4294967040]}},7]}}"#);
    assert_eq!((asks(&seven, "==", "7"), asks(&seven, "!=", "7")), (1, 0));
    let six = format!(r#"{{"^":[{seven},1]}}"#);
    assert_eq!((asks(&six, "==", "7"), asks(&six, "==", "6")), (0, 1));
    assert_eq!((asks("5", "==", "5"), asks("5", "==", "6")), (1, 0));
    let connection = r#"{"ct":{"key":"mark"}}"#;
    assert_eq!((asks(connection, "==", "5"), asks(connection, "!=", "5")), (1, 1));
}

#[test]
fn devices_and_their_beginnings() {
    let by = |output| Asked {
        output,
        ..packet("198.51.100.1", "198.51.100.2", 1, None)
    };
    let dropped = ["not Calico: `oifname { eth1, wg* } log prefix \"wg: \" drop` in table inet filter"];
    assert_eq!(said(&by(Device::Is("eth1")), FORWARD), dropped);
    assert_eq!(said(&by(Device::Is("wg0")), FORWARD), dropped);
    assert_eq!(said(&by(Device::Unknown), FORWARD), dropped);
    assert!(said(&by(Device::Is("eth10")), FORWARD).is_empty());
    assert!(said(&by(Device::Is("w")), FORWARD).is_empty());
    let not = |device| {
        let rule = r#"{"match":{"op":"!=","left":{"meta":{"key":"iifname"}},"right":"eth*"}},{"drop":null}"#;
        let packet = Asked {
            input: device,
            ..udp("10.0.0.1", 53)
        };
        dropped_by(rule, &packet)
    };
    assert_eq!(
        (not(Device::Is("eth0")), not(Device::Is("lo")), not(Device::None)),
        (0, 1, 1)
    );
}

#[test]
fn conditions_in_other_words() {
    let local = ["10.244.120.67".parse().unwrap()];
    let here = Asked {
        is_from_there: false,
        local: &local,
        ..udp("10.0.0.1", 53)
    };
    let is = |left: &str, operator: &str, right: &str| {
        dropped_by(
            &format!(r#"{{"match":{{"op":"{operator}","left":{left},"right":{right}}}}},{{"drop":null}}"#),
            &here,
        ) == 1
    };
    let fib = r#"{"fib":{"result":"type","flags":["daddr"]}}"#;
    assert!(is(fib, "==", "2") && is(fib, "==", "\"local\"") && !is(fib, "!=", "2"));
    assert!(is(fib, "==", r#"{"set":[3,5]}"#), "not understood");
    let protocol = r#"{"meta":{"key":"l4proto"}}"#;
    assert!(is(protocol, "==", "\"udp\"") && !is(protocol, "==", "6") && is(protocol, "!=", "6"));
    let state = r#"{"ct":{"key":"state"}}"#;
    assert!(is(state, "in", "[8,2]") && !is(state, "in", "1") && !is(state, "!=", "\"new\""));
    assert!(is(state, "!=", "[2,8]"), "not understood");
    let ports = r#"{"concat":[{"payload":{"protocol":"udp","field":"sport"}},{"payload":{"protocol":"udp","field":"dport"}}]}"#;
    assert!(is(ports, "==", r#"{"concat":[40000,53]}"#) && !is(ports, "==", r#"{"concat":[40000,54]}"#));
    assert!(is(
        ports,
        "==",
        r#"{"set":[{"concat":[{"range":[1,50000]},53]}]}"#
    ));
    let address = r#"{"payload":{"protocol":"ip","field":"saddr"}}"#;
    assert!(
        is(address, "==", "\"*\"") && is(address, "<=", "\"10.0.0.1\"") && !is(address, "<", "\"10.0.0.1\"")
    );
    assert!(
        is(r#"{"payload":{"protocol":"ip","field":"ttl"}}"#, "==", "1"),
        "not understood"
    );
    assert!(
        !is(r#"{"payload":{"protocol":"ip6","field":"hoplimit"}}"#, "==", "1"),
        "IPv6's"
    );
}

#[test]
fn statements_in_any_order() {
    let packet = udp("10.0.0.1", 53);
    for (rule, dropped) in [
        (r#"{"accept":null},{"drop":null}"#, 0),
        (r#"{"continue":null},{"drop":null}"#, 1),
        (r#"{"return":null},{"drop":null}"#, 0),
        (r#"{"queue":{"num":1}},{"drop":null}"#, 0),
        (r#"{"xt":{"type":"match","name":"statistic"}},{"drop":null}"#, 1),
        (
            r#"{"xt":{"type":"match","name":"comment"}},{"accept":null},{"drop":null}"#,
            0,
        ),
        (r#"{"log":null},{"notrack":null},{"drop":null}"#, 1),
        (r#""jump {\n drop\n}""#, 1),
        (
            r#"{"vmap":{"key":{"numgen":{"mode":"random","mod":2}},"data":{"set":[[0,{"accept":null}],[1,{"drop":null}]]}}}"#,
            1,
        ),
        (
            r#"{"vmap":{"key":{"payload":{"protocol":"udp","field":"dport"}},"data":{"set":[["*",{"accept":null}],[53,{"drop":null}]]}}}"#,
            1,
        ),
        (
            r#"{"vmap":{"key":{"payload":{"protocol":"udp","field":"dport"}},"data":{"set":[["*",{"drop":null}],[53,{"accept":null}]]}}}"#,
            0,
        ),
        (
            r#"{"vmap":{"key":{"payload":{"protocol":"udp","field":"dport"}},"data":"@nowhere"}}"#,
            0,
        ),
    ] {
        assert_eq!(dropped_by(rule, &packet), dropped, "{rule}");
    }
}

#[test]
fn a_policy_s_name_is_in_its_chain_s_where_the_comment_is_cut_off() {
    let name = format!("default/{}", "x".repeat(100));
    let chain = format!("filter-cali-pi-knp/{name}");
    let comment = format!("cali:0123456789abcdef; KubernetesNetworkPolicy {name} ingress");
    let text = format!(
        r#"{{"chain":{{"family":"ip","table":"calico","name":"filter-FORWARD","type":"filter","hook":"forward","prio":0}}}}
{{"rule":{{"family":"ip","table":"calico","chain":"filter-FORWARD","expr":[{{"jump":{{"target":"{chain}"}}}}]}}}}
{{"rule":{{"family":"ip","table":"calico","chain":"{chain}","comment":"{}","expr":[{{"drop":null}}]}}}}"#,
        &comment[..128]
    );
    let found = Ruleset::parse_nft(&text, false).culprits(&udp("10.0.0.1", 53), &[FORWARD], &Sets::default());
    let Cause::Policy { policy, .. } = &found[0].cause else {
        panic!("{found:?}")
    };
    assert_eq!(policy.name, name);
    assert_eq!(policy.kind.as_deref(), Some("KubernetesNetworkPolicy"));
}

#[test]
fn the_end_of_a_tier_with_a_long_name() {
    let tier = "t".repeat(80);
    let start = format!("cali:0123456789abcdef; Start of tier {tier}");
    let end = format!("cali:0123456789abcdef; End of tier {tier}. Drop if no policies passed packet");
    let text = format!(
        r#"{{"chain":{{"family":"ip","table":"calico","name":"filter-FORWARD","type":"filter","hook":"forward","prio":0}}}}
{{"rule":{{"family":"ip","table":"calico","chain":"filter-FORWARD","expr":[{{"goto":{{"target":"filter-cali-fw-cali1"}}}}]}}}}
{{"rule":{{"family":"ip","table":"calico","chain":"filter-cali-fw-cali1","comment":"{start}","expr":[{{"continue":null}}]}}}}
{{"rule":{{"family":"ip","table":"calico","chain":"filter-cali-fw-cali1","comment":"{}","expr":[{{"drop":null}}]}}}}"#,
        &end[..128]
    );
    let found = Ruleset::parse_nft(&text, false).culprits(&udp("10.0.0.1", 53), &[FORWARD], &Sets::default());
    let expected = Cause::EndOfTier {
        tier,
        direction: Some(Direction::Egress),
    };
    assert_eq!(found[0].cause, expected);
}

#[test]
fn hostile_objects_are_read_to_their_end() {
    let mut text = "{}\n[]\n{\"rule\":{}}\nnothing\n".to_owned();
    let chain =
        r#"{"chain":{"family":"ip","table":"t","name":"c0","type":"filter","hook":"forward","prio":0}}"#;
    writeln!(text, "{chain}").unwrap();
    for chain in 0..60 {
        let rule = format!(
            r#"{{"rule":{{"family":"ip","table":"t","chain":"c{chain}","expr":[{{"limit":{{}}}},{{"jump":{{"target":"c{}"}}}}]}}}}"#,
            chain + 1
        );
        writeln!(text, "{rule}\n{rule}").unwrap();
    }
    let itself = r#"{"rule":{"family":"ip","table":"t","chain":"c60","expr":[{"vmap":{"key":1,"data":{"set":[[1,{"goto":{"target":"c0"}}],[2],[]]}}}]}}"#;
    writeln!(text, "{itself}").unwrap();
    let found = Ruleset::parse_nft(&text, false).culprits(&udp("10.0.0.1", 53), &[FORWARD], &Sets::default());
    assert!(found.is_empty(), "{found:?}");
}
