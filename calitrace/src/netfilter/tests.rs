//! Rules as Felix writes them, and packets that they drop.

use std::fmt::Write as _;

use super::*;

/// A node's rules, as `iptables-legacy-save` and `iptables-nft-save` (1.8.9) wrote them: policies from before and after
/// v3.32, flow logs on and off.
const SAVED: [&str; 2] = [include_str!("felix-legacy.save"), include_str!("felix-nft.save")];

/// The same in Calico's nftables mode, as `nft -j -n -s list table ip calico` (1.0.6) wrote it, with address sets, comments in
/// Felix' form, and a policy with an annotation.
const LISTED: &str = include_str!("felix-native.json");

const POD: &str = "10.244.120.67";
const OTHER: &str = "10.244.205.193";

/// A datagram from a pod of another node to the pod behind `output`.
fn datagram(output: &str, port: u16) -> Asked<'_> {
    Asked {
        src: OTHER.parse().unwrap(),
        dst: POD.parse().unwrap(),
        proto: 17,
        ports: Some((Some(40_000), port)),
        icmp: None,
        input: Device::Is("tunl0"),
        output: Device::Is(output),
        states: States::OPENING,
        is_from_there: false,
        local: &[],
    }
}

fn said(packet: &Asked<'_>, hooks: &[Hook]) -> Vec<String> {
    let native = Ruleset::parse_nft(&compact_nft(LISTED).unwrap(), false);
    let [legacy, nft] = SAVED.map(Ruleset::parse);
    let [legacy, nft, native] = [legacy, nft, native].map(|rules| {
        let culprits = rules.culprits(packet, hooks, &Sets::default());
        culprits.iter().map(ToString::to_string).collect::<Vec<_>>()
    });
    assert_eq!(legacy, nft);
    // Maps have no order.
    let [mut sorted, mut native] = [legacy.clone(), native];
    sorted.sort();
    native.sort();
    assert_eq!(sorted, native);
    legacy
}

#[test]
fn each_pod_s_policy_is_named() {
    let cases = [
        ("cali11111111111", "policy default/deny-all (ingress)"),
        (
            "cali22222222222",
            "policy default/deny-frontend (ingress), rule 1",
        ),
        ("cali33333333333", "policy default/old-deny (ingress)"),
        (
            "cali44444444444",
            "end of tier security (ingress): no policy of it allows the packet",
        ),
        ("cali55555555555", "no profile (ingress) allows the packet"),
        ("cali66666666666", "the endpoint is disabled"),
        ("cali77777777777", "Felix has no rules for the interface (yet)"),
    ];
    for (interface, sentence) in cases {
        assert_eq!(
            said(&datagram(interface, 53), &[Hook::Forward]),
            [sentence],
            "{interface}"
        );
    }
}

#[test]
fn what_a_policy_allows_is_not_dropped_by_it() {
    assert!(said(&datagram("cali22222222222", 5353), &[Hook::Forward]).is_empty());
}

#[test]
fn a_segment_amid_a_connection_may_be_invalid() {
    let segment = Asked {
        proto: 6,
        states: States::ANY,
        ..datagram("cali11111111111", 80)
    };
    assert_eq!(
        said(&segment, &[Hook::Forward]),
        [
            "conntrack calls the packet INVALID",
            "policy default/deny-all (ingress)"
        ]
    );
}

#[test]
fn where_the_interface_is_not_known_it_is_one_of_several() {
    let packet = Asked {
        output: Device::Unknown,
        ..datagram("", 53)
    };
    let said = said(&packet, &[Hook::Forward]);
    assert!(said.len() > 4, "{said:?}");
    assert!(
        said.contains(&"policy default/deny-all (ingress)".to_owned()),
        "{said:?}"
    );
}

#[test]
fn a_wrong_source_fails_before_routing() {
    let packet = Asked {
        input: Device::Is("cali11111111111"),
        output: Device::Unknown,
        ..datagram("", 53)
    };
    assert_eq!(
        said(&packet, &[Hook::Prerouting]),
        [
            "the node has no route to the source address through the interface it came by: not the sender's address, or its route \
          is missing (reverse path filter)"
        ]
    );
    // Of what comes from elsewhere Calico asks nothing there.
    assert!(said(&datagram("", 53), &[Hook::Prerouting]).is_empty());
}

#[test]
fn a_tunnel_s_outer_packet_from_a_stranger() {
    let local = ["192.168.49.2".parse().unwrap()];
    let outer = |src: &str| Asked {
        src: src.parse().unwrap(),
        dst: local[0],
        proto: 4,
        ports: None,
        icmp: None,
        input: Device::Is("eth0"),
        output: Device::None,
        states: States::OPENING,
        is_from_there: false,
        local: &local,
    };
    assert_eq!(
        said(&outer("192.168.49.9"), &[Hook::Input]),
        ["encapsulated by a host that is not known as a node of the cluster"]
    );
    assert!(said(&outer("192.168.49.3"), &[Hook::Input]).is_empty());
}

/// Of its ports only the tunnel's own is known, and Felix says which that is.
#[test]
fn an_outer_packet_of_vxlan_has_the_port_that_felix_names() {
    let local = ["192.168.49.2".parse().unwrap()];
    let rules = |ports: &str| {
        let rule = |source, comment, target| {
            format!(
                "-A cali-INPUT {source}-p udp -m comment --comment \"{comment}\" -m multiport --dports {ports} -m addrtype \
                 --dst-type LOCAL -j {target}\n"
            )
        };
        Ruleset::parse(&format!(
            "*filter\n:INPUT ACCEPT [0:0]\n:cali-INPUT - [0:0]\n-A INPUT -j cali-INPUT\n{}{}COMMIT\n",
            rule(
                "-s 192.168.49.3/32 ",
                "Allow IPv4 VXLAN packets from allowed hosts",
                "ACCEPT"
            ),
            rule("", "Drop IPv4 VXLAN packets from non-allowed hosts", "DROP"),
        ))
    };
    let outer = |src: &str, port: Option<u16>| Asked {
        src: src.parse().unwrap(),
        dst: local[0],
        ports: port.map(|port| (None, port)),
        input: Device::Is("eth0"),
        output: Device::None,
        local: &local,
        ..datagram("", 0)
    };
    for port in ["4789", "8472"] {
        let rules = rules(port);
        let known = rules.vxlan_port();
        assert_eq!(known.map(|port| port.to_string()).as_deref(), Some(port));
        let of = |src, port| rules.culprits(&outer(src, port), &[Hook::Input], &Sets::default());
        assert_eq!(of("192.168.49.3", known), []);
        assert_eq!(of("192.168.49.9", known)[0].cause, Cause::UnknownTunnelPeer);
        assert_eq!(
            of("192.168.49.3", None).len(),
            1,
            "without the port both may hold"
        );
    }
    assert_eq!(rules("4789,8472").vxlan_port(), None);
    assert_eq!(Ruleset::default().vxlan_port(), None);
    // No rule of Felix'.
    let own = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m udp --dport 8472 -m comment --comment \"no VXLAN\" -j \
               DROP\nCOMMIT\n";
    assert_eq!(Ruleset::parse(own).vxlan_port(), None);
    // Where it asks for a source port, nobody knows.
    let asks =
        "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m udp --sport 53 --dport 4789 -j DROP\nCOMMIT\n";
    let asked = outer("192.168.49.3", Some(4789));
    assert_eq!(
        Ruleset::parse(asks)
            .culprits(&asked, &[Hook::Input], &Sets::default())
            .len(),
        1
    );
}

#[test]
fn rules_of_others_are_quoted() {
    let text = "*filter\n:INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\n\
                [7:80] -A FORWARD -s 10.0.0.0/8 -m comment --comment \"a \\\"b\\\" c\" -m ttl --ttl-eq 5 -j DROP\nCOMMIT\n";
    let rules = Ruleset::parse(text);
    let packet = datagram("cali11111111111", 53);
    let culprits = rules.culprits(&packet, &[Hook::Forward], &Sets::default());
    assert_eq!(culprits.len(), 1);
    assert!(matches!(&culprits[0].cause, Cause::Foreign { rule } if rule.contains("--ttl-eq 5")));
    let culprits = rules.culprits(&packet, &[Hook::Input], &Sets::default());
    assert_eq!(
        culprits[0].to_string(),
        "the policy of chain INPUT in table filter"
    );
}

#[test]
fn hostile_text_is_read_to_its_end() {
    let mut deep = String::new();
    for chain in 0..200 {
        writeln!(deep, ":C{chain} -\n-A C{chain} -j C{}", chain + 1).unwrap();
    }
    let text =
        format!("*filter\n:FORWARD ACCEPT\n{deep}-A FORWARD -j C0\n-A\n-A FORWARD -j\n-A FORWARD ! -s\n\"");
    let culprits = Ruleset::parse(&text).culprits(&datagram("x", 1), &[Hook::Forward], &Sets::default());
    assert!(culprits.is_empty(), "{culprits:?}");
    // Each chain leads to the next one twice.
    let mut wide = String::new();
    for chain in 0..60 {
        let next = format!("-A C{chain} -m time -j C{}\n", chain + 1);
        writeln!(wide, ":C{chain} -\n{next}{next}").unwrap();
    }
    let text = format!("*filter\n:FORWARD ACCEPT\n{wide}-A FORWARD -j C0\n");
    let culprits = Ruleset::parse(&text).culprits(&datagram("x", 1), &[Hook::Forward], &Sets::default());
    assert!(culprits.is_empty(), "{culprits:?}");
}

/// Felix's chain for `natOutgoing`, as 3.34 writes it with and without a range of ports, and an exception before it.
#[test]
fn packets_to_outside_the_pools_are_masqueraded() {
    let sets = Sets::parse(
        "create cali40masq-ipam-pools hash:net family inet\nadd cali40masq-ipam-pools 10.244.0.0/16\n\
         create cali40all-ipam-pools hash:net family inet\nadd cali40all-ipam-pools 10.244.0.0/16\n",
    );
    let rule = "-A cali-nat-outgoing -m comment --comment \"cali:flqWnvo8yq4ULQLa\" -m set --match-set cali40masq-ipam-pools src \
                -m set ! --match-set cali40all-ipam-pools dst -j MASQUERADE --random-fully\n";
    let ask = |rules: &str, dst: &str, sets: &Sets| {
        let packet = Asked {
            dst: dst.parse().unwrap(),
            input: Device::None,
            ..datagram("eth0", 53)
        };
        let text = format!("*nat\n:cali-nat-outgoing - [0:0]\n{rules}COMMIT\n");
        Ruleset::parse(&text).masquerades(&packet, sets)
    };
    assert_eq!(ask(rule, "8.8.8.8", &sets), Some(true));
    assert_eq!(ask(rule, "10.244.7.7", &sets), Some(false));
    assert_eq!(
        ask(rule, "8.8.8.8", &Sets::default()),
        None,
        "whose members are not known"
    );
    assert_eq!(ask("", "8.8.8.8", &sets), Some(false));
    let excepted = format!("-A cali-nat-outgoing -d 8.8.0.0/16 -j RETURN\n{rule}");
    assert_eq!(ask(&excepted, "8.8.8.8", &sets), Some(false));
    assert_eq!(ask(&excepted, "9.9.9.9", &sets), Some(true));
    assert_eq!(
        Ruleset::parse("*filter\nCOMMIT\n").masquerades(&datagram("eth0", 53), &sets),
        None
    );
}
