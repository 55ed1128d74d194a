//! clsact, for kernels without TCX: the qdisc that TC filters hang on, and which filters it has. All of it in the
//! calling thread's network namespace.
//!
//! A filter outlives the process that added it, and a qdisc is shared with everybody who uses TC: one that we did not
//! add, or that has others' filters, is left alone.

use anyhow::{Context as _, Result, bail};
use aya::programs::{TcAttachType, tc};
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
    if !names(ifindex, TcAttachType::Ingress)?.is_empty() || !names(ifindex, TcAttachType::Egress)?.is_empty()
    {
        return Ok(());
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

/// Names of the bpf filters in one direction, in the order they run in; an empty one for filters of other kinds.
pub(super) fn names(ifindex: u32, direction: TcAttachType) -> Result<Vec<String>> {
    let mut message = message(ifindex)?;
    message.header.parent = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: match direction {
            TcAttachType::Egress => TcHandle::MIN_EGRESS,
            _ => TcHandle::MIN_INGRESS,
        },
    };
    let mut found = Vec::new();
    request(
        RouteNetlinkMessage::GetTrafficFilter(message),
        NLM_F_DUMP,
        |reply| {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) = reply
            // A classifier is announced once without a handle before its filters.
            && filter.header.handle != TcHandle::UNSPEC
            {
                found.push(bpf_name(&filter.attributes));
            }
        },
    )
    .with_context(|| format!("list the TC filters of interface {ifindex}"))?;
    Ok(found)
}

/// Takes away filters that an earlier run left when it was killed: those that carry our programs' names.
pub(super) fn sweep(ifname: &str, ifindex: u32) -> Result<()> {
    let mut swept = false;
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        for name in names(ifindex, direction)? {
            if hooks::TABLE.iter().any(|row| row.program == name) {
                swept = true;
                match tc::qdisc_detach_program(ifname, direction, &name) {
                    Err(tc::TcError::IoError(error)) if error.kind() == std::io::ErrorKind::NotFound => {}
                    done => done.with_context(|| format!("remove the TC filter {name} of {ifname}"))?,
                }
            }
        }
    }
    if swept {
        // The qdisc was ours, too, if nothing else is on it.
        remove_if_empty(ifindex)?;
    }
    Ok(())
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
