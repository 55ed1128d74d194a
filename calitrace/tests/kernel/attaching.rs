//! Attaching, detaching, counting, and that nothing stays behind.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{SchedClassifier, TcAttachType, loaded_programs};
use calitrace::{
    event::Hook,
    kernel::{Attached, AttachmentCheck, Config, Count, Kernel, has_kprobes},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use calitrace_tests::{
    Namespace,
    stand_in::{self, Action, Side},
};

use crate::net::{DEVICE, End, LEFT, Net, RIGHT, Watch, patience, run};

/// Names of the TCX programs on an end's device; none where the kernel has no TCX.
fn tcx_programs(end: &End) -> Vec<String> {
    end.ns
        .run(|| {
            let mut names = Vec::new();
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                let Ok((_, programs)) = SchedClassifier::query_tcx(DEVICE, direction) else {
                    return Ok(Vec::new());
                };
                names.extend(
                    programs
                        .iter()
                        .map(|program| program.name_as_str().unwrap().to_owned()),
                );
            }
            Ok(names)
        })
        .unwrap()
}

/// What `tc` shows of the filters in one direction of an end's device.
fn filters(end: &End, direction: &str) -> String {
    let arguments = ["-n", &end.name, "filter", "show", "dev", DEVICE, direction];
    String::from_utf8(Command::new("tc").args(arguments).output().unwrap().stdout).unwrap()
}

/// Names of all programs of ours on an end's device, by TCX or as filters, as the kernel cuts them: to 15 bytes.
/// `tc` shows a filter on a line, with its own name for the program and the kernel's.
fn programs(end: &End) -> Vec<String> {
    let mut names = tcx_programs(end);
    for direction in ["ingress", "egress"] {
        names.extend(filters(end, direction).lines().filter_map(|line| {
            let name = line
                .split_whitespace()
                .find(|word| word.starts_with("calitrace_"))?;
            Some(name.chars().take(15).collect())
        }));
    }
    names
}

fn counts(kernel: &Kernel, end: &End, hook: Hook) -> Count {
    let counts = kernel.counters().unwrap();
    *counts
        .iter()
        .find(|count| (count.netns, count.ifindex, count.hook) == (end.ns.inode(), end.ifindex, hook))
        .unwrap_or_else(|| panic!("{hook:?} in {counts:#?}"))
}

fn adds_up(count: &Count) {
    let counters = count.counters;
    assert_eq!(
        counters.seen,
        counters.non_ip + counters.out_of_scope + counters.ring_refused + counters.recorded,
        "{count:?}"
    );
}

pub(crate) fn nothing_is_left_after_detaching() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    assert_eq!(programs(&net.left), ["calitrace_workl"]);
    assert_eq!(programs(&net.right), ["calitrace_workl"]);
    watch.finish();
    assert_eq!(programs(&net.left), Vec::<String>::new());
    assert_eq!(programs(&net.right), Vec::<String>::new());
}

pub(crate) fn counts_survive_detaching_and_slots_are_used_again() {
    let net = Net::new();
    let mut watch = Watch::new(&Config::default());
    watch
        .kernel
        .set_scope(&["10.99.0.2/32".parse().unwrap()])
        .unwrap();
    let from = net.left.udp(LEFT, 0);
    let _to = net.right.udp(RIGHT, 7200);
    net.left.exec(&format!("ping -q -c 1 -W 10 {RIGHT}"));
    let mut sent = 0;
    for round in 0..3 {
        watch.attach(&net.left, Hook::UplinkEgress);
        for _ in 0..10 {
            from.send_to(b"counted", (RIGHT, 7200)).unwrap();
            sent += 1;
        }
        // Out of scope: its destination is no address of anybody.
        from.send_to(b"elsewhere", ("10.99.0.200", 7201)).unwrap();
        watch
            .kernel
            .detach_tc(net.left.ns.inode(), net.left.ifindex, Hook::UplinkEgress)
            .unwrap();
        from.send_to(b"not seen", (RIGHT, 7200)).unwrap();
        let count = counts(&watch.kernel, &net.left, Hook::UplinkEgress);
        adds_up(&count);
        assert!(count.counters.recorded >= sent, "round {round}: {count:?}");
    }
    let seen = watch.finish();
    let count = counts(&watch.kernel, &net.left, Hook::UplinkEgress);
    assert_eq!(count.counters.recorded, u64::try_from(seen.len()).unwrap());
    assert_eq!(
        seen.iter().filter(|seen| seen.packet.length == 28 + 7).count(),
        usize::try_from(sent).unwrap(),
        "each datagram sent while attached, and no other"
    );
}

/// Programs remember slots for each CPU: what they remember must not outlive the slot.
pub(crate) fn a_slot_that_another_hook_got_is_forgotten() {
    const LO: u32 = 1;
    let net = Net::new();
    let netns = &net.left.ns;
    let mut kernel = Kernel::load(&Config::default()).unwrap();
    let attach = |kernel: &mut Kernel, hook| {
        assert_eq!(kernel.attach_tc(netns, "lo", LO, hook).unwrap(), Attached::Yes);
    };
    let arp = [&[2; 12], &[0x08, 0x06][..], &[0; 28]].concat();
    let non_ip = |kernel: &Kernel, hook| {
        let counts = kernel.counters().unwrap();
        let count = counts
            .iter()
            .find(|count| (count.netns, count.ifindex, count.hook) == (netns.inode(), LO, hook));
        count.map(|count| count.counters.non_ip)
    };
    // On one CPU, and its threads with it.
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = CpuSet::new();
            first.set(0).unwrap();
            sched_setaffinity(Pid::from_raw(0), &first).unwrap();
            attach(&mut kernel, Hook::UplinkEgress);
            kernel.trial(netns, Some(Hook::UplinkEgress), &arp, 10).unwrap();
            kernel.detach_tc(netns.inode(), LO, Hook::UplinkEgress).unwrap();
            attach(&mut kernel, Hook::TunnelEgress);
            attach(&mut kernel, Hook::UplinkEgress);
            kernel.trial(netns, Some(Hook::UplinkEgress), &arp, 10).unwrap();
        });
    });
    assert_eq!(non_ip(&kernel, Hook::UplinkEgress), Some(20));
    assert_eq!(non_ip(&kernel, Hook::TunnelEgress), Some(0));
}

pub(crate) fn traffic_out_of_scope_is_counted_only() {
    let net = Net::new();
    let mut watch = Watch::new(&Config::default());
    watch
        .kernel
        .set_scope(&["10.77.0.0/16".parse().unwrap()])
        .unwrap();
    watch.attach(&net.left, Hook::UplinkEgress);
    net.left.exec(&format!("ping -q -c 3 -i 0.01 -W 10 {RIGHT}"));
    assert_eq!(watch.finish(), []);
    let count = counts(&watch.kernel, &net.left, Hook::UplinkEgress);
    adds_up(&count);
    assert!(count.counters.out_of_scope >= 3, "{count:?}");
    assert_eq!(count.counters.recorded, 0);
}

pub(crate) fn a_full_ring_refuses_and_counts() {
    let net = Net::new();
    // Nobody drains this ring: a page holds 30 records of 128 bytes with their headers.
    let mut kernel = Kernel::load(&Config {
        ring_bytes: 4096,
        ..Config::default()
    })
    .unwrap();
    let from = net.left.udp(LEFT, 0);
    let _to = net.right.udp(RIGHT, 7202);
    net.left.exec(&format!("ping -q -c 1 -W 10 {RIGHT}"));
    kernel
        .attach_tc(&net.left.ns, DEVICE, net.left.ifindex, Hook::WorkloadEgress)
        .unwrap();
    for _ in 0..1000 {
        from.send_to(b"flood", (RIGHT, 7202)).unwrap();
    }
    kernel.detach_all().unwrap();
    let count = counts(&kernel, &net.left, Hook::WorkloadEgress);
    adds_up(&count);
    assert!(count.counters.ring_refused >= 900, "{count:?}");
    assert!(
        count.counters.recorded + count.counters.ring_refused >= 1000,
        "{count:?}"
    );
}

pub(crate) fn an_interface_that_is_gone_is_no_error() {
    let net = Net::new();
    let mut kernel = Kernel::load(&Config::default()).unwrap();
    let left = &net.left;
    assert_eq!(
        kernel
            .attach_tc(&left.ns, "absent", 77, Hook::WorkloadEgress)
            .unwrap(),
        Attached::Gone
    );
    // Another interface has taken the name.
    let other = kernel
        .attach_tc(&left.ns, DEVICE, left.ifindex + 1, Hook::WorkloadEgress)
        .unwrap();
    assert_eq!(other, Attached::Gone);
    kernel
        .attach_tc(&left.ns, DEVICE, left.ifindex, Hook::WorkloadEgress)
        .unwrap();
    run(&format!("ip -n {} link del {DEVICE}", left.name));
    let check = kernel
        .check_tc(left.ns.inode(), left.ifindex, Hook::WorkloadEgress)
        .unwrap();
    assert_eq!(check, AttachmentCheck::Gone);
    kernel
        .detach_tc(left.ns.inode(), left.ifindex, Hook::WorkloadEgress)
        .unwrap();
    assert_eq!(kernel.attached().count(), 0);
}

pub(crate) fn another_program_in_front_is_noticed() {
    let net = Net::new();
    let right = &net.right;
    let mut ours = Kernel::load(&Config::default()).unwrap();
    ours.attach_tc(&right.ns, DEVICE, right.ifindex, Hook::WorkloadIngress)
        .unwrap();
    ours.attach_tc(&right.ns, DEVICE, right.ifindex, Hook::WorkloadEgress)
        .unwrap();
    let check = |kernel: &Kernel, hook| kernel.check_tc(right.ns.inode(), right.ifindex, hook).unwrap();
    assert_eq!(check(&ours, Hook::WorkloadIngress), AttachmentCheck::InPlace);
    assert_eq!(check(&ours, Hook::WorkloadEgress), AttachmentCheck::InPlace);

    // Another run of calitrace changes nothing for this one.
    let mut akin = Kernel::load(&Config::default()).unwrap();
    for hook in [Hook::WorkloadIngress, Hook::WorkloadEgress] {
        akin.attach_tc(&right.ns, DEVICE, right.ifindex, hook).unwrap();
        assert_eq!(check(&ours, hook), AttachmentCheck::InPlace);
        assert_eq!(check(&akin, hook), AttachmentCheck::InPlace);
    }

    let namespace = Namespace::open(&right.name).unwrap();
    let front = stand_in::attach_in_front(&namespace, DEVICE, Side::Ingress, RIGHT, Action::Accept).unwrap();
    let behind = stand_in::attach(&namespace, DEVICE, Side::Egress, RIGHT, Action::Accept).unwrap();
    let all = ours.check(|netns, error| panic!("{netns}: {error:#}"));
    assert_eq!(all.len(), 2);
    for checked in all {
        assert_eq!(checked.state, AttachmentCheck::Displaced, "{checked:?}");
        assert_eq!(checked.others, [stand_in::NAME], "{checked:?}");
    }
    drop((front, behind));
    for hook in [Hook::WorkloadIngress, Hook::WorkloadEgress] {
        assert_eq!(check(&ours, hook), AttachmentCheck::InPlace);
    }
}

pub(crate) fn without_btf_only_tc_observes_and_namespaces_are_told_apart() {
    let net = Net::new();
    let empty = tempfile::NamedTempFile::new().unwrap();
    for path in [PathBuf::from("/nonexistent/btf"), empty.path().to_owned()] {
        let mut watch = Watch::new(&Config {
            btf: Some(path.clone()),
            ..Config::default()
        });
        watch.kernel.attach_global().unwrap();
        let [line] = watch.kernel.missing() else {
            panic!("{:?}", watch.kernel.missing())
        };
        assert!(
            line.contains(path.to_str().unwrap()) && line.contains("only TC"),
            "{line}"
        );
        watch.attach(&net.left, Hook::WorkloadEgress);
        watch.attach(&net.right, Hook::WorkloadIngress);
        net.left.udp(LEFT, 0).send_to(b"no BTF", (RIGHT, 7204)).unwrap();
        let (left, right) = watch.pair(|seen| seen.packet.length == 28 + 6 && seen.packet.src == LEFT);
        assert_eq!(
            (left.netns, right.netns),
            (net.left.ns.inode(), net.right.ns.inode())
        );
        assert_eq!(left.packet, right.packet);
        assert_eq!(left.skb, right.skb);
        assert_eq!(left.head, 0, "where it lies is not known");
        watch.finish();
        adds_up(&counts(&watch.kernel, &net.left, Hook::WorkloadEgress));
    }
}

pub(crate) fn programs_load_with_their_log_messages_too() {
    let net = Net::new();
    // The verifier keeps the calls that it otherwise removes.
    let mut watch = Watch::new(&Config {
        verbose: true,
        ..Config::default()
    });
    watch.kernel.attach_global().unwrap();
    assert_eq!(watch.kernel.missing(), Vec::<String>::new());
    for hook in [
        Hook::WorkloadEgress,
        Hook::WorkloadIngress,
        Hook::TunnelEgress,
        Hook::TunnelIngress,
        Hook::UplinkEgress,
        Hook::UplinkIngress,
    ] {
        watch.attach(&net.left, hook);
    }
    net.left
        .udp(LEFT, 0)
        .send_to(b"talkative", (RIGHT, 7205))
        .unwrap();
    watch.wait(1, |seen| {
        seen.packet.length == 28 + 9 && seen.packet.src == LEFT && seen.hook == Hook::WorkloadEgress
    });
    watch.finish();
}

pub(crate) fn a_ring_of_no_legal_size_is_refused() {
    let error = Kernel::load(&Config {
        ring_bytes: 5000,
        ..Config::default()
    })
    .err()
    .unwrap();
    assert!(error.to_string().contains("5000"), "{error:#}");
}

/// What a process of its own, begun by [`attach_in_another_process`], attaches to.
pub(crate) struct Target {
    netns: OsString,
    ifindex: u32,
    tcx: bool,
}

const TOLD: [&str; 3] = [
    "CALITRACE_TEST_NETNS",
    "CALITRACE_TEST_IFINDEX",
    "CALITRACE_TEST_METHOD",
];

impl Target {
    /// What this process was told to attach to; `None` if it is a test run.
    pub(crate) fn told() -> Option<Self> {
        let [netns, ifindex, method] = TOLD.map(std::env::var_os);
        Some(Self {
            netns: netns?,
            ifindex: ifindex?.to_str()?.parse().ok()?,
            tcx: method? == "tcx",
        })
    }
}

/// Attaches, says so, and holds on until its standard input closes.
pub(crate) fn attach_and_wait_to_be_killed(target: &Target) {
    let ns = calitrace::netns::Handle::open(target.netns.as_ref()).unwrap();
    let mut kernel = Kernel::load(&Config {
        tcx: target.tcx,
        ..Config::default()
    })
    .unwrap();
    kernel.attach_global().unwrap();
    kernel
        .attach_tc(&ns, DEVICE, target.ifindex, Hook::WorkloadEgress)
        .unwrap();
    println!("attached");
    // The parent kills it; if that has died, its end of the pipe closes.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Begins a process that attaches to an end's device by `tcx` or `clsact`, and returns when it has.
pub(crate) fn attach_in_another_process(end: &End, method: &str) -> Child {
    let [netns, ifindex, by] = TOLD;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .env(netns, format!("/run/netns/{}", end.name))
        .env(ifindex, end.ifindex.to_string())
        .env(by, method)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "attached");
    child
}

pub(crate) fn nothing_is_left_after_a_kill() {
    let net = Net::new();
    let mut child = attach_in_another_process(&net.left, "tcx");
    assert_eq!(programs(&net.left), ["calitrace_workl"]);
    let (_, attached) = net
        .left
        .ns
        .run(|| Ok(SchedClassifier::query_tcx(DEVICE, TcAttachType::Egress)?))
        .unwrap();
    let id = attached[0].id();
    let loaded = |id| {
        loaded_programs()
            .filter_map(Result::ok)
            .any(|program| program.id() == id)
    };
    assert!(loaded(id));
    drop(attached);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(programs(&net.left), Vec::<String>::new());
    // The kernel frees a program a moment after its last user is gone.
    let deadline = Instant::now() + patience();
    while loaded(id) {
        assert!(Instant::now() < deadline, "program {id} is still loaded");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Which hooks are missing, and why.
fn missing(mut kernel: Kernel) -> Vec<(String, String)> {
    let hooks = kernel.try_hooks().unwrap();
    hooks
        .into_iter()
        .filter_map(|hook| Some((hook.hook, hook.missing?)))
        .collect()
}

pub(crate) fn programs_load_while_children_end() {
    // Each interrupts the verifier once at most, and one program alone is tried more often.
    const CHILDREN: usize = 10;
    // Where functions are hooked as well there is more to interrupt, so fewer rounds show it.
    let rounds = if has_kprobes() { 5 } else { 20 };
    let loaded = || Kernel::load(&Config::default()).unwrap();
    let quiet = missing(loaded());
    for round in 0..rounds {
        let kernel = loaded();
        let beside = thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..CHILDREN {
                    // A child that cannot become the program ends while its parent's thread blocks all signals.
                    Command::new("/nonexistent/program").spawn().unwrap_err();
                }
            });
            missing(kernel)
        });
        assert_eq!(beside, quiet, "round {round}");
    }
}
