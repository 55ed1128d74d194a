//! clsact, for kernels without TCX: the qdisc that TC filters hang on, and which filters it has. All of it in the
//! calling thread's network namespace.
//!
//! A filter outlives the process that added it, and a qdisc is shared with everybody who uses TC: one that we did not
//! add, or that has others' filters, is left alone.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use aya::programs::{TcAttachType, tc};
use calitrace_ebpf::Hook;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::kernel::hooks;

/// Adds the qdisc; false if there was one.
pub(super) fn add(ifname: &str) -> Result<bool> {
    match tc::qdisc_add_clsact(ifname) {
        Ok(()) => Ok(true),
        Err(tc::TcError::AlreadyAttached) => Ok(false),
        Err(tc::TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("add a clsact qdisc to {ifname}")),
    }
}

/// Takes the qdisc away if no filters are left on it.
pub(super) fn remove_if_empty(ifindex: u32) -> Result<()> {
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        if !filters(ifindex, direction)?.is_empty() {
            return Ok(());
        }
    }
    let mut message = message(ifindex)?;
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    message.header.parent = TcHandle::CLSACT;
    request(
        RouteNetlinkMessage::DelQueueDiscipline(message),
        NLM_F_ACK,
        |_| (),
    )
    .with_context(|| format!("remove the clsact qdisc of interface {ifindex}"))
}

/// A filter on a clsact qdisc.
pub(super) struct Filter {
    /// Name of a bpf filter; empty for one of another kind.
    name: String,
    /// Its number among those of its priority.
    pub(super) handle: u32,
    /// Priority in the upper half, protocol in the lower.
    info: u32,
    parent: TcHandle,
}

/// The filters in one direction, in the order they run in.
pub(super) fn filters(ifindex: u32, direction: TcAttachType) -> Result<Vec<Filter>> {
    let mut message = message(ifindex)?;
    message.header.parent = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: match direction {
            TcAttachType::Egress => TcHandle::MIN_EGRESS,
            _ => TcHandle::MIN_INGRESS,
        },
    };
    let parent = message.header.parent;
    let mut found = Vec::new();
    request(
        RouteNetlinkMessage::GetTrafficFilter(message),
        NLM_F_DUMP,
        |reply| {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) = reply
            // A classifier is announced once without a handle before its filters.
            && filter.header.handle != TcHandle::UNSPEC
            {
                found.push(Filter {
                    name: bpf_name(&filter.attributes),
                    handle: filter.header.handle.into(),
                    info: filter.header.info,
                    parent,
                });
            }
        },
    )
    .with_context(|| format!("list the TC filters of interface {ifindex}"))?;
    Ok(found)
}

/// Process ids have at most 22 bits (`PID_MAX_LIMIT`, include/linux/threads.h), handles 31.
const PID_BITS: u32 = 22;

/// A handle for a hook's filters of the `number`th loading in this process: who finds a filter later can tell whether
/// its owner is still alive.
pub(super) fn handle(number: u32, hook: Hook) -> u32 {
    ((number << 3 | hook as u32) << PID_BITS | std::process::id()) & 0x7fff_ffff
}

const _: () = assert!(
    Hook::ALL.len() <= 8,
    "a hook's number takes three bits of a handle"
);

/// Takes away filters that an earlier run left when it was killed: those that carry our programs' names and a handle
/// with the id of a process that is gone.
pub(super) fn sweep(ifindex: u32) -> Result<()> {
    let mut swept = false;
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        for filter in filters(ifindex, direction)? {
            let ours = hooks::TABLE.iter().any(|row| row.program == filter.name);
            let owner = filter.handle & ((1 << PID_BITS) - 1);
            if ours && !Path::new("/proc").join(owner.to_string()).exists() {
                let mut message = message(ifindex)?;
                message.header.handle = filter.handle.into();
                message.header.parent = filter.parent;
                message.header.info = filter.info;
                request(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK, |_| ()).with_context(
                    || format!("remove the TC filter {} of interface {ifindex}", filter.name),
                )?;
                swept = true;
            }
        }
    }
    // The qdisc was ours, too, if nothing else is on it.
    if swept { remove_if_empty(ifindex) } else { Ok(()) }
}

fn bpf_name(attributes: &[TcAttribute]) -> String {
    let options = attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options
        .flatten()
        .find_map(|option| match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
            _ => None,
        })
        .unwrap_or_default()
}

fn message(ifindex: u32) -> Result<TcMessage> {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(ifindex).context("interface index")?;
    Ok(message)
}

/// Sends one request and reads replies to its end.
fn request(
    message: RouteNetlinkMessage,
    flags: u16,
    mut reply: impl FnMut(&RouteNetlinkMessage),
) -> Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE).context("open a netlink socket")?;
    socket.bind_auto().context("bind the netlink socket")?;
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | flags;
    request.header.sequence_number = 1;
    request.finalize();
    let mut buffer = vec![0; request.buffer_len()];
    request.serialize(&mut buffer);
    socket
        .send_to(&buffer, &SocketAddr::new(0, 0), 0)
        .context("send a netlink request")?;
    loop {
        let (data, _) = socket.recv_from_full().context("read a netlink reply")?;
        let mut rest = &data[..];
        while !rest.is_empty() {
            let answer =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).context("parse a netlink reply")?;
            match &answer.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => {
                    return match error.code {
                        None => Ok(()),
                        Some(_) => Err(error.to_io().into()),
                    };
                }
                NetlinkPayload::InnerMessage(message) => reply(message),
                _ => {}
            }
            let length = (answer.header.length as usize).next_multiple_of(4);
            match rest.get(length..) {
                Some(next) if length > 0 => rest = next,
                Some(_) => bail!("a netlink reply of no length"),
                None => break,
            }
        }
    }
}
