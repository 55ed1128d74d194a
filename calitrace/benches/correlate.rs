//! From ring records to packet traces on one core: observations a second, and the heap in use while many traces are open.
//! 10,000 flows between pods of two nodes with IPIP, six observations a packet, nearly in order of time.
#![expect(clippy::print_stdout, reason = "a command that prints its results")]

mod heap;

use std::{hint::black_box, net::Ipv4Addr};

use calitrace::{
    correlate::{Config, Correlator, PacketTrace, Verdict},
    event::{
        Attachment, AttachmentState, DropNames, EncapKind, Fact, Hook, Interface, Item, Node, Pod, Role,
        Route, RouteKind, decode,
    },
};
use calitrace_ebpf::{Encapsulated, Flags, Kind, Outer, Plain, TunnelKind};
use criterion::{BatchSize, Criterion, Throughput};

use heap::{heap, mebibytes};

const FLOWS: u64 = 10_000;
const PODS: u64 = 100;
const PACKETS: u64 = 100_000;
/// As `watch` has it.
const DRAIN_PERIOD: u64 = 10_000_000;
/// Nanoseconds; `CLOCK_MONOTONIC` of a machine that is up for a while.
const BEGIN: u64 = 1_000_000_000_000;

const TUNNEL: u32 = 2;
const UPLINK: u32 = 3;
const FIRST_POD: u32 = 10;

/// Where a packet goes by, and how long after its first observation.
const WAY: [(u64, Hook, u64, u8); 6] = [
    (0, Hook::WorkloadIngress, 0, 64),
    (0, Hook::TunnelEgress, 4_000, 63),
    (0, Hook::UplinkEgress, 6_000, 63),
    (1, Hook::UplinkIngress, 26_000, 63),
    (1, Hook::TunnelIngress, 29_000, 63),
    (1, Hook::WorkloadEgress, 33_000, 62),
];

fn netns(node: u64) -> u64 {
    4_026_532_000 + node
}

fn node_address(node: u64) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 49, 2 + byte(node))
}

fn tunnel_address(node: u64) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, byte(node), 0)
}

fn pod_address(node: u64, pod: u64) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, byte(node), 1 + byte(pod))
}

fn byte(value: u64) -> u8 {
    u8::try_from(value).expect("small")
}

fn ifindex_of(pod: u64) -> u32 {
    FIRST_POD + u32::from(byte(pod))
}

/// The finaliser of `SplitMix64`: numbers that look like chance and are the same in every run.
fn chance(number: u64) -> u64 {
    let mut value = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Two nodes and their pods.
fn facts() -> Vec<Item> {
    let time = 0;
    let mut facts = Vec::new();
    for node in 0..2 {
        let (netns, other) = (netns(node), 1 - node);
        facts.push(Fact::Node(Node {
            time,
            netns,
            name: format!("node{node}"),
            cluster: 1,
            addresses: vec![node_address(node).into(), tunnel_address(node).into()],
        }));
        facts.push(Fact::Routes {
            time,
            netns,
            routes: vec![Route {
                prefix: format!("10.244.{other}.0/24").parse().expect("a prefix"),
                kind: RouteKind::Unicast,
                gateway: Some(node_address(other).into()),
                ifindex: Some(TUNNEL),
                encap: Some(EncapKind::Ipip),
                remote_node: Some(node_address(other).into()),
            }],
        });
        let pods = (0..PODS).map(|pod| (ifindex_of(pod), Role::Workload));
        for (ifindex, role) in pods.chain([(TUNNEL, Role::Tunnel), (UPLINK, Role::Uplink)]) {
            facts.push(Fact::Interface(Interface {
                time,
                netns,
                ifindex,
                name: format!("if{ifindex}"),
                role,
                mtu: 1480,
                addresses: Vec::new(),
                xdp: false,
                gone: false,
            }));
            facts.push(Fact::Attachment(Attachment {
                time,
                netns,
                ifindex,
                hook: match role {
                    Role::Workload => Hook::WorkloadIngress,
                    Role::Tunnel => Hook::TunnelIngress,
                    _ => Hook::UplinkIngress,
                },
                state: AttachmentState::Attached,
                since: None,
                others: Vec::new(),
            }));
        }
        for pod in 0..PODS {
            facts.push(Fact::Pod(Pod {
                time,
                netns,
                ifindex: ifindex_of(pod),
                addresses: vec![pod_address(node, pod).into()],
                name: Some(format!("default/pod-{node}-{pod}")),
                pod_netns: None,
                gone: false,
            }));
        }
    }
    facts.into_iter().map(Item::Fact).collect()
}

/// The record of a packet at its first hook, without times and places: by flow TCP data, TCP acknowledgements or UDP.
fn packet(number: u64, sent: &mut [u32]) -> Plain {
    let flow = chance(number) % FLOWS;
    let mut plain = Plain {
        kind: Kind::Plain as u8,
        ttl: 64,
        ..Plain::default()
    };
    plain.src = pod_address(0, flow % PODS).to_ipv6_mapped().octets();
    plain.dst = pod_address(1, flow / PODS).to_ipv6_mapped().octets();
    plain.sport = 30_000 + u16::try_from(flow).expect("few flows");
    plain.dport = 80;
    plain.ip_id = u32::try_from(number % 65_536).expect("16 bits");
    plain.flags = Flags::DF;
    let already = &mut sent[usize::try_from(flow).expect("few flows")];
    (plain.proto, plain.payload) = match flow % 4 {
        0 | 1 => (6, 1400),
        2 => (6, 0),
        _ => (17, 64),
    };
    if plain.proto == 6 {
        plain.flags |= Flags::TSVAL;
        plain.tcp_flags = 0x10;
        (plain.window, plain.tsval) = (500, plain.ip_id);
        (plain.seq, plain.ack) = if plain.payload == 0 {
            (1, *already)
        } else {
            (*already, 1)
        };
        *already += 1400;
        plain.length = 52 + plain.payload;
    } else {
        plain.length = 28 + plain.payload;
        plain.digest = chance(number);
    }
    plain
}

/// Records of packets sent `interval` nanoseconds apart, as they come out of the ring.
fn records(interval: u64) -> Vec<Vec<u8>> {
    let mut sent = vec![1; usize::try_from(FLOWS).expect("few flows")];
    let mut records = Vec::new();
    for number in 0..PACKETS {
        let mut plain = packet(number, &mut sent);
        let pods = [plain.src[15], plain.dst[15]].map(|last| ifindex_of(u64::from(last) - 1));
        for (node, hook, after, ttl) in WAY {
            plain.hook = hook as u8;
            plain.ttl = ttl;
            plain.netns = netns(node);
            plain.time = BEGIN + number * interval + after;
            plain.skb = 0xffff_8880_0000_0000 + (number % 4096 * 2 + node) * 256;
            plain.head = plain.skb + 0x1000_0000;
            plain.ifindex = match hook {
                Hook::WorkloadIngress => pods[0],
                Hook::WorkloadEgress => pods[1],
                Hook::UplinkIngress | Hook::UplinkEgress => UPLINK,
                _ => TUNNEL,
            };
            let encapsulated = plain.ifindex == UPLINK;
            plain.kind = if encapsulated {
                Kind::Encapsulated
            } else {
                Kind::Plain
            } as u8;
            plain.outer_length = 0;
            let record = if encapsulated {
                plain.outer_length = u16::try_from(plain.length + 20).expect("a small packet");
                let outer = Outer {
                    src: node_address(0).to_ipv6_mapped().octets(),
                    dst: node_address(1).to_ipv6_mapped().octets(),
                    kind: TunnelKind::Ipip as u8,
                    ttl: 64,
                    ip_id: 0,
                    vni: 0,
                };
                bytes(&Encapsulated { plain, outer })
            } else {
                bytes(&plain)
            };
            // Records of several CPUs: up to 2 µs out of order.
            records.push((plain.time + chance(plain.time) % 2000, record));
        }
    }
    records.sort_by_key(|(arrival, _)| *arrival);
    records.into_iter().map(|(_, record)| record).collect()
}

fn bytes<T: Copy>(record: &T) -> Vec<u8> {
    // SAFETY: records are made of integers, with explicit padding: all their bytes are set.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(record).cast::<u8>(), size_of::<T>()) }.to_vec()
}

/// None of the packets is dropped.
struct NoDrops;

impl DropNames for NoDrops {
    fn reason(&self, _reason: u32) -> Option<String> {
        None
    }

    fn symbol(&self, _address: u64) -> Option<String> {
        None
    }
}

fn correlator(facts: &[Item], drain_period: u64) -> Correlator {
    let mut correlator = Correlator::new(Config {
        drain_period,
        ..Config::default()
    });
    for fact in facts {
        correlator.push(fact, &mut Vec::new());
    }
    correlator
}

fn push(correlator: &mut Correlator, record: &[u8], closed: &mut Vec<PacketTrace>) {
    let observation = decode(record, &NoDrops).expect("a record");
    correlator.push(&Item::Observation(observation), closed);
}

/// What 100,000 open traces take.
fn print_heap(facts: &[Item]) {
    // All of them within the 50 ms that a delivered packet's trace stays open: 15 times as fast as below, so that no
    // more observations wait to be put in order than there, they wait so much shorter.
    let (interval, drain_period) = (400, DRAIN_PERIOD / 15);
    let records = records(interval);
    let mut closed = Vec::new();
    let mut correlator = correlator(facts, drain_period);
    let before = heap();
    for record in &records {
        push(&mut correlator, record, &mut closed);
    }
    // Nothing waits any more; what the waiting took counts.
    let time = BEGIN + PACKETS * interval + 33_000 + drain_period;
    correlator.push(&Item::Tick { time }, &mut closed);
    let bytes = heap() - before;
    assert!(closed.is_empty(), "all traces are open");
    println!(
        "heap: {:.1} MiB with {PACKETS} open traces of {} observations, {} bytes a trace",
        mebibytes(bytes),
        WAY.len(),
        bytes / usize::try_from(PACKETS).expect("not so many"),
    );
    correlator.finish(&mut closed);
    assert_right(&closed);
}

/// What is measured is that every packet becomes one trace.
fn assert_right(closed: &[PacketTrace]) {
    assert_eq!(closed.len() as u64, PACKETS);
    for trace in closed {
        assert_eq!(trace.verdict, Verdict::Delivered);
        assert_eq!(trace.observations.len(), WAY.len());
    }
}

fn main() {
    let facts = facts();
    print_heap(&facts);

    // A million observations a second.
    let records = records(6_000);
    let mut closed = Vec::new();
    let mut once = correlator(&facts, DRAIN_PERIOD);
    for record in &records {
        push(&mut once, record, &mut closed);
    }
    once.finish(&mut closed);
    assert_right(&closed);
    drop(closed);

    let mut criterion = Criterion::default().configure_from_args().sample_size(10);
    let mut group = criterion.benchmark_group("observations");
    group.throughput(Throughput::Elements(records.len() as u64));
    group.bench_function("decode", |bencher| {
        bencher.iter(|| {
            for record in &records {
                black_box(decode(record, &NoDrops).expect("a record"));
            }
        });
    });
    group.bench_function("decode and correlate", |bencher| {
        bencher.iter_batched(
            || correlator(&facts, DRAIN_PERIOD),
            |mut correlator| {
                let mut closed = Vec::new();
                for record in &records {
                    push(&mut correlator, record, &mut closed);
                    black_box(&closed);
                    closed.clear();
                }
                correlator.finish(&mut closed);
                closed
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
    criterion.final_summary();
}
