//! The journal: where the blocks lie, in the order in which that was decided, so that a disk opens quickly.
//!
//! A file of 32-byte entries, appended to, and rewritten with what is still true when most of it is not. It is
//! made durable for what only it says for certain: that a block is erased. All else in it can be
//! lost: what lies in segments it does not call sealed is looked up there, and when it is gone or damaged in
//! the middle, in all segments ([`crate::recovery`]). All integers little-endian.
//!
//! ```text
//! head, 32 bytes:   "EGGSJRNL"  u32 format version  u32 zero  u64 block service id  u32 zero  u32 CRC of the 28 before
//! entry, 32 bytes:  u8 kind  [3] zeros  u32 segment  u64 block  u32 offset  u32 size  u32 crc
//!                   u32 CRC of the 28 before, begun with the entry's number in the file
//! kinds:            1 the block lies here   2 the block that lay here is erased
//!                   3 the segment is sealed: all of its blocks were told before (no block, offset, size, crc)
//!                   4 the segment is removed
//! ```

use eggs_proto::{BlockId, BlockServiceId};

use crate::identity::DISK_FORMAT;
use crate::index::Place;

/// Of the head and of each entry.
pub const ENTRY_BYTES: usize = 32;

const MAGIC: [u8; 8] = *b"EGGSJRNL";
const CRC_AT: usize = 28;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    Put { block: BlockId, place: Place },
    Erased { block: BlockId, place: Place },
    Sealed { segment: u32 },
    Removed { segment: u32 },
}

/// How a journal ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// After this many bytes; what follows, if anything, was never made durable.
    At(u64),
    /// There are entries behind a place where there is none: something in the middle is gone.
    Damaged,
}

/// The head of the journal of a disk.
pub fn head(service: BlockServiceId) -> [u8; ENTRY_BYTES] {
    let mut bytes = [0; ENTRY_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&DISK_FORMAT.to_le_bytes());
    bytes[16..24].copy_from_slice(&service.0.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

impl Entry {
    /// The bytes of this entry at `number` in the file, where the head is number 0.
    pub fn encode(&self, number: u64) -> [u8; ENTRY_BYTES] {
        let (kind, segment, of_block): (u8, u32, Option<(BlockId, Place)>) = match *self {
            Entry::Put { block, place } => (1, place.segment, Some((block, place))),
            Entry::Erased { block, place } => (2, place.segment, Some((block, place))),
            Entry::Sealed { segment } => (3, segment, None),
            Entry::Removed { segment } => (4, segment, None),
        };
        let mut bytes = [0; ENTRY_BYTES];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&segment.to_le_bytes());
        if let Some((block, place)) = of_block {
            bytes[8..16].copy_from_slice(&block.0.to_le_bytes());
            bytes[16..20].copy_from_slice(&place.offset.to_le_bytes());
            bytes[20..24].copy_from_slice(&place.size.to_le_bytes());
            bytes[24..28].copy_from_slice(&place.crc.to_le_bytes());
        }
        let crc = crc_of(&bytes, number);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The entry that these bytes are at `number`; `None`: they are none.
    pub fn decode(bytes: &[u8; ENTRY_BYTES], number: u64) -> Option<Entry> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if u32_at(CRC_AT) != crc_of(bytes, number) {
            return None;
        }
        let mut block = [0; 8];
        block.copy_from_slice(&bytes[8..16]);
        let block = BlockId(u64::from_le_bytes(block));
        let segment = u32_at(4);
        let place = Place { segment, offset: u32_at(16), size: u32_at(20), crc: u32_at(24) };
        match bytes[0] {
            1 => Some(Entry::Put { block, place }),
            2 => Some(Entry::Erased { block, place }),
            3 => Some(Entry::Sealed { segment }),
            4 => Some(Entry::Removed { segment }),
            _ => None,
        }
    }
}

/// The entries of a journal in order, and how it ends; `None` when it does not begin as one of this disk.
pub fn read(bytes: &[u8], service: BlockServiceId, mut entry: impl FnMut(Entry)) -> Option<End> {
    let (all, rest) = bytes.as_chunks::<ENTRY_BYTES>();
    let (first, all) = all.split_first()?;
    if *first != head(service) {
        return None;
    }
    let mut numbered = (1u64..).zip(all);
    for (number, bytes) in &mut numbered {
        match Entry::decode(bytes, number) {
            Some(found) => entry(found),
            None => {
                let more = numbered.any(|(number, bytes)| Entry::decode(bytes, number).is_some());
                return Some(if more { End::Damaged } else { End::At(number * ENTRY_BYTES as u64) });
            }
        }
    }
    Some(End::At((bytes.len() - rest.len()) as u64))
}

fn crc_of(bytes: &[u8; ENTRY_BYTES], number: u64) -> u32 {
    // The CRC of zeros begun with zero would be zero: begin with something that is never that.
    let mut hasher = crc32fast::Hasher::new_with_initial(!(number as u32));
    hasher.update(&bytes[..CRC_AT]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SERVICE: BlockServiceId = BlockServiceId(0x0102_0304_0506_0708);

    fn entries() -> Vec<Entry> {
        let place = Place { segment: 7, offset: 0x40, size: 5, crc: 0xdead_beef };
        let block = BlockId(0x0100_0000_0000_0001);
        vec![
            Entry::Put { block, place },
            Entry::Erased { block, place },
            Entry::Sealed { segment: 7 },
            Entry::Removed { segment: 7 },
        ]
    }

    fn encoded(entries: &[Entry]) -> Vec<u8> {
        let numbered = (1..).zip(entries).flat_map(|(number, entry)| entry.encode(number));
        head(SERVICE).into_iter().chain(numbered).collect()
    }

    fn decoded(bytes: &[u8]) -> (Vec<Entry>, Option<End>) {
        let mut entries = Vec::new();
        let end = read(bytes, SERVICE, |entry| entries.push(entry));
        (entries, end)
    }

    #[test]
    fn golden_entry() {
        let hex: String = entries()[0].encode(1)[..28].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "0100000007000000010000000000000140000000 05000000efbeadde".replace(' ', ""));
        let crcs: Vec<u8> = entries()[0].encode(1)[28..].to_vec();
        assert_eq!(u32::from_le_bytes(crcs.try_into().unwrap()), 898_313_436);
    }

    #[test]
    fn a_journal_reads_back_up_to_a_torn_tail() {
        let bytes = encoded(&entries());
        assert_eq!(decoded(&bytes), (entries(), Some(End::At(160))));
        for length in 32..bytes.len() {
            let whole = length / 32 - 1;
            let expected = (entries()[..whole].to_vec(), Some(End::At(32 * (whole as u64 + 1))));
            assert_eq!(decoded(&bytes[..length]), expected, "{length}");
            let mut zeros = bytes[..length].to_vec();
            zeros.resize(512, 0);
            assert_eq!(decoded(&zeros), expected, "{length}");
        }
        assert_eq!(decoded(&bytes[..31]).1, None);
        assert_eq!(read(&bytes, BlockServiceId(1), |_| ()), None);
    }

    #[test]
    fn damage_in_the_middle_is_told_from_a_torn_tail() {
        let good = encoded(&entries());
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            let (found, end) = decoded(&bytes);
            match at / 32 {
                0 => assert_eq!(end, None),
                4 => assert_eq!((found.len(), end), (3, Some(End::At(128)))),
                entry => assert_eq!((found.len(), end), (entry - 1, Some(End::Damaged))),
            }
        }
        // An entry in another's place is none.
        let mut bytes = good.clone();
        bytes.copy_within(32..64, 64);
        assert_eq!(decoded(&bytes).1, Some(End::Damaged));
    }

    proptest! {
        #[test]
        fn hostile_journals_are_no_trouble(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if bytes.len() >= 32 {
                bytes[..32].copy_from_slice(&head(SERVICE));
            }
            let _ = decoded(&bytes);
        }
    }
}
