//! UDP datagrams from and to plain sockets, which are counted where they are sent and received.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::Lab;
use crate::wait::patience;

/// Datagrams one socket sent and received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpCounts {
    /// Datagrams the kernel took for sending.
    pub sent: u64,
    /// Datagrams read.
    pub received: u64,
}

/// A socket in a part of the lab that reads what comes, and sends it back if it is to.
#[derive(Debug)]
pub struct UdpServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<UdpCounts>>>,
}

impl Lab {
    /// Starts a UDP server on a port of a part of the lab, for IPv4 and, where there is any, IPv6.
    pub fn udp_server(&self, part: &str, port: u16, echo: bool) -> Result<UdpServer> {
        let socket = self.namespace(part)?.within(|| {
            UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
                .or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))
                .with_context(|| format!("cannot bind UDP port {port} in {part}"))
        })?;
        enlarge_queue(&socket)?;
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .context("cannot set a time limit")?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = thread::spawn(move || serve(&socket, echo, &asked));
        Ok(UdpServer {
            stop,
            thread: Some(thread),
        })
    }

    /// Sends `count` datagrams of `size` bytes from a part of the lab, each after the answer to the one
    /// before. An answer that does not come within the usual patience is an error.
    pub fn udp_exchange(&self, part: &str, to: SocketAddr, count: u64, size: usize) -> Result<UdpCounts> {
        self.namespace(part)?.within(|| {
            let socket = client(to)?;
            socket
                .set_read_timeout(Some(patience()))
                .context("cannot set a time limit")?;
            let (mut question, mut answer) = (vec![0; size.max(8)], vec![0; 65536]);
            let mut counts = UdpCounts::default();
            for number in 0..count {
                question[..8].copy_from_slice(&number.to_be_bytes());
                socket
                    .send(&question)
                    .with_context(|| format!("cannot send to {to} from {part}"))?;
                counts.sent += 1;
                let length = socket
                    .recv(&mut answer)
                    .with_context(|| format!("no answer from {to} to {part}"))?;
                ensure!(
                    answer[..length] == question[..],
                    "the answer from {to} is another datagram"
                );
                counts.received += 1;
            }
            Ok(counts)
        })
    }

    /// Sends `count` datagrams of `size` bytes from a part of the lab, as fast as it goes and without
    /// waiting for anything, and returns how many the kernel took.
    pub fn udp_flood(&self, part: &str, to: SocketAddr, count: u64, size: usize) -> Result<u64> {
        self.namespace(part)?.within(|| {
            let socket = client(to)?;
            let mut datagram = vec![0; size.max(8)];
            let mut sent = 0;
            for number in 0..count {
                datagram[..8].copy_from_slice(&number.to_be_bytes());
                match socket.send(&datagram) {
                    Ok(_) => sent += 1,
                    // A full queue, or the port unreachable that answered an earlier datagram.
                    Err(error)
                        if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused)
                            || error.raw_os_error() == Some(libc::ENOBUFS) => {}
                    Err(error) => {
                        return Err(error).with_context(|| format!("cannot send to {to} from {part}"));
                    }
                }
            }
            Ok(sent)
        })
    }
}

impl UdpServer {
    /// Reads what has arrived, stops, and returns the counts.
    pub fn stop(mut self) -> Result<UdpCounts> {
        self.end().unwrap_or_else(|| Ok(UdpCounts::default()))
    }

    fn end(&mut self) -> Option<Result<UdpCounts>> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take()?.join();
        Some(joined.unwrap_or_else(|_| Err(anyhow!("the UDP server panicked"))))
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        // Its counts are lost with it; whoever wanted them called `stop`.
        let _ = self.end();
    }
}

fn serve(socket: &UdpSocket, echo: bool, stop: &AtomicBool) -> Result<UdpCounts> {
    let mut counts = UdpCounts::default();
    let mut buffer = vec![0; 65536];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                counts.received += 1;
                if echo {
                    socket
                        .send_to(&buffer[..length], from)
                        .with_context(|| format!("cannot answer {from}"))?;
                    counts.sent += 1;
                }
            }
            // The queue is empty: only then is it asked whether to go on.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(counts);
                }
            }
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
}

fn client(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).context("cannot bind a UDP socket")?;
    socket
        .set_broadcast(true)
        .context("cannot let a UDP socket send to everybody")?;
    socket
        .connect(to)
        .with_context(|| format!("cannot connect a UDP socket to {to}"))?;
    Ok(socket)
}

/// 16 MiB of receive queue, beyond what the machine allows others, so that a burst is not lost at the
/// socket.
fn enlarge_queue(socket: &UdpSocket) -> Result<()> {
    let size: libc::c_int = 16 << 20;
    // SAFETY: the kernel reads the four bytes of an integer that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const size).cast(),
            libc::socklen_t::try_from(size_of::<libc::c_int>()).context("the size of an integer")?,
        )
    };
    ensure!(
        result == 0,
        "cannot set the receive queue: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}
