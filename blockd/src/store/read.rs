//! A stored block, open for reading. Every page that is read is compared with its checksum (BL-8).

use std::sync::Arc;

use bytes::Bytes;
use eggs_blockd_core::Place;
use eggs_blockd_core::record::{Kind, PAGE_BYTES, RECORD_HEADER_BYTES, Record, pages_match, pages_of};
use eggs_blockd_core::recovery::VERIFY_BYTES;
use eggs_proto::{BlockError, BlockId};
use rustix::fs::Advice;

use super::segment::Segment;
use super::{Store, StoreError, io_error, lock};

/// Where a block lies, and its open segment. It stays readable when the block is moved meanwhile.
#[derive(Debug)]
pub struct StoredBlock<'a> {
    store: &'a Store,
    segment: Arc<Segment>,
    block: BlockId,
    place: Place,
}

impl Store {
    /// Finds a block.
    ///
    /// # Errors
    /// `UnknownBlock`, `DiskLost` when it is the whole disk that is gone, or the disk's.
    pub fn read(&self, block: BlockId) -> Result<StoredBlock<'_>, StoreError> {
        let Some(place) = lock(&self.books).index.get(block) else {
            self.still_there()?;
            return Err(BlockError::UnknownBlock.into());
        };
        match self.segment_if_there(place.segment)? {
            Some(segment) => Ok(StoredBlock { store: self, segment, block, place }),
            // Moved in this instant, and its segment removed?
            None if lock(&self.books).index.get(block) != Some(place) => self.read(block),
            None => {
                self.still_there()?;
                Err(StoreError::Corrupt(format!("block {block}: its segment {:08x} is gone", place.segment)))
            }
        }
    }
}

impl StoredBlock<'_> {
    pub fn size(&self) -> u32 {
        self.place.size
    }

    /// CRC-32 of the whole block as it was written.
    pub fn crc(&self) -> u32 {
        self.place.crc
    }

    pub fn place(&self) -> Place {
        self.place
    }

    /// Tells the kernel that this range is about to be read in order.
    pub fn will_read(&self, offset: u32, length: u32) {
        let at = u64::from(self.place.extent().data_at) + u64::from(offset);
        self.segment.file.advise(at, u64::from(length), Advice::WillNeed);
    }

    /// Lets the next reads come from the disk, not from memory.
    fn forget_cached(&self) {
        let extent = self.place.extent();
        self.segment.file.advise(u64::from(extent.offset), extent.bytes(), Advice::DontNeed);
    }

    /// The bytes of a range inside the block.
    ///
    /// # Errors
    /// Corrupt when a page of it is not what was written, `UnknownBlock` when it was erased meanwhile, or the
    /// disk's.
    pub fn read_at(&self, offset: u32, length: u32) -> Result<Bytes, StoreError> {
        if length == 0 {
            return Ok(Bytes::new());
        }
        let (first, last) = pages_of(offset, length);
        let begin = first * PAGE_BYTES;
        let end = (u64::from(last) * u64::from(PAGE_BYTES)).min(u64::from(self.place.size)) as u32;
        let extent = self.place.extent();
        let read = |at: u32, length: u32| match self.segment.file.read(u64::from(at), length as usize) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(self.corrupt("it is cut off"))
            }
            result => result.map_err(io_error("read a block")),
        };
        let sums = read(extent.sums_at() + 4 * first, 4 * (last - first))?;
        let bytes = read(extent.data_at + begin, end - begin)?;
        if !pages_match(self.block, first, &bytes, &sums) {
            return Err(self.wrong());
        }
        let from = (offset - begin) as usize;
        Ok(Bytes::from(bytes).slice(from..from + length as usize))
    }

    /// Reads all there is of it and compares.
    ///
    /// # Errors
    /// Corrupt when it is not what was written, or the disk's.
    pub fn verify(&self) -> Result<(), StoreError> {
        let mut header = [0; RECORD_HEADER_BYTES];
        let offset = u64::from(self.place.offset);
        match self.segment.file.read_exact(&mut header, offset) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(self.corrupt("it is cut off"));
            }
            result => result.map_err(io_error("read a block"))?,
        }
        let expected = Record::block(self.block, self.place.size, self.place.crc);
        let found = Record::decode(&header, self.store.seal_key(), self.place.segment, offset);
        match found {
            Ok(found) if found == expected => {}
            Ok(Record { kind: Kind::Erased, .. }) => return Err(self.wrong()),
            Ok(_) => return Err(self.corrupt("its header is of another block")),
            Err(error) => return Err(self.corrupt(&error.to_string())),
        }
        let mut hasher = crc32fast::Hasher::new();
        let mut offset = 0;
        while offset < self.place.size {
            let length = VERIFY_BYTES.min(self.place.size - offset);
            hasher.update(&self.read_at(offset, length)?);
            offset += length;
        }
        self.check_crc(hasher.finalize())
    }

    /// As [`StoredBlock::verify`], from the disk itself, and whether it is what somebody expects.
    ///
    /// # Errors
    /// As there, and `WrongSize` or `WrongCrc` when the block is another one than expected.
    pub fn check(&self, size: u32, crc: u32) -> Result<(), StoreError> {
        if self.place.size != size {
            return Err(BlockError::WrongSize.into());
        }
        if self.place.crc != crc {
            return Err(BlockError::WrongCrc.into());
        }
        self.forget_cached();
        self.verify()
    }

    /// Whether the CRC of all its bytes, as read, is the right one (BL-8).
    ///
    /// # Errors
    /// Corrupt when not.
    pub fn check_crc(&self, crc: u32) -> Result<(), StoreError> {
        if crc == self.place.crc { Ok(()) } else { Err(self.corrupt("its bytes do not have its CRC")) }
    }

    /// What was read is wrong: because it was erased or moved meanwhile, or because it is damaged.
    fn wrong(&self) -> StoreError {
        match lock(&self.store.books).index.get(self.block) {
            None => BlockError::UnknownBlock.into(),
            Some(place) if place != self.place => BlockError::Busy.into(),
            Some(_) => self.corrupt("its bytes are not those that were written"),
        }
    }

    fn corrupt(&self, what: &str) -> StoreError {
        let Place { segment, offset, .. } = self.place;
        StoreError::Corrupt(format!("block {} (segment {segment:08x} at {offset}): {what}", self.block))
    }
}
