//! A stand-in for Felix's XDP program, by which it drops what untracked policies of host endpoints deny, by the sender's
//! address (`felix/bpf/xdp`, `felix/bpf-apache/filter.c`).

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};

use super::{Attached, HEADERS, Instruction, code, link, load};
use crate::namespace::Namespace;

/// Where the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// After the device's driver (`XDP_FLAGS_SKB_MODE`).
    Generic,
    /// In the driver (`XDP_FLAGS_DRV_MODE`).
    Native,
}

/// Drops all IPv4 packets with this source that come in at the interface.
pub fn attach(namespace: &Namespace, interface: &str, from: Ipv4Addr, mode: Mode) -> Result<Attached> {
    let flags = match mode {
        Mode::Generic => 1 << 1,
        Mode::Native => 1 << 2,
    };
    let attached = namespace.within(|| {
        link(
            &load(PROGRAM_TYPE, &program(from))?,
            interface,
            ATTACH_TYPE,
            flags,
        )
    });
    attached.with_context(|| format!("attach an XDP program to {interface} in {}", namespace.name()))
}

/// `BPF_PROG_TYPE_XDP` and `BPF_XDP` (include/uapi/linux/bpf.h, Linux 6.6).
const PROGRAM_TYPE: u32 = 6;
const ATTACH_TYPE: u32 = 37;
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
/// Offsets in an Ethernet frame with an IPv4 header.
const ETHER_TYPE: i16 = 12;
const SOURCE: i16 = 26;

/// In the notation of the kernel's verifier.
fn program(from: Ipv4Addr) -> [Instruction; 12] {
    let ipv4 = i32::from(0x0800_u16.to_be());
    let address = i32::from_ne_bytes(from.octets());
    [
        code(0x61, 2, 1, 0, 0),          // r2 = *(u32 *)(r1 + 0), data
        code(0x61, 3, 1, 4, 0),          // r3 = *(u32 *)(r1 + 4), data_end
        code(0xb7, 0, 0, 0, XDP_PASS),   // r0 = XDP_PASS
        code(0xbf, 4, 2, 0, 0),          // r4 = r2
        code(0x07, 4, 0, 0, HEADERS),    // r4 += HEADERS
        code(0x2d, 4, 3, 5, 0),          // if r4 > r3 goto exit
        code(0x69, 4, 2, ETHER_TYPE, 0), // r4 = *(u16 *)(r2 + ETHER_TYPE)
        code(0x55, 4, 0, 3, ipv4),       // if r4 != IPv4 goto exit
        code(0x61, 4, 2, SOURCE, 0),     // r4 = *(u32 *)(r2 + SOURCE)
        code(0x56, 4, 0, 1, address),    // if w4 != address goto exit
        code(0xb7, 0, 0, 0, XDP_DROP),   // r0 = XDP_DROP
        code(0x95, 0, 0, 0, 0),          // exit
    ]
}
