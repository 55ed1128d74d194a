//! Each transport's fields, as sent by real sockets and as recorded at both ends of a link.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
};

use calitrace::event::{Hook, Observation, QuotedTransport, Transport};
use calitrace_tests::needs;

use crate::net::{DEVICE, LEFT, LEFT6, Net, RIGHT, RIGHT6, Watch};

fn udp_port(seen: &Observation) -> Option<u16> {
    match seen.packet.transport {
        Transport::Udp { dst_port, .. } => Some(dst_port),
        _ => None,
    }
}

pub(crate) fn udp_has_the_same_key_at_both_ends() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    let from = net.left.udp(LEFT, 0);
    let _to = net.right.udp(RIGHT, 7001);
    for size in [1_usize, 2, 7, 31, 32, 33, 1400] {
        let payload: Vec<u8> = (0..size).map(|byte| u8::try_from(byte % 251).unwrap()).collect();
        from.send_to(&payload, (RIGHT, 7001)).unwrap();
        let (left, right) = watch.pair(|seen| seen.packet.length == u32::try_from(size).unwrap() + 28);
        let source = from.local_addr().unwrap().port();
        let expected = Transport::Udp {
            src_port: source,
            dst_port: 7001,
            payload: u32::try_from(size).unwrap(),
        };
        for (seen, end, hook) in [
            (&left, &net.left, Hook::WorkloadEgress),
            (&right, &net.right, Hook::WorkloadIngress),
        ] {
            assert_eq!(seen.hook, hook);
            assert_eq!(seen.netns, end.ns.inode());
            assert_eq!(seen.ifindex, end.ifindex);
            assert_eq!(seen.packet.src, IpAddr::from(LEFT));
            assert_eq!(seen.packet.dst, IpAddr::from(RIGHT));
            assert_eq!(seen.packet.transport, expected);
            assert_eq!(seen.packet.ttl, 64);
            assert!(seen.packet.dont_fragment, "Linux sets DF for path MTU discovery");
            assert_ne!(seen.skb, 0);
            assert_ne!(seen.head, 0);
            assert_ne!(seen.packet.digest, 0);
            assert!(seen.drop.is_none() && seen.encap.is_none());
        }
        assert_eq!(left.packet, right.packet);
        assert_eq!(
            (left.skb, left.head),
            (right.skb, right.head),
            "veth hands the same sk_buff on"
        );
        assert!(left.time <= right.time);
    }
}

pub(crate) fn payloads_that_differ_have_other_digests() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    let from = net.left.udp(LEFT, 0);
    for byte in 0..16 {
        from.send_to(&[byte; 3], (RIGHT, 7002)).unwrap();
    }
    let seen = watch.wait(32, |seen| udp_port(seen) == Some(7002));
    let digests: std::collections::BTreeSet<u64> = seen.iter().map(|seen| seen.packet.digest).collect();
    assert_eq!(digests.len(), 16);
}

pub(crate) fn udp_over_ipv6() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    let from = net.left.udp(LEFT6, 0);
    from.send_to(b"six", (RIGHT6, 7003)).unwrap();
    let (left, right) = watch.pair(|seen| udp_port(seen) == Some(7003));
    assert_eq!(left.packet, right.packet);
    assert_eq!(left.packet.src, IpAddr::from(LEFT6));
    assert_eq!(left.packet.dst, IpAddr::from(RIGHT6));
    assert_eq!(
        (left.packet.proto, left.packet.ttl, left.packet.length),
        (17, 64, 40 + 8 + 3)
    );
}

pub(crate) fn tcp_sequence_numbers_follow_the_bytes() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    let listener = net
        .right
        .ns
        .run(|| Ok(TcpListener::bind((RIGHT, 7004))?))
        .unwrap();
    let mut client = net
        .left
        .ns
        .run(|| Ok(TcpStream::connect((RIGHT, 7004))?))
        .unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"hello").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();

    let tcp = |seen: &Observation| match seen.packet.transport {
        Transport::Tcp {
            seq,
            flags,
            payload,
            tsval,
            src_port,
            dst_port,
            ..
        } => Some((seq, flags, payload, tsval, src_port, dst_port)),
        _ => None,
    };
    let (syn, syn_right) = watch.pair(|seen| tcp(seen).is_some_and(|(_, flags, ..)| flags & 2 != 0));
    let (data, data_right) = watch.pair(|seen| tcp(seen).is_some_and(|(_, _, payload, ..)| payload == 5));
    assert_eq!(syn.packet, syn_right.packet);
    assert_eq!(data.packet, data_right.packet);
    let port = client.local_addr().unwrap().port();
    let (first, flags, payload, syn_tsval, ..) = tcp(&syn).unwrap();
    assert_eq!((flags & 0x3f, payload), (2, 0), "a bare SYN");
    assert!(syn_tsval.is_some(), "behind the MSS and SACK options");
    let (seq, flags, _, tsval, src, dst) = tcp(&data).unwrap();
    assert_eq!(seq, first.wrapping_add(1));
    assert_eq!(flags & 0x3f, 0x18, "ACK and PSH");
    assert!(tsval.is_some());
    assert_eq!((src, dst), (port, 7004));
    assert_eq!(data.packet.digest, 0);
}

pub(crate) fn echo_has_identifier_and_sequence_number() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    for (destination, length) in [(IpAddr::from(RIGHT), 84), (IpAddr::from(RIGHT6), 104)] {
        net.left
            .exec(&format!("ping -q -c 2 -i 0.01 -W 10 {destination}"));
        for number in [1, 2] {
            let (left, right) = watch.pair(|seen| {
                seen.packet.dst == destination
                    && matches!(seen.packet.transport, Transport::Echo { reply: false, seq, .. } if seq == number)
            });
            assert_eq!(left.packet, right.packet);
            assert_eq!(left.packet.length, length);
            assert_ne!(left.packet.digest, 0);
        }
    }
}

pub(crate) fn an_icmp_error_quotes_the_packet_and_the_drop_has_its_reason() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    // Answers come back the other way.
    watch.attach(&net.left, Hook::WorkloadIngress);
    watch
        .kernel
        .set_scope(&["10.99.0.0/24".parse().unwrap(), "fd00:99::/64".parse().unwrap()])
        .unwrap();
    watch.kernel.attach_global().unwrap();
    for (source, destination) in [
        (LEFT.into(), RIGHT.into()),
        (IpAddr::from(LEFT6), IpAddr::from(RIGHT6)),
    ] {
        let from = net.left.udp(source, 0);
        let port = from.local_addr().unwrap().port();
        from.send_to(b"anybody?", (destination, 7005)).unwrap();
        let sent = watch.wait(1, |seen| {
            seen.hook == Hook::WorkloadEgress && udp_port(seen) == Some(7005) && seen.packet.src == source
        });
        let errors = watch.wait(1, |seen| {
            seen.hook == Hook::WorkloadIngress
                && seen.packet.dst == source
                && matches!(seen.packet.transport, Transport::IcmpError { .. })
        });
        let Transport::IcmpError {
            icmp_type,
            code,
            ref quoted,
            ..
        } = errors[0].packet.transport
        else {
            panic!("{:?}", errors[0]);
        };
        assert_eq!((icmp_type, code), if source.is_ipv4() { (3, 3) } else { (1, 4) });
        assert_eq!((quoted.src, quoted.dst), (source, destination));
        assert_eq!(
            (quoted.proto, quoted.ttl, quoted.ip_id),
            (17, 64, sent[0].packet.ip_id)
        );
        assert_eq!(quoted.length, sent[0].packet.length);
        assert_eq!(
            quoted.transport,
            QuotedTransport::Udp {
                src_port: port,
                dst_port: 7005
            }
        );

        // The datagram itself died of having no socket to go to.
        let drops = watch.wait(1, |seen| {
            seen.hook == Hook::KfreeSkb && udp_port(seen) == Some(7005) && seen.packet.src == source
        });
        let drop = drops[0].drop.as_ref().unwrap();
        assert_eq!(
            drop.reason.as_deref(),
            needs::has_drop_reasons().then_some("NO_SOCKET")
        );
        assert!(drop.location.as_deref().unwrap().contains("udp"), "{drop:?}");
        assert_eq!(drops[0].netns, net.right.ns.inode());
        assert_eq!(drops[0].ifindex, net.right.ifindex);
        assert_eq!(drops[0].skb, sent[0].skb);
        assert_eq!(drops[0].packet.digest, sent[0].packet.digest);
    }
}

pub(crate) fn sctp_has_ports_and_the_digest_of_its_chunks() {
    const INIT: [u8; 20] = [1, 0, 0, 20, 1, 2, 3, 4, 0, 1, 0, 0, 0, 1, 0, 1, 5, 6, 7, 8];
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    let socket = net.left.raw(libc::AF_INET, 132);
    let mut digests = Vec::new();
    // NAT would change the ports and the checksum, and nothing else.
    for (port, checksum) in [(40_000_u16, 11_u8), (40_001, 22)] {
        let [high, low] = port.to_be_bytes();
        let header = [high, low, 0x0f, 0x1c, 9, 9, 9, 9, checksum, 0, 0, 0];
        socket
            .send_to(&[&header[..], &INIT].concat(), (RIGHT, 0))
            .unwrap();
        let (left, right) =
            watch.pair(|seen| seen.packet.proto == 132 && seen.packet.flow().src_port == port);
        assert_eq!(left.packet, right.packet);
        let expected = Transport::Sctp {
            src_port: port,
            dst_port: 3868,
            payload: 20,
        };
        assert_eq!(left.packet.transport, expected);
        digests.push(left.packet.digest);
    }
    assert_ne!(digests[0], 0);
    assert_eq!(digests[0], digests[1]);
    watch.finish();
}

pub(crate) fn other_protocols_have_addresses_number_and_digest() {
    let net = Net::new();
    let mut watch = Watch::left_to_right(&net);
    net.left
        .raw(libc::AF_INET, 253)
        .send_to(b"experimental", (RIGHT, 0))
        .unwrap();
    let (left, right) = watch.pair(|seen| seen.packet.proto == 253);
    assert_eq!(left.packet, right.packet);
    assert_eq!(left.packet.transport, Transport::Other);
    assert_eq!(left.packet.length, 20 + 12);
    assert_ne!(left.packet.digest, 0);
    // What is not IP leaves a count, not a record.
    net.left.exec(&format!("ip neigh flush dev {DEVICE}"));
    net.left.exec(&format!("ping -q -c 1 -W 10 {RIGHT}"));
    let seen = watch.finish();
    let counts = watch.kernel.counters().unwrap();
    let count = counts
        .iter()
        .find(|count| count.hook == Hook::WorkloadEgress)
        .unwrap()
        .counters;
    assert!(count.non_ip >= 1, "an ARP request: {count:?}");
    let recorded = seen
        .iter()
        .filter(|seen| seen.hook == Hook::WorkloadEgress)
        .count();
    assert_eq!(
        count.seen,
        count.non_ip + count.out_of_scope + count.ring_refused + count.recorded
    );
    assert_eq!(count.recorded, u64::try_from(recorded).unwrap());
}
