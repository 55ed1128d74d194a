//! Reading clocks: the only place of the live source that does.

use nix::time::{ClockId, clock_gettime};

use crate::event::Clock;

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of the records (`bpf_ktime_get_ns`).
pub(super) fn monotonic() -> u64 {
    read(ClockId::CLOCK_MONOTONIC)
}

/// Both clocks at one moment: of five bracketed readings the tightest.
pub(super) fn both() -> Clock {
    let mut best = (u64::MAX, Clock { time: 0, realtime: 0 });
    for _ in 0..5 {
        let before = monotonic();
        let realtime = read(ClockId::CLOCK_REALTIME);
        let spread = monotonic().saturating_sub(before);
        if spread < best.0 {
            best = (
                spread,
                Clock {
                    time: before + spread / 2,
                    realtime,
                },
            );
        }
    }
    best.1
}

fn read(clock: ClockId) -> u64 {
    // Both clocks exist on every Linux; a failure would need an invalid clock id.
    clock_gettime(clock).map_or(0, |time| {
        let nanoseconds = i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec());
        u64::try_from(nanoseconds).unwrap_or(0)
    })
}
