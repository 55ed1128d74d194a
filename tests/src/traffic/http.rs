//! A small HTTP server and client on plain sockets, which report what their sockets counted.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};

use crate::Lab;
use crate::wait::{patience, wait_until};

/// What a TCP socket counted over its whole life (`struct tcp_info` in `include/uapi/linux/tcp.h`).
///
/// The side that accepted the connection counts the SYN but not the SYN-ACK, which was sent before its
/// socket existed (`tcp_create_openreq_child` in `net/ipv4/tcp_minisocks.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpCounts {
    /// Segments sent, each of a segmentation offload counted.
    pub segments_out: u32,
    /// Segments received.
    pub segments_in: u32,
    /// Segments sent again.
    pub retransmitted: u32,
    /// Bytes of data sent, those sent again counted again (4.19 and later).
    pub bytes_out: u64,
}

/// One connection, as one of its ends saw it.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Bytes read, header and body.
    pub received: u64,
    /// Bytes written, header and body.
    pub sent: u64,
    /// What the socket counted, read after the connection was closed on both sides.
    pub segments: TcpCounts,
}

/// A server in a part of the lab. `GET /N` is answered with a body of N bytes; each connection carries one
/// request.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
    transfers: Arc<Mutex<Vec<Result<Transfer>>>>,
}

impl Lab {
    /// Starts an HTTP server on a port of a part of the lab, for IPv4 and, where there is any, IPv6.
    pub fn http_server(&self, part: &str, port: u16) -> Result<HttpServer> {
        let namespace = self.namespace(part)?;
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = namespace.within(|| {
            TcpListener::bind(address)
                .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
                .with_context(|| format!("cannot listen on port {port} in {part}"))
        })?;
        let transfers = Arc::new(Mutex::new(Vec::new()));
        let accepting = listener.try_clone().context("cannot share a listening socket")?;
        let results = Arc::clone(&transfers);
        // A socket stays in its namespace; the thread need not be there.
        let thread = thread::spawn(move || accept(&accepting, &results));
        Ok(HttpServer {
            listener,
            thread: Some(thread),
            transfers,
        })
    }

    /// Asks an HTTP server for a body of `size` bytes, from a part of the lab, and checks that it came.
    pub fn http_get(&self, part: &str, server: SocketAddr, size: usize) -> Result<Transfer> {
        self.namespace(part)?
            .within(|| get(server, size).with_context(|| format!("HTTP from {part} to {server}")))
    }
}

impl HttpServer {
    /// Stops accepting and returns all transfers, once their connections are closed.
    pub fn stop(mut self) -> Result<Vec<Transfer>> {
        self.end()?;
        let mut transfers = self.transfers.lock().unwrap_or_else(PoisonError::into_inner);
        transfers.drain(..).collect()
    }

    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        // Wakes the thread that waits in accept(2), with EINVAL.
        // SAFETY: a system call on a descriptor this value owns.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RD) };
        thread
            .join()
            .map_err(|_panic| anyhow!("the HTTP server panicked"))
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        // Its transfers are lost with it; whoever wanted them called `stop`.
        let _ = self.end();
    }
}

fn accept(listener: &TcpListener, results: &Mutex<Vec<Result<Transfer>>>) {
    thread::scope(|scope| {
        while let Ok((stream, peer)) = listener.accept() {
            scope.spawn(move || {
                let transfer = serve(stream, peer);
                results
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(transfer);
            });
        }
    });
}

fn serve(stream: TcpStream, peer: SocketAddr) -> Result<Transfer> {
    prepare(&stream)?;
    let mut reader = BufReader::new(stream);
    let mut received = 0;
    let mut request = String::new();
    loop {
        let mut line = String::new();
        received += reader.read_line(&mut line).context("cannot read a request")?;
        if line.trim().is_empty() {
            break;
        }
        request += &line;
    }
    let path = request
        .split(' ')
        .nth(1)
        .and_then(|path| path.trim_start_matches('/').parse::<usize>().ok());
    let body = vec![b'.'; path.unwrap_or(0)];
    let mut response = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    response.extend_from_slice(&body);
    reader
        .get_mut()
        .write_all(&response)
        .context("cannot write a response")?;
    reader
        .get_ref()
        .shutdown(Shutdown::Write)
        .context("cannot end a response")?;
    let rest = reader
        .read_to_end(&mut Vec::new())
        .context("cannot read the end of a connection")?;
    finish(reader.get_ref(), peer, received + rest, response.len())
}

fn get(server: SocketAddr, size: usize) -> Result<Transfer> {
    let mut stream = TcpStream::connect_timeout(&server, patience()).context("cannot connect")?;
    prepare(&stream)?;
    let request = format!("GET /{size} HTTP/1.1\r\nHost: {}\r\n\r\n", server.ip());
    stream
        .write_all(request.as_bytes())
        .context("cannot send a request")?;
    let mut response = Vec::new();
    stream
        .read_to_end(&mut response)
        .context("cannot read a response")?;
    let end = response
        .windows(4)
        .position(|part| part == b"\r\n\r\n")
        .context("a response without a header")?;
    let body = response.len() - end - 4;
    ensure!(response.starts_with(b"HTTP/1.1 200 "), "the server refused");
    ensure!(body == size, "a body of {body} bytes instead of {size}");
    stream.shutdown(Shutdown::Write).context("cannot close")?;
    finish(&stream, server, response.len(), request.len())
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream
        .set_read_timeout(Some(patience()))
        .context("cannot set a time limit")?;
    stream
        .set_write_timeout(Some(patience()))
        .context("cannot set a time limit")
}

/// Waits until both sides have acknowledged the end, so that the counts are final.
fn finish(stream: &TcpStream, peer: SocketAddr, received: usize, sent: usize) -> Result<Transfer> {
    // TCP_CLOSE in include/net/tcp_states.h; a socket in TIME_WAIT says so, too.
    const CLOSED: u8 = 7;
    let local = stream.local_addr().context("a socket without an address")?;
    let segments = wait_until("the end of a TCP connection", || {
        let (state, counts) = tcp_info(stream.as_raw_fd())?;
        Ok((state == CLOSED).then_some(counts))
    })?;
    Ok(Transfer {
        local,
        peer,
        received: received as u64,
        sent: sent as u64,
        segments,
    })
}

fn tcp_info(socket: RawFd) -> Result<(u8, TcpCounts)> {
    let mut info = [0_u8; 256];
    let mut size = libc::socklen_t::try_from(info.len()).context("a buffer of 256 bytes")?;
    // SAFETY: the kernel writes at most `size` bytes into the buffer of that size.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    ensure!(
        result == 0,
        "cannot read TCP_INFO: {}",
        std::io::Error::last_os_error()
    );
    let number = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    ensure!(size >= 208, "TCP_INFO has {size} bytes: a kernel before 4.19");
    // tcpi_state, tcpi_total_retrans, tcpi_segs_out and tcpi_segs_in (4.2 and later), tcpi_bytes_sent.
    let counts = TcpCounts {
        retransmitted: number(100),
        segments_out: number(136),
        segments_in: number(140),
        bytes_out: u64::from_ne_bytes(std::array::from_fn(|byte| info[200 + byte])),
    };
    Ok((info[0], counts))
}
