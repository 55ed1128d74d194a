//! Observations for tests.

use super::{Hook, Observation, Packet, Transport};

/// A packet from one pod to another, whose transport header says `transport`.
pub(crate) fn packet(proto: u8, length: u32, transport: Transport) -> Packet {
    Packet {
        src: [10, 244, 0, 1].into(),
        dst: [10, 244, 1, 1].into(),
        proto,
        ttl: 64,
        tos: 0,
        ip_id: 0,
        length,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset: 0,
        transport,
        digest: 0,
        gso_size: 0,
        gso_segs: 0,
    }
}

/// The packet as it leaves its pod.
pub(crate) fn sent(time: u64, packet: Packet) -> Observation {
    Observation {
        time,
        netns: 1,
        ifindex: 2,
        hook: Hook::WorkloadIngress,
        cpu: 0,
        skb: 0,
        head: 0,
        packet,
        encap: None,
        drop: None,
        detail: None,
    }
}
