//! How many blocks a disk holds, counted while it is in use.
//!
//! The scan after opening goes through the folders in order and must not delay or disturb writes. A
//! change in a folder it has not come to yet is not counted (the scan will see it); in a folder that is done,
//! it is; in the folder it is just counting, it is noted and preferred to what the scan saw.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use eggs_blockd_core::BlockPath;
use eggs_blockd_core::header::Folder;
use eggs_proto::BlockId;
use rustix::fs::{self as rfs, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{FOLDERS, StoreError, io_error, lock};

/// What the blocks of a disk take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    pub blocks: u64,
    /// Lengths of their files.
    pub used_bytes: u64,
    /// False: the scan is still under way (or broke off), and this is what it has found.
    pub complete: bool,
}

#[derive(Debug, Default)]
pub struct Ledger {
    blocks: AtomicU64,
    used_bytes: AtomicU64,
    complete: AtomicBool,
    scan: Mutex<Scan>,
}

#[derive(Debug, Default)]
struct Scan {
    /// Folders before this one are counted.
    next: usize,
    /// What changed in folder `next` since its names were read: the length now, `None` for gone.
    changed: Option<HashMap<BlockId, Option<u64>>>,
}

impl Ledger {
    pub fn totals(&self) -> Totals {
        Totals {
            blocks: self.blocks.load(Ordering::Relaxed),
            used_bytes: self.used_bytes.load(Ordering::Relaxed),
            complete: self.complete.load(Ordering::Acquire),
        }
    }

    /// Makes one change of a block's file (its length before and after) and counts it when it succeeds.
    pub fn change(
        &self,
        path: BlockPath,
        before: Option<u64>,
        after: Option<u64>,
        make: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if self.complete.load(Ordering::Acquire) {
            make()?;
            self.count(before, after);
            return Ok(());
        }
        // Under the lock, so that the scan reads a folder's names either before or after.
        let mut scan = lock(&self.scan);
        make()?;
        let folder = usize::from(path.folder().0);
        if folder < scan.next {
            self.count(before, after);
        } else if folder == scan.next
            && let Some(changed) = &mut scan.changed
        {
            changed.insert(path.block, after);
        }
        Ok(())
    }

    fn count(&self, before: Option<u64>, after: Option<u64>) {
        if let Some(length) = after {
            self.blocks.fetch_add(1, Ordering::Relaxed);
            self.used_bytes.fetch_add(length, Ordering::Relaxed);
        }
        if let Some(length) = before {
            // Saturating: somebody may have changed a file's length behind our back.
            let less = |by: u64| move |total: u64| Some(total.saturating_sub(by));
            let _ = self.blocks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less(1));
            let _ = self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less(length));
        }
    }

    pub fn scan(&self, blocks: &OwnedFd, stop: impl Fn() -> bool) -> Result<(), StoreError> {
        let mut number = 0;
        while number < FOLDERS && !stop() {
            let folder = Folder(number as u16);
            number = self.scan_folder(blocks, folder)?;
        }
        if number == FOLDERS {
            self.complete.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Counts one folder; the number of the next one there can be.
    fn scan_folder(&self, blocks: &OwnedFd, folder: Folder) -> Result<usize, StoreError> {
        let number = usize::from(folder.0);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut scan = lock(&self.scan);
        if number.is_multiple_of(256) {
            match rfs::statat(blocks, folder.upper(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => {}
                Err(Errno::NOENT) => {
                    scan.next = number + 256;
                    return Ok(scan.next);
                }
                Err(error) => return Err(io_error("count blocks")(error)),
            }
        }
        let opened = match rfs::openat(blocks, folder.path(), flags, Mode::empty()) {
            Ok(opened) => opened,
            Err(Errno::NOENT) => {
                scan.next = number + 1;
                return Ok(scan.next);
            }
            Err(error) => return Err(io_error("count blocks")(error)),
        };
        let names = names(&opened).map_err(io_error("count blocks"))?;
        (scan.next, scan.changed) = (number, Some(HashMap::new()));
        drop(scan);

        let mut lengths = Vec::with_capacity(names.len());
        for path in names {
            match rfs::statat(&opened, path.name(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => lengths.push((path.block, stat.st_size as u64)),
                Err(Errno::NOENT) => {} // Erased since: noted.
                Err(error) => return Err(io_error("count blocks")(error)),
            }
        }

        let mut scan = lock(&self.scan);
        let changed = scan.changed.take().unwrap_or_default();
        let untouched =
            lengths.iter().filter(|(block, _)| !changed.contains_key(block)).map(|(_, length)| *length);
        for length in untouched.chain(changed.values().flatten().copied()) {
            self.count(None, Some(length));
        }
        scan.next = number + 1;
        Ok(scan.next)
    }
}

/// The blocks that have a file in a folder.
fn names(folder: &OwnedFd) -> Result<Vec<BlockPath>, Errno> {
    let mut names = Vec::new();
    for entry in rfs::Dir::read_from(folder)? {
        names.extend(BlockPath::of_name(entry?.file_name().to_bytes()));
    }
    Ok(names)
}
