//! What a disk holds, found out when it is opened: from its journal, and from the segments that the journal
//! does not call sealed, or from all of them when there is no good journal.
//!
//! The journal is believed where it says anything (it told of a block only after the block was durable, and
//! of an erasure before that was proved). A record it does not know lies in a segment that was being written: it
//! is a block when it is whole (its bytes have its CRC, its pages their checksums), whoever was acknowledged, and is otherwise
//! erased for good. Of two whole copies the known one stays: it was proved. What cannot be read now is left as it is. Without
//! a journal the headers are believed: in a sealed segment all records are whole, in others each is verified.

use std::collections::BTreeSet;

use eggs_proto::BlockId;

use crate::index::{Index, Place};
use crate::journal::Entry;
use crate::record::{
    Extent, Kind, PAGE_BYTES, RECORD_ALIGN, RECORD_HEADER_BYTES, Record, Seal, looks_like_a_header, pages,
    pages_match, pages_of,
};

/// Read at once of a block that is verified: whole pages.
pub const VERIFY_BYTES: u32 = 256 << 10;

/// What the journal tells.
#[derive(Debug, Clone, Default)]
pub struct Recovery {
    pub index: Index,
    sealed: BTreeSet<u32>,
    /// Places in segments that are not sealed where a block lay and is none any more.
    dead: BTreeSet<(u32, u32)>,
    /// The highest segment number ever told of.
    highest: u32,
    /// The segments told something that the journal does not know.
    pub changed: bool,
}

/// What is to be done with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToErase {
    pub block: BlockId,
    pub place: Place,
}

impl Recovery {
    /// Takes in the next entry of the journal.
    pub fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Put { block, place } => {
                self.dead.remove(&(place.segment, place.offset));
                if let Some(before) = self.index.put(block, place).filter(|before| *before != place) {
                    self.dead(before);
                }
                self.highest = self.highest.max(place.segment);
            }
            Entry::Erased { block, place } => {
                if self.index.get(block) == Some(place) {
                    self.index.remove(block);
                }
                self.dead(place);
            }
            Entry::Sealed { segment } => {
                self.highest = self.highest.max(segment);
                self.sealed.insert(segment);
                self.index.seal(segment);
                self.dead.retain(|(of, _)| *of != segment);
            }
            Entry::Removed { segment } => {
                self.highest = self.highest.max(segment);
                self.forget(segment);
            }
        }
    }

    fn dead(&mut self, place: Place) {
        self.highest = self.highest.max(place.segment);
        if !self.sealed.contains(&place.segment) {
            self.dead.insert((place.segment, place.offset));
        }
    }

    fn forget(&mut self, segment: u32) -> usize {
        self.sealed.remove(&segment);
        self.dead.retain(|(of, _)| *of != segment);
        self.index.drop_segment(segment)
    }

    /// The segments that there are: what lay in others is gone. How many blocks that were.
    pub fn found(&mut self, segments: &BTreeSet<u32>) -> usize {
        let gone: Vec<u32> =
            self.index.segments().map(|(number, _)| number).filter(|n| !segments.contains(n)).collect();
        self.highest = self.highest.max(segments.last().copied().unwrap_or(0));
        self.changed |= !gone.is_empty();
        gone.into_iter().map(|segment| self.forget(segment)).sum()
    }

    /// Where the records of a segment end, those with a damaged header that only the journal knows among them.
    pub fn end(&self, segment: u32, walk: &Walk) -> u32 {
        let known = self.index.blocks().filter(|(_, place)| place.segment == segment);
        known.map(|(_, place)| place.extent().end).fold(walk.end, u32::max)
    }

    pub fn is_sealed(&self, segment: u32) -> bool {
        self.sealed.contains(&segment)
    }

    /// A number that no segment has or had.
    pub fn next_segment(&self) -> u32 {
        self.highest.saturating_add(1)
    }

    /// Takes in what a walk over a segment has found. `is_whole` reads a record, in this segment or another, and
    /// says whether its header is of that block and all its bytes and checksums are right; `None` when it cannot be
    /// read now. Such a record stays as it is, and so does its segment. What is returned is to be erased.
    pub fn adopt(
        &mut self,
        segment: u32,
        walk: &Walk,
        mut is_whole: impl FnMut(BlockId, Place) -> Option<bool>,
    ) -> Vec<ToErase> {
        let mut to_erase = Vec::new();
        let mut doubtful = false;
        for &(offset, record) in &walk.records {
            let block = record.block;
            let place = Place { segment, offset, size: record.size, crc: record.crc };
            let known = self.index.get(block);
            match record.kind {
                Kind::Seal => {}
                Kind::Erased if known == Some(place) => {
                    self.changed = true;
                    self.index.remove(block);
                }
                Kind::Erased => {}
                Kind::Block if known == Some(place) => {}
                Kind::Block if self.dead.contains(&(segment, offset)) => {
                    to_erase.push(ToErase { block, place });
                }
                Kind::Block => {
                    // Two of the same: being copied or mended when the disk stopped. A good one stays.
                    let right = match known.map(|before| is_whole(block, before)) {
                        None if walk.sealed => Some(true),
                        None | Some(Some(false)) => is_whole(block, place),
                        Some(before) => before.map(|_| false),
                    };
                    match right {
                        None => doubtful = true,
                        Some(false) => to_erase.push(ToErase { block, place }),
                        Some(true) => {
                            self.changed = true;
                            let before = self.index.put(block, place);
                            to_erase.extend(before.map(|place| ToErase { block, place }));
                        }
                    }
                }
            }
        }
        // Called sealed, it would not be looked through again.
        if walk.sealed && !doubtful {
            self.changed = true;
            self.sealed.insert(segment);
            self.index.seal(segment);
            self.dead.retain(|(of, _)| *of != segment);
        }
        to_erase
    }
}

/// What a walk over a segment has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Walk {
    /// Offset and header of every record, the seal not among them.
    pub records: Vec<(u32, Record)>,
    /// It ends with a seal.
    pub sealed: bool,
    /// Where the last record ends: nothing behind it is one.
    pub end: u32,
    /// Places where there should have been a header and was none.
    pub gaps: u32,
}

/// Whether the record there is that block, not erased, its pages have their checksums, without which nobody could
/// read it, and all of it its CRC. `read` fills the bytes from an offset of the segment.
///
/// # Errors
/// Those of `read`.
pub fn is_whole<E>(
    seal: Seal<'_>,
    block: BlockId,
    place: Place,
    mut read: impl FnMut(u32, &mut [u8]) -> Result<(), E>,
) -> Result<bool, E> {
    let extent = place.extent();
    let mut header = [0; RECORD_HEADER_BYTES];
    read(place.offset, &mut header)?;
    let found = Record::decode(&header, seal, place.segment, u64::from(place.offset));
    if found != Ok(Record::block(block, place.size, place.crc)) {
        return Ok(false);
    }
    let mut sums = vec![0; 4 * pages(place.size) as usize];
    read(extent.sums_at(), &mut sums)?;
    let mut bytes = vec![0; VERIFY_BYTES.min(place.size) as usize];
    let mut hasher = crc32fast::Hasher::new();
    let mut offset = 0;
    while offset < place.size {
        let length = VERIFY_BYTES.min(place.size - offset);
        let bytes = &mut bytes[..length as usize];
        read(extent.data_at + offset, bytes)?;
        let (first, last) = pages_of(offset, length);
        let sums = sums.get(4 * first as usize..4 * last as usize).unwrap_or_default();
        if !pages_match(block, first, bytes, sums) {
            return Ok(false);
        }
        hasher.update(bytes);
        offset += length;
    }
    Ok(hasher.finalize() == place.crc)
}

/// Goes through a segment of `length` bytes from header to header. Where there is none (torn, damaged or
/// unreadable) every multiple of 64 bytes is looked at until there is one. `read` fills the bytes from an
/// offset, and says false when it cannot.
pub fn walk(seal: Seal<'_>, segment: u32, length: u32, mut read: impl FnMut(u32, &mut [u8]) -> bool) -> Walk {
    let mut walk = Walk::default();
    let mut at = 0u32;
    let mut header = [0; RECORD_HEADER_BYTES];
    while at.saturating_add(RECORD_HEADER_BYTES as u32) <= length {
        let record = if read(at, &mut header) {
            Record::decode(&header, seal, segment, u64::from(at)).ok()
        } else {
            None
        };
        let record = match record {
            Some(record) => record,
            None => {
                let Some(found) = next_header(seal, segment, at, length, &mut read) else { break };
                walk.gaps += 1;
                at = found.0;
                found.1
            }
        };
        let end = Extent::new(at, record.size).end;
        walk.sealed = record.kind == Kind::Seal;
        if record.kind != Kind::Seal {
            walk.records.push((at, record));
        }
        walk.end = end;
        at = end;
    }
    walk
}

/// The first header behind `at`.
fn next_header(
    seal: Seal<'_>,
    segment: u32,
    at: u32,
    length: u32,
    read: &mut impl FnMut(u32, &mut [u8]) -> bool,
) -> Option<(u32, Record)> {
    let mut page = [0; PAGE_BYTES as usize];
    let mut from = at + RECORD_ALIGN;
    while from + RECORD_ALIGN <= length {
        // A whole page or the rest of one: pages that cannot be read cost only themselves.
        let until = (from / PAGE_BYTES + 1).saturating_mul(PAGE_BYTES).min(length);
        let bytes = page.get_mut(..(until - from) as usize)?;
        if read(from, bytes) {
            let found =
                (from..).step_by(RECORD_ALIGN as usize).zip(bytes.as_chunks::<RECORD_HEADER_BYTES>().0);
            let records =
                found.filter(|(_, bytes)| looks_like_a_header(*bytes)).find_map(|(offset, bytes)| {
                    Some((offset, Record::decode(bytes, seal, segment, u64::from(offset)).ok()?))
                });
            if records.is_some() {
                return records;
            }
        }
        from = until;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::PageSums;
    use eggs_proto::{BlockServiceId, ClusterId};
    use proptest::prelude::*;

    const SEAL: Seal<'static> =
        Seal { key: &[9; 32], cluster: ClusterId([1; 16]), service: BlockServiceId(7) };

    /// A segment in memory, written as the store writes it.
    #[derive(Default, Clone)]
    struct Written {
        bytes: Vec<u8>,
        places: Vec<(BlockId, Place)>,
    }

    impl Written {
        fn add(&mut self, segment: u32, block: u64, contents: &[u8]) {
            let record = Record::block(BlockId(block), contents.len() as u32, crc32fast::hash(contents));
            let offset = self.bytes.len() as u32;
            let extent = record.extent(offset);
            self.bytes.extend(record.encode(SEAL, segment, u64::from(offset)));
            let mut sums = PageSums::new(record.block, record.size);
            sums.push(contents);
            self.bytes.extend(sums.finish());
            self.bytes.resize(extent.data_at as usize, 0);
            self.bytes.extend(contents);
            self.bytes.resize(extent.end as usize, 0);
            let place = Place { segment, offset, size: record.size, crc: record.crc };
            self.places.push((record.block, place));
        }

        fn erase(&mut self, n: usize) {
            let (block, place) = self.places[n];
            let record = Record::block(block, place.size, place.crc).erased();
            let bytes = record.encode(SEAL, place.segment, u64::from(place.offset));
            self.bytes[place.offset as usize..][..64].copy_from_slice(&bytes);
        }

        fn seal(&mut self, segment: u32) {
            let offset = self.bytes.len() as u64;
            self.bytes.extend(Record::seal().encode(SEAL, segment, offset));
        }

        fn walk(&self, segment: u32) -> Walk {
            walk(SEAL, segment, self.bytes.len() as u32, |at, into| {
                let bytes = self.bytes.get(at as usize..at as usize + into.len());
                bytes.map(|bytes| into.copy_from_slice(bytes)).is_some()
            })
        }

        fn is_whole(&self, place: Place) -> bool {
            let at = place.extent().data_at as usize;
            let bytes = self.bytes.get(at..at + place.size as usize);
            bytes.is_some_and(|bytes| crc32fast::hash(bytes) == place.crc)
        }
    }

    fn contents(n: u64, length: usize) -> Vec<u8> {
        (0..length as u64).map(|i| (i.wrapping_mul(n + 3) >> 3) as u8 ^ n as u8).collect()
    }

    fn segment() -> Written {
        let mut written = Written::default();
        for (n, length) in [10, 5000, 70_000, 64, 1].into_iter().enumerate() {
            written.add(3, n as u64, &contents(n as u64, length));
        }
        written
    }

    fn blocks(recovery: &Recovery) -> Vec<u64> {
        recovery.index.blocks().map(|(block, _)| block.0).collect()
    }

    #[test]
    fn a_segment_without_a_journal_tells_what_it_holds() {
        let mut written = segment();
        written.erase(1);
        let mut recovery = Recovery::default();
        let walk = written.walk(3);
        assert_eq!((walk.records.len(), walk.sealed, walk.gaps), (5, false, 0));
        assert_eq!(walk.end as usize, written.bytes.len());
        assert_eq!(recovery.adopt(3, &walk, |_, place| Some(written.is_whole(place))), vec![]);
        assert_eq!(blocks(&recovery), [0, 2, 3, 4]);
        // Sealed: nothing needs to be read.
        written.seal(3);
        let mut recovery = Recovery::default();
        let walk = written.walk(3);
        assert!(walk.sealed);
        recovery.adopt(3, &walk, |_, _| panic!("read"));
        assert_eq!(blocks(&recovery), [0, 2, 3, 4]);
        assert!(recovery.is_sealed(3));
        // Under another number it is nothing.
        assert_eq!(written.walk(4), Walk::default());
    }

    #[test]
    fn what_is_torn_hides_nothing_behind_it() {
        for torn in 0..5 {
            let mut written = segment();
            let (block, place) = written.places[torn];
            // Neither header nor bytes came to the disk.
            let extent = place.extent();
            written.bytes[extent.offset as usize..extent.end as usize].fill(0);
            let walk = written.walk(3);
            let mut recovery = Recovery::default();
            assert_eq!(recovery.adopt(3, &walk, |_, place| Some(written.is_whole(place))), vec![]);
            assert_eq!(recovery.index.len(), 4, "{torn}");
            assert_eq!(recovery.index.get(block), None);
            // The header came, the bytes did not.
            let mut written = segment();
            written.bytes[extent.data_at as usize..extent.end as usize].fill(0);
            let walk = written.walk(3);
            let mut recovery = Recovery::default();
            let erase = recovery.adopt(3, &walk, |_, place| Some(written.is_whole(place)));
            assert_eq!(erase, vec![ToErase { block, place }]);
            assert_eq!(recovery.index.len(), 4);
        }
    }

    #[test]
    fn the_journal_is_believed() {
        let written = segment();
        let [first, second] = [written.places[0], written.places[1]];
        let mut recovery = Recovery::default();
        recovery.apply(Entry::Put { block: first.0, place: first.1 });
        recovery.apply(Entry::Put { block: second.0, place: second.1 });
        recovery.apply(Entry::Erased { block: second.0, place: second.1 });
        // Known ones are not read, the erased one does not come back though its header says nothing of it.
        let known = |block: BlockId| block == first.0 || block == second.0;
        let erase = recovery.adopt(3, &written.walk(3), |block, place| {
            assert!(!known(block));
            Some(written.is_whole(place))
        });
        assert_eq!(erase, vec![ToErase { block: second.0, place: second.1 }]);
        assert_eq!(blocks(&recovery), [0, 2, 3, 4]);
        assert_eq!(recovery.next_segment(), 4);
    }

    #[test]
    fn a_damaged_header_at_the_end_does_not_cut_off_its_block() {
        let mut written = segment();
        let mut recovery = Recovery::default();
        for &(block, place) in &written.places {
            recovery.apply(Entry::Put { block, place });
        }
        for &(_, place) in &written.places {
            written.bytes[place.offset as usize] ^= 1;
        }
        let walk = written.walk(3);
        assert_eq!(walk.end, 0);
        assert_eq!(recovery.end(3, &walk) as usize, written.bytes.len());
        assert_eq!(recovery.adopt(3, &walk, |_, _| panic!("read")), vec![]);
        assert_eq!(recovery.index.len(), 5);
    }

    #[test]
    fn of_two_copies_a_good_one_stays() {
        let mut copy = Written::default();
        copy.add(4, 1, &contents(1, 5000));
        let (block, original, newcomer) = (BlockId(1), segment().places[1].1, copy.places[0].1);
        let cases = [
            // What is known of the original and of the copy, and which stays.
            (Some(true), Some(true), Some(original)),
            (Some(true), Some(false), Some(original)),
            (Some(true), None, Some(original)),
            (Some(false), Some(true), Some(newcomer)),
            (Some(false), Some(false), Some(original)),
            // What cannot be read is neither taken nor given up.
            (Some(false), None, None),
            (None, Some(true), None),
        ];
        for sealed in [false, true] {
            if sealed {
                copy.seal(4);
            }
            for (of_original, of_copy, stays) in cases {
                let mut recovery = Recovery::default();
                recovery.apply(Entry::Put { block, place: original });
                recovery.apply(Entry::Sealed { segment: 3 });
                let whole = |_, place| if place == original { of_original } else { of_copy };
                let erase = recovery.adopt(4, &copy.walk(4), whole);
                assert_eq!(recovery.index.get(block), Some(stays.unwrap_or(original)));
                let goes = stays.map(|stays| if stays == original { newcomer } else { original });
                let expected: Vec<_> = goes.map(|place| ToErase { block, place }).into_iter().collect();
                assert_eq!(erase, expected);
                assert_eq!(recovery.is_sealed(4), sealed && stays.is_some());
            }
        }
    }

    #[test]
    fn segments_that_are_gone_take_their_blocks_along() {
        let mut recovery = Recovery::default();
        for (block, place) in segment().places {
            recovery.apply(Entry::Put { block, place });
        }
        recovery.apply(Entry::Sealed { segment: 9 });
        assert_eq!(recovery.found(&[9].into()), 5);
        assert_eq!((recovery.index.len(), recovery.next_segment()), (0, 10));
        recovery.apply(Entry::Removed { segment: 9 });
        assert!(!recovery.is_sealed(9));
    }

    #[test]
    fn bytes_that_look_like_a_header_are_none() {
        // A block holds the header that would be right in its place, but for the key.
        let mut written = Written::default();
        let forged = Record::block(BlockId(66), 1, 0).encode(Seal { key: &[8; 32], ..SEAL }, 3, 192);
        let mut contents = vec![0; 192 - 68];
        contents.extend(forged);
        written.add(3, 1, &contents);
        written.add(3, 2, b"behind");
        assert_eq!(&written.bytes[192..256], &forged);
        written.bytes[3] ^= 1;
        let walk = written.walk(3);
        assert_eq!(walk.records.iter().map(|(_, record)| record.block.0).collect::<Vec<_>>(), [2]);
        assert_eq!(walk.gaps, 1);
    }

    proptest! {
        #[test]
        fn whatever_happens_to_some_bytes_the_other_blocks_are_found(
            lengths in proptest::collection::vec(1usize..9000, 1..12),
            at in any::<proptest::sample::Index>(),
            length in 1usize..6000,
            with in any::<u8>(),
            unreadable in any::<bool>(),
        ) {
            let mut written = Written::default();
            for (n, length) in lengths.iter().enumerate() {
                written.add(3, n as u64, &contents(n as u64, *length));
            }
            let from = at.index(written.bytes.len());
            let until = (from + length).min(written.bytes.len());
            written.bytes[from..until].fill(with);
            // Sectors of 4 KiB cannot be read.
            let bad = if unreadable { from / 4096 * 4096..until.next_multiple_of(4096) } else { 0..0 };
            let walk = walk(SEAL, 3, written.bytes.len() as u32, |at, into| {
                let at = at as usize;
                if at < bad.end && at + into.len() > bad.start {
                    return false;
                }
                let bytes = written.bytes.get(at..at + into.len());
                bytes.map(|bytes| into.copy_from_slice(bytes)).is_some()
            });
            let mut recovery = Recovery::default();
            recovery.adopt(3, &walk, |_, place| Some(written.is_whole(place)));
            let hurt = if unreadable { bad.start..bad.end.max(until) } else { from..until };
            for (block, place) in &written.places {
                let extent = place.extent();
                let untouched = extent.end as usize <= hurt.start || extent.offset as usize >= hurt.end;
                if untouched {
                    prop_assert_eq!(recovery.index.get(*block), Some(*place));
                }
            }
        }
    }
}
