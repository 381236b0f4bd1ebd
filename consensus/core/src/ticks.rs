//! When ticks pass: one after the other, or at rest several at once.
//!
//! Time is the driver's own, since whenever it likes; it never goes back.

use std::time::Duration;

use crate::host::TICK;

/// The ticks of a [`Host`](crate::Host), for who drives it.
#[derive(Debug, Clone, Copy)]
pub struct Ticks {
    /// The tick that is waited for …
    next: Duration,
    /// … and how many pass with it: one, at rest more.
    left: u64,
}

impl Ticks {
    /// The next is a whole one away.
    pub fn new(now: Duration) -> Ticks {
        Ticks { next: now + TICK, left: 1 }
    }

    /// When the host is to tick.
    pub fn next(&self) -> Duration {
        self.next
    }

    /// Several ticks pass at once until then.
    pub fn is_at_rest(&self) -> bool {
        self.left > 1
    }

    /// What the host says of the ticks to come ([`Host::rest_ticks`](crate::Host::rest_ticks)). A rest that has begun goes on
    /// unless it is over.
    pub fn plan(&mut self, ticks: u64) {
        match (self.left, ticks) {
            (1, 2..) => {
                self.next += whole(ticks - 1);
                self.left = ticks;
            }
            // Woken: the tick that is under way goes on from where it is.
            (2.., ..2) => {
                self.next = self.next.saturating_sub(whole(self.left - 1));
                self.left = 1;
            }
            _ => {}
        }
    }

    /// The ticks that have gone by in a rest, to be passed ([`Host::pass`](crate::Host::pass)) before anything that came
    /// meanwhile is taken in: it is younger than they are. Else who was just heard of would seem silent, and a leader's lease
    /// over before its time. The last tick is left to [`Host::tick`](crate::Host::tick).
    pub fn gone_by(&mut self, now: Duration) -> u64 {
        let left = self.next.saturating_sub(now).as_nanos().div_ceil(TICK.as_nanos());
        let left = u64::try_from(left).unwrap_or(u64::MAX).clamp(1, self.left);
        let gone = self.left - left;
        self.left = left;
        gone
    }

    /// Whether the host is to tick now.
    pub fn is_due(&self, now: Duration) -> bool {
        self.left == 1 && now >= self.next
    }
}

fn whole(ticks: u64) -> Duration {
    TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn several_pass_at_once_at_rest() {
        let mut ticks = Ticks::new(at(0));
        assert!(!ticks.is_due(at(99)) && ticks.is_due(at(100)));
        ticks.plan(3);
        assert_eq!((ticks.next(), ticks.is_at_rest()), (at(300), true));
        ticks.plan(2);
        assert_eq!(ticks.next(), at(300), "it goes on");
        assert_eq!(ticks.gone_by(at(300)), 2);
        assert!(ticks.is_due(at(300)));
    }

    #[test]
    fn who_is_woken_has_lost_no_time() {
        let mut ticks = Ticks::new(at(0));
        ticks.plan(3);
        assert_eq!(ticks.gone_by(at(99)), 0);
        assert_eq!(ticks.gone_by(at(100)), 1);
        assert_eq!(ticks.gone_by(at(150)), 0, "told once");
        ticks.plan(1);
        assert_eq!(ticks.next(), at(200));
        assert!(!ticks.is_due(at(150)) && ticks.is_due(at(200)));
    }

    #[test]
    fn time_goes_on_however_often_a_rest_is_broken_off() {
        let mut ticks = Ticks::new(at(0));
        let mut passed = 0;
        for now in (10..10_000).step_by(10).map(at) {
            ticks.plan(3);
            passed += ticks.gone_by(now);
            ticks.plan(1);
            if ticks.is_due(now) {
                passed += 1;
                ticks = Ticks::new(now);
            }
        }
        assert_eq!(passed, 99);
    }

    #[test]
    fn who_stood_still_ticks_once() {
        let mut ticks = Ticks::new(at(0));
        ticks.plan(3);
        assert_eq!(ticks.gone_by(at(60_000)), 2, "what was to be passed, no more");
        assert!(ticks.is_due(at(60_000)));
    }
}
