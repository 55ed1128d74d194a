//! The devices that a packet passes, with what they leave of their MTUs for it.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{
    calico::{anatomy, view::NodeView},
    event::{self, EncapKind},
    netns::Found,
    route::Link,
};

/// A device that a packet passes on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Passage {
    /// The TTL of the router that it belongs to; 0 for the sender's own end of its interface, the last hop's for the
    /// receiver's.
    pub hop: u8,
    /// The node that it belongs to, or on which the pod is.
    pub node: String,
    /// The pod whose own end of its interface it is, by name or address; null for a node's devices.
    pub pod: Option<String>,
    /// Its name.
    pub device: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// What outer headers take of it, in bytes: 0 where the packet passes without them.
    pub overhead: u32,
    /// Outer packets that are too long for it are fragmented, so that it limits no packet. VXLAN as Felix sets it up and
    /// `WireGuard` let theirs be; IPIP takes over that the packet must not be.
    pub fragments: bool,
    /// The outer header that this device adds; null where it adds none.
    pub encap: Option<Outer>,
}

/// An outer header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Outer {
    /// The encapsulation.
    pub kind: EncapKind,
    /// Source address: of this node; null where it is not known.
    pub src: Option<IpAddr>,
    /// Destination address: of the other node; null where it is not known.
    pub dst: Option<IpAddr>,
}

impl Passage {
    /// A device of a node.
    pub(super) fn of(node: &NodeView, hop: u8, ifindex: u32) -> Option<Self> {
        let link = node.snapshot.link(ifindex)?;
        Some(Self::new(node, hop, link))
    }

    /// A pod's own end of its interface; none where its namespace is not seen.
    pub(super) fn in_pod(node: &NodeView, hop: u8, pod: &event::Pod, all: &[Found]) -> Result<Option<Self>> {
        let name = || pod.addresses.first().map(ToString::to_string);
        Ok(node.pod_end(pod, all)?.map(|link| Self {
            pod: pod.name.clone().or_else(name),
            ..Self::new(node, hop, &link)
        }))
    }

    fn new(node: &NodeView, hop: u8, link: &Link) -> Self {
        Self {
            hop,
            node: node.node.name.clone(),
            pod: None,
            device: link.name.clone(),
            mtu: link.mtu,
            overhead: 0,
            fragments: false,
            encap: None,
        }
    }

    /// As it wraps a packet that goes to another node.
    pub(super) fn wrapping(
        self,
        node: &NodeView,
        tunnel: &Link,
        kind: EncapKind,
        to: Option<IpAddr>,
    ) -> Result<Self> {
        let set = tunnel
            .vxlan
            .and_then(|vxlan| vxlan.local)
            .or_else(|| tunnel.ipip.and_then(|ipip| ipip.local));
        let chosen = match to {
            Some(to) if set.is_none() => node
                .lookup
                .route_to(to)
                .with_context(|| format!("ask {} for the way to {to}", self.node))?
                .and_then(|decision| decision.source),
            _ => None,
        };
        Ok(Self {
            encap: Some(Outer {
                kind,
                src: set.or(chosen),
                dst: to,
            }),
            ..self
        })
    }

    /// As it carries packets in a tunnel's outer headers, if what `sent` it made them no longer than this one takes.
    /// `vxlan_xmit_one` (`drivers/net/vxlan/vxlan_core.c`) sets DF only where `df` was set, `wg_socket_send_skb_to_peer`
    /// (`drivers/net/wireguard/socket.c`) never; `ip_tunnel_xmit` (`net/ipv4/ip_tunnel.c`; all Linux 6.18) copies it.
    pub(super) fn carrying(self, tunnel: &Link, sent: Option<u32>) -> Self {
        let may_be_cut = matches!(
            anatomy::encap_of(tunnel),
            Some(EncapKind::Vxlan | EncapKind::Wireguard)
        );
        Self {
            overhead: anatomy::overhead(tunnel).unwrap_or_default(),
            fragments: may_be_cut && sent.is_none_or(|sent| sent <= self.mtu),
            ..self
        }
    }

    /// The longest packet that it takes whole; none where it has no limit.
    pub(super) fn room(&self) -> Option<u32> {
        (self.mtu > 0).then(|| self.mtu.saturating_sub(self.overhead))
    }
}
