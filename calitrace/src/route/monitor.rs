//! Notices that something changed in a namespace's tables. Says that, not what: whoever is told reads the tables anew,
//! which cannot drift.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use anyhow::{Context as _, Result};
use netlink_sys::Socket;
use nix::sys::socket::{setsockopt, sockopt};

use crate::{netlink, netns::Handle};

/// Multicast groups (`enum rtnetlink_groups`, include/uapi/linux/rtnetlink.h): link, neighbour, TC, IPv4 and IPv6
/// addresses and routes.
const GROUPS: [u32; 7] = [1, 3, 4, 5, 7, 9, 11];
/// Enough for the notices of some thousand pods at once; what does not fit is told as [`Changes::resync`].
const RECEIVE_BUFFER: usize = 8 << 20;
/// Longer than any notice: the kernel makes them of a page or two.
const DATAGRAM_BYTES: usize = 32 * 1024;
const HEADER_BYTES: usize = 16;
/// Neighbour states that only configuration makes: `NUD_NOARP`, `NUD_PERMANENT`. All others come and go with traffic.
const NUD_CONFIGURED: u16 = 0x40 | 0x80;

/// What changed since the last call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each table changes on its own")]
pub struct Changes {
    /// Devices.
    pub links: bool,
    /// Addresses.
    pub addresses: bool,
    /// Routes.
    pub routes: bool,
    /// Configured neighbours or forwarding entries.
    pub neighbours: bool,
    /// TC filters, or qdiscs that went with theirs.
    pub filters: bool,
    /// Notices were lost: anything may have changed.
    pub resync: bool,
}

impl Changes {
    /// Something changed.
    pub fn any(self) -> bool {
        self != Self::default()
    }

    /// Something changed in the tables that a node is made of: all but TC filters.
    pub fn tables(self) -> bool {
        Self {
            filters: false,
            ..self
        }
        .any()
    }

    /// Takes in what `other` tells.
    pub fn merge(&mut self, other: Self) {
        self.links |= other.links;
        self.addresses |= other.addresses;
        self.routes |= other.routes;
        self.neighbours |= other.neighbours;
        self.filters |= other.filters;
        self.resync |= other.resync;
    }
}

/// Listens for changes in one namespace. Its descriptor is readable when [`Monitor::drain`] has something to tell.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
}

impl Monitor {
    /// Begins to listen: changes after this call are told.
    pub fn open(handle: &Handle) -> Result<Self> {
        let socket = netlink::open(handle)?;
        socket
            .set_non_blocking(true)
            .context("make a netlink socket non-blocking")?;
        // Beyond the system's limit where we may, else up to it.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)
                .context("enlarge a netlink socket's receive buffer")?;
        }
        for group in GROUPS {
            socket
                .add_membership(group)
                .with_context(|| format!("join the route netlink group {group}"))?;
        }
        Ok(Self { socket })
    }

    /// Reads all that waits, without blocking.
    pub fn drain(&mut self) -> Result<Changes> {
        let mut changes = Changes::default();
        let mut buffer = vec![0; DATAGRAM_BYTES];
        loop {
            match self.socket.recv(&mut buffer.as_mut_slice(), 0) {
                Ok(length) => notices(&buffer[..length], &mut changes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(changes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changes.resync = true,
                Err(error) => return Err(error).context("read netlink notices"),
            }
        }
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads the kinds of the messages in a datagram.
fn notices(datagram: &[u8], changes: &mut Changes) {
    let mut rest = datagram;
    while let Some(header) = rest.first_chunk::<HEADER_BYTES>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let Some(message) = rest.get(..length).filter(|_| length >= HEADER_BYTES) else {
            return;
        };
        match u16::from_ne_bytes([header[4], header[5]]) {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => changes.links = true,
            libc::RTM_NEWADDR | libc::RTM_DELADDR => changes.addresses = true,
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => changes.routes = true,
            libc::RTM_DELQDISC | libc::RTM_NEWTFILTER | libc::RTM_DELTFILTER => changes.filters = true,
            libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => {
                changes.neighbours |= configured(&message[HEADER_BYTES..]);
            }
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// Whether a `struct ndmsg` (family, padding, index, state at 8) is of a forwarding database or a configured neighbour.
fn configured(body: &[u8]) -> bool {
    let Some(header) = body.first_chunk::<12>() else {
        return false;
    };
    let state = u16::from_ne_bytes([header[8], header[9]]);
    i32::from(header[0]) == libc::AF_BRIDGE || state & NUD_CONFIGURED != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn neighbour(family: u8, state: u16) -> Vec<u8> {
        let state = state.to_ne_bytes();
        message(
            libc::RTM_NEWNEIGH,
            &[family, 0, 0, 0, 1, 0, 0, 0, state[0], state[1], 0, 0],
        )
    }

    fn read(datagram: &[u8]) -> Changes {
        let mut changes = Changes::default();
        notices(datagram, &mut changes);
        changes
    }

    #[test]
    fn kinds_are_told_apart() {
        let both = [
            message(libc::RTM_NEWLINK, &[0; 16]),
            message(libc::RTM_DELROUTE, &[0; 13]),
        ]
        .concat();
        assert_eq!(
            read(&both),
            Changes {
                links: true,
                routes: true,
                ..Changes::default()
            }
        );
    }

    #[test]
    fn filters_are_no_table() {
        for kind in [libc::RTM_DELQDISC, libc::RTM_NEWTFILTER, libc::RTM_DELTFILTER] {
            let changes = read(&message(kind, &[0; 20]));
            assert!(changes.filters && !changes.tables(), "{kind}");
        }
        assert!(
            !read(&message(libc::RTM_NEWQDISC, &[0; 20])).any(),
            "nothing is lost by it"
        );
    }

    #[test]
    fn neighbours_that_come_with_traffic_are_no_change() {
        let inet = u8::try_from(libc::AF_INET).unwrap();
        assert!(!read(&neighbour(inet, 0x02)).any());
        assert!(read(&neighbour(inet, 0x80)).neighbours);
        assert!(read(&neighbour(u8::try_from(libc::AF_BRIDGE).unwrap(), 0x02)).neighbours);
    }

    #[test]
    fn a_broken_datagram_ends_the_reading() {
        for length in [0_u32, 3, 15, 4096] {
            let mut bytes = message(libc::RTM_NEWLINK, &[0; 16]);
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(!read(&bytes).any());
        }
        assert!(!read(&[1, 2, 3]).any());
    }
}
