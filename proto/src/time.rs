//! Time as every part of the system sees it.

use std::fmt;
use std::time::Duration;

/// Nanoseconds since the Unix epoch from a hybrid logical clock (Kulkarni et al., 2014): never goes
/// back on a shard, carried in every request and reply. 0 is "unset".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(pub u64);

impl Time {
    pub const ZERO: Time = Time(0);
    pub const MAX: Time = Time(u64::MAX);

    /// The next instant; saturates.
    #[must_use]
    pub fn next(self) -> Time {
        Time(self.0.saturating_add(1))
    }

    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero when it is before.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    pub fn is_unset(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ns", self.0)
    }
}

/// A hybrid logical clock: wall time that never goes back and never falls behind what it has seen.
///
/// The wall clock is an argument; the clock itself only decides.
#[derive(Debug, Clone, Default)]
pub struct HybridClock {
    last: Time,
}

impl HybridClock {
    /// A time later than every one given or observed before, as near to `wall` as that allows.
    pub fn now(&mut self, wall: Time) -> Time {
        self.last = wall.max(self.last.next());
        self.last
    }

    /// Takes in a time seen in a message. One further ahead of `wall` than
    /// [`crate::limits::CLOCK_AHEAD_MAX`] is not believed (a peer with a broken clock would push
    /// everybody's into the future); false says so.
    pub fn observe(&mut self, seen: Time, wall: Time) -> bool {
        let believed = seen <= self.last || seen <= wall.saturating_add(crate::limits::CLOCK_AHEAD_MAX);
        if believed {
            self.last = self.last.max(seen);
        }
        believed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hybrid_clock_only_moves_forward() {
        let mut clock = HybridClock::default();
        assert_eq!(clock.now(Time(100)), Time(100));
        assert_eq!(clock.now(Time(50)), Time(101));
        assert!(clock.observe(Time(500), Time(50)));
        assert_eq!(clock.now(Time(60)), Time(501));
        assert!(!clock.observe(Time(u64::MAX), Time(60)));
        assert_eq!(clock.now(Time(60)), Time(502));
        // What it has said itself is believed after a step back of the wall clock.
        let late = Time(u64::MAX / 2);
        assert_eq!(clock.now(late), late);
        assert!(clock.observe(late, Time(60)));
    }
}
