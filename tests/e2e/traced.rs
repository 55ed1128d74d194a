//! Packets from pod 1 to pod 2, and what is said of them: the traces in JSON and the text view.

use std::{
    net::{Ipv4Addr, UdpSocket},
    os::fd::{FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Lab, Options, lab::netfilter::Backend, unhurried};
use serde_json::Value;

use crate::support::{Watch, goes, with};

pub(crate) const POD1: Ipv4Addr = Ipv4Addr::new(10, 244, 120, 67);
pub(crate) const POD2: Ipv4Addr = Ipv4Addr::new(10, 244, 205, 193);

/// A lab of VXLAN, with iptables in nftables.
pub(crate) fn lab() -> Result<Lab> {
    lab_with(Backend::Nft)
}

/// A lab of VXLAN.
pub(crate) fn lab_with(netfilter: Backend) -> Result<Lab> {
    Lab::up(&Options {
        netfilter,
        ipv6: false,
        ..Options::default()
    })
}

/// The traces of packets from `src` to pod 2 with this protocol that `send` sent, and what the text view said.
pub(crate) fn traced(
    lab: &Lab,
    proto: &str,
    src: Ipv4Addr,
    send: impl FnOnce(&Lab) -> Result<()>,
) -> Result<(Vec<Value>, String)> {
    let watch = Watch::start(&with(lab, &["-o", "json"]))?;
    let text = Watch::start(&with(lab, &[]))?;
    send(lab)?;
    let packets = watch.stop()?.packets()?;
    let text = text.stop()?.stdout;
    let is_one = |packet: &Value| goes(packet, proto, &src.to_string(), &POD2.to_string());
    let traces: Vec<Value> = packets.into_iter().filter(is_one).collect();
    ensure!(!traces.is_empty(), "nothing was traced: {text}");
    Ok((traces, text))
}

/// Each trace has this verdict.
pub(crate) fn all(traces: &[Value], verdict: &str) -> Result<()> {
    for trace in traces {
        ensure!(trace["verdict"] == verdict, "{verdict}: {trace:#}");
    }
    Ok(())
}

/// A line of the text begins with the sentence.
pub(crate) fn says(text: &str, sentence: &str) -> Result<()> {
    let mut lines = text.lines();
    ensure!(
        lines.any(|line| line.trim().starts_with(sentence)),
        "{sentence}\nis not in\n{text}"
    );
    Ok(())
}

/// It was dropped on that node, and for this cause alone.
pub(crate) fn culprit(trace: &Value, node: &str, cause: &str) -> Result<()> {
    let drop = &trace["drop"];
    let culprits = drop["culprits"].as_array().context("culprits")?;
    ensure!(
        drop["node"] == node && culprits.len() == 1 && culprits[0]["cause"] == cause,
        "{cause} on {node}: {trace:#}"
    );
    Ok(())
}

/// Three pings from pod 1 to pod 2.
pub(crate) fn ping(lab: &Lab) -> Result<()> {
    lab.ping("pod1", POD2.into(), 3, &[]).map(drop)
}

/// Datagrams from pod 1 to pod 2, which receives them.
pub(crate) fn datagrams(lab: &Lab, src: Ipv4Addr, count: u32) -> Result<()> {
    let server = lab.udp_server("pod2", 5353, false)?;
    let socket = lab
        .namespace("pod1")?
        .within(|| UdpSocket::bind((src, 0)).context("bind a socket"))?;
    for number in 0..count {
        socket
            .send_to(&[u8::try_from(number % 256)?; 1_000], (POD2, 5353))
            .context("send a datagram")?;
    }
    // The last of them may be on their way, or wait in a queue: who listens no longer would reject them.
    std::thread::sleep(unhurried(std::time::Duration::from_millis(500)));
    server.stop().map(drop)
}

/// A socket that sends what follows an IPv4 header, or with `IPPROTO_RAW` packets as they are. Its addresses are those of a
/// UDP socket.
pub(crate) fn raw_socket(protocol: libc::c_int) -> Result<UdpSocket> {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    ensure!(fd >= 0, "no raw socket: {}", std::io::Error::last_os_error());
    // SAFETY: it was just opened, and is nobody else's.
    Ok(UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}
