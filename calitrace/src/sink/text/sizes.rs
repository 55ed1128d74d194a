//! The sizes of a packet on its way, beside the MTUs it had to fit: at each interface, before and after encapsulation.

use crate::{
    correlate::{PacketTrace, SightedEncap, Sighting},
    event::EncapKind,
};

/// Whether sizes explain what became of the packet: they are shown without being asked for.
pub(super) fn explain(packet: &PacketTrace) -> bool {
    let told = packet.answer.as_ref().is_some_and(|answer| answer.mtu.is_some());
    let too_large = packet.drop.as_ref().is_some_and(|report| report.mtu.is_some());
    told || too_large
}

/// `cali8d02ed71817 84 of 1500, tunl0 84 of 1480, eth0 104 of 1500 (IPIP +20)`: bytes and MTU at each interface of a node.
/// None where the packet was seen at none.
pub(super) fn at(packet: &PacketTrace, node: &str) -> Option<String> {
    let here = |sighting: &&Sighting| {
        sighting.direction.is_some() && sighting.node.as_deref() == Some(node) && sighting.interface.is_some()
    };
    let mut places: Vec<Place<'_>> = Vec::new();
    for sighting in packet.observations.iter().filter(here) {
        match places.iter_mut().find(|place| place.is_of(sighting)) {
            Some(place) => place.and(sighting),
            None => places.push(Place::new(sighting)),
        }
    }
    let words: Vec<String> = places.iter().map(Place::describe).collect();
    (!words.is_empty()).then(|| words.join(", "))
}

/// What was seen of a packet at an interface: one sighting, or its pieces.
struct Place<'a> {
    first: &'a Sighting,
    pieces: usize,
    largest: u32,
}

impl<'a> Place<'a> {
    fn new(first: &'a Sighting) -> Self {
        Self {
            first,
            pieces: 1,
            largest: bytes(first),
        }
    }

    fn is_of(&self, sighting: &Sighting) -> bool {
        (&self.first.interface, self.first.direction) == (&sighting.interface, sighting.direction)
    }

    fn and(&mut self, piece: &Sighting) {
        self.pieces += 1;
        self.largest = self.largest.max(bytes(piece));
    }

    fn describe(&self) -> String {
        let name = self.first.interface.as_deref().unwrap_or_default();
        let pieces = if self.pieces > 1 {
            format!("{} pieces of up to ", self.pieces)
        } else {
            String::new()
        };
        let part = |part: Option<String>| part.unwrap_or_default();
        let segments = part(
            self.first
                .segments
                .map(|segments| format!(" in {segments} segments")),
        );
        let mtu = part(self.first.mtu.map(|mtu| format!(" of {mtu}")));
        let encap = self.first.encap.as_ref();
        let added = part(
            encap
                .and_then(|encap| added(encap, self.first))
                .map(|(name, more)| format!(" ({name} +{more})")),
        );
        format!("{name} {pieces}{}{segments}{mtu}{added}", self.largest)
    }
}

/// IP total length of the outer packet, or of the packet where it has none.
fn bytes(sighting: &Sighting) -> u32 {
    let outer = sighting.encap.as_ref().and_then(|encap| encap.length);
    outer.map_or(sighting.length, u32::from)
}

/// What encapsulation adds to it; none where the outer header does not say.
fn added(encap: &SightedEncap, sighting: &Sighting) -> Option<(&'static str, u32)> {
    let name = match encap.kind {
        EncapKind::Ipip => "IPIP",
        EncapKind::Vxlan => "VXLAN",
        EncapKind::Wireguard => "WireGuard",
    };
    let more = u32::from(encap.length?).checked_sub(sighting.length)?;
    Some((name, more))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::sample;

    #[test]
    fn each_interface_has_its_bytes_and_its_mtu() {
        let packet = sample::ping(0, 1);
        assert_eq!(
            at(&packet, "minikube").as_deref(),
            Some("cali8d02ed71817 84 of 1500, tunl0 84 of 1480, eth0 104 of 1500 (IPIP +20)")
        );
        assert_eq!(at(&packet, "elsewhere"), None);
    }

    #[test]
    fn pieces_are_counted_and_super_packets_have_segments() {
        let mut packet = sample::ping(0, 1);
        packet.observations.truncate(2);
        packet.observations[0].length = 2_920;
        packet.observations[0].segments = Some(2);
        packet.observations[1].length = 1_472;
        let piece = packet.observations[1].clone();
        packet.observations.push(Sighting {
            length: 1_468,
            ..piece
        });
        assert_eq!(
            at(&packet, "minikube").as_deref(),
            Some("cali8d02ed71817 2920 in 2 segments of 1500, tunl0 2 pieces of up to 1472 of 1480")
        );
    }
}
