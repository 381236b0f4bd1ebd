//! One disk's bytes: the only place that knows how blocks lie in files.
//!
//! One file per block ([`eggs_blockd_core::header`]): written into `tmp/`, made durable, renamed into its
//! folder under `blocks/`, the folder made durable. All paths hang on open folders, not on names: when
//! the disk's folder is removed or something is mounted over it, nothing can be made in its place.
//! Everything here blocks; callers give it threads.
//!
//! ```text
//! PATH/identity       what makes the folder a disk ([`eggs_blockd_core::identity`]), mode 0600
//! PATH/blocks/GG/SS/  the blocks
//! PATH/tmp/           blocks that are arriving; emptied on opening
//! PATH                itself is locked (flock) while a process has the disk
//! ```

mod format;
mod incoming;
mod ledger;
mod read;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use eggs_blockd_core::admission::Space;
use eggs_blockd_core::header::Folder;
use eggs_blockd_core::{BlockPath, Identity};
use eggs_proto::{BlockError, BlockId};
use rustix::fs::{self as rfs, AtFlags, Mode, OFlags};
use rustix::io::Errno;

pub use format::{Contents, OpenError, OpenProblem, format, inspect};
pub use incoming::{Begun, Incoming};
pub use ledger::Totals;
pub use read::StoredBlock;

const BLOCKS: &str = "blocks";
const TMP: &str = "tmp";
/// Folders that blocks can lie in.
const FOLDERS: usize = 1 << 16;

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing wrong with the disk.
    #[error("{0}")]
    Refused(BlockError),
    /// What is on the disk is not what was written.
    #[error("{0}")]
    Corrupt(String),
    /// The disk's fault.
    #[error("cannot {what}: {source}")]
    Io { what: &'static str, source: io::Error },
}

impl From<BlockError> for StoreError {
    fn from(error: BlockError) -> StoreError {
        StoreError::Refused(error)
    }
}

impl StoreError {
    /// What the one who asked is told.
    pub fn code(&self) -> BlockError {
        match self {
            StoreError::Refused(error) => *error,
            StoreError::Corrupt(_) => BlockError::Corrupt,
            StoreError::Io { source, .. } => match Errno::from_io_error(source) {
                Some(Errno::NOSPC | Errno::DQUOT) => BlockError::NoSpace,
                _ => BlockError::Io,
            },
        }
    }
}

/// For `map_err`: an IO error with what was tried.
fn io_error<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> StoreError {
    move |source| StoreError::Io { what, source: source.into() }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic aborts the process, so nobody ever sees what a poisoned lock guards.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open, locked disk.
#[derive(Debug)]
pub struct Store {
    identity: Identity,
    /// The identity file as it was read: what it must still be at every check.
    identity_bytes: Vec<u8>,
    path: PathBuf,
    root: OwnedFd,
    blocks: OwnedFd,
    tmp: OwnedFd,
    /// Device and inode of the disk's folder.
    place: (u64, u64),
    ledger: ledger::Ledger,
    /// Blocks being written or erased: one at a time per block.
    claims: Mutex<HashSet<BlockId>>,
    /// Folders whose own names are known to be durable.
    durable: Mutex<Vec<bool>>,
    /// Bytes that blocks in arrival may still take.
    promised: AtomicU64,
    next_tmp: AtomicU64,
}

impl Store {
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device the disk's folder is on: disks that share one share its space.
    pub fn device(&self) -> u64 {
        self.place.0
    }

    /// Whether the disk is still where and what it was.
    ///
    /// # Errors
    /// What has become of it, for people.
    pub fn check(&self) -> Result<(), String> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rfs::open(&self.path, flags, Mode::empty()).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR => "its folder is gone".to_owned(),
            error => format!("its folder cannot be opened: {error}"),
        })?;
        let stat = rfs::fstat(&root).map_err(|error| format!("its folder cannot be read: {error}"))?;
        if (stat.st_dev, stat.st_ino) != self.place {
            return Err("another folder is in its place".to_owned());
        }
        match format::read_identity(&root) {
            Ok(bytes) if bytes == self.identity_bytes => {}
            Ok(_) => return Err("its identity file was changed".to_owned()),
            Err(Errno::NOENT) => return Err("its identity file is gone".to_owned()),
            Err(error) => return Err(format!("its identity file cannot be read: {error}")),
        }
        let same = |name, open: &OwnedFd| {
            let found = rfs::statat(&root, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            let open = rfs::fstat(open).ok()?;
            (found.st_ino == open.st_ino && found.st_dev == open.st_dev).then_some(())
        };
        same(BLOCKS, &self.blocks).ok_or("the folder of its blocks is gone")?;
        same(TMP, &self.tmp).ok_or("its folder for arriving blocks is gone")?;
        Ok(())
    }

    /// Room on the disk's file system; none free when that is mounted read-only.
    ///
    /// # Errors
    /// When the file system does not say.
    pub fn space(&self) -> Result<Space, StoreError> {
        let stat = rfs::fstatvfs(&self.root).map_err(io_error("ask for free space"))?;
        let free = if stat.f_flag.contains(rfs::StatVfsMountFlags::RDONLY) { 0 } else { stat.f_bavail };
        Ok(Space {
            capacity_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            free_bytes: free.saturating_mul(stat.f_frsize),
        })
    }

    /// What the blocks take, as far as the scan has come.
    pub fn totals(&self) -> Totals {
        self.ledger.totals()
    }

    /// Counts the blocks; for the background, once after opening. Ends early when `stop` says so.
    ///
    /// # Errors
    /// When a folder cannot be read; what was counted so far stays.
    pub fn scan(&self, stop: impl Fn() -> bool) -> Result<(), StoreError> {
        self.ledger.scan(&self.blocks, stop)
    }

    /// Removes a block for good. Gone already is as good (BL-5).
    ///
    /// # Errors
    /// `Busy` while the block is being written, or the disk's.
    pub fn erase(self: &Arc<Self>, block: BlockId) -> Result<(), StoreError> {
        let _claim = Claim::take(self, block)?;
        let path = BlockPath::new(block);
        let folder = match self.open_folder(path.folder()) {
            Ok(folder) => folder,
            // Folders are never removed: no block was ever in it.
            Err(Errno::NOENT) => return self.still_there(),
            Err(error) => return Err(io_error("open a folder")(error)),
        };
        let before = match rfs::statat(&folder, path.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat.st_size as u64),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(io_error("look at a block")(error)),
        };
        if before.is_some() {
            self.ledger
                .change(path, before, None, || rfs::unlinkat(&folder, path.name(), AtFlags::empty()))
                .map_err(io_error("remove a block"))?;
        }
        // Even when it was gone: an earlier erasure may have been cut short before this.
        rfs::fsync(&folder).map_err(io_error("make a removal durable"))
    }

    /// `NotFound` on a disk that has vanished is not an answer about a block.
    fn still_there(&self) -> Result<(), StoreError> {
        self.check().map_err(|_| BlockError::DiskLost.into())
    }

    fn open_folder(&self, folder: Folder) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rfs::openat(&self.blocks, folder.path(), flags, Mode::empty())
    }

    /// The folder, made if need be, with its own name durable (BL-1).
    fn durable_folder(&self, folder: Folder) -> Result<OwnedFd, StoreError> {
        let known = |store: &Store| lock(&store.durable).get(usize::from(folder.0)).copied() == Some(true);
        if known(self) {
            match self.open_folder(folder) {
                Err(Errno::NOENT) => {} // Somebody removed it: what was in it is lost, readers will say so.
                result => return result.map_err(io_error("open a folder")),
            }
        }
        let make =
            |parent: &OwnedFd, name: String| match rfs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(error) => Err(io_error("make a folder")(error)),
            };
        make(&self.blocks, folder.upper())?;
        // Also when it was there: whoever made it may not have come to this.
        rfs::fsync(&self.blocks).map_err(io_error("make a folder durable"))?;
        make(&self.blocks, folder.path())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let upper = rfs::openat(&self.blocks, folder.upper(), flags, Mode::empty())
            .map_err(io_error("open a folder"))?;
        rfs::fsync(&upper).map_err(io_error("make a folder durable"))?;
        let opened = self.open_folder(folder).map_err(io_error("open a folder"))?;
        if let Some(mark) = lock(&self.durable).get_mut(usize::from(folder.0)) {
            *mark = true;
        }
        Ok(opened)
    }
}

/// One block is written or erased by one at a time.
#[derive(Debug)]
struct Claim {
    store: Arc<Store>,
    block: BlockId,
}

impl Claim {
    fn take(store: &Arc<Store>, block: BlockId) -> Result<Claim, BlockError> {
        if !lock(&store.claims).insert(block) {
            return Err(BlockError::Busy);
        }
        Ok(Claim { store: Arc::clone(store), block })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.store.claims).remove(&self.block);
    }
}

/// A part of the disk's room, promised to a block that is arriving.
#[derive(Debug)]
struct Promise {
    store: Arc<Store>,
    bytes: u64,
}

impl Promise {
    /// BL-10.
    fn take(store: &Arc<Store>, size: u32) -> Result<Promise, StoreError> {
        let bytes = eggs_blockd_core::header::file_bytes(size);
        let promised = store.promised.fetch_add(bytes, Ordering::Relaxed);
        let promise = Promise { store: Arc::clone(store), bytes };
        store.space()?.admit(size, promised)?;
        Ok(promise)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.store.promised.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
