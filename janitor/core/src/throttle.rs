//! How fast: bytes per second, and a share of the disks' time (JA-6).

use std::time::Duration;

use eggs_proto::Time;

/// What may be taken at once after a rest, in time: short enough that nobody notices, long enough for one block.
const BURST: Duration = Duration::from_secs(1);
const NS: u128 = 1_000_000_000;

/// A bucket of tokens: bytes that may be moved.
///
/// What is more than the bucket holds is let through when the bucket is full enough, and paid for after: so a block
/// that is larger than a second's bytes gets through too.
#[derive(Debug, Clone)]
pub struct Throttle {
    /// 0: no limit.
    bytes_per_second: u64,
    /// When everything taken so far is paid for.
    paid_until: Time,
}

impl Throttle {
    /// `bytes_per_second` 0: no limit.
    pub fn new(bytes_per_second: u64) -> Throttle {
        Throttle { bytes_per_second, paid_until: Time(0) }
    }

    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    /// What was taken stays taken.
    pub fn set_rate(&mut self, bytes_per_second: u64) {
        self.bytes_per_second = bytes_per_second;
    }

    /// Takes leave to move `bytes`: how long to wait before.
    pub fn take(&mut self, bytes: u64, now: Time) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let earliest = Time(now.0.saturating_sub(nanos(BURST)));
        let from = self.paid_until.max(earliest);
        let costs = u128::from(bytes) * NS / u128::from(self.bytes_per_second);
        self.paid_until = Time(from.0.saturating_add(u64::try_from(costs).unwrap_or(u64::MAX)));
        from.since(now)
    }

    /// Of what was taken, this was not moved.
    pub fn give_back(&mut self, bytes: u64) {
        let costs = u128::from(bytes) * NS / u128::from(self.bytes_per_second.max(1));
        let costs = u64::try_from(costs).unwrap_or(u64::MAX);
        self.paid_until = Time(self.paid_until.0.saturating_sub(costs));
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// How long to leave the disks alone after they were busy for `busy`, so that no more than `percent` of their time goes
/// to the janitor. 100 and more: no rest; 0 counts as 1.
pub fn rest_after(busy: Duration, percent: u32) -> Duration {
    let percent = percent.clamp(1, 100);
    busy.saturating_mul(100 - percent) / percent
}

/// How long the rest takes at this rate; None: it does not get on.
pub fn time_left(bytes_left: u64, bytes_per_second: u64) -> Option<Duration> {
    (bytes_per_second > 0).then(|| Duration::from_secs(bytes_left.div_ceil(bytes_per_second)))
}

/// Bytes per second, from what was moved lately: half of what counts is not older than `HALF_LIFE`.
#[derive(Debug, Clone, Default)]
pub struct Rate {
    bytes: f64,
    seconds: f64,
    at: Time,
}

const HALF_LIFE: f64 = 5.0;

impl Rate {
    /// Since `now`.
    pub fn new(now: Time) -> Rate {
        Rate { bytes: 0.0, seconds: 0.0, at: now }
    }

    pub fn add(&mut self, bytes: u64, now: Time) {
        let passed = now.since(self.at).as_secs_f64();
        let keep = 0.5f64.powf(passed / HALF_LIFE);
        self.bytes = self.bytes * keep + bytes as f64;
        self.seconds = self.seconds * keep + passed;
        self.at = self.at.max(now);
    }

    pub fn bytes_per_second(&mut self, now: Time) -> u64 {
        self.add(0, now);
        if self.seconds > 0.0 { (self.bytes / self.seconds) as u64 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_block_larger_than_a_seconds_bytes_gets_through_and_is_paid_for() {
        let mut throttle = Throttle::new(1000);
        assert_eq!(throttle.take(10_000, Time(100 * SECOND)), Duration::ZERO);
        assert_eq!(throttle.take(1, Time(100 * SECOND)), Duration::from_secs(9));
        throttle.give_back(9000);
        assert_eq!(
            throttle.take(1, Time(100 * SECOND)),
            Duration::from_millis(1),
            "what was not moved costs nothing"
        );
        let mut free = Throttle::new(0);
        assert_eq!(free.take(u64::MAX, Time(0)), Duration::ZERO);
    }

    #[test]
    fn a_share_of_the_time() {
        assert_eq!(rest_after(Duration::from_secs(1), 50), Duration::from_secs(1));
        assert_eq!(rest_after(Duration::from_secs(1), 20), Duration::from_secs(4));
        assert_eq!(rest_after(Duration::from_secs(1), 100), Duration::ZERO);
        assert_eq!(rest_after(Duration::from_secs(1), 0), Duration::from_secs(99));
    }

    #[test]
    fn a_rate_forgets() {
        let mut rate = Rate::new(Time(0));
        for second in 1..=100 {
            rate.add(1000, Time(second * SECOND));
        }
        assert!(rate.bytes_per_second(Time(100 * SECOND)).abs_diff(1000) < 10);
        assert!(rate.bytes_per_second(Time(160 * SECOND)) < 10);
        assert_eq!(time_left(1001, 1000), Some(Duration::from_secs(2)));
        assert_eq!(time_left(1, 0), None);
    }

    proptest! {
        /// JA-6: what starts in any time is at most what the rate allows for it, a burst, and the last one taken.
        #[test]
        fn never_more_than_the_rate_allows(
            takes in prop::collection::vec((1u64..5000, 0u64..3 * SECOND), 1..60), rate in 1u64..10_000,
        ) {
            let mut throttle = Throttle::new(rate);
            let mut now = 1000 * SECOND;
            let mut started: Vec<(u64, u64)> = Vec::new();
            for (bytes, pause) in takes {
                now += pause;
                let wait = u64::try_from(throttle.take(bytes, Time(now)).as_nanos()).unwrap();
                started.push((now + wait, bytes));
            }
            for from in 0..started.len() {
                for to in from + 1..started.len() {
                    let moved: u64 = started[from..to].iter().map(|(_, bytes)| bytes).sum();
                    let passed = started[to - 1].0 - started[from].0;
                    let largest = started[from..to].iter().map(|(_, bytes)| *bytes).max().unwrap();
                    let allowed = (u128::from(passed) * u128::from(rate) / NS) as u64 + rate + largest + (to - from) as u64;
                    prop_assert!(moved <= allowed, "{moved} bytes, {allowed} allowed");
                }
            }
        }
    }
}
