//! What sets and maps of nftables have, and whether a packet's values are among it. Values are numbers of the same order as
//! the addresses, ports and names they stand for, so that networks, ranges and beginnings of names are intervals.

use std::{iter::zip, net::IpAddr};

use rustc_hash::FxHashSet;

use super::{
    packet::{Asked, Device},
    rules::{End, Way},
    walk::Truth,
};

/// From the first value to the last one.
pub(super) type Range = (u128, u128);

/// Any value.
pub(super) const WHOLE: Range = (0, u128::MAX);

/// A value of a packet that can be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Address(End),
    Protocol,
    Port(End),
    /// A device's name.
    Device(Way),
    IcmpType,
    IcmpCode,
    /// Bits of [`super::States`].
    State,
    /// Something that is not understood here.
    Unknown,
}

/// What is known of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Is(u128),
    /// One of these bits.
    OneOf(u8),
    Nothing,
}

impl Key {
    fn of(self, packet: &Asked<'_>) -> Known {
        match self {
            Self::Address(End::Source) => Known::Is(address(packet.src)),
            Self::Address(End::Destination) => Known::Is(address(packet.dst)),
            Self::Protocol => Known::Is(packet.proto.into()),
            Self::Port(end) => packet
                .port(end)
                .map_or(Known::Nothing, |port| Known::Is(port.into())),
            Self::Device(way) => {
                let device = match way {
                    Way::In => packet.input,
                    Way::Out => packet.output,
                };
                match device {
                    Device::Is(name) => Known::Is(device_name(name)),
                    // An empty name (`nft_meta_store_ifname`, `net/netfilter/nft_meta.c`, 5.10 to 6.18).
                    Device::None => Known::Is(0),
                    Device::Unknown => Known::Nothing,
                }
            }
            Self::IcmpType => packet.icmp.map_or(Known::Nothing, |(of, _)| Known::Is(of.into())),
            Self::IcmpCode => packet
                .icmp
                .map_or(Known::Nothing, |(_, code)| Known::Is(code.into())),
            Self::State if packet.states.0.is_power_of_two() => Known::Is(packet.states.0.into()),
            Self::State => Known::OneOf(packet.states.0),
            Self::Unknown => Known::Nothing,
        }
    }
}

impl Known {
    /// Whether it is in the range.
    fn is_in(self, (first, last): Range) -> Truth {
        let has = |value| (first..=last).contains(&value);
        match self {
            Self::Is(value) => has(value).into(),
            Self::OneOf(bits) => of_each(bits, has),
            Self::Nothing => Truth::Perhaps,
        }
    }
}

/// Whether something holds of each of these bits.
fn of_each(bits: u8, holds: impl Fn(u128) -> bool) -> Truth {
    let each = (0..u8::BITS).map(|bit| 1 << bit).filter(|bit| bits & bit != 0);
    let holds = each.map(|bit: u8| holds(bit.into()));
    match holds.fold((false, false), |(some, others), holds| {
        (some || holds, others || !holds)
    }) {
        (true, false) => Truth::Yes,
        (true, true) => Truth::Perhaps,
        (false, _) => Truth::No,
    }
}

/// An address as a number. The rules are those of one family.
pub(super) fn address(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// A device's name as the kernel has it: `IFNAMSIZ` bytes, zeros after the name.
pub(super) fn device_name(name: &str) -> u128 {
    let mut bytes = [0; 16];
    for (byte, of) in zip(&mut bytes, name.as_bytes()) {
        *byte = *of;
    }
    u128::from_be_bytes(bytes)
}

/// All names with this beginning.
pub(super) fn device_names(beginning: &str) -> Range {
    let first = device_name(beginning);
    let rest = 8 * 16_usize.saturating_sub(beginning.len());
    let ones = match u32::try_from(rest) {
        Ok(128..) | Err(_) => u128::MAX,
        Ok(bits) => (1 << bits) - 1,
    };
    (first, first | ones)
}

/// The value of each key, where a packet's together are one element.
pub(super) type Element = Box<[Range]>;

/// Whether the packet's values are this element.
pub(super) fn is(element: &[Range], keys: &[Key], packet: &Asked<'_>) -> Truth {
    are(keys.iter().map(|key| key.of(packet)), element.iter().copied())
}

/// Whether each is in its range.
fn are(known: impl Iterator<Item = Known>, ranges: impl Iterator<Item = Range>) -> Truth {
    let each = zip(known, ranges).map(|(known, range)| known.is_in(range));
    each.min().unwrap_or(Truth::Yes)
}

/// The elements of a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Elements {
    /// Of sets with one key: in order, none within another.
    ranges: Vec<Range>,
    /// Of sets with several keys, those without intervals.
    exact: FxHashSet<Box<[u128]>>,
    /// And those with some.
    boxes: Vec<Element>,
    /// There may be more in it than is known here: some were not understood, or packets put them in and time takes them out.
    is_open: bool,
}

impl Elements {
    /// Of these elements; none for one that is not understood.
    pub(super) fn of(elements: impl Iterator<Item = Option<Element>>, is_open: bool) -> Self {
        let mut all = Self {
            is_open,
            ..Self::default()
        };
        for element in elements {
            match element {
                Some(element) if element.len() == 1 => all.ranges.push(element[0]),
                Some(element) if element.iter().all(|(first, last)| first == last) => {
                    let values = element.iter().map(|(value, _)| *value);
                    all.exact.insert(values.collect());
                }
                Some(element) => all.boxes.push(element),
                None => all.is_open = true,
            }
        }
        all.ranges.sort_unstable();
        all.ranges.dedup_by(|next, before| {
            let within = next.0 <= before.1;
            if within {
                before.1 = before.1.max(next.1);
            }
            within
        });
        all
    }

    /// The only value that is an element, of a set with one key.
    pub(super) fn only(&self) -> Option<u128> {
        match self.ranges[..] {
            [(first, last)] if first == last && !self.is_open => Some(first),
            _ => None,
        }
    }

    /// Whether the packet's values are an element.
    pub(super) fn has(&self, keys: &[Key], packet: &Asked<'_>) -> Truth {
        let found = match keys {
            [key] => self.has_one(*key, packet),
            keys => self.has_all(keys, packet),
        };
        if self.is_open { Truth::Perhaps } else { found }
    }

    fn has_one(&self, key: Key, packet: &Asked<'_>) -> Truth {
        let has = |value: u128| {
            let place = self.ranges.partition_point(|(_, last)| *last < value);
            let range = self.ranges.get(place);
            range.is_some_and(|(first, _)| *first <= value)
        };
        match key.of(packet) {
            Known::Is(value) => has(value).into(),
            Known::OneOf(bits) => of_each(bits, has),
            Known::Nothing if self.ranges.is_empty() => Truth::No,
            Known::Nothing => Truth::Perhaps,
        }
    }

    fn has_all(&self, keys: &[Key], packet: &Asked<'_>) -> Truth {
        let known: Vec<Known> = keys.iter().map(|key| key.of(packet)).collect();
        let values = known.iter().map(|known| match known {
            Known::Is(value) => Some(*value),
            Known::OneOf(_) | Known::Nothing => None,
        });
        let exact = if let Some(values) = values.collect::<Option<Vec<u128>>>() {
            self.exact.contains(values.as_slice()).into()
        } else {
            let each = self.exact.iter().map(|element| {
                let ranges = element.iter().map(|value| (*value, *value));
                are(known.iter().copied(), ranges)
            });
            each.max().unwrap_or(Truth::No)
        };
        let boxes = self.boxes.iter();
        let boxes = boxes.map(|element| are(known.iter().copied(), element.iter().copied()));
        boxes.max().unwrap_or(Truth::No).max(exact)
    }
}
