//! When a disk that is away is given up (JA-4).

use std::collections::BTreeMap;
use std::time::Duration;

use eggs_proto::limits::STALE_AFTER;
use eggs_proto::{BlockServiceId, Time};

use crate::disks::{Disk, Disks, Presence};

/// How much the janitor may give up by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A disk that was away for this long is given up. None: people do that.
    pub after: Option<Duration>,
    /// This many disks at once, …
    pub disks: u32,
    /// … or, in a large cluster, this share of all its disks in percent, if that is more.
    pub share_percent: u32,
    /// Looks this far apart say nothing of the time between.
    pub apart: Duration,
}

impl Default for Limits {
    /// Longer than a machine takes to restart and an operator to notice; so few that a cut network loses nothing. A disk
    /// that is heard of is not missed for `STALE_AFTER`: closer looks see every return.
    fn default() -> Limits {
        let after = Some(Duration::from_secs(15 * 60));
        Limits { after, disks: 2, share_percent: 2, apart: STALE_AFTER }
    }
}

impl Limits {
    /// Disks that may be given up, and not be empty yet, in a cluster of `disks`.
    pub fn allowed(&self, disks: usize) -> usize {
        let share = disks.saturating_mul(self.share_percent.min(100) as usize) / 100;
        share.max(self.disks as usize)
    }
}

/// What is to be done about disks that are away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// To be given up now.
    pub give_up: Vec<BlockServiceId>,
    /// Away for long enough, but more than may be given up: people have to say.
    pub too_many: Vec<BlockServiceId>,
    /// Away for so long, and when they will be given up.
    pub waiting: Vec<(BlockServiceId, Time)>,
}

/// Since when disks are away, as far as this watch has seen: it begins anew with every start of the janitor.
#[derive(Debug, Default)]
pub struct Watch {
    since: BTreeMap<BlockServiceId, Time>,
    looked: Option<Time>,
}

/// A disk that may be lost. NO_READ without more is what people want: it is no sign of a loss.
pub fn silent(disk: &Disk) -> bool {
    let unheard = eggs_proto::flags::STALE | eggs_proto::flags::LOST;
    disk.presence() == Presence::Away && disk.flags & unheard != 0
}

impl Watch {
    /// Looks at the disks as they are at `now`, of a clock that is never set. `given_up`: disks that are gone and have
    /// blocks still; they count.
    pub fn look(&mut self, disks: &Disks, given_up: usize, limits: &Limits, now: Time) -> Verdict {
        if self.looked.replace(now).is_some_and(|looked| now.since(looked) >= limits.apart) {
            self.since.clear();
        }
        let away = |id: &BlockServiceId| disks.get(*id).is_some_and(silent);
        self.since.retain(|id, _| away(id));
        for (id, _) in disks.iter().filter(|(id, _)| away(id)) {
            self.since.entry(id).or_insert(now);
        }
        let mut verdict = Verdict::default();
        let Some(after) = limits.after else { return verdict };
        for (&id, &since) in &self.since {
            if now.since(since) >= after {
                verdict.give_up.push(id);
            } else {
                verdict.waiting.push((id, since.saturating_add(after)));
            }
        }
        // Those that wait count too: of a network that was cut, some disks are always the first to be missed.
        let away = verdict.give_up.len() + verdict.waiting.len();
        if away + given_up > limits.allowed(disks.len()) {
            verdict.too_many = std::mem::take(&mut verdict.give_up);
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use eggs_proto::flags::{DECOMMISSIONED, LOST, NO_READ, STALE};
    use proptest::prelude::*;

    use super::*;
    use crate::disks::tests::disk;

    const SECOND: u64 = 1_000_000_000;

    fn disks(flags: &[u32]) -> Disks {
        (1u64..).zip(flags).map(|(id, &flags)| (BlockServiceId(id), disk("a", flags))).collect()
    }

    fn limits(seconds: u64, disks: u32) -> Limits {
        Limits { after: Some(Duration::from_secs(seconds)), disks, share_percent: 0, apart: Duration::MAX }
    }

    #[test]
    fn a_disk_is_given_up_when_its_time_is_over_and_not_when_it_came_back() {
        let mut watch = Watch::default();
        let limits = limits(10, 2);
        let look = |watch: &mut Watch, flags: &[u32], at: u64| {
            watch.look(&disks(flags), 0, &limits, Time(at * SECOND)).give_up
        };
        assert_eq!(look(&mut watch, &[0, STALE, NO_READ], 100), []);
        assert_eq!(look(&mut watch, &[0, STALE, NO_READ], 109), []);
        assert_eq!(look(&mut watch, &[0, 0, NO_READ], 110), [], "back");
        assert_eq!(look(&mut watch, &[0, LOST, NO_READ], 111), [], "and away again");
        assert_eq!(look(&mut watch, &[0, LOST, NO_READ], 120), []);
        assert_eq!(look(&mut watch, &[0, LOST, NO_READ], 121), [BlockServiceId(2)]);
        assert_eq!(look(&mut watch, &[0, LOST | DECOMMISSIONED, NO_READ], 122), [], "it is given up");
    }

    #[test]
    fn what_nobody_saw_is_not_held_against_a_disk() {
        let mut watch = Watch::default();
        let limits = Limits { apart: Duration::from_secs(5), ..limits(10, 2) };
        let mut look = |at: u64| watch.look(&disks(&[STALE, 0]), 0, &limits, Time(at * SECOND)).give_up;
        assert_eq!(look(100), []);
        assert_eq!(look(200), [], "another janitor worked meanwhile: the disk was back, perhaps");
        assert_eq!((201..210).flat_map(&mut look).collect::<Vec<_>>(), []);
        assert_eq!(look(210), [BlockServiceId(1)]);
    }

    #[test]
    fn when_too_many_are_away_none_is_given_up() {
        let mut watch = Watch::default();
        let flags = [LOST, LOST, STALE, 0, 0, 0];
        watch.look(&disks(&flags), 0, &limits(10, 2), Time(SECOND));
        let verdict = watch.look(&disks(&flags), 0, &limits(10, 2), Time(100 * SECOND));
        assert_eq!((verdict.give_up.len(), verdict.too_many.len()), (0, 3));
        let verdict = watch.look(&disks(&[LOST, LOST, 0, 0, 0, 0]), 1, &limits(10, 2), Time(101 * SECOND));
        assert_eq!((verdict.give_up.len(), verdict.too_many.len()), (0, 2), "one is being repaired");
        let verdict = watch.look(&disks(&[LOST, LOST, 0, 0, 0, 0]), 0, &limits(10, 2), Time(102 * SECOND));
        assert_eq!(verdict.give_up.len(), 2);
        let never = Limits { after: None, ..Limits::default() };
        assert_eq!(watch.look(&disks(&flags), 0, &never, Time(9000 * SECOND)), Verdict::default());
    }

    #[test]
    fn a_large_cluster_may_lose_a_share() {
        let limits = Limits::default();
        assert_eq!([6, 100, 1000, 0].map(|disks| limits.allowed(disks)), [2, 2, 20, 2]);
    }

    proptest! {
        /// JA-4, whatever comes and goes.
        #[test]
        fn never_too_soon_nor_too_many(
            looks in prop::collection::vec((prop::collection::vec(0u32..32, 8), 0u64..8, 0usize..3), 1..40),
            after in 1u64..20, max in 0u32..4, apart in 2u64..9,
        ) {
            let mut watch = Watch::default();
            let mut away_since: BTreeMap<u64, u64> = BTreeMap::new();
            let mut now = 1;
            let limits = Limits { apart: Duration::from_secs(apart), ..limits(after, max) };
            for (flags, pause, given_up) in looks {
                now += pause;
                if pause >= apart {
                    away_since.clear();
                }
                let disks = disks(&flags);
                let verdict = watch.look(&disks, given_up, &limits, Time(now * SECOND));
                for (id, disk) in disks.iter() {
                    let away = disk.presence() == Presence::Away && disk.flags & (STALE | LOST) != 0;
                    if away { away_since.entry(id.0).or_insert(now); } else { away_since.remove(&id.0); }
                }
                prop_assert!(verdict.give_up.is_empty() || verdict.give_up.len() + given_up <= max as usize);
                for id in verdict.give_up.iter().chain(&verdict.too_many) {
                    prop_assert!(now - away_since[&id.0] >= after);
                }
            }
        }
    }
}
