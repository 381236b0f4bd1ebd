//! Who may run now: locks on edges and directories, strictly first come first served.
//!
//! A transaction asks for all its locks at once, when it is begun, and joins the queue of each. It
//! runs when every one is granted. A queue grants from its front only: an exclusive lock when nothing
//! is held, shared ones together. All queues see the transactions in the same order, so whoever
//! waits waits for earlier ones only: there is no cycle of waiting (no deadlock), and the earliest
//! transaction not yet done always runs (no starvation). XD-6, XD-7.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use eggs_proto::{InodeId, TransactionId};

/// What can be locked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// That a directory goes on existing (shared), or its removal (exclusive).
    Directory(InodeId),
    /// What a directory has under a name.
    Edge(InodeId, Bytes),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    Shared,
    Exclusive,
}

/// The locks of one transaction; of two on one resource the stronger counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LockSet(BTreeMap<Resource, Mode>);

impl LockSet {
    #[must_use]
    pub fn with(mut self, resource: Resource, mode: Mode) -> LockSet {
        let held = self.0.entry(resource).or_insert(mode);
        *held = mode.max(*held);
        self
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Resource, Mode)> {
        self.0.iter().map(|(resource, &mode)| (resource, mode))
    }

    /// The two cannot run at once.
    pub fn conflicts(&self, other: &LockSet) -> bool {
        self.0.iter().any(|(resource, &mode)| {
            other.0.get(resource).is_some_and(|&theirs| mode.max(theirs) == Mode::Exclusive)
        })
    }
}

#[derive(Debug, Default)]
struct Queue {
    shared: usize,
    exclusive: bool,
    waiting: VecDeque<(TransactionId, Mode)>,
}

impl Queue {
    fn grants(&self, mode: Mode) -> bool {
        !self.exclusive && (mode == Mode::Shared || self.shared == 0)
    }

    fn hold(&mut self, mode: Mode) {
        match mode {
            Mode::Shared => self.shared += 1,
            Mode::Exclusive => self.exclusive = true,
        }
    }
}

#[derive(Debug)]
struct Holder {
    locks: LockSet,
    /// Locks not granted yet.
    missing: usize,
}

/// The queues of all resources somebody has or wants.
#[derive(Debug, Default)]
pub struct Locks {
    queues: BTreeMap<Resource, Queue>,
    holders: BTreeMap<TransactionId, Holder>,
}

impl Locks {
    /// Joins the queues; true when everything is granted at once. A transaction that already is in
    /// them stays where it is.
    pub fn acquire(&mut self, transaction: TransactionId, locks: LockSet) -> bool {
        if let Some(holder) = self.holders.get(&transaction) {
            return holder.missing == 0;
        }
        let mut missing = 0;
        for (resource, mode) in locks.iter() {
            let queue = self.queues.entry(resource.clone()).or_default();
            if queue.waiting.is_empty() && queue.grants(mode) {
                queue.hold(mode);
            } else {
                queue.waiting.push_back((transaction, mode));
                missing += 1;
            }
        }
        self.holders.insert(transaction, Holder { locks, missing });
        missing == 0
    }

    /// Gives the locks back; returns who can run now, in the order they came.
    ///
    /// Only a transaction that has all its locks can give them back: one that is still waiting is left
    /// where it is.
    pub fn release(&mut self, transaction: TransactionId) -> Vec<TransactionId> {
        match self.holders.get(&transaction) {
            Some(holder) if holder.missing == 0 => {}
            _ => return Vec::new(),
        }
        let Some(holder) = self.holders.remove(&transaction) else { return Vec::new() };
        let mut ready = Vec::new();
        for (resource, mode) in holder.locks.iter() {
            let Some(queue) = self.queues.get_mut(resource) else { continue };
            match mode {
                Mode::Shared => queue.shared -= 1,
                Mode::Exclusive => queue.exclusive = false,
            }
            while let Some(&(next, mode)) = queue.waiting.front() {
                if !queue.grants(mode) {
                    break;
                }
                queue.hold(mode);
                queue.waiting.pop_front();
                if let Some(next_holder) = self.holders.get_mut(&next) {
                    next_holder.missing -= 1;
                    if next_holder.missing == 0 {
                        ready.push(next);
                    }
                }
            }
            if queue.shared == 0 && !queue.exclusive && queue.waiting.is_empty() {
                self.queues.remove(resource);
            }
        }
        ready.sort_unstable();
        ready
    }

    /// Has all its locks.
    pub fn holds(&self, transaction: TransactionId) -> bool {
        self.holders.get(&transaction).is_some_and(|holder| holder.missing == 0)
    }

    /// How many wait in the longest of the queues `locks` would join.
    pub fn longest_queue(&self, locks: &LockSet) -> usize {
        let lengths = locks.iter().filter_map(|(resource, _)| self.queues.get(resource));
        lengths.map(|queue| queue.waiting.len()).max().unwrap_or(0)
    }

    /// Nobody has or wants anything.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty() && self.holders.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Mode::{Exclusive, Shared};

    fn directory(n: u64) -> Resource {
        Resource::Directory(InodeId(n))
    }

    fn set(locks: &[(u64, Mode)]) -> LockSet {
        locks.iter().fold(LockSet::default(), |set, &(n, mode)| set.with(directory(n), mode))
    }

    fn t(n: u64) -> TransactionId {
        TransactionId(n)
    }

    #[test]
    fn an_exclusive_lock_is_not_overtaken_by_shared_ones() {
        let mut locks = Locks::default();
        assert!(locks.acquire(t(1), set(&[(7, Shared)])));
        assert!(!locks.acquire(t(2), set(&[(7, Exclusive)])));
        assert!(!locks.acquire(t(3), set(&[(7, Shared)])), "XD-7: 2 came first");
        assert!(!locks.acquire(t(4), set(&[(7, Shared)])));
        assert_eq!(locks.release(t(3)), [], "3 holds nothing to give back");
        assert_eq!(locks.release(t(1)), [t(2)]);
        assert_eq!(locks.release(t(2)), [t(3), t(4)]);
        locks.release(t(3));
        locks.release(t(4));
        assert!(locks.is_empty());
    }

    #[test]
    fn what_does_not_conflict_runs_at_once() {
        let mut locks = Locks::default();
        assert!(locks.acquire(t(1), set(&[(1, Shared), (2, Exclusive)])));
        assert!(locks.acquire(t(2), set(&[(1, Shared), (3, Exclusive)])));
        assert!(!locks.acquire(t(3), set(&[(3, Shared), (4, Exclusive)])));
        assert!(!locks.acquire(t(4), set(&[(4, Shared)])), "waits for 3, who waits for 2");
        assert!(locks.acquire(t(5), set(&[(5, Exclusive)])));
        assert_eq!(locks.longest_queue(&set(&[(3, Shared)])), 1);
        assert_eq!(locks.release(t(2)), [t(3)]);
        assert_eq!(locks.release(t(3)), [t(4)]);
    }

    #[test]
    fn the_stronger_of_two_locks_on_one_resource_counts() {
        let both = set(&[(1, Shared), (1, Exclusive), (1, Shared)]);
        assert_eq!(both, set(&[(1, Exclusive)]));
        assert!(both.conflicts(&set(&[(1, Shared)])));
        assert!(!set(&[(1, Shared)]).conflicts(&set(&[(1, Shared), (2, Exclusive)])));
    }

    fn sets() -> impl Strategy<Value = Vec<LockSet>> {
        let mode = prop_oneof![Just(Shared), Just(Exclusive)];
        let one = prop::collection::vec((0u64..5, mode), 0..4).prop_map(|locks| set(&locks));
        prop::collection::vec(one, 1..24)
    }

    proptest! {
        /// XD-6, XD-7: whatever comes and finishes in whatever order.
        #[test]
        fn no_conflict_runs_at_once_first_come_first_served_and_all_finish(
            sets in sets(), choices in prop::collection::vec(any::<prop::sample::Index>(), 64)
        ) {
            let mut locks = Locks::default();
            let mut running: Vec<TransactionId> = Vec::new();
            let mut started: Vec<TransactionId> = Vec::new();
            let mut coming = sets.iter().enumerate().map(|(n, set)| (t(n as u64), set.clone()));
            let mut choices = choices.into_iter().cycle();
            let mut left = sets.len();
            let set_of = |id: TransactionId| &sets[id.0 as usize];
            let mut arrived = 0;
            while left > 0 {
                let choice = choices.next().unwrap();
                let ready = if running.is_empty() || choice.index(2) == 0 {
                    match coming.next() {
                        Some((id, set)) => {
                            arrived += 1;
                            if locks.acquire(id, set) { vec![id] } else { Vec::new() }
                        }
                        None => {
                            prop_assert!(!running.is_empty(), "deadlock: nobody runs, {left} are left");
                            let done = running.remove(choice.index(running.len()));
                            left -= 1;
                            locks.release(done)
                        }
                    }
                } else {
                    let done = running.remove(choice.index(running.len()));
                    left -= 1;
                    locks.release(done)
                };
                for id in ready {
                    for &other in &running {
                        prop_assert!(!set_of(id).conflicts(set_of(other)), "{id} runs beside {other}");
                    }
                    for earlier in 0..id.0 {
                        prop_assert!(
                            started.contains(&t(earlier)) || !set_of(t(earlier)).conflicts(set_of(id)),
                            "{id} overtook {earlier}"
                        );
                    }
                    running.push(id);
                    started.push(id);
                }
                // The earliest that is not done never waits.
                if let Some(first) = (0..arrived).map(t).find(|id| !started.contains(id)) {
                    prop_assert!(!locks.holds(first));
                    prop_assert!(running.iter().any(|id| *id < first), "{first} waits for nobody");
                }
            }
            prop_assert!(locks.is_empty());
        }
    }
}
