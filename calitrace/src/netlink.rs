//! One netlink socket inside a namespace: requests and their answers. Knows message framing, errors and retries;
//! not what the messages mean.

use std::{fmt::Debug, io, marker::PhantomData, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE},
};

use crate::netns::Handle;

/// The kernel fills a dump's messages up to the size of the reader's buffer, 32 KiB at most
/// (`netlink_recvmsg`, `net/netlink/af_netlink.c`, Linux 6.18).
const BUFFER_BYTES: usize = 64 * 1024;

/// How often a dump is repeated that changed under the kernel's hands.
const DUMP_ATTEMPTS: u32 = 8;

/// Opens a route netlink socket that belongs to `handle`'s namespace for its whole life.
pub(crate) fn open(handle: &Handle) -> Result<Socket> {
    open_protocol(handle, NETLINK_ROUTE)
}

fn open_protocol(handle: &Handle, protocol: isize) -> Result<Socket> {
    handle.run(|| bound(protocol))
}

fn bound(protocol: isize) -> Result<Socket> {
    let mut socket = Socket::new(protocol).context("open a netlink socket")?;
    socket.bind_auto().context("bind a netlink socket")?;
    Ok(socket)
}

/// A socket for requests in messages of the type `M`.
#[derive(Debug)]
pub(crate) struct Connection<M = RouteNetlinkMessage> {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    messages: PhantomData<M>,
}

impl Connection {
    /// Opens a route netlink socket in `handle`'s namespace.
    pub(crate) fn open(handle: &Handle) -> Result<Self> {
        Self::of(open_protocol(handle, NETLINK_ROUTE)?)
    }

    /// Opens a route netlink socket in the calling thread's namespace.
    pub(crate) fn here() -> Result<Self> {
        Self::of(bound(NETLINK_ROUTE)?)
    }
}

impl<M: NetlinkSerializable + NetlinkDeserializable + Clone + Debug> Connection<M> {
    /// Opens a generic netlink socket in `handle`'s namespace.
    pub(crate) fn generic(handle: &Handle) -> Result<Self> {
        Self::of(open_protocol(handle, NETLINK_GENERIC)?)
    }

    /// Opens a netfilter netlink socket in the calling thread's namespace.
    pub(crate) fn netfilter() -> Result<Self> {
        Self::of(bound(NETLINK_NETFILTER)?)
    }

    fn of(socket: Socket) -> Result<Self> {
        socket
            .connect(&SocketAddr::new(0, 0))
            .context("connect a netlink socket to the kernel")?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER_BYTES],
            messages: PhantomData,
        })
    }

    /// Everything of one kind; `what` names it in errors. Repeated when the kernel says that the answer is inconsistent;
    /// the last attempt's answer is taken as it is, because a later notification will correct it.
    pub(crate) fn dump(&mut self, request: &M, what: &str) -> Result<Vec<M>> {
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

    fn try_dump(&mut self, request: &M) -> Result<(Vec<M>, bool)> {
        self.send(request.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut messages, mut consistent) = (Vec::new(), true);
        loop {
            let length = self.receive()?;
            for message in Framed::<M>::new(&self.buffer[..length]) {
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
    pub(crate) fn get(&mut self, request: M) -> Result<io::Result<M>> {
        self.send(request, NLM_F_REQUEST)?;
        loop {
            let length = self.receive()?;
            for message in Framed::<M>::new(&self.buffer[..length]) {
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

    /// Has the kernel change something.
    pub(crate) fn change(&mut self, request: M) -> Result<()> {
        self.send(request, NLM_F_REQUEST | NLM_F_ACK)?;
        loop {
            let length = self.receive()?;
            for (header, message) in Framed::<M>::new(&self.buffer[..length]).flatten() {
                if header.sequence_number != self.sequence {
                    continue;
                }
                if let NetlinkPayload::Error(answer) = message {
                    return match answer.code {
                        None => Ok(()),
                        Some(_) => Err(answer.to_io().into()),
                    };
                }
            }
        }
    }

    fn send(&mut self, message: M, flags: u16) -> Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
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
struct Framed<'a, M> {
    rest: &'a [u8],
    messages: PhantomData<M>,
}

impl<'a, M> Framed<'a, M> {
    fn new(datagram: &'a [u8]) -> Self {
        Self {
            rest: datagram,
            messages: PhantomData,
        }
    }
}

impl<M: NetlinkDeserializable> Iterator for Framed<'_, M> {
    type Item = Option<(NetlinkHeader, NetlinkPayload<M>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let length = u32::from_ne_bytes(*self.rest.first_chunk()?) as usize;
        let message = self.rest.get(..length).filter(|_| length >= 16)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(match NetlinkMessage::<M>::deserialize(message) {
            Ok(message) => Some(message.into_parts()),
            Err(error) => {
                log::warn!("a netlink message is passed over: {error}");
                None
            }
        })
    }
}
