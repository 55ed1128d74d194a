//! Values in nftables' JSON: constants, and what is computed of the mark.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::only;
use crate::netfilter::{
    elements::{Key, Range, WHOLE, address, device_name, device_names},
    packet::States,
    save::protocol,
};

/// The values that a constant stands for; none if it is not understood.
pub(super) fn range(key: Key, value: &Value) -> Option<Range> {
    if let Some(("range", Value::Array(ends))) = only(value) {
        let [first, last] = ends.as_slice() else {
            return None;
        };
        return Some((range(key, first)?.0, range(key, last)?.1));
    }
    match key {
        Key::Address(_) => addresses(value),
        Key::Protocol => {
            let number = match value.as_str() {
                Some(name) => protocol(name)?.into(),
                None => value.as_u64()?.into(),
            };
            Some((number, number))
        }
        Key::Port(_) | Key::IcmpType | Key::IcmpCode => {
            let number = value.as_u64()?.into();
            Some((number, number))
        }
        Key::Device(_) => {
            let name = value.as_str()?;
            Some(match name.strip_suffix('*') {
                Some(beginning) => device_names(beginning),
                None => (device_name(name), device_name(name)),
            })
        }
        Key::State => {
            let bit = states("==", value)?;
            Some((bit.into(), bit.into()))
        }
        Key::Unknown => Some(WHOLE),
    }
}

/// `"10.0.0.1"`, `{"prefix": {"addr": "10.0.0.0", "len": 8}}`.
fn addresses(value: &Value) -> Option<Range> {
    let net: IpNet = match only(value) {
        Some(("prefix", prefix)) => {
            let length = u8::try_from(prefix["len"].as_u64()?).ok()?;
            IpNet::new(prefix["addr"].as_str()?.parse().ok()?, length).ok()?
        }
        _ => IpNet::from(value.as_str()?.parse::<IpAddr>().ok()?),
    };
    Some((address(net.network()), address(net.broadcast())))
}

/// Connection states as [`States`] has them; none if they are no set of states. Numbers are those of `ct state`
/// (`NF_CT_STATE_BIT`, `include/uapi/linux/netfilter/nf_conntrack_common.h`).
pub(super) fn states(operator: &str, value: &Value) -> Option<u8> {
    let one = |value: &Value| {
        Some(match (value.as_u64(), value.as_str()) {
            (Some(1), _) | (_, Some("invalid")) => States::INVALID,
            (Some(2), _) | (_, Some("established")) => States::ESTABLISHED,
            (Some(4), _) | (_, Some("related")) => States::RELATED,
            (Some(8), _) | (_, Some("new")) => States::NEW,
            (Some(64), _) | (_, Some("untracked")) => States::UNTRACKED,
            _ => return None,
        })
    };
    let members = match (operator, value, only(value)) {
        // Any of them.
        ("in", Value::Array(members), _) | (_, _, Some(("set", Value::Array(members)))) => members.as_slice(),
        _ => std::slice::from_ref(value),
    };
    members
        .iter()
        .map(one)
        .try_fold(0, |states, state| Some(states | state?))
}

/// The packet's mark.
pub(super) fn is_mark(expression: &Value) -> bool {
    matches!(only(expression), Some(("meta", meta)) if meta["key"] == "mark")
}

/// The bits of the mark that are looked at; none if it is something else that is.
pub(super) fn mark_mask(expression: &Value) -> Option<u32> {
    if is_mark(expression) {
        return Some(u32::MAX);
    }
    match only(expression)? {
        ("&", Value::Array(sides)) if is_mark(sides.first()?) => u32::try_from(sides.get(1)?.as_u64()?).ok(),
        _ => None,
    }
}

/// What `meta mark set` makes of the mark, as a value and a mask of [`super::super::rules::Target::Mark`].
pub(super) fn new_mark(expression: &Value) -> (Option<u32>, u32) {
    match computed(expression) {
        Some((and, xor)) => (Some(xor), !and),
        None => (None, u32::MAX),
    }
}

/// The mark's new value, as `mark & AND ^ XOR`; none if it is made of something else.
fn computed(expression: &Value) -> Option<(u32, u32)> {
    if is_mark(expression) {
        return Some((u32::MAX, 0));
    }
    if let Some(number) = expression.as_u64() {
        return Some((0, u32::try_from(number).ok()?));
    }
    let (operator, Value::Array(sides)) = only(expression)? else {
        return None;
    };
    let [left, right] = sides.as_slice() else {
        return None;
    };
    let (and, xor) = computed(left)?;
    let with = u32::try_from(right.as_u64()?).ok()?;
    Some(match operator {
        "&" => (and & with, xor & with),
        "|" => (and & !with, (xor & !with) | with),
        "^" => (and, xor ^ with),
        _ => return None,
    })
}
