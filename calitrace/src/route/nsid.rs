//! Which namespace a device's other end lies in. The kernel numbers foreign namespaces anew in each namespace.

use std::{collections::HashMap, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result};
use netlink_packet_route::{
    RouteNetlinkMessage,
    nsid::{NsidAttribute, NsidMessage},
};

use crate::{event::Netns, netlink::Connection, netns::Handle};

/// Namespace inode numbers by the number under which one namespace knows them ([`super::Link::link_netnsid`]).
pub type PeerNamespaces = HashMap<i32, Netns>;

/// How `handle`'s namespace numbers those of `known` (`RTM_GETNSID`). Asking assigns no numbers.
pub fn peer_namespaces(handle: &Handle, known: &[Handle]) -> Result<PeerNamespaces> {
    let mut connection = Connection::open(handle)?;
    let mut peers = PeerNamespaces::new();
    for peer in known {
        let fd =
            u32::try_from(peer.file().as_raw_fd()).context("a namespace's file descriptor is negative")?;
        let mut request = NsidMessage::default();
        request.attributes.push(NsidAttribute::Fd(fd));
        let answer = connection
            .get(RouteNetlinkMessage::GetNsId(request))
            .with_context(|| format!("ask for the number of the namespace {}", peer.inode()))?;
        // A refusal means that this namespace cannot be seen from there: it has no number.
        let Ok(RouteNetlinkMessage::NewNsId(message)) = answer else {
            continue;
        };
        for attribute in message.attributes {
            if let NsidAttribute::Id(id) = attribute
                && id >= 0
            {
                peers.insert(id, peer.inode());
            }
        }
    }
    Ok(peers)
}
