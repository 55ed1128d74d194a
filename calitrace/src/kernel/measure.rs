//! What the programs cost and how fast records pass the ring, by `BPF_PROG_TEST_RUN`: printed, not judged, as machines
//! differ. Judged is that every record arrives.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use aya::{TestRun as _, programs::TestRunOptions};
use calitrace_ebpf::Hook;

use super::{Config, Drain, Kernel};

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

fn run(kernel: &mut Kernel, hook: Hook, repeat: u32) -> Duration {
    let packet = packet();
    let options = TestRunOptions {
        data_in: Some(&packet),
        repeat,
        ..TestRunOptions::default()
    };
    let result = kernel
        .instance(0)
        .unwrap()
        .classifier(hook)
        .unwrap()
        .test_run(options)
        .unwrap();
    assert_eq!(result.return_value, u32::MAX, "TC_ACT_UNSPEC");
    result.duration
}

#[test]
fn cost_of_a_packet_and_speed_of_the_drain() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: loading eBPF programs needs root");
        return;
    }
    let start = Instant::now();
    let mut kernel = Kernel::load(&Config::default()).unwrap();
    println!("loaded in {:?}", start.elapsed());
    let start = Instant::now();
    let info = kernel
        .instance(0)
        .unwrap()
        .classifier(Hook::WorkloadIngress)
        .unwrap()
        .info()
        .unwrap();
    println!(
        "a program verified in {:?}: {:?} bytes, {:?} instructions walked",
        start.elapsed(),
        info.size_translated(),
        info.verified_instruction_count()
    );
    // About 5,000 on 6.18 and 12,000 on 6.1. Far more would mean that ways through the program no longer meet, and that
    // an older verifier gives up (at a million).
    assert!(
        info.verified_instruction_count()
            .is_none_or(|walked| walked < 100_000)
    );
    kernel.attach_global().unwrap();

    println!(
        "out of scope: {:?} a packet",
        run(&mut kernel, Hook::UplinkIngress, 100_000)
    );

    let (sender, receiver) = mpsc::sync_channel(64);
    let drain = Drain::start(kernel.take_ring().unwrap(), Duration::from_millis(5), sender).unwrap();
    let consumer = thread::spawn(move || receiver.iter().map(|batch| batch.len() as u64).sum::<u64>());
    let start = Instant::now();
    let cost = run(&mut kernel, Hook::WorkloadIngress, RECORDS);
    let made = start.elapsed();
    drain.stop().unwrap();
    let drained = start.elapsed();
    let received = consumer.join().unwrap();
    let counters = kernel.counters().unwrap();
    let counted = counters
        .iter()
        .find(|count| count.hook == Hook::WorkloadIngress)
        .unwrap()
        .counters;
    println!("recorded: {cost:?} a packet; {RECORDS} in {made:?}, drained after {drained:?}; {counted:?}");
    assert_eq!(counted.seen, u64::from(RECORDS));
    assert_eq!(counted.recorded + counted.ring_refused, counted.seen);
    assert_eq!(received, counted.recorded);
}
