//! More than a pod may have: packets a second and connections (Felix' controls of quality of service), and more than the
//! kernel takes in at once. Counted by those who drop.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Lab, Need, command, lab::netfilter::Backend, unhurried};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, change_nftables, change_rules, goes, with},
    test,
    traced::{POD1, POD2, all, culprit, datagrams, lab_with, says, traced},
};

pub(crate) const TESTS: &[Test] = &[
    test("more_packets_than_a_pod_may_have", || packets(Backend::Nft)),
    test("more_packets_than_a_pod_may_have_by_legacy", || {
        packets(Backend::Legacy)
    }),
    test("more_packets_than_a_pod_may_have_by_nftables", || {
        packets(Backend::Native)
    })
    .needs(&[Need::Program("nft")]),
    test("more_connections_than_a_pod_may_have", || {
        connections(Backend::Nft)
    })
    .needs(&[Need::Program("conntrack")]),
    test("more_connections_than_a_pod_may_have_by_nftables", || {
        connections(Backend::Native)
    })
    .needs(&[Need::Program("nft"), Need::Program("conntrack")]),
    test("more_packets_than_the_kernel_takes_in", backlog).needs(&[Need::Guest]),
];

const PORT: u16 = 5353;

/// The first rules of the chain of pod 2, as Felix writes them (`felix/rules/endpoints.go` from v3.30 on). With `most` packets at
/// once, and one a minute.
fn limit_packets(lab: &Lab, most: u32) -> Result<()> {
    let chain = format!("cali-tw-{}", lab.pod("pod2")?.interface);
    if lab.options().netfilter == Backend::Native {
        let rule = format!(
            "insert rule ip calico filter-{chain} limit rate over 1/minute burst {most} packets counter drop \
             comment \"cali:1; Drop packets over ingress packet rate limit\"\n"
        );
        return change_nftables(lab, "minikube-m02", &rule);
    }
    change_rules(
        lab,
        "minikube-m02",
        &format!(
            "*filter\n\
             -I {chain} -m comment --comment \"Clear ingress packet rate limit mark\" -j MARK --set-xmark 0x0/0x80000\n\
             -I {chain} -m comment --comment \"Drop packets over ingress packet rate limit\" \
             -m mark ! --mark 0x80000/0x80000 -j DROP\n\
             -I {chain} -m comment --comment \"Mark packets within ingress packet rate limit\" \
             -m limit --limit 1/min --limit-burst {most} -j MARK --set-xmark 0x80000/0x80000\n\
             -I {chain} -m comment --comment \"Clear ingress packet rate limit mark\" -j MARK --set-xmark 0x0/0x80000\n\
             COMMIT\n"
        ),
    )
}

/// What is within the limit arrives, each one beyond is dropped for it. The twin may have them all.
fn packets(backend: Backend) -> Result<()> {
    const COUNT: u32 = 30;
    const MOST: u32 = 12;
    let lab = lab_with(backend)?;
    let send = |lab: &Lab| datagrams(lab, POD1, COUNT);
    let (traces, _) = traced(&lab, "udp", POD1, send)?;
    all(&traces, "delivered")?;
    limit_packets(&lab, MOST)?;
    let (traces, text) = traced(&lab, "udp", POD1, send)?;
    let (delivered, dropped): (Vec<&Value>, Vec<&Value>) =
        traces.iter().partition(|trace| trace["verdict"] == "delivered");
    ensure!(
        delivered.len() == MOST as usize && dropped.len() == (COUNT - MOST) as usize,
        "{} delivered, {} dropped",
        delivered.len(),
        dropped.len()
    );
    for trace in dropped {
        ensure!(trace["verdict"] == "dropped", "{trace:#}");
        culprit(trace, "minikube-m02", "limit")?;
    }
    says(
        &text,
        "✗ dropped on node minikube-m02 at vxlan.calico, before cali79f33e4263e: more packets a second (ingress) than the pod \
         may have",
    )
}

/// Those that are too many are reset by the node, which the trace says with the reason. The twin may have them all.
fn connections(backend: Backend) -> Result<()> {
    const COUNT: usize = 5;
    const MOST: usize = 2;
    let lab = lab_with(backend)?;
    let listener = lab
        .namespace("pod2")?
        .within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("listen"))?;
    let connect = || -> Result<Vec<Option<TcpStream>>> {
        lab.namespace("pod1")?.within(|| {
            let to = SocketAddr::from((POD2, PORT));
            let one = |_| TcpStream::connect_timeout(&to, Duration::from_secs(10)).ok();
            Ok((0..COUNT).map(one).collect())
        })
    };
    let opened = |watch: Watch| -> Result<Vec<Value>> {
        let packets = watch.stop()?.packets()?;
        let is_first = |packet: &Value| {
            goes(packet, "tcp", &POD1.to_string(), &POD2.to_string())
                && packet["answer"]["kind"] != Value::Null
                || packet["verdict"] == "rejected"
        };
        Ok(packets.into_iter().filter(is_first).collect())
    };
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let streams = connect()?;
    ensure!(streams.iter().all(Option::is_some), "{streams:?}");
    drop(streams);
    let traces = opened(watch)?;
    ensure!(traces.len() >= COUNT, "{traces:#?}");
    all(&traces, "delivered")?;

    let chain = format!("cali-tw-{}", lab.pod("pod2")?.interface);
    if backend == Backend::Native {
        change_nftables(
            &lab,
            "minikube-m02",
            &format!(
                "add rule ip calico filter-{chain} index 1 meta l4proto tcp ct count over {MOST} counter reject with tcp reset \
                 comment \"cali:1; Reject connections over ingress connection limit\"\n"
            ),
        )?;
    } else {
        change_rules(
            &lab,
            "minikube-m02",
            &format!(
                "*filter\n-I {chain} 3 -p tcp -m comment --comment \"Reject connections over ingress connection limit\" \
                 -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m connlimit --connlimit-above {MOST} --connlimit-mask 0 \
                 -j REJECT --reject-with tcp-reset\nCOMMIT\n"
            ),
        )?;
    }
    // It has a limit of packets, too, that is not reached: who drops does not reset.
    limit_packets(&lab, 1_000)?;
    // Those of before have ended.
    command::run(&mut lab.exec("minikube-m02", ["conntrack", "-F"])?)?;
    let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
    let text = Watch::start(&with(&lab, &[]))?;
    let streams = connect()?;
    let through = streams.iter().flatten().count();
    ensure!(through == MOST, "{through} of {COUNT} got through");
    let rejected: Vec<Value> = opened(watch)?
        .into_iter()
        .filter(|trace| trace["verdict"] == "rejected")
        .collect();
    ensure!(rejected.len() == COUNT - MOST, "{rejected:#?}");
    for trace in &rejected {
        culprit(trace, "minikube-m02", "limit")?;
        ensure!(
            trace["drop"]["culprits"][0]["rejects"] == true && trace["answer"]["kind"] == "reset",
            "{trace:#}"
        );
    }
    drop((streams, listener));
    let text = text.stop()?.stdout;
    let sentence = text
        .lines()
        .find(|line| line.starts_with("✗ rejected on node minikube-m02"));
    ensure!(
        sentence.is_some_and(|sentence| {
            sentence.contains(": more connections (ingress) than the pod may have · netfilter")
                && sentence.ends_with("; the node sent a TCP reset in the name of 10.244.205.193")
        }),
        "{text}"
    );
    Ok(())
}

/// As many packets as wait for a processor (`net.core.netdev_max_backlog`); it is the whole machine's. A queue before the pod's
/// device lets go of all at once. The twin is a larger backlog.
fn backlog() -> Result<()> {
    const COUNT: u32 = 60;
    let lab = lab_with(Backend::Nft)?;
    let to = lab.pod("pod3")?;
    let shape = format!(
        "tc qdisc add dev {} root netem slot 20ms 20ms limit 1000",
        to.interface
    );
    command::run(&mut lab.exec("minikube", shape.split(' '))?)?;
    let send = || -> Result<Vec<Value>> {
        let server = lab.udp_server("pod3", PORT, false)?;
        let watch = Watch::start(&with(&lab, &["-o", "json"]))?;
        let socket = lab
            .namespace("pod1")?
            .within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind a socket"))?;
        for number in 0..COUNT {
            socket.send_to(&number.to_be_bytes(), (to.address, PORT))?;
        }
        // Two slots, and what the kernel takes.
        std::thread::sleep(unhurried(Duration::from_secs(2)));
        let packets = watch.stop()?.packets()?;
        server.stop()?;
        let is_one = |packet: &Value| goes(packet, "udp", &POD1.to_string(), &to.address.to_string());
        let traces: Vec<Value> = packets.into_iter().filter(is_one).collect();
        ensure!(traces.len() == COUNT as usize, "{} traces", traces.len());
        Ok(traces)
    };
    all(&send()?, "delivered")?;
    let small = Small::backlog()?;
    let before = dropped_by_backlog()?;
    let traces = send()?;
    // The whole machine's.
    let counted = dropped_by_backlog()? - before;
    drop(small);
    let dropped: Vec<&Value> = traces
        .iter()
        .filter(|trace| trace["verdict"] == "dropped")
        .collect();
    let delivered = traces
        .iter()
        .filter(|trace| trace["verdict"] == "delivered")
        .count();
    ensure!(
        !dropped.is_empty() && dropped.len() <= counted && delivered + dropped.len() == COUNT as usize,
        "{counted} by the kernel's counter, {} dropped, {delivered} delivered: {traces:#?}",
        dropped.len()
    );
    for trace in dropped {
        let drop = &trace["drop"];
        ensure!(
            matches!(
                drop["reason"].as_str(),
                None | Some("CPU_BACKLOG" | "NOT_SPECIFIED")
            ),
            "{trace:#}"
        );
    }
    Ok(())
}

/// A small backlog, until it is dropped.
struct Small {
    before: String,
}

impl Small {
    const SETTING: &str = "/proc/sys/net/core/netdev_max_backlog";

    fn backlog() -> Result<Self> {
        let before = fs::read_to_string(Self::SETTING).with_context(|| format!("read {}", Self::SETTING))?;
        fs::write(Self::SETTING, "8").with_context(|| format!("write {}", Self::SETTING))?;
        Ok(Self { before })
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Whatever failed, further tests need it; what fails here they say themselves.
        let _ = fs::write(Self::SETTING, &self.before);
    }
}

/// Of all processors: the second column (`softnet_seq_show`, `net/core/net-procfs.c`, 5.10 to 6.18).
fn dropped_by_backlog() -> Result<usize> {
    let text = fs::read_to_string("/proc/net/softnet_stat").context("read the backlogs' counters")?;
    let mut sum = 0;
    for line in text.lines() {
        let column = line.split_whitespace().nth(1).context("a column of drops")?;
        sum += usize::from_str_radix(column, 16)?;
    }
    Ok(sum)
}
