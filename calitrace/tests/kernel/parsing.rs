//! Tunnels, extension headers and fragments: packets made byte by byte and sent by raw sockets.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use calitrace::{
    event::{Encap, EncapKind, Hook, Observation, Quoted, QuotedTransport, Transport},
    kernel::Config,
};

use crate::net::{LEFT, LEFT6, Net, RIGHT, RIGHT6, Watch};

const INNER_SRC: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const INNER_DST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 1);
const INNER6_SRC: &str = "fd77::1";
const INNER6_DST: &str = "fd77:1::1";

/// A UDP header and its payload; no checksum.
fn udp(src: u16, dst: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [src, dst, u16::try_from(8 + payload.len()).unwrap(), 0] {
        out.extend_from_slice(&word.to_be_bytes());
    }
    out.extend_from_slice(payload);
    out
}

/// An IPv4 packet with TTL 63 and IP id 0x1234. `options` is a multiple of four bytes.
fn ipv4(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = 20 + options.len();
    let mut out = vec![0x40 | u8::try_from(header / 4).unwrap(), 0];
    out.extend_from_slice(&u16::try_from(header + payload.len()).unwrap().to_be_bytes());
    out.extend_from_slice(&[0x12, 0x34, 0, 0, 63, proto, 0, 0]);
    out.extend_from_slice(&src.octets());
    out.extend_from_slice(&dst.octets());
    out.extend_from_slice(options);
    out.extend_from_slice(payload);
    out
}

fn ipv6(proto: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0x60, 0, 0, 0];
    out.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend_from_slice(&[proto, 62]);
    for address in [INNER6_SRC, INNER6_DST] {
        out.extend_from_slice(&address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    out.extend_from_slice(payload);
    out
}

/// A VXLAN header with VNI 4096 and an Ethernet frame.
fn vxlan(frame_type: &[u8], packet: &[u8]) -> Vec<u8> {
    let mut out = vec![8, 0, 0, 0, 0, 0x10, 0, 0];
    out.extend_from_slice(&[2; 12]);
    out.extend_from_slice(frame_type);
    out.extend_from_slice(packet);
    out
}

/// Hooks of uplinks on both ends, with the inner addresses in scope.
fn uplinks(net: &Net) -> Watch {
    let mut watch = Watch::new(&Config::default());
    watch
        .kernel
        .set_scope(&["10.77.0.0/24".parse().unwrap(), "fd77::/32".parse().unwrap()])
        .unwrap();
    watch.attach(&net.left, Hook::UplinkEgress);
    watch.attach(&net.right, Hook::UplinkIngress);
    watch
}

fn payload(seen: &Observation, size: u32) -> bool {
    matches!(seen.packet.transport, Transport::Udp { payload, .. } if payload == size)
}

pub(crate) fn vxlan_gives_inner_and_outer_header() {
    let net = Net::new();
    let mut watch = uplinks(&net);
    let from = net.left.udp(LEFT, 0);
    let v4 = ipv4(INNER_SRC, INNER_DST, 17, &[], &udp(1000, 2000, b"inner"));
    let v6 = ipv6(17, &udp(1000, 2000, b"inner"));
    let mut digest = None;
    for (frame_type, packet) in [
        (&[0x08, 0x00][..], &v4),
        (&[0x81, 0x00, 0x00, 0x05, 0x08, 0x00], &v4),
        (&[0x86, 0xdd], &v6),
        (&[0x81, 0x00, 0x00, 0x05, 0x86, 0xdd], &v6),
    ] {
        from.send_to(&vxlan(frame_type, packet), (RIGHT, 4789)).unwrap();
        let (left, right) = watch.pair(|_| true);
        assert_eq!((left.hook, right.hook), (Hook::UplinkEgress, Hook::UplinkIngress));
        assert_eq!((&left.packet, left.encap), (&right.packet, right.encap));
        let outer = Encap {
            kind: EncapKind::Vxlan,
            src: LEFT.into(),
            dst: RIGHT.into(),
            ttl: 64,
            ip_id: left.encap.unwrap().ip_id,
            length: u16::try_from(20 + 8 + 8 + 12 + frame_type.len() + packet.len()).unwrap(),
            vni: Some(4096),
        };
        assert_eq!(left.encap, Some(outer));
        assert_eq!(
            left.packet.transport,
            Transport::Udp {
                src_port: 1000,
                dst_port: 2000,
                payload: 5
            }
        );
        if left.packet.src.is_ipv4() {
            assert_eq!(
                (left.packet.src, left.packet.dst),
                (INNER_SRC.into(), INNER_DST.into())
            );
            assert_eq!(
                (left.packet.ttl, left.packet.ip_id, left.packet.length),
                (63, 0x1234, 33)
            );
            assert!(!left.packet.dont_fragment, "of the inner header, not the outer");
        } else {
            assert_eq!(left.packet.src, INNER6_SRC.parse::<IpAddr>().unwrap());
            assert_eq!((left.packet.ttl, left.packet.length), (62, 53));
        }
        // The payload is the same in all four, so its digest is, too.
        assert_eq!(*digest.get_or_insert(left.packet.digest), left.packet.digest);
        watch.forget();
    }
}

pub(crate) fn ipip_gives_inner_and_outer_header() {
    let net = Net::new();
    let mut watch = uplinks(&net);
    let inner = udp(1000, 2000, b"inner");
    net.left
        .raw(libc::AF_INET, libc::IPPROTO_IPIP)
        .send_to(&ipv4(INNER_SRC, INNER_DST, 17, &[], &inner), (RIGHT, 0))
        .unwrap();
    let (left, right) = watch.pair(|seen| payload(seen, 5) && seen.packet.src.is_ipv4());
    assert_eq!((&left.packet, left.encap), (&right.packet, right.encap));
    let outer = |encap: Option<Encap>, inner: usize| Encap {
        kind: EncapKind::Ipip,
        src: LEFT.into(),
        dst: RIGHT.into(),
        ttl: 64,
        ip_id: encap.unwrap().ip_id,
        length: u16::try_from(20 + inner).unwrap(),
        vni: None,
    };
    assert_eq!(left.encap, Some(outer(left.encap, 20 + inner.len())));
    assert_eq!(
        (left.packet.src, left.packet.dst, left.packet.ttl),
        (INNER_SRC.into(), INNER_DST.into(), 63)
    );

    net.left
        .raw(libc::AF_INET, libc::IPPROTO_IPV6)
        .send_to(&ipv6(17, &inner), (RIGHT, 0))
        .unwrap();
    let (left, right) = watch.pair(|seen| payload(seen, 5) && seen.packet.src.is_ipv6());
    assert_eq!((&left.packet, left.encap), (&right.packet, right.encap));
    assert_eq!(left.encap, Some(outer(left.encap, 40 + inner.len())));
}

/// A router between the nodes answers a packet of the tunnel: the record tells of the packet inside.
pub(crate) fn an_error_about_a_tunnelled_packet_tells_of_the_packet_inside() {
    let net = Net::new();
    let mut watch = uplinks(&net);
    let icmp = net.left.raw(libc::AF_INET, libc::IPPROTO_ICMP);
    let inner = ipv4(INNER_SRC, INNER_DST, 17, &[], &udp(1000, 2000, b"inner"));
    let far = Ipv4Addr::new(192, 0, 2, 9);
    // Time exceeded. No checksum: nobody but the programs reads it.
    let error = |packet: &[u8]| [&[11, 0, 0, 0, 0, 0, 0, 0][..], packet].concat();
    icmp.send_to(&error(&ipv4(RIGHT, far, 4, &[1; 4], &inner)), (RIGHT, 0))
        .unwrap();
    let seen = watch.wait(1, |seen| seen.hook == Hook::UplinkIngress).remove(0);
    assert_eq!((seen.packet.src, seen.packet.dst), (LEFT.into(), RIGHT.into()));
    assert_eq!(seen.encap, None, "the error itself is not in a tunnel");
    let quoted = Quoted {
        src: INNER_SRC.into(),
        dst: INNER_DST.into(),
        proto: 17,
        ttl: 63,
        ip_id: 0x1234,
        length: 33,
        transport: QuotedTransport::Udp {
            src_port: 1000,
            dst_port: 2000,
        },
        encap: Some(Box::new(Encap {
            kind: EncapKind::Ipip,
            src: RIGHT.into(),
            dst: far.into(),
            ttl: 63,
            ip_id: 0x1234,
            length: 24 + 33,
            vni: None,
        })),
    };
    let Transport::IcmpError {
        icmp_type: 11,
        quoted: told,
        ..
    } = seen.packet.transport
    else {
        panic!("no time exceeded: {seen:?}")
    };
    assert_eq!(*told, quoted);
    watch.forget();

    // What quotes others' tunnels, or no more than RFC 792 asks for, is out of scope as any error to a node is.
    let others = ipv4(far, far, 17, &[], &udp(1000, 2000, b"inner"));
    icmp.send_to(&error(&ipv4(RIGHT, far, 4, &[], &others)), (RIGHT, 0))
        .unwrap();
    icmp.send_to(&error(&ipv4(RIGHT, far, 4, &[], &inner[..8])), (RIGHT, 0))
        .unwrap();
    icmp.send_to(&error(&ipv4(RIGHT, far, 17, &[], &inner)), (RIGHT, 0))
        .unwrap();
    // Seen after the three, and the only one that is.
    net.left
        .raw(libc::AF_INET, libc::IPPROTO_IPIP)
        .send_to(&inner, (RIGHT, 0))
        .unwrap();
    let (last, _) = watch.pair(|_| true);
    assert_eq!(last.encap.unwrap().kind, EncapKind::Ipip);
}

pub(crate) fn a_pods_own_tunnel_is_its_payload() {
    let net = Net::new();
    let mut watch = uplinks(&net);
    watch
        .kernel
        .set_scope(&["10.99.0.0/24".parse().unwrap()])
        .unwrap();
    let inner = ipv4(INNER_SRC, INNER_DST, 17, &[], &udp(1000, 2000, b"inner"));
    net.left
        .raw(libc::AF_INET, libc::IPPROTO_IPIP)
        .send_to(&inner, (RIGHT, 0))
        .unwrap();
    let (left, _) = watch.pair(|seen| seen.packet.proto == 4);
    assert_eq!(
        (left.packet.src, left.packet.dst, left.encap),
        (LEFT.into(), RIGHT.into(), None)
    );
}

pub(crate) fn ip_options_and_extension_headers_are_stepped_over() {
    let net = Net::new();
    let mut watch = uplinks(&net);
    let ipip = net.left.raw(libc::AF_INET, libc::IPPROTO_IPIP);
    // Four NOPs.
    let with_options = ipv4(INNER_SRC, INNER_DST, 17, &[1; 4], &udp(1000, 2000, b"options"));
    ipip.send_to(&with_options, (RIGHT, 0)).unwrap();
    let (left, _) = watch.pair(|seen| payload(seen, 7));
    assert_eq!(left.packet.length, 24 + 8 + 7);

    // Hop-by-hop options, then routing, then destination options of 16 bytes, then an atomic fragment.
    let mut chain = vec![43, 0, 1, 4, 0, 0, 0, 0];
    chain.extend_from_slice(&[60, 0, 4, 0, 0, 0, 0, 0]);
    chain.extend_from_slice(&[44, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    chain.extend_from_slice(&[17, 0, 0, 0, 0xde, 0xad, 0xbe, 0xef]);
    chain.extend_from_slice(&udp(1000, 2000, b"extended"));
    net.left
        .raw(libc::AF_INET, libc::IPPROTO_IPV6)
        .send_to(&ipv6(0, &chain), (RIGHT, 0))
        .unwrap();
    let (left, _) = watch.pair(|seen| payload(seen, 8));
    assert_eq!((left.packet.proto, left.packet.ip_id), (17, 0xdead_beef));
    assert_eq!(
        (left.packet.fragment_offset, left.packet.more_fragments),
        (0, false)
    );
}

pub(crate) fn later_fragments_have_no_transport() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    // 2,960 bytes of UDP, header included: two fragments, as large as the link takes, and one of what is left.
    let bytes: Vec<u8> = (0..3500_u32)
        .map(|byte| u8::try_from(byte % 253).unwrap())
        .collect();
    for (source, destination) in [
        (IpAddr::from(LEFT), IpAddr::from(RIGHT)),
        (LEFT6.into(), RIGHT6.into()),
    ] {
        let from = net.left.udp(source, 0);
        allow_fragments(&from);
        from.send_to(&bytes, (destination, 7100)).unwrap();
        let seen = watch.wait(6, |seen| seen.packet.proto == 17 && seen.packet.src == source);
        let (egress, ingress): (Vec<_>, Vec<_>) = seen
            .into_iter()
            .partition(|seen| seen.hook == Hook::WorkloadEgress);
        for (sent, received) in egress.iter().zip(&ingress) {
            assert_eq!(sent.packet, received.packet);
        }
        let id = egress[0].packet.ip_id;
        assert_ne!(id, 0);
        assert!(egress.iter().all(|seen| seen.packet.ip_id == id));
        assert!(matches!(
            egress[0].packet.transport,
            Transport::Udp { dst_port: 7100, .. }
        ));
        assert_eq!(egress[0].packet.fragment_offset, 0);
        assert!(egress[0].packet.more_fragments && egress[1].packet.more_fragments);
        assert!(!egress[2].packet.more_fragments);
        for (fragment, number) in egress.iter().zip(0_u32..).skip(1) {
            assert_eq!(fragment.packet.transport, Transport::Other);
            assert_eq!(
                fragment.packet.fragment_offset,
                number * egress[1].packet.fragment_offset
            );
            assert_ne!(fragment.packet.digest, 0);
        }
    }
}

pub(crate) fn later_fragments_have_no_node_port() {
    let net = Net::new();
    let mut watch = Watch::new(&Config::default());
    watch
        .kernel
        .set_scope(&["10.77.0.0/16".parse().unwrap()])
        .unwrap();
    watch.attach(&net.left, Hook::UplinkEgress);
    let from = net.left.udp(LEFT, 0);
    allow_fragments(&from);
    // Read as ports, each two bytes of it are 30840, as the second packet's port is.
    from.send_to(&[0x78; 3500], (RIGHT, 7100)).unwrap();
    from.send_to(b"node port", (RIGHT, 30_840)).unwrap();
    let seen = watch.finish();
    assert!(matches!(&seen[..], [seen] if payload(seen, 9)), "{seen:#?}");
}

/// Lets the kernel fragment what the socket sends.
fn allow_fragments(socket: &UdpSocket) {
    use std::os::fd::AsRawFd as _;
    let (level, option) = match socket.local_addr().unwrap() {
        std::net::SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        std::net::SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    let dont: libc::c_int = libc::IP_PMTUDISC_DONT;
    // SAFETY: the pointer and the length are those of `dont`.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const dont).cast(),
            u32::try_from(size_of_val(&dont)).unwrap(),
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}
