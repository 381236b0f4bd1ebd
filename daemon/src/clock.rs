//! The wall clock, read only here and in the consensus shell.

use std::time::{SystemTime, UNIX_EPOCH};

use eggs_proto::Time;

/// Wall time now; 1 ns after the epoch for a clock set before it.
pub fn wall() -> Time {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos());
    Time(u64::try_from(nanos).unwrap_or(u64::MAX).max(1))
}
