//! Which block lies where, and what each segment still holds.
//!
//! In memory only: about 40 bytes per block (24 of key and place, in nodes two thirds full), 56 at worst. The
//! segments can always make it again ([`crate::recovery`]); the journal does it quickly.

use std::collections::BTreeMap;

use eggs_proto::BlockId;

use crate::record::Extent;

/// Most blocks on one disk: their index takes less than a GiB of memory.
pub const BLOCKS_PER_DISK_MAX: usize = 1 << 24;
/// A sealed segment is worth compacting when at least this share of it is dead …
const DEAD_SHARE: u64 = 2;
/// … or this when room is short …
const DEAD_SHARE_PRESSED: u64 = 8;
/// … and at least this many bytes.
const DEAD_BYTES_MIN: u64 = 1 << 20;

/// Where a block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub segment: u32,
    pub offset: u32,
    pub size: u32,
    pub crc: u32,
}

impl Place {
    pub fn extent(&self) -> Extent {
        Extent::new(self.offset, self.size)
    }
}

/// What a segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentUse {
    pub live_blocks: u32,
    /// What their records take.
    pub live_bytes: u64,
    /// What the segment takes on the disk: without its holes.
    pub disk_bytes: u64,
    /// Nothing is written to it any more.
    pub sealed: bool,
    /// Dead bytes it had when it could not be emptied.
    stuck_at: Option<u64>,
}

impl SegmentUse {
    /// What nobody needs, and compaction would give back.
    pub fn dead_bytes(&self) -> u64 {
        self.disk_bytes.saturating_sub(self.live_bytes)
    }
}

/// What a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    pub blocks: u64,
    /// What their records take.
    pub used_bytes: u64,
    pub dead_bytes: u64,
    pub segments: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    blocks: BTreeMap<BlockId, Place>,
    segments: BTreeMap<u32, SegmentUse>,
    live_bytes: u64,
    disk_bytes: u64,
}

impl Index {
    pub fn get(&self, block: BlockId) -> Option<Place> {
        self.blocks.get(&block).copied()
    }

    /// Puts a block in a place; the one it had before.
    pub fn put(&mut self, block: BlockId, place: Place) -> Option<Place> {
        let before = self.blocks.insert(block, place);
        if let Some(before) = before {
            self.release(before);
        }
        let used = self.segments.entry(place.segment).or_default();
        used.live_blocks += 1;
        used.live_bytes += place.extent().bytes();
        self.live_bytes += place.extent().bytes();
        before
    }

    /// Takes a block out; where it lay.
    pub fn remove(&mut self, block: BlockId) -> Option<Place> {
        let place = self.blocks.remove(&block)?;
        self.release(place);
        Some(place)
    }

    fn release(&mut self, place: Place) {
        let bytes = place.extent().bytes();
        self.live_bytes = self.live_bytes.saturating_sub(bytes);
        if let Some(used) = self.segments.get_mut(&place.segment) {
            used.live_blocks = used.live_blocks.saturating_sub(1);
            used.live_bytes = used.live_bytes.saturating_sub(bytes);
        }
    }

    /// A segment takes more room on the disk, or less.
    pub fn grow(&mut self, segment: u32, bytes: i64) {
        let used = self.segments.entry(segment).or_default();
        let before = used.disk_bytes;
        used.disk_bytes = before.saturating_add_signed(bytes);
        self.disk_bytes = (self.disk_bytes - before).saturating_add(used.disk_bytes);
    }

    /// What a segment takes, measured.
    pub fn measured(&mut self, segment: u32, disk_bytes: u64) {
        let used = self.segments.entry(segment).or_default();
        self.disk_bytes = (self.disk_bytes - used.disk_bytes).saturating_add(disk_bytes);
        used.disk_bytes = disk_bytes;
    }

    pub fn seal(&mut self, segment: u32) {
        self.segments.entry(segment).or_default().sealed = true;
    }

    /// A segment is gone, with the blocks that the index still has in it: how many.
    pub fn drop_segment(&mut self, segment: u32) -> usize {
        let before = self.blocks.len();
        if self.segments.get(&segment).is_some_and(|used| used.live_blocks > 0) {
            self.blocks.retain(|_, place| place.segment != segment);
        }
        if let Some(used) = self.segments.remove(&segment) {
            self.live_bytes = self.live_bytes.saturating_sub(used.live_bytes);
            self.disk_bytes = self.disk_bytes.saturating_sub(used.disk_bytes);
        }
        before - self.blocks.len()
    }

    /// A segment could not be emptied: it is left alone until more of it is dead.
    pub fn stuck(&mut self, segment: u32) {
        if let Some(used) = self.segments.get_mut(&segment) {
            used.stuck_at = Some(used.dead_bytes());
        }
    }

    pub fn segment(&self, segment: u32) -> Option<SegmentUse> {
        self.segments.get(&segment).copied()
    }

    pub fn segments(&self) -> impl Iterator<Item = (u32, SegmentUse)> + '_ {
        self.segments.iter().map(|(&number, &used)| (number, used))
    }

    pub fn blocks(&self) -> impl Iterator<Item = (BlockId, Place)> + '_ {
        self.blocks.iter().map(|(&block, &place)| (block, place))
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub fn totals(&self) -> Totals {
        Totals {
            blocks: self.blocks.len() as u64,
            used_bytes: self.live_bytes,
            dead_bytes: self.disk_bytes.saturating_sub(self.live_bytes),
            segments: self.segments.len() as u64,
        }
    }

    /// The sealed segment that gives back most for what must be copied, if one is worth it: an empty one
    /// first, then the one with the largest dead share. Room may be short (`pressed`).
    pub fn victim(&self, pressed: bool) -> Option<u32> {
        let share = if pressed { DEAD_SHARE_PRESSED } else { DEAD_SHARE };
        let worth = |used: &SegmentUse| {
            let dead = used.dead_bytes();
            let more_than_when_stuck = used.stuck_at.is_none_or(|then| dead > then + DEAD_BYTES_MIN);
            used.live_blocks == 0
                || (more_than_when_stuck && dead >= DEAD_BYTES_MIN && dead >= used.disk_bytes / share)
        };
        // Per mille, so that it can be compared without fractions.
        let dead_share = |used: &SegmentUse| {
            if used.live_blocks == 0 { 1001 } else { used.dead_bytes() * 1000 / used.disk_bytes.max(1) }
        };
        let candidates = self.segments.iter().filter(|(_, used)| used.sealed && worth(used));
        // The lowest number among equals.
        candidates.rev().max_by_key(|(_, used)| dead_share(used)).map(|(&number, _)| number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place(segment: u32, offset: u32, size: u32) -> Place {
        Place { segment, offset, size, crc: 1 }
    }

    #[test]
    fn the_deadest_sealed_segment_is_compacted() {
        let mut index = Index::default();
        for segment in 1..=4 {
            index.put(BlockId(u64::from(segment)), place(segment, 0, 1 << 20));
        }
        for (segment, bytes) in [(1, 3 << 20), (2, 10 << 20), (3, 4 << 20), (4, (1 << 20) + 8192)] {
            index.measured(segment, bytes);
        }
        assert_eq!(index.victim(false), None);
        (1..=4).for_each(|segment| index.seal(segment));
        assert_eq!(index.victim(false), Some(2));
        index.remove(BlockId(4));
        assert_eq!(index.victim(false), Some(4));
        assert_eq!(index.drop_segment(4), 0);
        index.drop_segment(2);
        assert_eq!(index.victim(false), Some(3));
        index.measured(3, (1 << 20) + (1 << 19));
        index.measured(1, 2 << 20);
        assert_eq!(index.victim(false), None);
        assert_eq!(index.victim(true), None);
        index.measured(1, (9 << 20) / 4);
        assert_eq!(index.victim(true), Some(1));
    }

    proptest! {
        #[test]
        fn the_sums_are_those_of_the_blocks(
            steps in proptest::collection::vec((0u8..4, 0u64..8, 0u32..3, 1u32..100_000), 0..60)
        ) {
            let mut index = Index::default();
            for (n, (what, block, segment, size)) in (0u32..).zip(steps) {
                match what {
                    0 | 1 => { index.put(BlockId(block), place(segment, n * 64, size)); }
                    2 => { index.remove(BlockId(block)); }
                    _ => { index.drop_segment(segment); }
                }
                index.grow(segment, 100);
            }
            let bytes = |of: &dyn Fn(&Place) -> bool| -> u64 {
                index.blocks().filter(|(_, place)| of(place)).map(|(_, place)| place.extent().bytes()).sum()
            };
            prop_assert_eq!(index.totals().used_bytes, bytes(&|_| true));
            prop_assert_eq!(index.totals().blocks, index.blocks().count() as u64);
            for (segment, used) in index.segments() {
                prop_assert_eq!(used.live_bytes, bytes(&|place| place.segment == segment));
            }
            let disk: u64 = index.segments().map(|(_, used)| used.disk_bytes).sum();
            prop_assert_eq!(index.disk_bytes, disk);
        }
    }
}
