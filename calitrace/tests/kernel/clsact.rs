//! The way of kernels without TCX: filters on a clsact qdisc, beside those of others, and what a killed run leaves.

use std::{net::Ipv4Addr, process::Command, time::Duration};

use calitrace::{
    event::Hook,
    kernel::{AttachmentCheck, Config, Kernel, leftovers},
};
use calitrace_tests::{
    Namespace,
    stand_in::{self, Action, Side},
};

use crate::{
    attaching::attach_in_another_process,
    net::{DEVICE, End, LEFT, Net, RIGHT, Watch, run},
};

const PORT: u16 = 7203;

fn config() -> Config {
    Config {
        tcx: false,
        ..Config::default()
    }
}

fn tc(end: &End, words: &[&str]) -> String {
    let output = Command::new("tc")
        .args(["-n", &end.name])
        .args(words)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn has_qdisc(end: &End) -> bool {
    tc(end, &["qdisc", "show", "dev", DEVICE]).contains("clsact")
}

/// Names of the bpf filters in one direction, in the order they run in.
fn filters(end: &End, direction: &str) -> Vec<String> {
    let text = tc(end, &["filter", "show", "dev", DEVICE, direction]);
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |pair: &[&str]| (pair[0].starts_with("0x")).then(|| pair[1].to_owned());
    words.windows(2).filter_map(after).collect()
}

/// A datagram from the left to this address.
fn send(net: &Net, to: Ipv4Addr) {
    net.left.udp(LEFT, 0).send_to(b"by clsact", (to, PORT)).unwrap();
}

pub(crate) fn a_qdisc_of_ours_goes_with_the_last_filter() {
    let net = Net::new();
    let mut watch = Watch::new(&config());
    watch.attach(&net.left, Hook::WorkloadEgress);
    watch.attach(&net.left, Hook::WorkloadIngress);
    watch.attach(&net.right, Hook::WorkloadIngress);
    // A second run on the same interface has filters of its own, and outlives the first, whose qdisc it inherits.
    let mut second = Kernel::load(&config()).unwrap();
    second
        .attach_tc(&net.left.ns, DEVICE, net.left.ifindex, Hook::WorkloadEgress)
        .unwrap();
    assert_eq!(filters(&net.left, "egress"), ["calitrace_workload_egress"; 2]);
    let all = watch.kernel.check(|netns, error| panic!("{netns}: {error:#}"));
    assert_eq!(all.len(), 3);
    for checked in all {
        assert_eq!(checked.state, AttachmentCheck::InPlace, "{checked:?}");
        assert!(checked.others.is_empty(), "{checked:?}");
    }
    send(&net, RIGHT);
    let (left, right) = watch.pair(|seen| seen.packet.length == 28 + 9 && seen.packet.src == LEFT);
    assert_eq!(left.packet, right.packet);
    watch.finish();
    assert!(has_qdisc(&net.left), "the second still needs it");
    assert!(!has_qdisc(&net.right));
    second.detach_all().unwrap();
    assert!(!has_qdisc(&net.left), "{}", tc(&net.left, &["qdisc"]));
}

pub(crate) fn filters_of_others_before_and_after_ours_run_and_stay() {
    let net = Net::new();
    let right = &net.right;
    let (before, after) = (Ipv4Addr::new(10, 99, 0, 3), Ipv4Addr::new(10, 99, 0, 4));
    for address in [before, after] {
        run(&format!(
            "ip -n {} addr add {address}/24 dev {DEVICE}",
            right.name
        ));
    }
    let namespace = Namespace::open(&right.name).unwrap();
    run(&format!("tc -n {} qdisc add dev {DEVICE} clsact", right.name));
    let shoot = |address, priority| {
        stand_in::attach_filter(
            &namespace,
            DEVICE,
            Side::Ingress,
            address,
            Action::Shoot,
            priority,
        )
        .unwrap();
    };
    // At the very first priority, and at one that the kernel chooses, as for Felix.
    shoot(before, 1);
    shoot(after, 0);
    let mut watch = Watch::new(&config());
    watch.attach(right, Hook::WorkloadIngress);
    let order = [stand_in::NAME, "calitrace_workload_ingress", stand_in::NAME];
    assert_eq!(filters(right, "ingress"), order);
    let [checked] = &watch.kernel.check(|netns, error| panic!("{netns}: {error:#}"))[..] else {
        panic!("one is attached")
    };
    assert_eq!(
        checked.state,
        AttachmentCheck::Displaced,
        "nothing comes before the first"
    );
    assert_eq!(checked.others, [stand_in::NAME; 2]);

    let receiver = right.udp(Ipv4Addr::UNSPECIFIED, PORT);
    receiver
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    for address in [before, after, RIGHT] {
        // The first packet waits for ARP; all go the same way, so the last is the last.
        net.left.exec(&format!("ping -q -c 1 -W 1 {RIGHT}"));
        send(&net, address);
    }
    let seen = watch.wait(2, |seen| seen.packet.length == 28 + 9 && seen.packet.src == LEFT);
    let to: Vec<_> = seen.iter().map(|seen| seen.packet.dst).collect();
    assert_eq!(to, [after, RIGHT], "what the first shoots never comes to ours");
    receiver.recv(&mut [0; 64]).unwrap();
    assert!(
        receiver.recv(&mut [0; 64]).is_err(),
        "what either shoots does not arrive"
    );
    watch.finish();
    assert_eq!(filters(right, "ingress"), [stand_in::NAME; 2]);
    assert!(has_qdisc(right), "theirs");
}

pub(crate) fn egress_is_not_observed_on_an_ingress_qdisc() {
    let net = Net::new();
    run(&format!("tc -n {} qdisc add dev {DEVICE} ingress", net.left.name));
    let mut watch = Watch::new(&config());
    let error = watch
        .kernel
        .attach_tc(&net.left.ns, DEVICE, net.left.ifindex, Hook::WorkloadEgress)
        .unwrap_err();
    assert!(format!("{error:#}").contains("ingress qdisc"), "{error:#}");
    watch.attach(&net.left, Hook::WorkloadIngress);
    watch.finish();
    assert!(tc(&net.left, &["qdisc", "show", "dev", DEVICE]).contains("ingress"));
}

pub(crate) fn what_a_killed_run_left_is_found_and_swept_and_nothing_else() {
    let net = Net::new();
    let kill = |end: &End| {
        let mut child = attach_in_another_process(end, "clsact");
        assert_eq!(leftovers::find(&end.ns).unwrap(), [], "its owner lives");
        child.kill().unwrap();
        child.wait().unwrap();
    };
    // The right end has a filter of somebody else's, on a qdisc of ours.
    kill(&net.left);
    kill(&net.right);
    let namespace = Namespace::open(&net.right.name).unwrap();
    stand_in::attach_filter(&namespace, DEVICE, Side::Ingress, RIGHT, Action::Accept, 0).unwrap();
    assert_eq!(filters(&net.left, "egress"), ["calitrace_workload_egress"]);
    let [left] = &leftovers::find(&net.left.ns).unwrap()[..] else {
        panic!("one interface")
    };
    assert_eq!((left.interface.as_str(), left.qdisc), (DEVICE, true), "{left}");
    assert_eq!(left.filters, ["calitrace_workload_egress"]);
    let found = leftovers::remove(&net.left.ns).unwrap();
    assert_eq!(found, std::slice::from_ref(left));
    assert!(!has_qdisc(&net.left));
    assert_eq!(leftovers::find(&net.left.ns).unwrap(), []);

    // The next start sweeps, also one that attaches by TCX, and whatever the hook.
    let mut next = Kernel::load(&Config::default()).unwrap();
    next.attach_tc(&net.right.ns, DEVICE, net.right.ifindex, Hook::UplinkIngress)
        .unwrap();
    assert_eq!(filters(&net.right, "egress"), Vec::<String>::new());
    next.detach_all().unwrap();
    assert_eq!(filters(&net.right, "ingress"), [stand_in::NAME], "theirs");
    assert!(has_qdisc(&net.right), "theirs is on it");
}

pub(crate) fn a_filter_that_somebody_took_away_is_missed() {
    let net = Net::new();
    let mut watch = Watch::new(&config());
    watch.attach(&net.right, Hook::WorkloadIngress);
    run(&format!(
        "tc -n {} filter del dev {DEVICE} ingress",
        net.right.name
    ));
    let check = watch
        .kernel
        .check_tc(net.right.ns.inode(), net.right.ifindex, Hook::WorkloadIngress)
        .unwrap();
    assert_eq!(check, AttachmentCheck::Lost);
    watch.finish();
}
