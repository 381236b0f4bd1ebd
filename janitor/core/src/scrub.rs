//! When a file is looked at again, and how fast all of them have to be.
//!
//! Every block is to be looked at once per period. A file is due when half of the period has passed since it was found
//! right; at the pace below, going round everything takes at most two fifths of a period. So no file waits for longer
//! than nine tenths of it, whenever it became due, and what a restart or a slow hour costs has a tenth to spare.
//! When a file was looked at last is kept with the file, so a janitor that starts goes on where the last one was.

use std::time::Duration;

use eggs_proto::Time;
use eggs_proto::limits::CLOCK_AHEAD_MAX;

/// A period shorter than this cannot be meant.
pub const PERIOD_MIN: Duration = Duration::from_secs(10);
/// A small cluster is looked at in little time, not as slowly as its period would allow.
const PACE_MIN: u64 = 1 << 20;

/// Whether a file is to be looked at. `scrubbed_at`: unset when it never was; then it is due as one that was found right
/// when it was made.
pub fn due(scrubbed_at: Time, created_at: Time, period: Duration, now: Time) -> bool {
    now.since(found_right(scrubbed_at, created_at, now)) >= period / 2
}

/// It has not been looked at for longer than it should be.
pub fn overdue(scrubbed_at: Time, created_at: Time, period: Duration, now: Time) -> bool {
    now.since(found_right(scrubbed_at, created_at, now)) > period
}

/// When a file was found right, or made. A time that is not yet says nothing: a clock was wrong.
fn found_right(scrubbed_at: Time, created_at: Time, now: Time) -> Time {
    let believed = |at: Time| if at > now.saturating_add(CLOCK_AHEAD_MAX) { Time(0) } else { at };
    believed(scrubbed_at).max(believed(created_at))
}

/// Bytes per second to look at when the disks hold so many: all in two fifths of the period.
pub fn pace(stored_bytes: u64, period: Duration) -> u64 {
    let ms = period.max(PERIOD_MIN).as_millis();
    let pace = u128::from(stored_bytes) * 1000 * 5 / (ms * 2);
    u64::try_from(pace).unwrap_or(u64::MAX).max(PACE_MIN)
}

/// How far a round is, and what the last whole one found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    pub files: u64,
    pub files_checked: u64,
    pub bytes_checked: u64,
    pub blocks_bad: u64,
    /// The file that was looked at longest ago, when the round passed it: no file waits since before. Unset: none yet.
    pub oldest: Time,
}

impl Round {
    /// A file was passed; `at`: when it was found right, just now perhaps.
    pub fn pass(&mut self, at: Time) {
        self.files += 1;
        if self.oldest.is_unset() || at < self.oldest {
            self.oldest = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_file_is_due_half_a_period_after_it_was_found_right_or_made() {
        let period = Duration::from_secs(100);
        let at = |seconds: u64| Time(seconds * SECOND);
        assert!(!due(at(1000), at(500), period, at(1049)));
        assert!(due(at(1000), at(500), period, at(1050)));
        assert!(!due(Time(0), at(1000), period, at(1049)));
        assert!(due(at(9000), at(500), period, at(1000)), "a time that is not yet");
        assert!(!due(at(1001), at(500), period, at(1000)), "clocks are not all the same");
        assert!(
            !overdue(at(1000), at(500), period, at(1100)) && overdue(at(1000), at(500), period, at(1101))
        );
    }

    #[test]
    fn rounds_remember_the_oldest() {
        let mut round = Round::default();
        [7, 3, 9].into_iter().for_each(|at| round.pass(Time(at)));
        assert_eq!((round.files, round.oldest), (3, Time(3)));
    }

    proptest! {
        /// At this pace a round takes at most two fifths of the period.
        #[test]
        fn a_round_is_fast_enough(stored in 0u64..u64::MAX / 4, seconds in 10u64..100_000_000) {
            let pace = pace(stored, Duration::from_secs(seconds));
            let round_ms = u128::from(stored) * 1000 / u128::from(pace);
            prop_assert!(round_ms <= u128::from(seconds) * 1000 * 2 / 5 + 2000 + u128::from(seconds));
        }
    }
}
