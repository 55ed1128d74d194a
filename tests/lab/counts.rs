//! Numbers: what sockets counted is what a capture on the pod's interface shows.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use calitrace_tests::traffic::tcpdump;
use calitrace_tests::{Lab, Options};

pub(crate) fn ping() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("ping.pcap");
    let capture = lab.tcpdump("pod1", "eth0", &file, "icmp")?;
    let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 25, &[])?;
    ensure!(
        (ping.sent, ping.received, ping.replies.len()) == (25, 25, 25),
        "{}",
        ping.raw
    );
    ensure!(
        ping.replies.iter().all(|(_, ttl, _)| *ttl == 62),
        "two routers:\n{}",
        ping.raw
    );
    ensure!(capture.stop()? == 50);
    ensure!(tcpdump::read(&file, "icmp[icmptype] = icmp-echo")?.len() == 25);
    Ok(())
}

pub(crate) fn udp() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    let folder = tempfile::tempdir()?;
    let to = SocketAddr::from((lab.pod("pod2")?.address, 7000));
    let server = lab.udp_server("pod2", 7000, true)?;
    let (out, back) = (folder.path().join("out.pcap"), folder.path().join("back.pcap"));
    let capture = lab.tcpdump("pod1", "eth0", &out, "udp and dst port 7000")?;
    let answers = lab.tcpdump("pod1", "eth0", &back, "udp and src port 7000")?;
    let exchanged = lab.udp_exchange("pod1", to, 40, 200)?;
    let flood = lab.udp_flood("pod1", to, 5000, 64)?;
    let served = server.stop()?;
    ensure!(exchanged.sent == 40 && exchanged.received == 40, "{exchanged:?}");
    // The flood's sender does not listen, but its socket is open until the last is sent.
    ensure!(capture.stop()? == 40 + flood, "sent {flood}");
    ensure!(
        served.received <= 40 + flood && served.received == served.sent,
        "{served:?}"
    );
    answers.stop()?;
    Ok(())
}

pub(crate) fn tcp_without_offloads() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    lab.offloads(false)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("tcp.pcap");
    let server = lab.http_server("pod2", 8080)?;
    let capture = lab.tcpdump("pod1", "eth0", &file, "tcp")?;
    let address = SocketAddr::from((lab.pod("pod2")?.address, 8080));
    let client = lab.http_get("pod1", address, 500_000)?;
    let served = server.stop()?;
    capture.stop()?;
    let out = tcpdump::read(&file, "dst port 8080")?.len();
    let back = tcpdump::read(&file, "src port 8080")?.len();
    let counted = (
        client.segments.segments_out as usize,
        client.segments.segments_in as usize,
    );
    ensure!(
        counted == (out, back),
        "the client counted {:?}, captured {out}, {back}",
        client.segments
    );
    // The socket that was accepted did not send the SYN-ACK itself, nor see a handshake that was repeated
    // before it existed, as happens on a slow machine.
    let accepted = &served[0].segments;
    let repeated = (client.segments.retransmitted + accepted.retransmitted) as usize;
    let unseen = (
        back.checked_sub(accepted.segments_out as usize + 1),
        out.checked_sub(accepted.segments_in as usize),
    );
    ensure!(
        matches!(unseen, (Some(sent), Some(received)) if sent <= repeated && received <= repeated),
        "the server counted {accepted:?}, captured {back}, {out}"
    );
    ensure!(served[0].sent == client.received && served[0].received == client.sent);
    Ok(())
}
