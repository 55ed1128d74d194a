//! The routes a namespace's kernel would take, asked one at a time (`RTM_GETROUTE`), and from them the address that its
//! ICMP errors carry.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::unix::fs::FileExt as _,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage},
};

use super::{Address, Type, snapshot};
use crate::{netlink::Connection, netns::Handle};

/// `IPTOS_PREC_INTERNETCONTROL`: the precedence of ICMP errors (net/ipv4/icmp.c, `__icmp_send`).
const TOS_INTERNETCONTROL: u8 = 0xc0;
/// `RT_SCOPE_LINK`: the widest scope that `icmp_errors_use_inbound_ifaddr` takes.
const SCOPE_LINK: u8 = 253;
const INBOUND_SYSCTL: &str = "/proc/sys/net/ipv4/icmp_errors_use_inbound_ifaddr";

/// Asks one namespace's kernel. May be used from any thread.
#[derive(Debug)]
pub struct Lookup {
    connection: Mutex<Connection>,
    /// Opened inside the namespace, so it stays that namespace's setting; none where `/proc/sys` is not there.
    inbound: Option<File>,
}

/// What the kernel would do with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What the route does.
    pub kind: Type,
    /// Gateway, if any.
    pub gateway: Option<IpAddr>,
    /// Output device, if any.
    pub oif: Option<u32>,
    /// The source address that the kernel would choose.
    pub source: Option<IpAddr>,
    /// MTU of the route, if it has one of its own (set, or learned from "fragmentation needed").
    pub mtu: Option<u32>,
}

impl Lookup {
    /// Opens the means to ask the kernel of that namespace.
    pub fn open(handle: &Handle) -> Result<Self> {
        let inbound = handle.run(|| match File::open(INBOUND_SYSCTL) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("open {INBOUND_SYSCTL}")),
        })?;
        Ok(Self {
            connection: Mutex::new(Connection::open(handle)?),
            inbound,
        })
    }

    /// The address that an ICMP error of this node towards `towards` would carry: what traceroute prints for it.
    ///
    /// The kernel routes its error as a packet of its own towards the sender and takes that route's preferred source
    /// (`net/ipv4/icmp.c`, `icmp_route_lookup`; `net/ipv6/icmp.c`, `icmp6_send`; Linux 5.10 to 6.18). `inbound` is the
    /// device on which the offending packet came in: its address goes first where the node's
    /// `net.ipv4.icmp_errors_use_inbound_ifaddr` is 1. `None`: there is no route back, so no error would be sent.
    pub fn hop_address(&self, towards: IpAddr, inbound: Option<u32>) -> Result<Option<IpAddr>> {
        if let (IpAddr::V4(_), Some(ifindex)) = (towards, inbound)
            && self.inbound_first()
            && let Some(address) = self.first_address(ifindex)?
        {
            return Ok(Some(address));
        }
        let decision = self.ask(towards, TOS_INTERNETCONTROL, true)?;
        Ok(decision
            .filter(|decision| matches!(decision.kind, Type::Unicast | Type::Local))
            .and_then(|d| d.source))
    }

    /// What this node would do with a packet of its own to `destination`; `None`: it has no route.
    pub fn route_to(&self, destination: IpAddr) -> Result<Option<Decision>> {
        self.ask(destination, 0, false)
    }

    fn ask(&self, destination: IpAddr, tos: u8, icmp: bool) -> Result<Option<Decision>> {
        let mut request = RouteMessage::default();
        let (family, bits, protocol) = match destination {
            IpAddr::V4(_) => (AddressFamily::Inet, 32, libc::IPPROTO_ICMP),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128, libc::IPPROTO_ICMPV6),
        };
        request.header = RouteHeader {
            address_family: family,
            destination_prefix_length: bits,
            tos,
            flags: RouteFlags::LookupTable,
            ..RouteHeader::default()
        };
        request
            .attributes
            .push(RouteAttribute::Destination(destination.into()));
        if icmp {
            // Both constants are below 256.
            request.attributes.push(RouteAttribute::IpProto(
                u8::try_from(protocol).unwrap_or_default(),
            ));
        }
        let answer = self
            .lock()
            .get(RouteNetlinkMessage::GetRoute(request))
            .with_context(|| format!("ask for the route to {destination}"))?;
        match answer {
            Ok(RouteNetlinkMessage::NewRoute(message)) => Ok(snapshot::entries(&message)
                .into_iter()
                .next()
                .map(|entry| Decision {
                    kind: entry.kind,
                    gateway: entry.gateway,
                    oif: entry.oif,
                    source: entry.source,
                    mtu: entry.mtu,
                })),
            Ok(_) => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENETUNREACH) => Ok(None),
            Err(error) => match refusal(&error) {
                Some(kind) => Ok(Some(Decision {
                    kind,
                    gateway: None,
                    oif: None,
                    source: None,
                    mtu: None,
                })),
                None => Err(error).with_context(|| format!("ask for the route to {destination}")),
            },
        }
    }

    fn inbound_first(&self) -> bool {
        let mut value = [0];
        self.inbound
            .as_ref()
            .is_some_and(|file| file.read_at(&mut value, 0).is_ok_and(|read| read == 1))
            && value == *b"1"
    }

    /// What `inet_select_addr(device, 0, RT_SCOPE_LINK)` (net/ipv4/devinet.c) finds on the device itself: its first
    /// primary address of link scope or wider.
    fn first_address(&self, ifindex: u32) -> Result<Option<IpAddr>> {
        let mut request = AddressMessage::default();
        request.header.family = AddressFamily::Inet;
        let messages = self
            .lock()
            .dump(&RouteNetlinkMessage::GetAddress(request), "addresses")?;
        let mut addresses = messages.into_iter().filter_map(snapshot::address);
        let suits = |address: &Address| {
            address.ifindex == ifindex && !address.secondary && address.scope <= SCOPE_LINK
        };
        Ok(addresses.find(suits).map(|address| address.address))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Connection> {
        // A panic elsewhere leaves at worst an answer unread, and answers are matched by sequence number.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernel answers a look-up that ends in a refusing route with that route's error (`net/ipv4/fib_semantics.c`,
/// `fib_props`; `net/ipv6/route.c`, `ip6_rt_type_to_error`).
fn refusal(error: &io::Error) -> Option<Type> {
    match error.raw_os_error()? {
        libc::EINVAL => Some(Type::Blackhole),
        libc::EHOSTUNREACH => Some(Type::Unreachable),
        libc::EACCES => Some(Type::Prohibit),
        _ => None,
    }
}
