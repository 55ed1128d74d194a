//! What is known of the packet whose way through the rules is followed.

use std::net::IpAddr;

use super::rules::End;

/// A device that a packet comes or goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device<'a> {
    /// This one.
    Is(&'a str),
    /// None: it is from the node, or for it.
    None,
    /// It is not known.
    Unknown,
}

/// Connection states as a set: those that are possible, or those that a rule asks for (`xt_conntrack`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(pub(super) u8);

impl States {
    pub(super) const INVALID: u8 = 1;
    pub(super) const NEW: u8 = 2;
    pub(super) const ESTABLISHED: u8 = 4;
    pub(super) const RELATED: u8 = 8;
    pub(super) const UNTRACKED: u8 = 16;

    /// Any.
    pub const ANY: Self = Self(31);
    /// Of a packet that may begin a connection: conntrack calls none of those invalid, unless its header is broken
    /// (`net/netfilter/nf_conntrack_proto_{tcp,udp,icmp}.c`).
    pub const OPENING: Self = Self(Self::NEW | Self::ESTABLISHED | Self::RELATED | Self::UNTRACKED);
    /// Of one whose header or checksum is broken.
    pub const BROKEN: Self = Self(Self::INVALID);
}

/// The packet, as it was where it was dropped.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IANA protocol number.
    pub proto: u8,
    /// Source and destination port, where it has them. Of an outer header no source port is known: the tunnel's device
    /// takes one by the inner flow's hash (`udp_flow_src_port`, `include/net/udp.h`).
    pub ports: Option<(Option<u16>, u16)>,
    /// ICMP type and code, where it has them.
    pub icmp: Option<(u8, u8)>,
    /// The device it came by.
    pub input: Device<'a>,
    /// The device it was to leave by.
    pub output: Device<'a>,
    /// Which states its connection may have.
    pub states: States,
    /// Its source is behind `input`, as far as is known: the answer would go there. Only then is it sure that a reverse path
    /// filter lets it pass.
    pub is_from_there: bool,
    /// The addresses of the node.
    pub local: &'a [IpAddr],
}

impl Asked<'_> {
    /// The port at this end, where it is known.
    pub(super) fn port(&self, end: End) -> Option<u16> {
        let (source, destination) = self.ports?;
        match end {
            End::Source => source,
            End::Destination => Some(destination),
        }
    }
}
