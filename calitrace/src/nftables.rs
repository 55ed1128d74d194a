//! nftables' own tables in the namespace of the calling thread: which there are, and what they have. Changes nothing, and
//! loads no module: the kernel would load `nf_tables` for the first question (`nfnetlink_rcv_msg`,
//! `net/netfilter/nfnetlink.c`, 6.18), so none is asked where that is not there.

use std::{convert::Infallible, fs, io::ErrorKind, iter, str, sync::OnceLock};

use anyhow::{Context as _, Result};
use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable};

use crate::{
    iptables::output,
    netfilter::{compact_nft, compact_nft_with_nat},
    netlink::Connection,
};

/// A table: its family as `nft` calls it, and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) family: &'static str,
    pub(crate) name: String,
}

/// Whether the kernel has nftables, as a module that is loaded or built in.
pub(crate) fn are_there() -> bool {
    static BUILT_IN: OnceLock<bool> = OnceLock::new();
    match fs::read_to_string("/proc/modules") {
        Ok(modules) if is_loaded(&modules) => true,
        Ok(_) => *BUILT_IN
            .get_or_init(|| fs::read_to_string("/proc/kallsyms").is_ok_and(|symbols| is_built_in(&symbols))),
        // A kernel without modules loads none.
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

fn is_loaded(modules: &str) -> bool {
    modules.lines().any(|line| line.starts_with("nf_tables "))
}

/// What is built in has symbols without a module's name behind them.
fn is_built_in(symbols: &str) -> bool {
    symbols.lines().any(|line| line.ends_with(" nft_do_chain"))
}

/// A number that changes with every change of the rules, sets and maps, those that packets make excepted
/// (`nf_tables_commit`, `net/netfilter/nf_tables_api.c`).
pub(crate) fn generation() -> Result<u32> {
    let request = Message::asks(GET_GENERATION);
    let answer = Connection::netfilter()?
        .get(request)?
        .context("ask for the generation of nftables' rules")?;
    let value = attributes(&answer.bytes).find(|(kind, _)| *kind == GENERATION_ID);
    let value = value.and_then(|(_, value)| value.try_into().ok());
    value
        .map(u32::from_be_bytes)
        .context("the kernel did not tell the generation of nftables' rules")
}

/// The tables that packets of IPv4 and IPv6 go through.
pub(crate) fn tables() -> Result<Vec<Table>> {
    let request = Message::asks(GET_TABLE);
    let answers = Connection::netfilter()?.dump(&request, "tables of nftables")?;
    Ok(answers.iter().filter_map(|answer| table(&answer.bytes)).collect())
}

/// What a table has that drops may come of, as [`compact_nft`] writes it; `None` if `nft` is not on the path.
pub(crate) fn list(table: &Table) -> Result<Option<String>> {
    listed(table, compact_nft)
}

/// The same, with what translates addresses.
pub(crate) fn list_with_nat(table: &Table) -> Result<Option<String>> {
    listed(table, compact_nft_with_nat)
}

fn listed(table: &Table, compact: fn(&str) -> Result<String>) -> Result<Option<String>> {
    // Numbers instead of names, and no counters.
    let command = [
        "nft",
        "-j",
        "-n",
        "-s",
        "list",
        "table",
        table.family,
        &table.name,
    ];
    let Some(list) = output(&command)? else {
        return Ok(None);
    };
    let text =
        compact(&list).with_context(|| format!("read table {} {} of nftables", table.family, table.name))?;
    Ok(Some(text))
}

/// Numbers of `include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h`.
const SUBSYSTEM: u16 = 10;
const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
const GET_GENERATION: u16 = SUBSYSTEM << 8 | 16;
const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const DORMANT: u32 = 1;
const GENERATION_ID: u16 = 1;
/// The size of `nfgenmsg`: family, version, resource.
const HEAD: usize = 4;

/// `nfgenmsg` and attributes, as they are on the wire.
#[derive(Clone, Debug)]
struct Message {
    kind: u16,
    bytes: Vec<u8>,
}

impl Message {
    /// Of all families.
    fn asks(kind: u16) -> Self {
        Self {
            kind,
            bytes: vec![0; HEAD],
        }
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self {
            kind: header.message_type,
            bytes: payload.to_vec(),
        })
    }
}

impl From<Message> for NetlinkPayload<Message> {
    fn from(message: Message) -> Self {
        Self::InnerMessage(message)
    }
}

/// None of a family that is not IP's, of a table that is switched off, and of a name that `nft` does not take.
fn table(message: &[u8]) -> Option<Table> {
    // `NFPROTO_…`, `include/uapi/linux/netfilter.h`.
    let family = match message.first()? {
        1 => "inet",
        2 => "ip",
        10 => "ip6",
        _ => return None,
    };
    let (mut name, mut flags) = (None, 0);
    for (kind, value) in attributes(message) {
        match kind {
            TABLE_NAME => name = str::from_utf8(value).ok(),
            TABLE_FLAGS => flags = u32::from_be_bytes(value.try_into().ok()?),
            _ => {}
        }
    }
    let name = name?.trim_end_matches('\0');
    let is_on = flags & DORMANT == 0;
    (is_on && is_plain(name)).then(|| Table {
        family,
        name: name.to_owned(),
    })
}

/// Whether `nft` reads it as a name. It reads its arguments as one text, and anybody who owns a namespace could name a table
/// like a command.
fn is_plain(name: &str) -> bool {
    let begins = |first: char| first.is_ascii_alphabetic() || matches!(first, '_' | '.');
    let goes_on = |next: char| begins(next) || next.is_ascii_digit() || matches!(next, '/' | '-');
    name.starts_with(begins) && name.chars().all(goes_on)
}

/// The attributes of a message, up to one that is cut off.
fn attributes(message: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = message.get(HEAD..).unwrap_or_default();
    iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message as the kernel writes it: its family, and attributes.
    fn message(family: u8, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = vec![family, 0, 0, 0];
        for (kind, value) in attributes {
            let length = u16::try_from(4 + value.len()).unwrap();
            message.extend(length.to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(*value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        message
    }

    #[test]
    fn tables_are_named() {
        let flags: (u16, &[u8]) = (TABLE_FLAGS, &[0; 4]);
        let calico = message(2, &[flags, (TABLE_NAME, b"calico\0")]);
        let expected = Table {
            family: "ip",
            name: "calico".into(),
        };
        assert_eq!(table(&calico), Some(expected));
        let filter = message(1, &[(TABLE_NAME, b"filter\0"), flags]);
        assert_eq!(table(&filter).map(|table| table.family), Some("inet"));
    }

    #[test]
    fn names_that_are_more_than_a_name_are_not_asked_for() {
        for name in ["calico", "kube-proxy", "_a.b/c-9"] {
            assert!(is_plain(name), "{name}");
        }
        for name in ["", "a b", "a;flush ruleset", "9", "-a", "{", "a\n", "ä"] {
            assert!(!is_plain(name), "{name}");
        }
    }

    #[test]
    fn a_module_is_there_or_built_in() {
        assert!(is_loaded(
            "nf_nat 1 1 - Live 0x0\nnf_tables 331776 5 nft_ct,nft_nat, Live 0x0000000000000000\n"
        ));
        assert!(!is_loaded("nf_tables_set 1 0 - Live 0x0\n"));
        assert!(is_built_in("0 T nft_do_chain\n"));
        assert!(!is_built_in(
            "0 t nft_do_chain\t[nf_tables]\n0 T nft_do_chain_ipv4\n"
        ));
    }

    #[test]
    fn other_families_and_what_is_no_table_are_passed_over() {
        assert_eq!(table(&message(7, &[(TABLE_NAME, b"bridge\0")])), None);
        assert_eq!(table(&message(2, &[(TABLE_FLAGS, &[0; 4])])), None);
        let dormant = message(2, &[(TABLE_NAME, b"calico\0"), (TABLE_FLAGS, &[0, 0, 0, 1])]);
        assert_eq!(table(&dormant), None);
        for cut in 0..12 {
            assert_eq!(
                table(&message(2, &[(TABLE_NAME, b"calico\0")])[..cut]),
                None,
                "{cut}"
            );
        }
    }
}
