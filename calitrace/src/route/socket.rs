//! One rtnetlink socket inside a namespace: requests and their answers. Knows message framing, errors and retries;
//! not what the messages mean.

use std::{io, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::netns::Handle;

/// The kernel fills a dump's messages up to the size of the reader's buffer, 32 KiB at most
/// (`netlink_recvmsg`, `net/netlink/af_netlink.c`, Linux 6.18).
const BUFFER_BYTES: usize = 64 * 1024;

/// How often a dump is repeated that changed under the kernel's hands.
const DUMP_ATTEMPTS: u32 = 8;

/// Opens a route netlink socket that belongs to `handle`'s namespace for its whole life.
pub(super) fn open(handle: &Handle) -> Result<Socket> {
    handle.run(|| {
        let mut socket = Socket::new(NETLINK_ROUTE).context("open a route netlink socket")?;
        socket.bind_auto().context("bind a route netlink socket")?;
        Ok(socket)
    })
}

/// A socket for requests.
#[derive(Debug)]
pub(super) struct Connection {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Connection {
    /// Opens it in `handle`'s namespace.
    pub(super) fn open(handle: &Handle) -> Result<Self> {
        let socket = open(handle)?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .context("connect a route netlink socket to the kernel")?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// Everything of one kind; `what` names it in errors. Repeated when the kernel says that the answer is inconsistent;
    /// the last attempt's answer is taken as it is, because a later notification will correct it.
    pub(super) fn dump(
        &mut self,
        request: &RouteNetlinkMessage,
        what: &str,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        for _ in 1..DUMP_ATTEMPTS {
            let (messages, consistent) = self
                .try_dump(request)
                .with_context(|| format!("list the {what} over netlink"))?;
            if consistent {
                return Ok(messages);
            }
        }
        Ok(self
            .try_dump(request)
            .with_context(|| format!("list the {what} over netlink"))?
            .0)
    }

    fn try_dump(&mut self, request: &RouteNetlinkMessage) -> Result<(Vec<RouteNetlinkMessage>, bool)> {
        self.send(request.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut messages, mut consistent) = (Vec::new(), true);
        loop {
            let length = self.receive()?;
            for message in Framed::new(&self.buffer[..length]) {
                let Some((header, message)) = message else {
                    continue;
                };
                if header.sequence_number != self.sequence {
                    continue;
                }
                consistent &= header.flags & NLM_F_DUMP_INTR == 0;
                match message {
                    NetlinkPayload::InnerMessage(message) => messages.push(message),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code).into());
                    }
                    NetlinkPayload::Done(_) => return Ok((messages, consistent)),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io().into()),
                    NetlinkPayload::Overrun(_) => bail!("the kernel's answer was cut short"),
                    _ => {}
                }
            }
        }
    }

    /// One answer to one question; the inner error is the kernel's refusal.
    pub(super) fn get(&mut self, request: RouteNetlinkMessage) -> Result<io::Result<RouteNetlinkMessage>> {
        self.send(request, NLM_F_REQUEST)?;
        loop {
            let length = self.receive()?;
            for message in Framed::new(&self.buffer[..length]) {
                let Some((header, message)) = message else {
                    bail!("the kernel's answer cannot be read")
                };
                if header.sequence_number != self.sequence {
                    continue;
                }
                match message {
                    NetlinkPayload::InnerMessage(message) => return Ok(Ok(message)),
                    NetlinkPayload::Error(error) => return Ok(Err(error.to_io())),
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).context("send a netlink request")?;
        Ok(())
    }

    fn receive(&mut self) -> Result<usize> {
        loop {
            match self.socket.recv(&mut self.buffer.as_mut_slice(), 0) {
                Ok(length) => return Ok(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("read netlink socket {}", self.socket.as_raw_fd()));
                }
            }
        }
    }
}

/// The messages in a datagram. `None` stands for one that cannot be decoded (a newer kernel's attribute): it is passed
/// over, so that one odd device does not hide all others.
pub(super) struct Framed<'a> {
    rest: &'a [u8],
}

impl<'a> Framed<'a> {
    pub(super) fn new(datagram: &'a [u8]) -> Self {
        Self { rest: datagram }
    }
}

impl Iterator for Framed<'_> {
    type Item = Option<(NetlinkHeader, NetlinkPayload<RouteNetlinkMessage>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let length = u32::from_ne_bytes(*self.rest.first_chunk()?) as usize;
        let message = self.rest.get(..length).filter(|_| length >= 16)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
                Ok(message) => Some(message.into_parts()),
                Err(error) => {
                    log::warn!("a netlink message is passed over: {error}");
                    None
                }
            },
        )
    }
}
