//! The clocks of a process: the wall's, and one for timers.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use eggs_proto::Time;

/// Wall time now; 1 ns after the epoch for a clock set before it.
pub fn wall() -> Time {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos());
    Time(u64::try_from(nanos).unwrap_or(u64::MAX).max(1))
}

/// Time for timers and freshness: begins at the wall clock, and then goes on evenly whatever happens to
/// that. A hybrid logical clock will not do: it stands still for as long as somebody's clock was ahead.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    base: Time,
    started: Instant,
}

impl Stopwatch {
    pub fn start() -> Stopwatch {
        Stopwatch { base: wall(), started: Instant::now() }
    }

    /// Never goes back.
    pub fn now(&self) -> Time {
        self.base.saturating_add(self.started.elapsed())
    }
}
