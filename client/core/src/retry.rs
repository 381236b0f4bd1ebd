//! How long to wait before asking again.

use std::time::Duration;

/// First pause: about one round trip with an fsync in it.
pub const PAUSE_MIN: Duration = Duration::from_millis(4);
/// Longest pause: a daemon that is back, or a leader that was elected, is found within it.
pub const PAUSE_MAX: Duration = Duration::from_millis(250);

/// Exponential backoff with jitter ("equal jitter": half of the pause is fixed, half random), so that many
/// clients that failed together do not come back together.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next pause; `entropy` is any random number.
    pub fn pause(&mut self, entropy: u64) -> Duration {
        let doubled = PAUSE_MIN.saturating_mul(1 << self.attempts.min(20));
        self.attempts = self.attempts.saturating_add(1);
        let half = doubled.min(PAUSE_MAX) / 2;
        half + half.mul_f64((entropy >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// Failures so far.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound() {
        let mut backoff = Backoff::default();
        for attempt in 0..100 {
            let longest = PAUSE_MIN.saturating_mul(1 << attempt.min(20)).min(PAUSE_MAX);
            let pause = backoff.pause(if attempt % 2 == 0 { 0 } else { u64::MAX });
            assert!(pause >= longest / 2 && pause <= longest, "{attempt}: {pause:?}");
        }
        assert_eq!(backoff.attempts(), 100);
    }
}
