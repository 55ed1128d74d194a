//! What the receiver's own socket drops: in the sentence's words, and counted against the receiver's kernel.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use calitrace_tests::{Lab, needs::has_drop_reason, unhurried};

use crate::{
    Test,
    counts::same,
    test,
    traced::{POD1, POD2, all, lab, raw_socket, says, traced},
};

pub(crate) const TESTS: &[Test] = &[
    test("a_socket_whose_buffer_is_full", full_buffer),
    test("a_segment_that_comes_twice", twice),
];

const PORT: u16 = 5353;

/// A server that does not read. The first datagrams, for which there is room, are the twin.
fn full_buffer() -> Result<()> {
    const COUNT: u64 = 30;
    let lab = lab()?;
    let server = lab
        .namespace("pod2")?
        .within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("bind a socket"))?;
    // The kernel makes it as small as it may be (`SOCK_MIN_RCVBUF`, include/net/sock.h).
    set(&server, libc::SO_RCVBUF, 1)?;
    let before = refused(&lab)?;
    let (traces, text) = traced(&lab, "udp", POD1, |lab| {
        let sent = lab.udp_flood("pod1", SocketAddr::from((POD2, PORT)), COUNT, 1_000)?;
        same("datagrams", COUNT, sent)
    })?;
    let refused = refused(&lab)? - before;
    ensure!(0 < refused && refused < COUNT, "{refused} of {COUNT} refused");
    let (dropped, delivered): (Vec<_>, Vec<_>) = traces
        .into_iter()
        .partition(|trace| trace["verdict"] == "dropped");
    same("datagrams the socket refused", dropped.len() as u64, refused)?;
    same("datagrams it took", delivered.len() as u64, COUNT - refused)?;
    all(&delivered, "delivered")?;
    for trace in &dropped {
        let drop = &trace["drop"];
        ensure!(
            drop["node"] == "minikube-m02" && drop["interface"] == "cali79f33e4263e",
            "{trace:#}"
        );
    }
    if has_drop_reason("SOCKET_RCVBUFF") {
        says(
            &text,
            "✗ dropped on node minikube-m02 at cali79f33e4263e: the receiver's socket buffer is full, SOCKET_RCVBUFF at ",
        )?;
    }
    Ok(())
}

/// The receiver has it already: nothing is lost, and the sentence says so. The twin is the segment that came first.
fn twice() -> Result<()> {
    let lab = lab()?;
    // So that its checksum is in the capture.
    lab.offloads(false)?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let file = folder.path().join("pod1.pcap");
    let listener = lab
        .namespace("pod2")?
        .within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("listen"))?;
    let mut connection = None;
    let (first, _) = traced(&lab, "tcp", POD1, |lab| {
        let capture = lab.tcpdump("minikube", &lab.pod("pod1")?.interface, &file, "tcp")?;
        let mut client = lab
            .namespace("pod1")?
            .within(|| TcpStream::connect((POD2, PORT)).context("connect"))?;
        let (mut server, _) = listener.accept().context("accept")?;
        client.write_all(b"once").context("write")?;
        server.read_exact(&mut [0; 4]).context("read")?;
        connection = Some((client, server));
        std::thread::sleep(unhurried(Duration::from_millis(500)));
        capture.stop().map(drop)
    })?;
    all(&first, "delivered")?;
    let segment = with_data(&fs::read(&file).context("read the capture")?)?;
    let (again, text) = traced(&lab, "tcp", POD1, |lab| {
        let socket = lab.namespace("pod1")?.within(|| raw_socket(libc::IPPROTO_RAW))?;
        socket
            .send_to(&segment, SocketAddr::from((POD2, 0)))
            .context("send a segment again")?;
        std::thread::sleep(unhurried(Duration::from_millis(500)));
        Ok(())
    })?;
    drop(connection);
    ensure!(again.len() == 1, "{again:#?}");
    // Before there were reasons, TCP freed what it dropped unseen (`tcp_drop`, `net/ipv4/tcp_input.c`, 5.10).
    if !has_drop_reason("TCP_OLD_DATA") {
        return all(&again, "delivered");
    }
    all(&again, "dropped")?;
    let drop = &again[0]["drop"];
    ensure!(
        drop["node"] == "minikube-m02" && drop["interface"] == "cali79f33e4263e",
        "{:#}",
        again[0]
    );
    ensure!(text.contains("1 packet, 0 lost, 1 superfluous"), "{text}");
    says(
        &text,
        "✗ dropped on node minikube-m02 at cali79f33e4263e: it came twice: the receiver has this data, nothing is lost, \
         TCP_OLD_DATA at ",
    )
}

/// Datagrams that sockets of pod 2 had no room for: `RcvbufErrors` (`UDP_MIB_RCVBUFERRORS`, net/ipv4/proc.c).
fn refused(lab: &Lab) -> Result<u64> {
    let text = calitrace_tests::command::text(&calitrace_tests::command::run(
        &mut lab.exec("pod2", ["cat", "/proc/net/snmp"])?,
    )?);
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = lines.next().zip(lines.next()).context("Udp: in snmp")?;
    let mut counters = names.split(' ').zip(values.split(' '));
    let (_, value) = counters
        .find(|(name, _)| *name == "RcvbufErrors")
        .context("RcvbufErrors")?;
    value.parse().with_context(|| format!("RcvbufErrors {value}"))
}

/// The IPv4 packet of the first segment with data in a capture (pcap of Ethernet frames, in this machine's byte order).
fn with_data(capture: &[u8]) -> Result<Vec<u8>> {
    let mut rest = capture.get(24..).context("a capture's header")?;
    while let Some((header, frames)) = rest.split_at_checked(16) {
        let length = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let (frame, next) = frames
            .split_at_checked(length.try_into()?)
            .context("a whole frame")?;
        rest = next;
        let packet = frame.get(14..).context("an IPv4 packet")?;
        let (ip, total) = (
            usize::from(packet[0] & 15) * 4,
            usize::from(u16::from_be_bytes([packet[2], packet[3]])),
        );
        let tcp = usize::from(packet[ip + 12] >> 4) * 4;
        if total > ip + tcp {
            return Ok(packet[..total].to_vec());
        }
    }
    bail!("no segment with data was captured")
}

fn set(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) -> Result<()> {
    // SAFETY: the kernel reads the four bytes of an integer that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            libc::socklen_t::try_from(size_of::<libc::c_int>())?,
        )
    };
    ensure!(
        result == 0,
        "set a socket option: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}
