//! `doctor` on what this kernel and a broken node lack. Each fault is made for real, what it does to packets is seen, and
//! without it nothing is found.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    DeviceOrder, Encapsulation, Lab, Namespace, Need, Options, command, lab::netfilter::Backend,
};

use crate::{
    Test,
    support::{change_nftables, quiet, run, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("doctor_names_what_is_missing", missing),
    test("doctor_names_mtus_that_do_not_fit", mtus),
    test("doctor_names_devices_of_other_plugins", plugins),
    test("doctor_names_a_node_that_is_taken_for_a_stranger", stranger).needs(&[Need::Program("ipset")]),
    test("doctor_names_a_stranger_of_nftables", stranger_of_nftables).needs(&[Need::Program("nft")]),
    test("doctor_names_a_tunnel_that_the_kernel_does_not_make", no_tunnel).needs(&[
        Need::Encapsulation(Encapsulation::Ipip),
        Need::Program("nft"),
        Need::Guest,
    ]),
    test("doctor_names_a_full_table_of_connections", connections).needs(&[Need::Program("conntrack")]),
    test("doctor_names_a_strict_reverse_path_filter", || {
        reverse_path(Backend::Nft)
    }),
    test("doctor_knows_what_calicos_nftables_mode_masquerades", || {
        reverse_path(Backend::Native)
    })
    .needs(&[Need::Program("nft")]),
    test("doctor_counts_wrong_checksums", checksums),
];

/// Which namespaces get a `tunl0` when they are made; a setting of the whole machine.
const FALLBACK_TUNNELS: &str = "/proc/sys/net/core/fb_tunnels_only_for_init_net";

/// The first node of a lab, and its peer.
const NODES: [&str; 2] = ["minikube", "minikube-m02"];

fn missing() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let well = doctor(&lab)?;
    let has_kprobes = fs::read_to_string("/proc/kallsyms")
        .context("read the kernel's symbols")?
        .lines()
        .any(|line| line.ends_with(" register_kprobe"));
    if !has_kprobes {
        for what in ["kprobes", "fentry", "ipip"] {
            let line = well.lines().find(|line| line.contains(what));
            ensure!(
                line.is_some_and(|line| line.contains('✗')),
                "{what} is missing here: {well}"
            );
        }
    }
    ensure!(!well.contains("default route"), "{well}");
    lab.delete_default_route(NODES[0])?;
    let ill = doctor(&lab)?;
    let line = ill
        .lines()
        .find(|line| line.contains("default route"))
        .with_context(|| ill.clone())?;
    ensure!(line.contains(NODES[0]) && line.contains('✗'), "{line}");
    Ok(())
}

fn doctor(lab: &Lab) -> Result<String> {
    let finished = run(&with(lab, &["doctor"]))?;
    ensure!(finished.status.success(), "{finished:?}");
    Ok(finished.stdout)
}

/// What is found of the nodes: the lines with a mark.
fn findings(lab: &Lab) -> Result<Vec<String>> {
    let told = doctor(lab)?;
    let found = told
        .lines()
        .filter(|line| line.starts_with("  ✗ node") || line.starts_with("  ! node"));
    Ok(found.map(str::to_owned).collect())
}

fn none(lab: &Lab) -> Result<()> {
    let found = findings(lab)?;
    ensure!(found.is_empty(), "nothing is wrong: {found:#?}");
    Ok(())
}

/// One finding, of this mark, which says all that.
fn only(lab: &Lab, mark: char, says: &[&str]) -> Result<()> {
    let found = findings(lab)?;
    ensure!(
        found.len() == 1
            && found[0].starts_with(&format!("  {mark} node {}: ", NODES[0]))
            && says.iter().all(|what| found[0].contains(what)),
        "{mark} {says:?}: {found:#?}"
    );
    Ok(())
}

/// Whether an echo request of `size` bytes from pod 1, which must not be fragmented, is answered.
fn passes(lab: &Lab, to: &str, size: usize) -> Result<bool> {
    // Of IPv4's and ICMP's headers.
    let payload = (size - 28).to_string();
    let said = lab.ping("pod1", to.parse()?, 1, &["-M", "do", "-s", &payload])?;
    Ok(said.received == 1)
}

fn mtus() -> Result<()> {
    const LARGE: usize = 1480;
    let lab = Lab::up(&Options {
        encapsulation: Encapsulation::None,
        ..quiet()
    })?;
    let node = lab.namespace(NODES[0])?;
    let pod = lab.namespace("pod1")?;
    let interface = lab.pod("pod1")?.interface;
    let peer = lab.pod("pod3")?.address.to_string();
    let set = |namespace: &Namespace, device: &str, mtu: u32| {
        namespace.ip(&format!("link set {device} mtu {mtu}\n"))
    };
    none(&lab)?;
    ensure!(passes(&lab, &peer, LARGE)?, "before");

    set(&node, &interface, 1400)?;
    only(
        &lab,
        '✗',
        &[
            &format!("{interface} (1400, in the pod 1500)"),
            "that the pod sends",
        ],
    )?;
    ensure!(!passes(&lab, &peer, LARGE)?, "the node's end is too small");
    set(&node, &interface, 1500)?;

    set(&pod, "eth0", 1400)?;
    only(
        &lab,
        '✗',
        &[&format!("{interface} (1500, in the pod 1400)"), "to the pod"],
    )?;
    set(&pod, "eth0", 1500)?;
    none(&lab)?;

    set(&node, "eth0", 1400)?;
    only(
        &lab,
        '!',
        &["2 of 2 workload interfaces have a larger MTU than eth0 (1400)"],
    )?;
    let far = lab.pod("pod2")?.address.to_string();
    ensure!(!passes(&lab, &far, LARGE)?, "the uplink is too small");
    set(&node, "eth0", 1500)?;
    none(&lab)
}

/// A bridge, and Flannel's VXLAN device as Flannel makes it.
fn plugins() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let node = lab.namespace(NODES[0])?;
    none(&lab)?;
    node.ip("link add cni0 type bridge\nlink set cni0 up\n\
             link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 nolearning\nlink set flannel.1 up\n")?;
    only(&lab, '!', &["cni0 (the bridge plugin), flannel.1 (Flannel)"])?;
    // Half of the other node's block.
    ensure!(passes(&lab, "10.244.205.193", 84)?, "before");
    node.ip("route add 10.244.205.192/27 dev cni0\n")?;
    let found = findings(&lab)?;
    ensure!(
        found.iter().any(|line| line.contains('✗')
            && line.contains("The route to 10.244.205.192/27 leads to cni0")
            && line.contains("in the block 10.244.205.192/26")),
        "{found:#?}"
    );
    ensure!(!passes(&lab, "10.244.205.193", 84)?, "they go astray");
    node.ip("link del cni0\nlink del flannel.1\n")?;
    none(&lab)
}

/// What is found when the other node is taken out of the set of hosts, and when it is back.
fn lacks_its_peer(
    lab: &Lab,
    take_out: impl FnOnce() -> Result<()>,
    put_back: impl FnOnce() -> Result<()>,
) -> Result<()> {
    none(lab)?;
    ensure!(passes(lab, "10.244.205.193", 84)?, "its node is known");
    take_out()?;
    only(
        lab,
        '✗',
        &["cali40all-vxlan-net lacks the node 192.168.49.3", "VXLAN packets"],
    )?;
    ensure!(!passes(lab, "10.244.205.193", 84)?, "its node is a stranger");
    put_back()?;
    none(lab)
}

/// The rule for encapsulated packets as Felix writes it, with its set of hosts.
fn stranger() -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter: Backend::Nft,
        ..quiet()
    })?;
    let sets = |change: &str| -> Result<()> {
        let mut restore = lab.exec(NODES[0], ["ipset", "restore"])?;
        command::run_with_input(&mut restore, change)?;
        Ok(())
    };
    sets("create cali40all-vxlan-net hash:net family inet\nadd cali40all-vxlan-net 192.168.49.3\n")?;
    let mut load = lab.exec(NODES[0], ["iptables-nft-restore", "--noflush", "-w", "10"])?;
    command::run_with_input(
        &mut load,
        "*filter\n-F cali-INPUT\n\
         -A cali-INPUT -p udp -m udp --dport 4789 -m comment --comment \"Allow IPv4 VXLAN packets from allowed hosts\" \
         -m set --match-set cali40all-vxlan-net src -m addrtype --dst-type LOCAL -j ACCEPT\n\
         -A cali-INPUT -p udp -m udp --dport 4789 -m comment --comment \"Drop IPv4 VXLAN packets from non-allowed hosts\" \
         -m addrtype --dst-type LOCAL -j DROP\nCOMMIT\n",
    )?;
    lacks_its_peer(
        &lab,
        || sets("del cali40all-vxlan-net 192.168.49.3\n"),
        || sets("add cali40all-vxlan-net 192.168.49.0/24\n"),
    )
}

/// The same in Calico's own table.
fn stranger_of_nftables() -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter: Backend::Native,
        ..quiet()
    })?;
    let hosts = |change: &str| -> Result<()> {
        let change = format!("{change} element ip calico cali40all-vxlan-net {{ 192.168.49.3 }}\n");
        change_nftables(&lab, NODES[0], &change)
    };
    lacks_its_peer(&lab, || hosts("delete"), || hosts("add"))
}

/// Where a new namespace gets no `tunl0`, as a container that is a node would not: newer Felix makes one, older Felix cannot.
fn no_tunnel() -> Result<()> {
    let lab = Lab::up(&Options {
        encapsulation: Encapsulation::Ipip,
        order: DeviceOrder::UplinkFirst,
        netfilter: Backend::Native,
        ..quiet()
    })?;
    let node = lab.namespace(NODES[0])?;
    none(&lab)?;
    ensure!(passes(&lab, "10.244.205.193", 84)?, "before");
    node.ip("link del tunl0\n")?;
    ensure!(!passes(&lab, "10.244.205.193", 84)?, "nothing leads there");
    let by = ["There is no tunl0, though", "to pods of 192.168.49.3, and"];
    for (setting, told) in [
        (
            "1",
            "net.core.fb_tunnels_only_for_init_net=1, and the node is in a container",
        ),
        (
            "2",
            "net.core.fb_tunnels_only_for_init_net=2, and the node is in a container",
        ),
    ] {
        fs::write(FALLBACK_TUNNELS, setting).with_context(|| format!("write {FALLBACK_TUNNELS}"))?;
        only(&lab, '✗', &[&by[..], &[told]].concat())?;
    }
    fs::write(FALLBACK_TUNNELS, "0").with_context(|| format!("write {FALLBACK_TUNNELS}"))?;
    only(&lab, '✗', &by)?;
    ensure!(!findings(&lab)?[0].contains("fb_tunnels"), "it would give one");
    // As older Felix and as newer Felix ask for it.
    let tried = command::output(&mut lab.exec(NODES[0], ["ip", "tunnel", "add", "tunl0", "mode", "ipip"])?)?;
    ensure!(
        !tried.status.success() && String::from_utf8_lossy(&tried.stderr).contains("No such device"),
        "{tried:?}"
    );
    node.ip("link add tunl0 type ipip\n")?;
    only(
        &lab,
        '✗',
        &["tunl0 has neither address nor routes, and is down, though"],
    )
}

/// Felix's and kube-proxy's limit is the whole machine's, so the node's own table is filled up to it.
fn connections() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    none(&lab)?;
    let max: u32 = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max")
        .context("read the limit of connections")?
        .trim()
        .parse()
        .context("the limit of connections")?;
    let fill = |connections: std::ops::Range<u32>| -> Result<()> {
        use std::fmt::Write as _;
        let mut lines = String::new();
        for number in connections {
            let source = std::net::Ipv4Addr::from_bits(0x0a00_0000 + number);
            writeln!(
                lines,
                "-A -p udp -s {source} -d 192.0.2.1 --sport 1 --dport 2 -t 600 -u SEEN_REPLY,ASSURED"
            )?;
        }
        match command::run_with_input(
            &mut lab.exec(NODES[0], ["conntrack", "-R", "/proc/self/fd/0"])?,
            &lines,
        ) {
            // What the kernel says when there is no room.
            Err(error) if format!("{error:#}").contains("Operation failed: not enough memory") => Ok(()),
            told => told.map(drop),
        }
    };
    let nearly = max / 100 * 95;
    fill(0..nearly)?;
    only(
        &lab,
        '!',
        &["The table of connections is nearly full", &format!("of {max})")],
    )?;
    ensure!(passes(&lab, "10.244.205.193", 84)?, "there is room");
    fill(nearly..max + 1)?;
    only(
        &lab,
        '✗',
        &["The table of connections is full", &format!("of {max})")],
    )?;
    ensure!(!passes(&lab, "10.244.205.194", 84)?, "there is no room");
    command::run(&mut lab.exec(NODES[0], ["conntrack", "-F"])?)?;
    none(&lab)
}

/// VXLAN from the other node, with a wrong checksum.
fn checksums() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    // Where the NIC is to compute it, veths leave it out.
    lab.offloads(false)?;
    ensure!(passes(&lab, "10.244.205.193", 84)?, "nothing is wrong yet");
    none(&lab)?;
    change_nftables(
        &lab,
        NODES[1],
        "table ip broken {\n chain post {\n  type filter hook postrouting priority 300;\n  udp dport 4789 @th,48,16 set 0xbad\n }\n}\n",
    )?;
    ensure!(!passes(&lab, "10.244.205.193", 84)?, "the answer is lost");
    only(
        &lab,
        '!',
        &[
            "UDP datagrams with a wrong checksum came to the node, 1 since",
            "vxlan.calico",
        ],
    )
}

/// What a pod sends to another node's own address, with the pod's address or masqueraded, and the answer.
fn reverse_path(netfilter: Backend) -> Result<()> {
    let lab = Lab::up(&Options { netfilter, ..quiet() })?;
    let filters = |node: &str, uplink: &str, tunnel: &str| -> Result<()> {
        lab.namespace(node)?.sysctls([
            ("net/ipv4/conf/all/rp_filter".to_owned(), "0"),
            ("net/ipv4/conf/eth0/rp_filter".to_owned(), uplink),
            ("net/ipv4/conf/vxlan.calico/rp_filter".to_owned(), tunnel),
        ])
    };
    let answered = |pod: &str, node: &str| -> Result<bool> {
        let address = lab.node(node)?.address;
        Ok(lab.ping(pod, address.into(), 1, &[])?.received == 1)
    };
    let [here, there] = NODES;
    for node in NODES {
        filters(node, "1", "1")?;
    }
    none(&lab)?;
    ensure!(answered("pod2", here)? && answered("pod1", there)?, "masqueraded");
    for node in NODES {
        let (mut load, change) = if netfilter == Backend::Native {
            let change = "flush chain ip calico nat-cali-nat-outgoing\n";
            (lab.exec(node, ["nft", "-f", "-"])?, change)
        } else {
            let load = lab.exec(node, ["iptables-nft-restore", "--noflush", "-w", "10"])?;
            (load, "*nat\n-F cali-nat-outgoing\nCOMMIT\n")
        };
        command::run_with_input(&mut load, change)?;
    }
    filters(there, "0", "0")?;
    filters(here, "1", "0")?;
    only(&lab, '!', &["Reverse path filtering is strict on eth0, pods"])?;
    ensure!(!answered("pod2", here)?, "by the uplink");
    ensure!(answered("pod1", there)?, "the answer comes by the tunnel");
    filters(here, "0", "1")?;
    only(
        &lab,
        '!',
        &["Reverse path filtering is strict on vxlan.calico, pods"],
    )?;
    ensure!(answered("pod2", here)?, "it comes by the uplink");
    ensure!(!answered("pod1", there)?, "the answer comes by the tunnel");
    filters(here, "2", "2")?;
    none(&lab)?;
    ensure!(answered("pod2", here)? && answered("pod1", there)?, "loose");
    Ok(())
}
