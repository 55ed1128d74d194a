//! The peers of a `WireGuard` device, asked over generic netlink (include/uapi/linux/wireguard.h, Linux 6.18). Reads what
//! goes to which peer and where the peer is; keys are passed over.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use netlink_packet_generic::{
    GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_wireguard::{
    WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd, WireguardMessage,
    WireguardPeer, WireguardPeerAttribute,
};

use crate::{netlink::Connection, netns::Handle};

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
    let mut request = GenlMessage::from_payload(WireguardMessage {
        cmd: WireguardCmd::GetDevice,
        attributes: vec![WireguardAttribute::IfIndex(ifindex)],
    });
    request.set_resolved_family_id(family(handle)?);
    let answers = Connection::generic(handle)?
        .dump(&request, "WireGuard peers")
        .with_context(|| format!("of device {ifindex}"))?;
    let mut peers = Vec::new();
    for attribute in answers.into_iter().flat_map(|answer| answer.payload.attributes) {
        if let WireguardAttribute::Peers(pieces) = attribute {
            for piece in pieces {
                take(&mut peers, ifindex, piece);
            }
        }
    }
    Ok(peers)
}

/// The number that generic netlink gave to `WireGuard`.
fn family(handle: &Handle) -> Result<u16> {
    let request = GenlMessage::from_payload(GenlCtrl {
        cmd: GenlCtrlCmd::GetFamily,
        nlas: vec![GenlCtrlAttrs::FamilyName("wireguard".to_owned())],
    });
    let answer = Connection::generic(handle)?
        .get(request)?
        .context("ask for the generic netlink family of WireGuard")?;
    answer
        .payload
        .nlas
        .iter()
        .find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        })
        .context("the kernel did not tell the generic netlink family of WireGuard")
}

/// A peer, or more of what is allowed to the last one: what does not fit into one message comes in the next.
fn take(peers: &mut Vec<Peer>, ifindex: u32, piece: WireguardPeer) {
    let mut peer = Peer::new(ifindex, None, Vec::new());
    for attribute in piece.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(key) => peer.key = key.to_vec(),
            WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(endpoint.ip()),
            WireguardPeerAttribute::AllowedIps(allowed) => {
                peer.allowed.extend(allowed.iter().filter_map(prefix));
            }
            _ => {}
        }
    }
    match peers.last_mut().filter(|last| last.key == peer.key) {
        Some(last) => last.allowed.append(&mut peer.allowed),
        None => peers.push(peer),
    }
}

fn prefix(allowed: &WireguardAllowedIp) -> Option<IpNet> {
    let (mut address, mut length) = (None, None);
    for attribute in &allowed.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(is) => address = Some(*is),
            WireguardAllowedIpAttr::Cidr(is) => length = Some(*is),
            _ => {}
        }
    }
    IpNet::new(address?, length?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(key: u8, endpoint: Option<&str>, allowed: &[(&str, u8)]) -> WireguardPeer {
        let mut attributes = vec![WireguardPeerAttribute::PublicKey([key; 32])];
        attributes.extend(
            endpoint.map(|endpoint| WireguardPeerAttribute::Endpoint((address(endpoint), 51820).into())),
        );
        let allowed = allowed.iter().map(|(network, length)| {
            WireguardAllowedIp(vec![
                WireguardAllowedIpAttr::IpAddr(address(network)),
                WireguardAllowedIpAttr::Cidr(*length),
            ])
        });
        attributes.push(WireguardPeerAttribute::AllowedIps(allowed.collect()));
        WireguardPeer(attributes)
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_peer_that_comes_in_two_pieces_is_one() {
        let mut peers = Vec::new();
        for piece in [
            peer(1, Some("192.168.49.3"), &[("10.244.205.192", 26)]),
            peer(1, None, &[("10.244.205.192", 32)]),
            peer(2, Some("192.168.49.4"), &[]),
        ] {
            take(&mut peers, 7, piece);
        }
        assert_eq!(peers.len(), 2);
        assert_eq!(peers[0].endpoint, Some(address("192.168.49.3")));
        let allowed: Vec<String> = peers[0].allowed.iter().map(IpNet::to_string).collect();
        assert_eq!(allowed, ["10.244.205.192/26", "10.244.205.192/32"]);
        assert_eq!(
            (peers[1].endpoint, peers[1].allowed.len()),
            (Some(address("192.168.49.4")), 0)
        );
    }

    #[test]
    fn a_network_without_length_is_none() {
        let attributes = vec![WireguardAllowedIpAttr::IpAddr(address("10.244.205.192"))];
        assert_eq!(prefix(&WireguardAllowedIp(attributes)), None);
    }
}
