//! A stored block, open for reading.

use std::os::fd::OwnedFd;

use bytes::Bytes;
use eggs_blockd_core::header::{HEADER_USED_BYTES, HeaderError};
use eggs_blockd_core::{BlockHeader, BlockPath, HEADER_BYTES};
use eggs_proto::{BlockError, BlockId};
use rustix::buffer::spare_capacity;
use rustix::fs::{self as rfs, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use super::{Store, StoreError, io_error};

/// Pieces in which a block is verified.
const VERIFY_BYTES: u32 = 256 << 10;

/// A block whose header is right. Its file stays readable when the block is erased meanwhile.
#[derive(Debug)]
pub struct StoredBlock {
    file: OwnedFd,
    header: BlockHeader,
}

impl Store {
    /// Opens a block.
    ///
    /// # Errors
    /// `UnknownBlock`, `DiskLost` when it is the whole disk that is gone, corrupt when its header or
    /// its length is not right, or the disk's.
    pub fn read(&self, block: BlockId) -> Result<StoredBlock, StoreError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = BlockPath::new(block).to_string();
        let file = match rfs::openat(&self.blocks, path, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => {
                self.still_there()?;
                return Err(BlockError::UnknownBlock.into());
            }
            Err(error) => return Err(io_error("open a block")(error)),
        };
        let corrupt =
            |problem: &dyn std::fmt::Display| StoreError::Corrupt(format!("block {block}: {problem}"));
        let mut bytes = [0; HEADER_USED_BYTES];
        let read =
            retry_on_intr(|| rustix::io::pread(&file, &mut bytes, 0)).map_err(io_error("read a block"))?;
        if read < bytes.len() {
            return Err(corrupt(&"it is cut off"));
        }
        let identity = self.identity();
        let header = match BlockHeader::expect(&bytes, identity.cluster, identity.service, block) {
            Ok(header) => header,
            Err(error @ (HeaderError::Damaged | HeaderError::AnotherBlock | HeaderError::Newer(_))) => {
                return Err(corrupt(&error));
            }
        };
        let stat = rfs::fstat(&file).map_err(io_error("look at a block"))?;
        if stat.st_size as u64 != header.file_bytes() {
            return Err(corrupt(&"its file is not as long as its header says"));
        }
        Ok(StoredBlock { file, header })
    }
}

impl StoredBlock {
    pub fn size(&self) -> u32 {
        self.header.size
    }

    /// CRC-32 of the whole block as it was written.
    pub fn crc(&self) -> u32 {
        self.header.crc
    }

    /// Tells the kernel that this range is about to be read in order.
    pub fn will_read(&self, offset: u32, length: u32) {
        let start = u64::from(HEADER_BYTES) + u64::from(offset);
        // Advice: it may be refused.
        let _ = rfs::fadvise(
            &self.file,
            start,
            std::num::NonZeroU64::new(u64::from(length)),
            rfs::Advice::WillNeed,
        );
    }

    /// The bytes of a range inside the block, as they are on the disk now.
    ///
    /// # Errors
    /// Corrupt when the file ends before, or the disk's.
    pub fn read_at(&self, offset: u32, length: u32) -> Result<Bytes, StoreError> {
        let mut bytes = Vec::with_capacity(length as usize);
        let start = u64::from(HEADER_BYTES) + u64::from(offset);
        while bytes.len() < length as usize {
            let at = start + bytes.len() as u64;
            let read = retry_on_intr(|| rustix::io::pread(&self.file, spare_capacity(&mut bytes), at))
                .map_err(io_error("read a block"))?;
            if read == 0 {
                return Err(StoreError::Corrupt(format!("block {}: it is cut off", self.header.block)));
            }
        }
        // An allocator may have given more room than was asked for.
        bytes.truncate(length as usize);
        Ok(bytes.into())
    }

    /// Reads the whole block and compares.
    ///
    /// # Errors
    /// Corrupt when it is not what was written, or the disk's.
    pub fn verify(&self) -> Result<(), StoreError> {
        let mut hasher = crc32fast::Hasher::new();
        let mut offset = 0;
        while offset < self.header.size {
            let length = VERIFY_BYTES.min(self.header.size - offset);
            hasher.update(&self.read_at(offset, length)?);
            offset += length;
        }
        self.check_crc(hasher.finalize())
    }

    /// Whether the CRC of all its bytes, as read, is the right one (BL-8).
    ///
    /// # Errors
    /// Corrupt when not.
    pub fn check_crc(&self, crc: u32) -> Result<(), StoreError> {
        if crc == self.header.crc {
            return Ok(());
        }
        Err(StoreError::Corrupt(format!("block {}: its bytes do not have its CRC", self.header.block)))
    }
}
