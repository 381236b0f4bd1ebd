//! Spans that wait for repair, the most urgent first, and not more than so many (JA-2, JA-5).

use std::collections::{BTreeMap, BTreeSet};

use eggs_proto::{BlockServiceId, InodeId};

use crate::disks::Disks;

/// Spans the queue remembers. Those that do not fit are found again by the next look at the disks they are on; at 50
/// bytes each this is a few MiB.
pub const QUEUE_MAX: usize = 65_536;

/// A span of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SpanKey {
    pub file: InodeId,
    pub offset: u64,
}

/// How urgent a repair is: less is more urgent. What cannot be read comes last: nothing can be done for it now, and
/// finding that out takes long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Urgency {
    /// More blocks cannot be had than the parity makes up for.
    pub lost: bool,
    /// There was no room for it: many such spans are not to hold up what there is room for.
    pub no_room: bool,
    /// Blocks the span can lose before it cannot be read.
    pub redundancy: i32,
    /// It has lost nothing: its disk is to be emptied.
    pub only_to_move: bool,
}

/// A bounded queue of spans; each is in it once.
#[derive(Debug)]
pub struct Queue {
    by_urgency: BTreeSet<(Urgency, SpanKey)>,
    urgencies: BTreeMap<SpanKey, Urgency>,
    max: usize,
    dropped: u64,
}

impl Default for Queue {
    fn default() -> Queue {
        Queue::new(QUEUE_MAX)
    }
}

impl Queue {
    /// With room for `max` spans, at least one.
    pub fn new(max: usize) -> Queue {
        Queue { by_urgency: BTreeSet::new(), urgencies: BTreeMap::new(), max: max.max(1), dropped: 0 }
    }

    /// Adds a span, or changes how urgent it is. When it is full the least urgent one leaves, which may be this: which one
    /// that was.
    pub fn offer(&mut self, key: SpanKey, urgency: Urgency) -> Option<SpanKey> {
        if let Some(before) = self.urgencies.insert(key, urgency) {
            self.by_urgency.remove(&(before, key));
        }
        self.by_urgency.insert((urgency, key));
        if self.by_urgency.len() <= self.max {
            return None;
        }
        let (_, least) = self.by_urgency.pop_last()?;
        self.urgencies.remove(&least);
        self.dropped += 1;
        Some(least)
    }

    /// Takes the most urgent one.
    pub fn pop(&mut self) -> Option<(SpanKey, Urgency)> {
        let (urgency, key) = self.by_urgency.pop_first()?;
        self.urgencies.remove(&key);
        Some((key, urgency))
    }

    /// How urgent the most urgent one is.
    pub fn first(&self) -> Option<Urgency> {
        self.by_urgency.first().map(|&(urgency, _)| urgency)
    }

    pub fn len(&self) -> usize {
        self.by_urgency.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_urgency.is_empty()
    }

    /// Spans that had no room since this was asked last: they have to be looked for again.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

/// Spans that there was no room for, as long as the same disks take blocks. Those that do not fit are tried in their turn
/// again (JA-5).
#[derive(Debug, Clone)]
pub struct NoRoom {
    spans: BTreeSet<SpanKey>,
    takers: BTreeSet<BlockServiceId>,
    max: usize,
}

impl Default for NoRoom {
    fn default() -> NoRoom {
        NoRoom::new(QUEUE_MAX)
    }
}

impl NoRoom {
    /// Remembers `max` spans.
    pub fn new(max: usize) -> NoRoom {
        NoRoom { spans: BTreeSet::new(), takers: BTreeSet::new(), max }
    }

    /// Looks at the disks: when others take blocks, there may be room.
    pub fn look(&mut self, disks: &Disks) {
        let takers = disks.iter().filter(|(_, disk)| disk.takes_blocks()).map(|(id, _)| id).collect();
        if self.takers != takers {
            self.takers = takers;
            self.spans.clear();
        }
    }

    /// There was no room for this one; whether that is new.
    pub fn insert(&mut self, key: SpanKey) -> bool {
        self.spans.len() < self.max && self.spans.insert(key)
    }

    /// There was.
    pub fn remove(&mut self, key: SpanKey) {
        self.spans.remove(&key);
    }

    pub fn contains(&self, key: SpanKey) -> bool {
        self.spans.contains(&key)
    }
}

#[cfg(test)]
mod tests {
    use eggs_proto::flags::{LOST, NO_WRITE};
    use proptest::prelude::*;

    use super::*;
    use crate::disks::Disk;
    use crate::disks::tests::disk;

    fn key(file: u64) -> SpanKey {
        SpanKey { file: InodeId(file), offset: 0 }
    }

    fn urgency(redundancy: i32, only_to_move: bool) -> Urgency {
        Urgency { lost: redundancy < 0, no_room: false, redundancy, only_to_move }
    }

    #[test]
    fn least_redundancy_first_and_lost_blocks_before_moves() {
        let mut queue = Queue::default();
        queue.offer(key(1), urgency(1, false));
        queue.offer(key(2), urgency(1, true));
        queue.offer(key(3), urgency(0, true));
        queue.offer(key(4), urgency(2, false));
        queue.offer(key(5), urgency(0, false));
        queue.offer(key(6), urgency(-1, false));
        assert_eq!(queue.first(), Some(urgency(0, false)));
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop()).map(|(key, _)| key.file.0).collect();
        assert_eq!(order, [5, 3, 1, 2, 4, 6], "what cannot be read comes last");
    }

    #[test]
    fn a_span_that_became_more_urgent_is_there_once() {
        let mut queue = Queue::default();
        queue.offer(key(1), urgency(2, false));
        queue.offer(key(1), urgency(0, false));
        assert_eq!((queue.len(), queue.pop(), queue.pop()), (1, Some((key(1), urgency(0, false))), None));
    }

    #[test]
    fn what_there_was_no_room_for_comes_after_what_there_may_be_room_for() {
        let mut queue = Queue::default();
        queue.offer(key(1), Urgency { no_room: true, ..urgency(0, false) });
        queue.offer(key(2), urgency(3, true));
        queue.offer(key(3), urgency(-1, false));
        queue.offer(key(4), Urgency { no_room: true, ..urgency(1, false) });
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop()).map(|(key, _)| key.file.0).collect();
        assert_eq!(order, [2, 1, 4, 3]);
    }

    #[test]
    fn that_there_was_no_room_is_forgotten_when_other_disks_take_blocks() {
        let disks = |disks: Vec<Disk>| -> Disks { (1u64..).map(BlockServiceId).zip(disks).collect() };
        let (mut no_room, disk) = (NoRoom::new(2), |flags| disk("a", flags));
        no_room.look(&disks(vec![disk(0), disk(NO_WRITE)]));
        assert_eq!([1, 1, 2, 3].map(|file| no_room.insert(key(file))), [true, false, true, false]);
        assert_eq!([1, 2, 3].map(|file| no_room.contains(key(file))), [true, true, false], "bounded");
        let fuller = Disk { available_bytes: 1, ..disk(0) };
        no_room.look(&disks(vec![fuller, disk(LOST)]));
        assert!(no_room.contains(key(1)), "the same one takes blocks");
        no_room.remove(key(1));
        assert!(!no_room.contains(key(1)) && no_room.contains(key(2)));
        no_room.look(&disks(vec![disk(0), disk(0)]));
        assert!(!no_room.contains(key(2)));
        assert!(no_room.insert(key(2)));
        no_room.look(&disks(vec![disk(0), Disk { read_only: true, ..disk(0) }]));
        assert!(!no_room.contains(key(2)), "who left may be back in another place");
    }

    proptest! {
        /// JA-2, JA-5: what stays is the most urgent of what was offered, in order, and what left is counted.
        #[test]
        fn the_most_urgent_stay(offers in prop::collection::vec((-2i32..4, any::<bool>()), 0..200), max in 1usize..50) {
            let mut queue = Queue::new(max);
            let (mut all, mut waiting) = (Vec::new(), BTreeSet::new());
            for (file, (redundancy, only_to_move)) in (0u64..).zip(offers) {
                let left = queue.offer(key(file), urgency(redundancy, only_to_move));
                all.push((urgency(redundancy, only_to_move), key(file)));
                waiting.insert(key(file));
                prop_assert!(left.is_none_or(|left| waiting.remove(&left)));
                prop_assert_eq!(waiting.len(), queue.len(), "who left is told");
                prop_assert!(queue.len() <= max);
            }
            all.sort();
            let dropped = all.len().saturating_sub(max) as u64;
            all.truncate(max);
            prop_assert_eq!(queue.take_dropped(), dropped);
            let popped: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(key, urgency)| (urgency, key)).collect();
            prop_assert_eq!(popped, all);
        }
    }
}
