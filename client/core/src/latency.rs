//! How long block services take, and from that: when to ask others too, and whom not to ask first (CL-13).
//!
//! Of each service the last [`SAMPLES`] fetches of about one size are remembered, in microseconds: the
//! [`PERCENTILE`] of them is what a fetch may take before it is *late*. A service much slower than the others
//! would by its own measure never be late: what the others take bounds it. Hedges are paid from a budget, so that
//! a cluster that is slow as a whole is not asked for more.
//!
//! Memory: [`SERVICES_MAX`] services of [`SIZES`] sizes of [`SAMPLES`] samples of 4 bytes, 4 MiB at the very most.

use std::collections::BTreeMap;
use std::time::Duration;

use eggs_proto::BlockServiceId;

/// Services remembered; of more, those that come first.
pub const SERVICES_MAX: usize = 4096;
/// Samples of one service and size.
const SAMPLES: usize = 64;
/// Fewer say nothing.
const SAMPLES_MIN: usize = 8;
/// Of a hundred fetches so many are in time.
const PERCENTILE: usize = 95;
/// Sizes are told apart by fours: up to 64 KiB, 256 KiB, 1 MiB and longer.
const SIZES: usize = 4;
const SIZE_FIRST: u64 = 64 << 10;

/// Nothing is late before: a scheduler's whim, not a slow disk …
const HEDGE_MIN: Duration = Duration::from_millis(2);
/// … and so much longer for each MiB of it.
const HEDGE_MIN_PER_MIB: Duration = Duration::from_millis(6);
/// While nothing is known.
const HEDGE_FIRST: Duration = Duration::from_millis(50);
/// Later than this many times what the others take is late, whatever the service takes by habit.
const OTHERS_TIMES: u32 = 2;

/// A service that was late is not asked first for this long …
const SLOW_MIN: Duration = Duration::from_millis(500);
/// … and each time it is late again for twice as long, up to this: one read now and then finds out.
const SLOW_MAX: Duration = Duration::from_secs(8);
/// Late this often in a row before it counts as slow: anybody can be late once.
const STRIKES: u32 = 2;

/// A hedge costs [`FETCHES_PER_HEDGE`] fetches, of which [`HEDGES_SAVED`] hedges may be saved up.
const FETCHES_PER_HEDGE: u32 = 10;
const HEDGES_SAVED: u32 = 64;

/// The last samples of one service and size.
#[derive(Debug, Clone, Default)]
struct Samples {
    micros: Vec<u32>,
    next: usize,
    /// Of them, when there are enough; found anew with every [`SAMPLES_MIN`] samples.
    percentile: Option<u32>,
}

impl Samples {
    /// True when there is a new percentile.
    fn add(&mut self, took: Duration) -> bool {
        let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        if self.micros.len() < SAMPLES {
            self.micros.push(micros);
        } else {
            self.micros[self.next % SAMPLES] = micros;
        }
        self.next += 1;
        if self.next.is_multiple_of(SAMPLES_MIN) {
            let mut sorted = self.micros.clone();
            let at = (sorted.len() * PERCENTILE / 100).min(sorted.len() - 1);
            self.percentile = Some(*sorted.select_nth_unstable(at).1);
            return true;
        }
        false
    }
}

#[derive(Debug, Clone, Default)]
struct Service {
    sizes: [Samples; SIZES],
    strikes: u32,
    slow_for: Duration,
    /// By the driver's clock.
    slow_until: Duration,
}

/// What a client knows of the block services' speed. Times are since any one instant of the driver's choice.
#[derive(Debug, Clone)]
pub struct Latencies {
    services: BTreeMap<u64, Service>,
    /// By size, the median of the services' percentiles.
    median: [Option<u32>; SIZES],
    /// What is saved up, in fetches.
    budget: u32,
}

impl Default for Latencies {
    fn default() -> Latencies {
        let budget = HEDGES_SAVED * FETCHES_PER_HEDGE;
        Latencies { services: BTreeMap::new(), median: [None; SIZES], budget }
    }
}

fn size_of(bytes: u32) -> usize {
    let mut size = 0;
    while size + 1 < SIZES && u64::from(bytes) > SIZE_FIRST << (2 * size) {
        size += 1;
    }
    size
}

/// Before this nothing is late.
fn floor(bytes: u32) -> Duration {
    HEDGE_MIN + HEDGE_MIN_PER_MIB.mul_f64(f64::from(bytes) / f64::from(1 << 20))
}

impl Latencies {
    fn service(&mut self, service: BlockServiceId) -> Option<&mut Service> {
        if self.services.len() >= SERVICES_MAX && !self.services.contains_key(&service.0) {
            return None;
        }
        Some(self.services.entry(service.0).or_default())
    }

    /// A fetch was answered.
    pub fn answered(&mut self, service: BlockServiceId, bytes: u32, took: Duration) {
        let size = size_of(bytes);
        self.budget = (self.budget + 1).min(HEDGES_SAVED * FETCHES_PER_HEDGE);
        let others = self.others(bytes);
        let Some(service) = self.service(service) else { return };
        if others.is_none_or(|others| took <= others) {
            service.strikes = 0;
            service.slow_for = Duration::ZERO;
        }
        if service.sizes[size].add(took) {
            let known = self.services.values().filter_map(|service| service.sizes[size].percentile);
            let mut known: Vec<u32> = known.collect();
            let middle = known.len() / 2;
            self.median[size] = Some(*known.select_nth_unstable(middle).1);
        }
    }

    /// A fetch was late: others were asked too. It had taken this long when it was answered or given up.
    pub fn late(&mut self, service: BlockServiceId, now: Duration) {
        let Some(service) = self.service(service) else { return };
        service.strikes += 1;
        if service.strikes >= STRIKES {
            service.slow_for = (service.slow_for * 2).clamp(SLOW_MIN, SLOW_MAX);
            service.slow_until = now + service.slow_for;
        }
    }

    /// It is better not asked first, just now.
    pub fn is_slow(&self, service: BlockServiceId, now: Duration) -> bool {
        self.services.get(&service.0).is_some_and(|service| now < service.slow_until)
    }

    /// What a fetch of so many bytes takes at most, going by the service in the middle.
    fn others(&self, bytes: u32) -> Option<Duration> {
        let percentile = self.median[size_of(bytes)]?;
        Some((Duration::from_micros(percentile.into()) * OTHERS_TIMES).max(floor(bytes)))
    }

    /// After how long a fetch is late, at most `cap`.
    pub fn hedge_after(&self, service: BlockServiceId, bytes: u32, cap: Duration) -> Duration {
        let own = self.services.get(&service.0).and_then(|known| known.sizes[size_of(bytes)].percentile);
        let own = own.map(|micros| Duration::from_micros(micros.into()));
        let usual = match (own, self.others(bytes)) {
            (Some(own), Some(others)) => own.min(others),
            (own, others) => own.or(others).unwrap_or(HEDGE_FIRST),
        };
        usual.max(floor(bytes)).min(cap)
    }

    /// Takes what a hedge costs from the budget; false when there is not enough.
    pub fn pay(&mut self) -> bool {
        let paid = self.budget >= FETCHES_PER_HEDGE;
        if paid {
            self.budget -= FETCHES_PER_HEDGE;
        }
        paid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAP: Duration = Duration::from_secs(1);
    const CELL: u32 = 256 << 10;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Services 1 to 8 at `quick`, but for the first, which takes `slow`.
    fn fleet(quick: Duration, slow: Duration) -> Latencies {
        let mut latencies = Latencies::default();
        for round in 0..800_u64 {
            let service = BlockServiceId(round % 8 + 1);
            latencies.answered(service, CELL, if service.0 == 1 { slow } else { quick });
        }
        latencies
    }

    #[test]
    fn nothing_known_is_a_guess_between_the_bounds() {
        let latencies = Latencies::default();
        assert_eq!(latencies.hedge_after(BlockServiceId(1), 4096, CAP), HEDGE_FIRST);
        assert_eq!(latencies.hedge_after(BlockServiceId(1), 4096, ms(1)), ms(1));
    }

    #[test]
    fn a_service_is_late_by_its_percentile_and_never_below_the_floor() {
        let mut latencies = fleet(ms(8), ms(8));
        assert_eq!(latencies.hedge_after(BlockServiceId(2), CELL, CAP), ms(8));
        for _ in 0..2 * SAMPLES {
            latencies.answered(BlockServiceId(2), CELL, Duration::from_micros(300));
        }
        assert_eq!(latencies.hedge_after(BlockServiceId(2), CELL, CAP), floor(CELL));
        // Other sizes know nothing of it.
        assert_eq!(latencies.hedge_after(BlockServiceId(2), 4096, CAP), HEDGE_FIRST);
    }

    #[test]
    fn a_slow_service_is_measured_by_the_others() {
        let latencies = fleet(ms(4), ms(100));
        assert_eq!(latencies.hedge_after(BlockServiceId(1), CELL, CAP), ms(8));
    }

    #[test]
    fn who_is_late_twice_in_a_row_is_avoided_for_a_while_and_longer_each_time() {
        let mut latencies = fleet(ms(4), ms(4));
        let (one, now) = (BlockServiceId(1), ms(10_000));
        latencies.late(one, now);
        assert!(!latencies.is_slow(one, now));
        latencies.answered(one, CELL, ms(4));
        latencies.late(one, now);
        assert!(!latencies.is_slow(one, now), "in time in between");
        latencies.late(one, now);
        assert!(latencies.is_slow(one, now) && !latencies.is_slow(BlockServiceId(2), now));
        let mut at = now + SLOW_MIN;
        assert!(!latencies.is_slow(one, at));
        for _ in 0..20 {
            latencies.late(one, at);
            assert!(latencies.is_slow(one, at));
            at += SLOW_MAX;
            assert!(!latencies.is_slow(one, at), "never for longer");
        }
        latencies.answered(one, CELL, ms(3));
        latencies.late(one, at);
        assert!(!latencies.is_slow(one, at), "it was in time: all is forgiven");
    }

    #[test]
    fn hedges_are_a_share_of_the_fetches() {
        let mut latencies = Latencies::default();
        let mut hedges = 0;
        for _ in 0..10_000 {
            latencies.answered(BlockServiceId(1), CELL, ms(1));
            hedges += u32::from(latencies.pay());
        }
        assert!((1000..=1000 + HEDGES_SAVED).contains(&hedges), "{hedges}");
    }

    #[test]
    fn sizes() {
        assert_eq!([1, 65_536, 65_537, 262_144, 1 << 20, u32::MAX].map(size_of), [0, 0, 1, 1, 2, 3]);
    }
}
