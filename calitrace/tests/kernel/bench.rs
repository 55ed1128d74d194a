//! How fast records pass the ring and the drain: printed, never judged, as machines differ. What is judged is that
//! none are lost while the ring has room.

use std::time::Instant;

use calitrace::{event::Hook, kernel::Config};

use crate::net::{LEFT, Net, RIGHT, Watch};

const DATAGRAMS: u32 = 100_000;

pub(crate) fn a_flood_is_recorded_to_the_last_datagram() {
    let net = Net::new();
    let mut watch = Watch::new(&Config::default());
    watch.attach(&net.left, Hook::WorkloadEgress);
    watch.attach(&net.right, Hook::WorkloadIngress);
    let from = net.left.udp(LEFT, 0);
    let _to = net.right.udp(RIGHT, 7300);
    net.left.exec(&format!("ping -q -c 1 -W 10 {RIGHT}"));
    let start = Instant::now();
    for _ in 0..DATAGRAMS {
        from.send_to(&[7; 18], (RIGHT, 7300)).unwrap();
    }
    let sent = start.elapsed();
    let seen = watch.finish();
    println!("{DATAGRAMS} datagrams sent in {sent:?}, {} records", seen.len());
    for hook in [Hook::WorkloadEgress, Hook::WorkloadIngress] {
        let datagrams = seen
            .iter()
            .filter(|seen| seen.hook == hook && seen.packet.length == 46)
            .count();
        let counts = watch.kernel.counters().unwrap();
        let counters = counts.iter().find(|count| count.hook == hook).unwrap().counters;
        assert_eq!(
            counters.recorded,
            u64::try_from(seen.iter().filter(|seen| seen.hook == hook).count()).unwrap()
        );
        let refused = usize::try_from(counters.ring_refused).unwrap();
        assert!(
            datagrams + refused >= DATAGRAMS as usize,
            "{datagrams} of {DATAGRAMS}: {counters:?}"
        );
        assert!(datagrams <= DATAGRAMS as usize);
    }
}
