//! Functions of the kernel as hooks: by trampolines, and by kprobes, with the same outcome. Needs root and kprobes.

#[expect(
    dead_code,
    clippy::print_stdout,
    reason = "shared with the tests of the kernel side, which use all of it"
)]
#[path = "../kernel/net.rs"]
mod net;

use std::{
    cell::RefCell,
    collections::BTreeSet,
    path::Path,
    process::{Command, ExitCode},
};

use calitrace::{
    event::{Detail, Hook, NetfilterVerdict, Observation, Transport},
    kernel::{Config, Means, Probes},
};
use calitrace_tests::{Need, Test, command, harness, test};
use net::{DEVICE, End, LEFT, Net, RIGHT, Watch, run};

/// A test by its name, with trampolines where the kernel has them, and by kprobes alone. It panics where it fails.
macro_rules! twice {
    ($name:literal, $test:ident) => {
        twice!($name, $test, &[Need::Kprobes])
    };
    ($name:literal, $test:ident, $needs:expr) => {
        [
            test(concat!("trampolines::", $name), || {
                $test(Probes::Cheapest);
                Ok(())
            })
            .needs($needs),
            test(concat!("kprobes::", $name), || {
                $test(Probes::Kprobes);
                Ok(())
            })
            .needs($needs),
        ]
    };
}

const TESTS: [[Test; 2]; 7] = [
    twice!("what_can_be_attached_is", attached),
    twice!("netfilter_s_drop_is_told_with_its_hook", netfilter),
    twice!("an_icmp_error_is_told_with_what_it_answers", icmp),
    twice!("a_translation_is_announced", translation),
    twice!("a_clone_is_known_by_its_new_address", clone),
    twice!("a_rule_that_logs_is_told_with_its_prefix", logs),
    twice!(
        "a_module_that_comes_later_is_seen",
        late_module,
        &[Need::Kprobes, Need::Guest]
    ),
];

fn main() -> ExitCode {
    harness::run_singly(TESTS.as_flattened().iter().copied())
}

/// What a pod on the left sends to one on the right is recorded, and so is what the functions see of it.
fn watch(net: &Net, probes: Probes) -> Watch {
    // Their modules, and so their symbols, come with the first rule.
    net.right.exec("iptables -t nat -A PREROUTING -d 172.30.0.1 -p udp --dport 7301 -j DNAT --to-destination 10.99.0.2:7302");
    let mut watch = Watch::new(&Config {
        functions: probes,
        ..Config::default()
    });
    watch
        .kernel
        .set_scope(&["10.99.0.0/24".parse().unwrap()])
        .unwrap();
    watch.attach(&net.left, Hook::WorkloadEgress);
    watch.attach(&net.right, Hook::WorkloadIngress);
    watch.kernel.attach_global().unwrap();
    watch.kernel.attach_functions().unwrap();
    watch
}

fn port(seen: &Observation) -> Option<u16> {
    match seen.packet.transport {
        Transport::Udp { dst_port, .. } => Some(dst_port),
        _ => None,
    }
}

fn attached(probes: Probes) {
    let net = Net::new();
    let mut watch = watch(&net, probes);
    let functions = watch.kernel.functions();
    let by = |means| -> BTreeSet<Hook> {
        functions
            .iter()
            .filter(|(_, by)| **by == means)
            .map(|(hook, _)| *hook)
            .collect()
    };
    // In the kernel itself on every Debian kernel; iptunnel_xmit has more arguments than trampolines before 6.6 take.
    let mut everywhere = vec![
        Hook::IpForward,
        Hook::NfHookSlow,
        Hook::SkbClone,
        Hook::PskbExpandHead,
    ];
    let trampoline = by(Means::Trampoline);
    let kprobe = by(Means::Kprobe);
    if probes == Probes::Cheapest {
        assert!(
            everywhere.iter().all(|hook| trampoline.contains(hook)),
            "{functions:?}"
        );
    } else {
        everywhere.push(Hook::IptunnelXmit);
        assert!(
            everywhere.iter().all(|hook| kprobe.contains(hook)),
            "{functions:?}"
        );
        assert!(trampoline.is_empty(), "{functions:?}");
    }
    for hook in [Hook::IcmpSend, Hook::Icmp6Send, Hook::Ip6Forward] {
        assert!(kprobe.contains(&hook), "{functions:?}");
    }
    for hook in Hook::ALL.into_iter().filter(|hook| hook.is_function()) {
        let missing = watch.kernel.hooks()[hook as usize].missing.clone();
        assert_eq!(
            functions.contains_key(&hook),
            missing.is_none(),
            "{hook:?}: {missing:?}"
        );
    }
    watch.finish();
}

fn netfilter(probes: Probes) {
    let net = Net::new();
    net.right.exec("iptables -A INPUT -p udp --dport 7300 -j DROP");
    let mut watch = watch(&net, probes);
    let from = net.left.udp(LEFT, 0);
    from.send_to(b"unwanted", (RIGHT, 7300)).unwrap();
    let judged = watch.wait(1, |seen| seen.hook == Hook::NfHookSlow);
    let drops = watch.wait(1, |seen| seen.hook == Hook::KfreeSkb && port(seen) == Some(7300));
    let [judged, drop] = [&judged[0], &drops[0]];
    assert_eq!(judged.skb, drop.skb);
    assert_eq!(judged.netns, net.right.ns.inode());
    assert!(judged.time >= drop.time, "{judged:?} {drop:?}");
    let Some(Detail::Judged {
        verdict,
        input,
        output,
        ..
    }) = judged.detail
    else {
        panic!("{judged:?}");
    };
    assert_eq!(verdict, NetfilterVerdict::Dropped);
    assert_eq!((input, output), (net.right.ifindex, 0));
    assert_eq!(judged.detail.as_ref().unwrap().netfilter_hook(), Some("INPUT"));
    // What is accepted is counted, and not told.
    let to = net.right.udp(RIGHT, 7303);
    from.send_to(b"wanted", (RIGHT, 7303)).unwrap();
    to.recv(&mut [0; 16]).unwrap();
    let seen = watch.finish();
    assert!(
        !seen
            .iter()
            .any(|seen| seen.hook == Hook::NfHookSlow && seen.time > judged.time),
        "{seen:#?}"
    );
    let filtered: u64 = watch
        .kernel
        .counters()
        .unwrap()
        .iter()
        .filter(|count| count.hook == Hook::NfHookSlow)
        .map(|count| count.counters.filtered)
        .sum();
    assert!(filtered > 0);
}

/// Has a tool in a namespace read a text.
fn load(end: &End, tool: &str, text: &str) {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &end.name]).args(tool.split(' '));
    command::run_with_input(&mut command, text).unwrap();
}

fn logs(probes: Probes) {
    let net = Net::new();
    let long = format!("DPI0|np/default/{}", "long".repeat(25));
    let rules = [
        ("iptables-legacy", 7310, "DPI0|np/default/web"),
        ("iptables-nft", 7311, "calico-packet: "),
        // No prefix.
        ("iptables-nft", 7312, ""),
    ];
    for (tool, port, prefix) in rules {
        let rule = format!("*filter\n-A INPUT -p udp --dport {port} -j NFLOG --nflog-group 7");
        let prefix = if prefix.is_empty() {
            String::new()
        } else {
            format!(" --nflog-prefix \"{prefix}\"")
        };
        load(
            &net.right,
            &format!("{tool}-restore --noflush"),
            &format!("{rule}{prefix}\nCOMMIT\n"),
        );
    }
    load(
        &net.right,
        "nft -f -",
        &format!(
            "table ip logs {{\nchain input {{\ntype filter hook input priority 0;\n\
                  udp dport 7313 log prefix \"{long}\" group 7\n}}\n}}\n"
        ),
    );
    let mut watch = watch(&net, probes);
    let from = net.left.udp(LEFT, 0);
    for port in 7310..=7314 {
        let to = net.right.udp(RIGHT, port);
        from.send_to(b"logged", (RIGHT, port)).unwrap();
        to.recv(&mut [0; 16]).unwrap();
    }
    let is_log = |seen: &Observation| matches!(seen.hook, Hook::NflogTg | Hook::NftLogEval);
    let logged = watch.wait(3, is_log);
    let said: Vec<(Option<u16>, Option<&str>)> = logged
        .iter()
        .map(|seen| match &seen.detail {
            Some(Detail::Logged { prefix }) => (port(seen), Some(&**prefix)),
            _ => (port(seen), None),
        })
        .collect();
    assert_eq!(
        said,
        [
            (Some(7310), Some("DPI0|np/default/web")),
            (Some(7311), Some("calico-packet: ")),
            (Some(7313), Some(&long[..63])),
        ]
    );
    assert_eq!(logged[0].hook, Hook::NflogTg);
    assert_eq!(logged[2].hook, Hook::NftLogEval);
    for seen in &logged {
        assert_eq!(
            (seen.netns, seen.ifindex),
            (net.right.ns.inode(), net.right.ifindex)
        );
    }
    // What has no prefix is counted, and not told.
    let seen = watch.finish();
    assert_eq!(seen.iter().filter(|seen| is_log(seen)).count(), 3, "{seen:#?}");
    let filtered: u64 = watch
        .kernel
        .counters()
        .unwrap()
        .iter()
        .filter(|count| matches!(count.hook, Hook::NflogTg | Hook::NftLogEval))
        .map(|count| count.counters.filtered)
        .sum();
    assert_eq!(filtered, 1);
}

fn icmp(probes: Probes) {
    let net = Net::new();
    let mut watch = watch(&net, probes);
    net.left.udp(LEFT, 0).send_to(b"nobody", (RIGHT, 7304)).unwrap();
    let sent = watch.wait(1, |seen| {
        seen.hook == Hook::WorkloadEgress && port(seen) == Some(7304)
    });
    let answered = watch.wait(1, |seen| seen.hook == Hook::IcmpSend);
    assert_eq!(
        answered[0].detail,
        Some(Detail::Answered {
            icmp_type: 3,
            code: 3
        })
    );
    assert_eq!(answered[0].netns, net.right.ns.inode());
    assert_eq!(answered[0].ifindex, net.right.ifindex);
    assert_eq!(answered[0].packet, sent[0].packet);
    watch.finish();
}

fn translation(probes: Probes) {
    let net = Net::new();
    let mut watch = watch(&net, probes);
    let to = net.right.udp(RIGHT, 7302);
    net.left
        .exec(&format!("ip route add 172.30.0.1/32 via {RIGHT} dev {DEVICE}"));
    let from = net.left.udp(LEFT, 0);
    from.send_to(b"service", ("172.30.0.1", 7301)).unwrap();
    to.recv(&mut [0; 16]).unwrap();
    let announced = watch.wait(1, |seen| seen.hook == Hook::NfNatSetupInfo);
    assert_eq!(
        announced[0].detail,
        Some(Detail::Translated {
            destination: true,
            address: RIGHT.into(),
            port: Some(7302),
        })
    );
    let flow = announced[0].packet.flow();
    assert_eq!(flow.src_port, from.local_addr().unwrap().port());
    assert_eq!(
        (flow.proto, flow.src, flow.dst, flow.dst_port),
        (17, LEFT.into(), "172.30.0.1".parse().unwrap(), 7301)
    );
    assert_eq!(announced[0].netns, net.right.ns.inode());
    watch.finish();
}

fn clone(probes: Probes) {
    let net = Net::new();
    let mut watch = watch(&net, probes);
    // A raw socket gets a clone of each packet of its protocol.
    let _raw = net.right.raw(libc::AF_INET, 253);
    net.left
        .raw(libc::AF_INET, 253)
        .send_to(b"twice", (RIGHT, 0))
        .unwrap();
    let arrived = watch.wait(1, |seen| {
        seen.hook == Hook::WorkloadIngress && seen.packet.proto == 253
    });
    // There may be more, as the kernel answers that nobody speaks the protocol: the first is enough.
    let first = RefCell::new(None);
    let clones = watch.wait(1, |seen| {
        seen.hook == Hook::SkbClone
            && seen.skb == arrived[0].skb
            && first.borrow_mut().get_or_insert_with(|| seen.clone()) == seen
    });
    let Some(Detail::Cloned { skb }) = clones[0].detail else {
        panic!("{clones:?}");
    };
    assert_ne!(skb, clones[0].skb);
    assert_eq!(clones[0].packet, arrived[0].packet);
    watch.finish();
}

/// A function of a module that is loaded after observing began is attached to with the next look.
fn late_module(probes: Probes) {
    let net = Net::new();
    if Path::new("/sys/module/vxlan").exists() {
        run("busybox rmmod vxlan");
    }
    let mut watch = watch(&net, probes);
    assert!(!watch.kernel.functions().contains_key(&Hook::VxlanXmit));
    net.left.exec(&format!(
        "ip link add late type vxlan id 5 dstport 4789 dev {DEVICE}"
    ));
    let new = watch.kernel.attach_functions().unwrap();
    assert!(new.contains(&Hook::VxlanXmit), "{new:?}");
    // It was looked for and found once.
    assert!(watch.kernel.attach_functions().unwrap().is_empty());
    watch.finish();
}
