//! Waiting for something to become true, generously: a test never fails because a machine is slow.

use std::fmt::Display;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long a test waits before it calls something failed: a minute, and at least 10 s of an emulated guest. Virtual
/// machines stand still for seconds when their host is busy; what does not come at all is told soon enough.
pub fn patience() -> Duration {
    Duration::from_mins(1).max(unhurried(Duration::from_secs(10)))
}

/// A length of time as this machine needs it: times `CALITRACE_TIME_SCALE` (a number; guests of an emulator run several
/// times slower than the machine itself).
pub fn unhurried(time: Duration) -> Duration {
    time.mul_f64(scale())
}

/// Whether this machine is a guest of an emulator, where packets take long enough for TCP to send them again.
pub fn is_emulated() -> bool {
    scale() > 1.0
}

fn scale() -> f64 {
    let scale = std::env::var("CALITRACE_TIME_SCALE")
        .ok()
        .and_then(|text| text.parse().ok());
    scale.filter(|scale| *scale >= 1.0).unwrap_or(1.0)
}

/// Asks `look` until it finds something, for [`patience`]. `what` names the thing awaited in the error,
/// next to the time waited and the last error `look` gave.
pub fn wait_until<T>(what: impl Display, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        let found = look();
        if let Ok(Some(found)) = found {
            return Ok(found);
        }
        if start.elapsed() > patience() {
            let waited = start.elapsed().as_secs_f64();
            return match found {
                Err(error) => Err(error.context(format!("waited {waited:.1} s for {what}"))),
                _ => bail!("waited {waited:.1} s for {what}"),
            };
        }
        sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_what_was_found_and_asks_again_after_an_error() {
        let mut asked = 0;
        let found = wait_until("the third answer", || {
            asked += 1;
            match asked {
                1 => bail!("not yet"),
                2 => Ok(None),
                _ => Ok(Some(asked)),
            }
        });
        assert_eq!(found.unwrap(), 3);
    }
}
