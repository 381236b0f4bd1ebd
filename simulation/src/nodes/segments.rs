//! The blocks of a virtual disk, in segments and a journal as `eggs-blockd` has them: the same records, the same
//! recovery, its own small store around them.

use std::collections::BTreeSet;

use bytes::Bytes;
use eggs_blockd_core::journal::{self, ENTRY_BYTES, End, Entry};
use eggs_blockd_core::record::{PageSums, Seal, pages, pages_match};
use eggs_blockd_core::recovery::{Recovery, ToErase, is_whole, walk};
use eggs_blockd_core::{Identity, Index, Place, Record, WriteAdmission};
use eggs_proto::{BlockError, BlockId};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::disk::{NoSpace, VirtualDisk};

/// Small: a run fills some of them.
const SEGMENT_BYTES: u32 = 1 << 20;
const JOURNAL: &str = "journal";

pub(crate) struct Segments {
    files: VirtualDisk,
    index: Index,
    /// The segment being written, and where it ends.
    open: Option<(u32, u32)>,
    next_segment: u32,
    /// Of the journal.
    next_entry: u64,
    /// Records whose bytes are not durable yet: their segments are not sealed.
    arriving: BTreeSet<(u32, u32)>,
}

/// A record ends behind the end of its segment.
struct NoSuchBytes;

fn path(segment: u32) -> String {
    format!("segments/{segment:08x}.seg")
}

fn number(path: &str) -> Option<u32> {
    let digits = path.strip_prefix("segments/")?.strip_suffix(".seg")?;
    u32::from_str_radix(digits, 16).ok()
}

impl Segments {
    pub fn new(capacity_bytes: u64) -> Segments {
        Segments {
            files: VirtualDisk::new(capacity_bytes),
            index: Index::default(),
            open: None,
            next_segment: 1,
            next_entry: 0,
            arriving: BTreeSet::new(),
        }
    }

    pub fn used_bytes(&self) -> u64 {
        self.files.used_bytes()
    }

    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.index.blocks().map(|(block, _)| block)
    }

    pub fn place(&self, block: BlockId) -> Option<Place> {
        self.index.get(block)
    }

    pub fn wipe(&mut self) {
        self.files.wipe();
        (self.index, self.open) = (Index::default(), None);
    }

    pub fn crash(&mut self, rng: &mut ChaCha8Rng) {
        self.files.crash(rng);
        self.arriving.clear();
        (self.index, self.open) = (Index::default(), None);
    }

    /// A block's place and bytes, when they are what was written.
    pub fn read(&self, block: BlockId) -> Result<(Place, Bytes), BlockError> {
        self.read_checked(block, true)
    }

    /// As [`Segments::read`], by a host whose memory is bad: what is not what was written it does not notice.
    pub fn read_blindly(&self, block: BlockId) -> Result<(Place, Bytes), BlockError> {
        self.read_checked(block, false)
    }

    fn read_checked(&self, block: BlockId, check: bool) -> Result<(Place, Bytes), BlockError> {
        let place = self.index.get(block).ok_or(BlockError::UnknownBlock)?;
        let extent = place.extent();
        let file = self.files.read(&path(place.segment)).ok_or(BlockError::Corrupt)?;
        let part = |at: u32, length: u32| file.get(at as usize..(at + length) as usize);
        let sums = part(extent.sums_at(), 4 * pages(place.size)).ok_or(BlockError::Corrupt)?;
        let bytes = part(extent.data_at, place.size).ok_or(BlockError::Corrupt)?;
        if check && (!pages_match(block, 0, bytes, sums) || crc32fast::hash(bytes) != place.crc) {
            return Err(BlockError::Corrupt);
        }
        Ok((place, Bytes::copy_from_slice(bytes)))
    }

    /// Writes a block; it is not durable yet and nobody knows it.
    pub fn append(
        &mut self,
        identity: &Identity,
        admission: &WriteAdmission,
        bytes: &[u8],
    ) -> Result<Place, NoSpace> {
        if self.open.is_some_and(|(_, end)| end >= SEGMENT_BYTES) {
            self.seal(identity)?;
        }
        let (segment, offset) = match self.open {
            Some(open) => open,
            None => {
                let number = self.next_segment;
                self.next_segment += 1;
                (number, 0)
            }
        };
        let record = Record::block(admission.block, admission.size, admission.crc);
        let extent = record.extent(offset);
        let mut sums = PageSums::new(admission.block, admission.size);
        sums.push(bytes);
        let mut whole = record.encode(Seal::from(identity), segment, u64::from(offset)).to_vec();
        whole.extend(sums.finish());
        whole.resize((extent.data_at - offset) as usize, 0);
        whole.extend_from_slice(bytes);
        whole.resize((extent.end - offset) as usize, 0);
        self.files.write(&path(segment), offset, &whole)?;
        self.open = Some((segment, extent.end));
        self.arriving.insert((segment, offset));
        Ok(Place { segment, offset, size: admission.size, crc: admission.crc })
    }

    pub fn sync(&mut self, place: Place) {
        self.files.sync(&path(place.segment));
    }

    /// The block is durable in its place: it is known from now on.
    pub fn placed(&mut self, identity: &Identity, block: BlockId, place: Place) {
        self.arriving.remove(&(place.segment, place.offset));
        self.tell(identity, Entry::Put { block, place });
        if let Some(before) = self.index.put(block, place) {
            self.mark_erased(identity, ToErase { block, place: before });
        }
    }

    /// The open segment is complete: it may be called so when none of its records is on its way.
    fn seal(&mut self, identity: &Identity) -> Result<(), NoSpace> {
        let Some((segment, end)) = self.open.take() else { return Ok(()) };
        if self.arriving.iter().any(|(of, _)| *of == segment) {
            // Not sealed: it is looked through at the next start.
            return Ok(());
        }
        let seal = Record::seal().encode(Seal::from(identity), segment, u64::from(end));
        self.files.write(&path(segment), end, &seal)?;
        self.files.sync(&path(segment));
        self.index.seal(segment);
        self.tell(identity, Entry::Sealed { segment });
        Ok(())
    }

    fn mark_erased(&mut self, identity: &Identity, ToErase { block, place }: ToErase) {
        let record = Record::block(block, place.size, place.crc).erased();
        let header = record.encode(Seal::from(identity), place.segment, u64::from(place.offset));
        // In place: it takes no room.
        let _ = self.files.write(&path(place.segment), place.offset, &header);
    }

    fn tell(&mut self, identity: &Identity, entry: Entry) {
        if self.next_entry == 0 {
            let _ = self.files.write(JOURNAL, 0, &journal::head(identity.service));
            self.next_entry = 1;
        }
        let at = self.next_entry as u32 * ENTRY_BYTES as u32;
        let _ = self.files.write(JOURNAL, at, &entry.encode(self.next_entry));
        self.next_entry += 1;
    }

    /// Finds out what there is, as after a start. Sometimes without the journal.
    pub fn open(&mut self, identity: &Identity, lose_journal: bool) {
        if lose_journal {
            self.files.remove(JOURNAL);
        }
        let mut recovery = Recovery::default();
        let bytes = self.files.read(JOURNAL).unwrap_or_default();
        let end = journal::read(bytes, identity.service, |entry| recovery.apply(entry));
        let Some(End::At(end)) = end else {
            self.files.remove(JOURNAL);
            self.next_entry = 0;
            return self.look_through(identity, Recovery::default());
        };
        self.files.truncate(JOURNAL, end as u32);
        self.next_entry = end / ENTRY_BYTES as u64;
        self.look_through(identity, recovery);
    }

    fn look_through(&mut self, identity: &Identity, mut recovery: Recovery) {
        let there: BTreeSet<u32> = self.files.paths().iter().filter_map(|path| number(path)).collect();
        recovery.found(&there);
        let before: BTreeSet<BlockId> = recovery.index.blocks().map(|(block, _)| block).collect();
        let (mut to_erase, mut open) = (Vec::new(), None);
        for &segment in &there {
            if recovery.is_sealed(segment) {
                continue;
            }
            let file = self.files.read(&path(segment)).unwrap_or_default();
            let part = |at: u32, length: usize| file.get(at as usize..at as usize + length);
            let found = walk(Seal::from(identity), segment, file.len() as u32, |at, into| {
                part(at, into.len()).map(|bytes| into.copy_from_slice(bytes)).is_some()
            });
            to_erase.extend(recovery.adopt(segment, &found, |block, place| {
                let file = self.files.read(&path(place.segment)).unwrap_or_default();
                let part = |at: u32, length: usize| file.get(at as usize..at as usize + length);
                let read = |at, into: &mut [u8]| {
                    let bytes = part(at, into.len()).ok_or(NoSuchBytes)?;
                    into.copy_from_slice(bytes);
                    Ok(())
                };
                let whole: Result<bool, NoSuchBytes> = is_whole(Seal::from(identity), block, place, read);
                Some(whole.unwrap_or(false))
            }));
            self.files.truncate(&path(segment), found.end);
            self.files.sync(&path(segment));
            if !found.sealed {
                open = Some((segment, found.end));
            }
        }
        (self.next_segment, self.open) = (recovery.next_segment(), open);
        self.index = recovery.index;
        for erase in to_erase {
            self.mark_erased(identity, erase);
        }
        let late: Vec<_> = self.index.blocks().filter(|(block, _)| !before.contains(block)).collect();
        for (block, place) in late {
            self.tell(identity, Entry::Put { block, place });
        }
    }

    /// Removes a block for good: its absence is durable in the journal, and its header says so sooner or later.
    pub fn erase(&mut self, identity: &Identity, block: BlockId) {
        let Some(place) = self.index.remove(block) else { return };
        self.mark_erased(identity, ToErase { block, place });
        self.tell(identity, Entry::Erased { block, place });
        self.files.sync(JOURNAL);
    }

    /// Flips a bit of a block's bytes or their checksums.
    pub fn rot(&mut self, block: BlockId, rng: &mut ChaCha8Rng) {
        let Some(place) = self.index.get(block) else { return };
        let extent = place.extent();
        let at = rng.random_range(extent.sums_at()..extent.data_at + place.size);
        self.files.flip(&path(place.segment), at, rng.random_range(0..8));
    }
}
