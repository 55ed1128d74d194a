//! Every record arrives, however fast they are made, and older verifiers will not give up on the programs. What the
//! programs cost is printed by `cargo xtask bench programs`.

use std::{path::Path, sync::mpsc, thread, time::Duration};

use calitrace_ebpf::Hook;

use super::{Config, Drain, Kernel};
use crate::netns;

/// Ethernet, IPv4, UDP from 10.1.0.1 to 10.2.0.1, 32 bytes of payload.
fn packet() -> Vec<u8> {
    let mut packet = vec![2; 12];
    packet.extend_from_slice(&[0x08, 0x00]);
    packet.extend_from_slice(&[
        0x45, 0, 0, 60, 0x12, 0x34, 0x40, 0, 64, 17, 0, 0, 10, 1, 0, 1, 10, 2, 0, 1,
    ]);
    packet.extend_from_slice(&[0x10, 0, 0x20, 0, 0, 40, 0, 0]);
    packet.extend_from_slice(&[7; 32]);
    packet
}

const RECORDS: u32 = 1_000_000;

#[test]
fn every_record_of_a_flood_is_drained_or_counted() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: loading eBPF programs needs root");
        return;
    }
    let netns = netns::Handle::open(Path::new("/proc/self/ns/net")).unwrap();
    let mut kernel = Kernel::load(&Config::default()).unwrap();
    let walked = kernel
        .verified_instructions(&netns, Hook::WorkloadIngress)
        .unwrap();
    println!("instructions walked by the verifier: {walked:?}");
    // About 5,000 on 6.18 and 12,000 on 6.1. Far more would mean that ways through the program no longer meet, and that
    // an older verifier gives up (at a million).
    assert!(walked.is_none_or(|walked| walked < 100_000));

    let (sender, receiver) = mpsc::sync_channel(64);
    let drain = Drain::start(kernel.take_ring().unwrap(), Duration::from_millis(5), sender).unwrap();
    let consumer = thread::spawn(move || receiver.iter().map(|batch| batch.len() as u64).sum::<u64>());
    kernel
        .trial(&netns, Some(Hook::WorkloadIngress), &packet(), RECORDS)
        .unwrap();
    drain.stop().unwrap();
    let received = consumer.join().unwrap();
    let counters = kernel.counters().unwrap();
    let counted = counters
        .iter()
        .find(|count| count.hook == Hook::WorkloadIngress)
        .unwrap()
        .counters;
    println!("{counted:?}");
    assert_eq!(counted.seen, u64::from(RECORDS));
    assert_eq!(counted.recorded + counted.ring_refused, counted.seen);
    assert_eq!(received, counted.recorded);
}
