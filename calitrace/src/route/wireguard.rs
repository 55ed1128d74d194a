//! The peers of a `WireGuard` device, asked over generic netlink (include/uapi/linux/wireguard.h, Linux 6.18). Reads what
//! goes to which peer and where the peer is; keys are passed over.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

use crate::netns::Handle;

/// `NLMSG_ERROR`, `NLMSG_DONE` (include/uapi/linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `NLM_F_REQUEST`, and with it `NLM_F_DUMP`.
const REQUEST: u16 = 1;
const DUMP: u16 = 0x301;
/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY` and two of its attributes (include/uapi/linux/genetlink.h).
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `WG_CMD_GET_DEVICE`, and attributes of devices, peers and allowed addresses.
const GET_DEVICE: u8 = 0;
const DEVICE_IFINDEX: u16 = 1;
const DEVICE_PEERS: u16 = 8;
const PEER_PUBLIC_KEY: u16 = 1;
const PEER_ENDPOINT: u16 = 4;
const PEER_ALLOWED: u16 = 9;
const ALLOWED_ADDRESS: u16 = 2;
const ALLOWED_PREFIX: u16 = 3;

/// Length of the headers of netlink and generic netlink.
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
/// The kernel's dumps are made in pieces of up to 32 KiB.
const BUFFER_BYTES: usize = 64 * 1024;

/// A peer of a `WireGuard` device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The device.
    pub ifindex: u32,
    /// Where its packets are sent, if that is known.
    pub endpoint: Option<IpAddr>,
    /// What is sent to it.
    pub allowed: Vec<IpNet>,
    /// Tells a peer that comes in several pieces.
    key: Vec<u8>,
}

impl Peer {
    /// A peer as the kernel would tell it.
    pub fn new(ifindex: u32, endpoint: Option<IpAddr>, allowed: Vec<IpNet>) -> Self {
        Self {
            ifindex,
            endpoint,
            allowed,
            key: Vec::new(),
        }
    }
}

/// The peers of a device. Needs `CAP_NET_ADMIN`.
pub(super) fn peers(handle: &Handle, ifindex: u32) -> Result<Vec<Peer>> {
    let socket = handle.run(|| {
        let mut socket = Socket::new(NETLINK_GENERIC).context("open a generic netlink socket")?;
        socket.bind_auto().context("bind a generic netlink socket")?;
        Ok(socket)
    })?;
    socket
        .connect(&SocketAddr::new(0, 0))
        .context("connect a generic netlink socket to the kernel")?;
    let mut family = None;
    let name = attribute(FAMILY_NAME, b"wireguard\0");
    ask(&socket, CONTROLLER, REQUEST, GET_FAMILY, &name, |body| {
        family = find(body, FAMILY_ID).and_then(|id| Some(u16::from_ne_bytes(*id.first_chunk()?)));
    })
    .context("ask for the generic netlink family of WireGuard")?;
    let Some(family) = family else {
        bail!("the kernel did not tell the generic netlink family of WireGuard");
    };
    let mut peers = Vec::new();
    let device = attribute(DEVICE_IFINDEX, &ifindex.to_ne_bytes());
    ask(&socket, family, DUMP, GET_DEVICE, &device, |body| {
        for piece in find(body, DEVICE_PEERS).into_iter().flat_map(nested) {
            take(&mut peers, ifindex, piece);
        }
    })
    .with_context(|| format!("ask for the WireGuard peers of device {ifindex}"))?;
    Ok(peers)
}

/// A peer, or more of what is allowed to the last one: what does not fit into one message comes in the next.
fn take(peers: &mut Vec<Peer>, ifindex: u32, piece: &[u8]) {
    let key = find(piece, PEER_PUBLIC_KEY).unwrap_or_default();
    let allowed = find(piece, PEER_ALLOWED)
        .into_iter()
        .flat_map(nested)
        .filter_map(prefix);
    match peers.last_mut().filter(|last| last.key == key) {
        Some(last) => last.allowed.extend(allowed),
        None => peers.push(Peer {
            ifindex,
            endpoint: find(piece, PEER_ENDPOINT).and_then(socket_address),
            allowed: allowed.collect(),
            key: key.to_vec(),
        }),
    }
}

fn prefix(attributes: &[u8]) -> Option<IpNet> {
    let address = match find(attributes, ALLOWED_ADDRESS)? {
        &[a, b, c, d] => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        bytes => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    };
    IpNet::new(address, *find(attributes, ALLOWED_PREFIX)?.first()?).ok()
}

/// The address in a `struct sockaddr_in` or `struct sockaddr_in6`.
fn socket_address(bytes: &[u8]) -> Option<IpAddr> {
    let family = i32::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    match family {
        libc::AF_INET => Some(IpAddr::from(*bytes.get(4..)?.first_chunk::<4>()?)),
        libc::AF_INET6 => Some(IpAddr::from(*bytes.get(8..)?.first_chunk::<16>()?)),
        _ => None,
    }
}

/// Sends a request and hands the attributes of each answer on, up to the last one.
fn ask(
    socket: &Socket,
    kind: u16,
    flags: u16,
    command: u8,
    attributes: &[u8],
    mut answer: impl FnMut(&[u8]),
) -> Result<()> {
    let length = u32::try_from(HEADER + GENERIC_HEADER + attributes.len()).unwrap_or(u32::MAX);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    // Sequence number and port: one request at a time, on a socket of its own.
    request.extend([0; 8]);
    request.extend([command, 1, 0, 0]);
    request.extend(attributes);
    socket
        .send(&request, 0)
        .context("send a generic netlink request")?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = match socket.recv(&mut buffer.as_mut_slice(), 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.context("read a generic netlink socket")?,
        };
        let mut rest = &buffer[..length];
        while let Some((kind, body, after)) = message(rest) {
            match kind {
                DONE => return Ok(()),
                ERROR => {
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    if code == 0 {
                        return Ok(());
                    }
                    return Err(io::Error::from_raw_os_error(-code)).context("the kernel refused");
                }
                _ => answer(body.get(GENERIC_HEADER..).unwrap_or_default()),
            }
            rest = after;
        }
        // Without a dump there is one answer.
        if flags == REQUEST {
            return Ok(());
        }
    }
}

/// Type and body of the first message, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    Some((
        kind,
        body,
        bytes.get(length.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Types and values of a row of attributes.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The two highest bits say that it is nested, or in network byte order.
        Some((kind & 0x3fff, value))
    })
}

fn nested(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    attributes(bytes).map(|(_, value)| value)
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(key: u8, endpoint: Option<[u8; 4]>, allowed: &[([u8; 4], u8)]) -> Vec<u8> {
        let mut bytes = attribute(PEER_PUBLIC_KEY, &[key; 32]);
        if let Some(endpoint) = endpoint {
            let family = u16::try_from(libc::AF_INET).unwrap().to_ne_bytes();
            let address = [&family[..], &51820_u16.to_be_bytes(), &endpoint, &[0; 8]].concat();
            bytes.extend(attribute(PEER_ENDPOINT, &address));
        }
        let list: Vec<u8> = allowed
            .iter()
            .flat_map(|(address, bits)| {
                let one = [
                    attribute(ALLOWED_ADDRESS, address),
                    attribute(ALLOWED_PREFIX, &[*bits]),
                ]
                .concat();
                attribute(0x8000, &one)
            })
            .collect();
        bytes.extend(attribute(PEER_ALLOWED | 0x8000, &list));
        bytes
    }

    #[test]
    fn a_peer_that_comes_in_two_pieces_is_one() {
        let mut peers = Vec::new();
        for piece in [
            peer(1, Some([192, 168, 49, 3]), &[([10, 244, 205, 192], 26)]),
            peer(1, None, &[([10, 244, 205, 192], 32)]),
            peer(2, Some([192, 168, 49, 4]), &[]),
        ] {
            take(&mut peers, 7, &piece);
        }
        assert_eq!(peers.len(), 2);
        assert_eq!(peers[0].endpoint, Some([192, 168, 49, 3].into()));
        let allowed: Vec<String> = peers[0].allowed.iter().map(IpNet::to_string).collect();
        assert_eq!(allowed, ["10.244.205.192/26", "10.244.205.192/32"]);
        assert_eq!(
            (peers[1].endpoint, peers[1].allowed.len()),
            (Some([192, 168, 49, 4].into()), 0)
        );
    }

    #[test]
    fn what_is_cut_off_is_no_attribute() {
        let whole = peer(1, Some([192, 168, 49, 3]), &[([10, 244, 205, 192], 26)]);
        for length in 0..whole.len() {
            let mut peers = Vec::new();
            take(&mut peers, 7, &whole[..length]);
            assert!(peers.iter().all(|peer| peer.allowed.is_empty()), "{length}");
        }
    }
}
