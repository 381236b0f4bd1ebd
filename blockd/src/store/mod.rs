//! One disk's bytes: the only place that knows how blocks lie in files.
//!
//! Blocks lie in append-only segments ([`eggs_blockd_core::record`]); [`books`] know where, [`segment`] writes
//! them, [`incoming`] and [`read`] are the blocks themselves, [`open`] finds out what there is, [`compact`] gives
//! room back. All paths hang on open folders, not on names: when the disk's folder is removed or something is
//! mounted over it, nothing can be made in its place. Everything here blocks; callers give it threads.
//!
//! ```text
//! PATH/identity               what makes the folder a disk ([`eggs_blockd_core::identity`]), mode 0600
//! PATH/segments/NNNNNNNN.seg  the blocks; numbers are hexadecimal and never used twice
//! PATH/journal                where they lie, to open quickly ([`eggs_blockd_core::journal`])
//! PATH                        itself is locked (flock) while a process has the disk
//! ```

mod books;
mod compact;
mod files;
mod format;
mod incoming;
mod open;
mod read;
mod segment;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use eggs_blockd_core::admission::Space;
use eggs_blockd_core::index::BLOCKS_PER_DISK_MAX;
use eggs_blockd_core::record::{Record, Seal};
use eggs_blockd_core::{Identity, Place};
use eggs_proto::{BlockError, BlockId};
use rustix::fs::{self as rfs, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use books::Books;
use files::Underway;
use segment::{Lane, Segment};

pub use books::JOURNAL;
pub use eggs_blockd_core::Totals;
pub use files::{DiskFile, Doing, Fault, Faults};
pub use format::{Contents, OpenError, OpenProblem, format, inspect};
pub use incoming::{Begun, Incoming, Wanted};
pub use open::{JOURNAL_BYTES_MAX, Options, numbers};
pub use read::StoredBlock;
pub use segment::WHOLE_BYTES_MAX;

const SEGMENTS: &str = "segments";
/// Segments kept open; more are opened when they are needed.
const OPEN_SEGMENTS_MAX: usize = 128;
/// How long a request to erase waits for all who are moving or writing its blocks.
const CLAIM_WAIT_MAX: Duration = Duration::from_millis(500);

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
                Some(Errno::ROFS) => BlockError::ReadOnly,
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

/// What a disk does, counted.
#[derive(Debug, Default)]
pub struct Counters {
    pub syncs: AtomicU64,
    /// Who waited for them: more than syncs when they are shared.
    pub sync_waiters: AtomicU64,
    /// Blocks that came whole, and the writes they came in.
    pub whole_blocks: AtomicU64,
    pub whole_writes: AtomicU64,
    pub compacted_bytes: AtomicU64,
    pub compacted_segments: AtomicU64,
}

impl Counters {
    fn synced(&self, together: u64) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.sync_waiters.fetch_add(together, Ordering::Relaxed);
    }

    fn batched(&self, blocks: usize) {
        self.whole_blocks.fetch_add(blocks as u64, Ordering::Relaxed);
        self.whole_writes.fetch_add(1, Ordering::Relaxed);
    }

    fn compacted(&self, bytes: u64) {
        self.compacted_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn compacted_segment(&self) {
        self.compacted_segments.fetch_add(1, Ordering::Relaxed);
    }
}

/// An open, locked disk.
#[derive(Debug)]
pub struct Store {
    identity: Identity,
    /// The identity file as it was read: what it must still be at every check.
    identity_bytes: Vec<u8>,
    path: PathBuf,
    root: OwnedFd,
    segments: OwnedFd,
    /// Device and inode of the disk's folder.
    place: (u64, u64),
    options: Options,
    underway: Arc<Underway>,
    /// It was mounted read-only when it was opened: nothing is written to it.
    read_only: bool,
    segment_bytes: u32,
    books: Mutex<Books>,
    /// As they were last seen.
    totals: Mutex<Totals>,
    small: Lane,
    large: Lane,
    open: Mutex<OpenSegments>,
    next_segment: AtomicU64,
    /// Blocks being written, moved or erased: one at a time per block.
    claims: Mutex<HashSet<BlockId>>,
    unclaimed: Condvar,
    /// Bytes that blocks in arrival may still take.
    promised: AtomicU64,
    pub counters: Counters,
}

#[derive(Debug, Default)]
struct OpenSegments {
    by_number: BTreeMap<u32, (Arc<Segment>, u64)>,
    /// Counts up with each use.
    used: u64,
}

fn segment_name(number: u32) -> String {
    format!("{number:08x}.seg")
}

/// The file of a segment of the disk at `path`.
pub fn segment_path(path: &Path, number: u32) -> PathBuf {
    path.join(SEGMENTS).join(segment_name(number))
}

/// The number of the segment with this name; `None` for names no segment has.
fn segment_number(name: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(name.strip_suffix(b".seg")?).ok()?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    (segment_name(number).as_bytes() == name).then_some(number)
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

    /// It takes no writes: its file system was mounted read-only when it was opened.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// How long the oldest write or sync that has not ended has been going on.
    pub fn underway(&self) -> Duration {
        self.underway.oldest()
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
        let found = rfs::statat(&root, SEGMENTS, AtFlags::SYMLINK_NOFOLLOW);
        match (found, rfs::fstat(&self.segments)) {
            (Ok(found), Ok(open)) if (found.st_dev, found.st_ino) == (open.st_dev, open.st_ino) => {}
            _ => return Err("the folder of its segments is gone".to_owned()),
        }
        if self.read_only && !self.mounted_read_only() {
            return Err("it was read-only and is not any more: it is opened again".to_owned());
        }
        Ok(())
    }

    /// Whether its file system takes no writes now.
    pub fn mounted_read_only(&self) -> bool {
        rfs::fstatvfs(&self.root).is_ok_and(|stat| stat.f_flag.contains(rfs::StatVfsMountFlags::RDONLY))
    }

    /// Room on the disk's file system; none free when that is mounted read-only.
    ///
    /// # Errors
    /// When the file system does not say.
    pub fn space(&self) -> Result<Space, StoreError> {
        let stat = rfs::fstatvfs(&self.root).map_err(io_error("ask for free space"))?;
        let read_only = self.read_only || stat.f_flag.contains(rfs::StatVfsMountFlags::RDONLY);
        let free = if read_only { 0 } else { stat.f_bavail };
        Ok(Space {
            capacity_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            free_bytes: free.saturating_mul(stat.f_frsize),
        })
    }

    /// What the disk holds, or held a moment ago: never waits for the disk, as those who change it may.
    pub fn totals(&self) -> Totals {
        let mut totals = lock(&self.totals);
        if let Ok(books) = self.books.try_lock() {
            *totals = books.index.totals();
        }
        *totals
    }

    /// Every block of the disk and where it lies, in the order of their places.
    pub fn list(&self) -> Vec<(BlockId, Place)> {
        let mut blocks: Vec<_> = lock(&self.books).index.blocks().collect();
        blocks.sort_unstable_by_key(|(_, place)| (place.segment, place.offset));
        blocks
    }

    /// Removes a block for good. Gone already is as good (BL-5).
    ///
    /// # Errors
    /// `Busy` while the block is being written, or the disk's.
    pub fn erase(self: &Arc<Self>, block: BlockId) -> Result<(), StoreError> {
        self.erase_many(&[block]).pop().unwrap_or(Ok(()))
    }

    /// Removes blocks for good, with one sync: the journal's. What became of each, in order.
    pub fn erase_many(self: &Arc<Self>, blocks: &[BlockId]) -> Vec<Result<(), StoreError>> {
        let mut results: Vec<Result<(), StoreError>> = Vec::with_capacity(blocks.len());
        let mut claims = Vec::new();
        let mut going = Vec::new();
        // One named twice has one answer.
        let mut first = BTreeMap::new();
        let again: Vec<(usize, usize)> = (0..blocks.len())
            .map(|number| (number, *first.entry(blocks[number]).or_insert(number)))
            .filter(|(number, first)| number != first)
            .collect();
        let deadline = Instant::now() + CLAIM_WAIT_MAX;
        for (number, &block) in blocks.iter().enumerate() {
            results.push(Ok(()));
            if first.get(&block) != Some(&number) {
                continue;
            }
            results[number] =
                Claim::wait(self, block, deadline).map_err(StoreError::from).and_then(|claim| {
                    claims.push(claim);
                    let found = self.find_to_erase(block)?;
                    going.extend(found.map(|(place, segment)| (number, block, place, segment)));
                    Ok(())
                });
        }
        self.erase_claimed(going, &mut results);
        drop(claims);
        for (number, first) in again {
            results[number] = results[first].as_ref().copied().map_err(incoming::same);
        }
        results
    }

    fn erase_claimed(
        &self,
        going: Vec<(usize, BlockId, Place, Option<Arc<Segment>>)>,
        results: &mut [Result<(), StoreError>],
    ) {
        if going.is_empty() {
            return;
        }
        // The headers first: whoever looks into the segments alone must see it too, sooner or later (BL-11).
        for (_, block, place, segment) in &going {
            if let Some(segment) = segment {
                self.mark_erased(segment, *block, *place);
            }
        }
        let told: Vec<_> = going.iter().map(|(_, block, place, _)| (*block, *place)).collect();
        let journal = lock(&self.books).erase(&told);
        match journal.and_then(|journal| journal.sync(self)) {
            Ok(()) => {
                for (_, _, place, segment) in &going {
                    if let Some(segment) = segment {
                        self.punch(segment, *place);
                    }
                }
            }
            Err(error) => {
                for (number, ..) in going {
                    results[number] = Err(incoming::same(&error));
                }
            }
        }
    }

    fn find_to_erase(&self, block: BlockId) -> Result<Option<Lying>, StoreError> {
        if self.read_only || self.mounted_read_only() {
            return Err(BlockError::ReadOnly.into());
        }
        let (place, broken) = {
            let books = lock(&self.books);
            (books.index.get(block), books.is_broken())
        };
        match place {
            Some(place) => Ok(Some((place, self.segment_if_there(place.segment)?))),
            None if broken => Err(io_error("write the journal")(Errno::IO)),
            // Not known is gone for good: it came out of the index before its claim was given up.
            None => self.still_there().map(|()| None),
        }
    }

    /// Overwrites the header of a record that is not needed any more. Not durable yet: the journal is. When it
    /// cannot be written, only a disk that loses its journal would find the block again.
    fn mark_erased(&self, segment: &Segment, block: BlockId, place: Place) {
        let record = Record::block(block, place.size, place.crc).erased();
        let offset = u64::from(place.offset);
        let header = record.encode(self.seal_key(), place.segment, offset);
        lock(&self.books).marked.insert(place.segment);
        if let Err(error) = segment.file.write_all(&header, offset) {
            tracing::warn!(path = %self.path.display(), %block, %error, "a header was not overwritten");
        }
    }

    /// Gives the room of an erased record back.
    fn punch(&self, segment: &Segment, place: Place) {
        if let Some((start, end)) = place.extent().hole()
            && segment.file.punch(u64::from(start), u64::from(end - start))
        {
            self.grow(place.segment, -i64::from(end - start));
        }
    }

    /// A copy of a block is not needed any more: another one, durable, has taken its place.
    fn give_up(&self, block: BlockId, place: Place) {
        if let Ok(Some(segment)) = self.segment_if_there(place.segment) {
            self.mark_erased(&segment, block, place);
            // Its room comes back with the segment: somebody may be reading it.
        }
    }

    fn grow(&self, segment: u32, bytes: i64) {
        lock(&self.books).index.grow(segment, bytes);
    }

    /// `NotFound` on a disk that has vanished is not an answer about a block.
    fn still_there(&self) -> Result<(), StoreError> {
        self.check().map_err(|_| BlockError::DiskLost.into())
    }

    /// Makes the names in the disk's folder durable.
    fn sync_names(&self) -> io::Result<()> {
        if let Some(faults) = &self.options.faults {
            faults.meet(Doing::Sync, "the folder")?;
        }
        Ok(rfs::fsync(&self.root)?)
    }

    fn seal_key(&self) -> Seal<'_> {
        Seal::from(&self.identity)
    }

    fn segment_bytes(&self) -> u32 {
        self.segment_bytes
    }

    fn file(&self, fd: OwnedFd, name: &str) -> DiskFile {
        DiskFile::new(fd, name.to_owned(), Arc::clone(&self.underway), self.options.faults.clone())
    }

    /// An open segment; `None` when there is no such file.
    fn segment_if_there(&self, number: u32) -> Result<Option<Arc<Segment>>, StoreError> {
        let mut open = lock(&self.open);
        open.used += 1;
        let now = open.used;
        if let Some((segment, used)) = open.by_number.get_mut(&number) {
            *used = now;
            return Ok(Some(Arc::clone(segment)));
        }
        let write = if self.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let flags = write | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = segment_name(number);
        let fd = match rfs::openat(&self.segments, &name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(io_error("open a segment")(error)),
        };
        let segment = Arc::new(Segment::new(number, self.file(fd, &name)));
        open.keep(Arc::clone(&segment));
        Ok(Some(segment))
    }

    /// A fresh segment, its name durable (BL-1).
    fn new_segment(&self) -> Result<Arc<Segment>, StoreError> {
        let number = u32::try_from(self.next_segment.fetch_add(1, Ordering::Relaxed))
            .map_err(|_| StoreError::from(BlockError::NoSpace))?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let name = segment_name(number);
        let fd = rfs::openat(&self.segments, &name, flags, Mode::from_raw_mode(0o600))
            .map_err(io_error("make a segment"))?;
        rfs::fsync(&self.segments).map_err(io_error("make a segment's name durable"))?;
        let segment = Arc::new(Segment::new(number, self.file(fd, &name)));
        lock(&self.open).keep(Arc::clone(&segment));
        lock(&self.books).index.grow(number, 0);
        Ok(segment)
    }

    fn close_segment(&self, number: u32) {
        lock(&self.open).by_number.remove(&number);
    }

    /// All records of a segment are whole or erased: says so in the segment, durably, then in the journal.
    fn seal(&self, segment: &Segment, end: u32) -> Result<(), StoreError> {
        let bytes = Record::seal().encode(self.seal_key(), segment.number, u64::from(end));
        segment.file.write_all(&bytes, u64::from(end)).map_err(io_error("seal a segment"))?;
        segment.sync(self)?;
        lock(&self.books).sealed(segment.number);
        Ok(())
    }
}

impl OpenSegments {
    fn keep(&mut self, segment: Arc<Segment>) {
        if self.by_number.len() >= OPEN_SEGMENTS_MAX {
            // Only one that nobody works on: writers of a segment must share its syncs.
            let idle = self.by_number.iter().filter(|(_, (segment, _))| Arc::strong_count(segment) == 1);
            if let Some(number) = idle.min_by_key(|(_, (_, used))| *used).map(|(&number, _)| number) {
                self.by_number.remove(&number);
            }
        }
        self.used += 1;
        self.by_number.insert(segment.number, (segment, self.used));
    }
}

/// Where a block lies, and its segment if that is still there.
type Lying = (Place, Option<Arc<Segment>>);

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

    /// Waits a moment for the one who has it: a block that is being moved.
    fn wait(store: &Arc<Store>, block: BlockId, deadline: Instant) -> Result<Claim, BlockError> {
        let mut claims = lock(&store.claims);
        while !claims.insert(block) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BlockError::Busy);
            }
            claims = store.unclaimed.wait_timeout(claims, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Claim { store: Arc::clone(store), block })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.store.claims).remove(&self.block);
        self.store.unclaimed.notify_all();
    }
}

/// A part of the disk's room, promised to a block that is arriving.
#[derive(Debug)]
struct Promise {
    store: Arc<Store>,
    bytes: u64,
}

impl Promise {
    /// BL-10: for some blocks that take so many bytes together.
    fn take(store: &Arc<Store>, bytes: u64, blocks: usize) -> Result<Promise, StoreError> {
        if lock(&store.books).index.len() + blocks > BLOCKS_PER_DISK_MAX {
            return Err(BlockError::NoSpace.into());
        }
        let promised = store.promised.fetch_add(bytes, Ordering::Relaxed);
        let promise = Promise { store: Arc::clone(store), bytes };
        store.space()?.admit_bytes(bytes, promised)?;
        Ok(promise)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.store.promised.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
