//! A block on its way in.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use eggs_blockd_core::header::file_bytes;
use eggs_blockd_core::{BlockHeader, BlockPath, HEADER_BYTES, Receiving, WriteAdmission};
use eggs_proto::{BlockError, mac};
use rustix::fs::{self as rfs, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{Claim, Promise, Store, StoreError, io_error};

/// How an admitted write goes on.
#[derive(Debug)]
pub enum Begun {
    /// The block is there, whole and durable: here is its proof again.
    Stored(mac::Mac),
    Arriving(Incoming),
}

/// A block whose bytes are arriving in `tmp/`. Dropped before [`Incoming::finish`], it leaves nothing.
#[derive(Debug)]
pub struct Incoming {
    store: Arc<Store>,
    admission: WriteAdmission,
    receiving: Receiving,
    file: OwnedFd,
    name: String,
    /// In its place now: a file of this length that is not the block it should be.
    replaces: Option<u64>,
    renamed: bool,
    /// Until the file has its room.
    promise: Option<Promise>,
    _claim: Claim,
}

impl Store {
    /// Begins an admitted write.
    ///
    /// # Errors
    /// `Busy` while the same block is being written or erased, `NoSpace`, `WrongCrc` when the block is
    /// there with other contents (BL-4), or the disk's.
    pub fn begin(self: &Arc<Self>, admission: WriteAdmission) -> Result<Begun, StoreError> {
        let claim = Claim::take(self, admission.block)?;
        let replaces = match self.stored(&admission)? {
            Existing::Same => return Ok(Begun::Stored(admission.proof)),
            Existing::None => None,
            Existing::Damaged(length) => Some(length),
        };
        let promise = Promise::take(self, admission.size)?;
        let number = self.next_tmp.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{number}", BlockPath::new(admission.block).name());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rfs::openat(&self.tmp, &name, flags, Mode::from_raw_mode(0o600))
            .map_err(io_error("make a file for a block"))?;
        let mut incoming = Incoming {
            store: Arc::clone(self),
            receiving: Receiving::new(admission.size, admission.crc),
            admission,
            file,
            name,
            replaces,
            renamed: false,
            promise: Some(promise),
            _claim: claim,
        };
        incoming.allocate()?;
        Ok(Begun::Arriving(incoming))
    }

    /// What lies in the block's place: the same block makes a retry idempotent (BL-1), and is
    /// believed only when it still reads right.
    fn stored(&self, admission: &WriteAdmission) -> Result<Existing, StoreError> {
        let path = BlockPath::new(admission.block);
        let length = match rfs::statat(&self.blocks, path.to_string(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat.st_size as u64,
            Err(Errno::NOENT) => return Ok(Existing::None),
            Err(error) => return Err(io_error("look at a block")(error)),
        };
        let block = match self.read(admission.block) {
            Ok(block) => block,
            Err(StoreError::Corrupt(_)) => return Ok(Existing::Damaged(length)),
            Err(error) => return Err(error),
        };
        if (block.size(), block.crc()) != (admission.size, admission.crc) {
            return Err(BlockError::WrongCrc.into());
        }
        match block.verify() {
            Ok(()) => {}
            Err(StoreError::Corrupt(_)) => return Ok(Existing::Damaged(length)),
            Err(error) => return Err(error),
        }
        // Its first writer may have died between the rename and this.
        let folder = self.durable_folder(path.folder())?;
        rfs::fsync(&folder).map_err(io_error("make a block durable"))?;
        Ok(Existing::Same)
    }
}

enum Existing {
    None,
    Same,
    Damaged(u64),
}

impl Incoming {
    /// Takes the file's room at once: a full disk refuses before the data comes, the block lies in one
    /// piece, and writing costs some 10 % less CPU than allocating as it comes (ext4, measured with the
    /// `throughput` example; starting the writeback early gained nothing).
    fn allocate(&mut self) -> Result<(), StoreError> {
        let length = file_bytes(self.admission.size);
        match rfs::fallocate(&self.file, rfs::FallocateFlags::empty(), 0, length) {
            Ok(()) => self.promise = None,
            Err(error @ (Errno::NOSPC | Errno::DQUOT)) => {
                return Err(io_error("make room for a block")(error));
            }
            // Not every file system can; failing disks show when written to.
            Err(_) => {}
        }
        Ok(())
    }

    /// Takes the next piece of the block.
    ///
    /// # Errors
    /// As [`Receiving::push`], or the disk's. The block is then lost: drop it.
    pub fn append(&mut self, piece: &[u8]) -> Result<(), StoreError> {
        let offset = self.admission.size - self.receiving.missing();
        self.receiving.push(piece)?;
        let written = if offset == 0 {
            self.write_first(piece)
        } else {
            write_all(&self.file, piece, u64::from(HEADER_BYTES + offset))
        };
        written.map_err(io_error("write a block"))
    }

    /// Bytes still to come.
    pub fn missing(&self) -> u32 {
        self.receiving.missing()
    }

    /// The header's page and the first piece in one call.
    fn write_first(&self, piece: &[u8]) -> io::Result<()> {
        let identity = self.store.identity();
        let header = BlockHeader {
            cluster: identity.cluster,
            service: identity.service,
            block: self.admission.block,
            size: self.admission.size,
            crc: self.admission.crc,
        };
        let mut page = [0; HEADER_BYTES as usize];
        let used = header.encode();
        page[..used.len()].copy_from_slice(&used);
        let slices = [io::IoSlice::new(&page), io::IoSlice::new(piece)];
        let written = retry(|| rustix::io::pwritev(&self.file, &slices, 0))?;
        let in_piece = written.saturating_sub(page.len());
        if written < page.len() {
            write_all(&self.file, &page[written..], written as u64)?;
        }
        write_all(&self.file, &piece[in_piece..], (page.len() + in_piece) as u64)
    }

    /// Checks the whole, makes it durable and gives it its name (BL-1, BL-2).
    ///
    /// # Errors
    /// `WrongSize`, `WrongCrc`, or the disk's; the block is then not there.
    pub fn finish(mut self) -> Result<mac::Mac, StoreError> {
        self.receiving.clone().finish()?;
        let store = Arc::clone(&self.store);
        let path = BlockPath::new(self.admission.block);
        let length = file_bytes(self.admission.size);
        let folder = store.durable_folder(path.folder())?;
        rfs::fdatasync(&self.file).map_err(io_error("make a block's bytes durable"))?;
        store
            .ledger
            .change(path, self.replaces, Some(length), || {
                rfs::renameat(&store.tmp, &self.name, &folder, path.name())
            })
            .map_err(io_error("name a block"))?;
        self.renamed = true;
        rfs::fsync(&folder).map_err(io_error("make a block durable"))?;
        Ok(self.admission.proof)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.renamed {
            // What cannot be removed now is removed when the disk is next opened.
            let _ = rfs::unlinkat(&self.store.tmp, &self.name, AtFlags::empty());
        }
    }
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = retry(|| rustix::io::pwrite(file, bytes, offset))?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> io::Result<T> {
    Ok(rustix::io::retry_on_intr(&mut call)?)
}
