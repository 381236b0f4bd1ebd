//! Opening a disk: what it holds is found out from its journal and its segments
//! ([`eggs_blockd_core::recovery`]), and what is torn is put right.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use eggs_blockd_core::index::BLOCKS_PER_DISK_MAX;
use eggs_blockd_core::journal::{self, ENTRY_BYTES, End, Entry};
use eggs_blockd_core::record::{Kind, Record, SEGMENT_BYTES_MAX};
use eggs_blockd_core::recovery::{self, Recovery, ToErase, Walk, walk};
use eggs_blockd_core::{Index, Place};
use eggs_proto::{BlockError, BlockId, ClusterId};
use rustix::fs::{self as rfs, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::books::{Books, JOURNAL, JournalFile};
use super::files::{DiskFile, Faults};
use super::format::{DIRECTORY, OpenError, OpenProblem, identity, lock as lock_folder};
use super::segment::{Lane, Segment};
use super::{Counters, OpenSegments, SEGMENTS, Store, StoreError, lock, segment_name, segment_number};

/// A segment is a 64th of a small disk, so that room comes back in time …
const SEGMENT_SHARE: u64 = 64;
/// … but not shorter than this.
const SEGMENT_BYTES_MIN: u64 = 4 << 20;
/// Bytes read at once while headers are looked for.
const LOOK_BYTES: usize = 16 << 10;
/// Reads that may fail while a disk is looked through: one with more bad places is not to be trusted to
/// tell what it holds.
const UNREADABLE_MAX: u32 = 64;

/// Named in one line of the log.
const SEGMENTS_NAMED: usize = 8;

/// More than the longest journal: three entries for each block a disk may have.
pub const JOURNAL_BYTES_MAX: u64 = 4 * (BLOCKS_PER_DISK_MAX * ENTRY_BYTES) as u64;

/// What only tests choose.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub faults: Option<Arc<Faults>>,
    /// Length at which a segment is full.
    pub segment_bytes: Option<u32>,
    /// A write or sync that takes longer hangs.
    pub underway_max: Option<Duration>,
}

impl Store {
    /// Opens and locks a formatted disk of this cluster (BL-2, BL-7).
    ///
    /// # Errors
    /// What is wrong; nothing was changed then.
    pub fn open(path: &Path, cluster: ClusterId, options: Options) -> Result<Arc<Store>, OpenError> {
        open(path, cluster, options).map_err(|problem| OpenError { path: path.to_owned(), problem })
    }
}

fn open(path: &Path, cluster: ClusterId, options: Options) -> Result<Arc<Store>, OpenProblem> {
    let root = rfs::open(path, DIRECTORY, Mode::empty()).map_err(|error| match error {
        Errno::NOENT => OpenProblem::Missing,
        error => OpenProblem::io("open the folder")(error),
    })?;
    let (identity, identity_bytes) = identity(&root)?;
    if identity.cluster != cluster {
        return Err(OpenProblem::AnotherCluster { theirs: identity.cluster, ours: cluster });
    }
    lock_folder(&root)?;
    let segments = match rfs::openat(&root, SEGMENTS, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(folder) => folder,
        Err(Errno::NOENT | Errno::NOTDIR) => return Err(OpenProblem::Incomplete(SEGMENTS)),
        Err(error) => return Err(OpenProblem::io("open its folders")(error)),
    };
    let stat = rfs::fstat(&root).map_err(OpenProblem::io("look at the folder"))?;
    let space = rfs::fstatvfs(&root).map_err(OpenProblem::io("ask for free space"))?;
    let read_only = space.f_flag.contains(rfs::StatVfsMountFlags::RDONLY);
    let share = space.f_blocks.saturating_mul(space.f_frsize) / SEGMENT_SHARE;
    let share = share.clamp(SEGMENT_BYTES_MIN, u64::from(SEGMENT_BYTES_MAX)) as u32;
    let there = numbers(&segments).map_err(OpenProblem::io("list its segments"))?;

    let mut store = Store {
        segment_bytes: options.segment_bytes.unwrap_or(share),
        identity,
        identity_bytes,
        path: path.to_owned(),
        place: (stat.st_dev, stat.st_ino),
        root,
        segments,
        options,
        read_only,
        books: Mutex::new(Books::new(Index::default(), None, 1)),
        underway: Arc::default(),
        totals: Mutex::default(),
        small: Lane::default(),
        large: Lane::default(),
        open: Mutex::new(OpenSegments::default()),
        next_segment: AtomicU64::new(0),
        claims: Mutex::default(),
        unclaimed: Condvar::new(),
        promised: AtomicU64::new(0),
        counters: Counters::default(),
    };
    let known = store.read_journal()?;
    let mut looking = Looking { store: &store, unfinished: Vec::new(), unreadable: 0 };
    let (mut recovery, journal) = match known {
        Some((recovery, journal, next)) => (recovery, Some((journal, next))),
        None => (Recovery::default(), None),
    };
    let gone = recovery.found(&there);
    if gone > 0 {
        tracing::error!(path = %path.display(), blocks = gone, "segments are gone, and their blocks with them");
    }
    let to_erase = looking.look_through(&mut recovery, &there)?;
    let unfinished = looking.unfinished;
    let rewrite = recovery.changed || !to_erase.is_empty() || journal.is_none();
    store.next_segment = AtomicU64::new(u64::from(recovery.next_segment()));
    // One that will be written anew is told nothing more: it does not know what the segments told just now, so
    // it must not call them sealed.
    let journal = journal.filter(|_| !rewrite);
    let (journal, next) = journal.map_or((None, 1), |(journal, next)| (Some(journal), next));
    store.books = Mutex::new(Books::new(recovery.index, journal, next));
    let store = Arc::new(store);
    store.measure(&there)?;
    if !store.read_only {
        store.put_right(&to_erase, unfinished, rewrite).map_err(open_problem)?;
    }
    Ok(store)
}

fn open_problem(error: StoreError) -> OpenProblem {
    match error {
        StoreError::Io { what, source } => OpenProblem::Io { what, source },
        error => OpenProblem::Io { what: "open the disk", source: io::Error::other(error.to_string()) },
    }
}

/// The numbers of the segments in a folder.
///
/// # Errors
/// The disk's.
pub fn numbers(segments: &OwnedFd) -> Result<BTreeSet<u32>, Errno> {
    let mut numbers = BTreeSet::new();
    for entry in Dir::read_from(segments)? {
        numbers.extend(segment_number(entry?.file_name().to_bytes()));
    }
    Ok(numbers)
}

/// A segment that is not sealed.
struct Unfinished {
    segment: Arc<Segment>,
    /// Where its records end; `None` when it cannot be read everywhere: it is left as it is.
    end: Option<u32>,
}

/// The look through the segments that the journal does not vouch for.
struct Looking<'a> {
    store: &'a Store,
    unfinished: Vec<Unfinished>,
    unreadable: u32,
}

impl Looking<'_> {
    fn look_through(
        &mut self,
        recovery: &mut Recovery,
        there: &BTreeSet<u32>,
    ) -> Result<Vec<ToErase>, OpenProblem> {
        let mut to_erase = Vec::new();
        for &number in there {
            if recovery.is_sealed(number) {
                continue;
            }
            let segment = self.store.segment_if_there(number).map_err(open_problem)?;
            let Some(segment) = segment else { continue };
            let before = self.unreadable;
            let walk = self.walk(&segment);
            let walk = walk.map_err(|source| OpenProblem::Io { what: "look at a segment", source })?;
            if self.unreadable > UNREADABLE_MAX {
                return Err(OpenProblem::Io { what: "read its segments", source: Errno::IO.into() });
            }
            let readable = self.unreadable == before;
            if !readable && walk.records.is_empty() {
                return Err(OpenProblem::Io { what: "read its segments", source: Errno::IO.into() });
            }
            if walk.gaps > 0 {
                let path = self.store.path.display();
                tracing::warn!(%path, segment = segment_name(number), gaps = walk.gaps, "bytes between records are none");
            }
            let mut unreadable = 0;
            to_erase.extend(recovery.adopt(number, &walk, |block, place| {
                if before + unreadable > UNREADABLE_MAX {
                    return None;
                }
                let whole = is_whole(self.store, block, place);
                unreadable += u32::from(whole.is_err());
                whole.ok()
            }));
            self.unreadable += unreadable;
            if self.unreadable > UNREADABLE_MAX {
                return Err(OpenProblem::Io { what: "read its segments", source: Errno::IO.into() });
            }
            if !walk.sealed {
                let end = (readable && unreadable == 0).then(|| recovery.end(number, &walk));
                self.unfinished.push(Unfinished { segment, end });
            }
        }
        Ok(to_erase)
    }

    fn walk(&mut self, segment: &Segment) -> io::Result<Walk> {
        let (length, _) = segment.file.lengths()?;
        let length = u32::try_from(length).unwrap_or(u32::MAX).min(SEGMENT_BYTES_MAX);
        // Headers of small blocks lie close together.
        let mut seen: (u32, Vec<u8>) = (0, Vec::new());
        Ok(walk(self.store.seal_key(), segment.number, length, |at, into| {
            // Each may take a failing disk seconds.
            if self.unreadable > UNREADABLE_MAX {
                return false;
            }
            let inside = at.checked_sub(seen.0).map(|from| from as usize);
            if let Some(bytes) = inside.and_then(|from| seen.1.get(from..from + into.len())) {
                into.copy_from_slice(bytes);
                return true;
            }
            let ahead = LOOK_BYTES.min((length - at) as usize).max(into.len());
            match segment.file.read(u64::from(at), ahead) {
                Ok(bytes) => seen = (at, bytes),
                // A bad place may be behind what is asked for.
                Err(_) => match segment.file.read(u64::from(at), into.len()) {
                    Ok(bytes) => seen = (at, bytes),
                    Err(_) => {
                        self.unreadable += 1;
                        return false;
                    }
                },
            }
            into.copy_from_slice(&seen.1[..into.len()]);
            true
        }))
    }
}

fn is_whole(store: &Store, block: BlockId, place: Place) -> Result<bool, StoreError> {
    let Some(segment) = store.segment_if_there(place.segment)? else { return Ok(false) };
    let read = |at, into: &mut [u8]| segment.file.read_exact(into, u64::from(at));
    match recovery::is_whole(store.seal_key(), block, place, read) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map_err(super::io_error("read a block")),
    }
}

impl Store {
    /// The records of a segment whose headers say that they are erased.
    ///
    /// # Errors
    /// The disk's, when it cannot be read everywhere.
    pub(super) fn erased_in(&self, segment: &Segment) -> Result<Vec<Entry>, StoreError> {
        let mut looking = Looking { store: self, unfinished: Vec::new(), unreadable: 0 };
        let walk = looking.walk(segment).map_err(super::io_error("look at a segment"))?;
        if looking.unreadable > 0 {
            return Err(super::io_error("read a segment")(Errno::IO));
        }
        let erased = walk.records.into_iter().filter(|(_, record)| record.kind == Kind::Erased);
        let entry = |(offset, Record { block, size, crc, .. }): (u32, Record)| Entry::Erased {
            block,
            place: Place { segment: segment.number, offset, size, crc },
        };
        Ok(erased.map(entry).collect())
    }

    /// What the journal tells, the journal, and the number of its next entry; `None` without a good one.
    fn read_journal(&self) -> Result<Option<(Recovery, Arc<JournalFile>, u64)>, OpenProblem> {
        let write = if self.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let flags = write | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: DiskFile = match rfs::openat(&self.root, JOURNAL, flags, Mode::empty()) {
            Ok(fd) => self.file(fd, JOURNAL),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(OpenProblem::io("open its journal")(error)),
        };
        let read = file.lengths().and_then(|(length, _)| match length {
            0..=JOURNAL_BYTES_MAX => file.read(0, length as usize),
            _ => Err(io::Error::other("it is too long to be one")),
        });
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the journal cannot be read: all segments are looked through");
                return Ok(None);
            }
        };
        let mut recovery = Recovery::default();
        match journal::read(&bytes, self.identity.service, |entry| recovery.apply(entry)) {
            Some(End::At(end)) => Ok(Some((recovery, JournalFile::new(file), end / ENTRY_BYTES as u64))),
            Some(End::Damaged) | None => {
                tracing::warn!(path = %self.path.display(), "the journal is damaged: all segments are looked through");
                Ok(None)
            }
        }
    }

    /// Asks the file system what the segments take, and says which are shorter than what is known to lie in them: such
    /// blocks are corrupt for whoever looks at them.
    fn measure(&self, there: &BTreeSet<u32>) -> Result<(), OpenProblem> {
        let mut lengths = BTreeMap::new();
        for &number in there {
            let stat = match rfs::statat(&self.segments, segment_name(number), rfs::AtFlags::SYMLINK_NOFOLLOW)
            {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(OpenProblem::io("look at a segment")(error)),
            };
            lock(&self.books).index.measured(number, stat.st_blocks as u64 * 512);
            lengths.insert(number, stat.st_size as u64);
        }
        let mut cut = BTreeMap::<u32, u64>::new();
        for (_, place) in lock(&self.books).index.blocks() {
            if lengths.get(&place.segment).is_some_and(|&length| length < u64::from(place.extent().end)) {
                *cut.entry(place.segment).or_default() += 1;
            }
        }
        if !cut.is_empty() {
            let mut segments: Vec<_> =
                cut.keys().take(SEGMENTS_NAMED).map(|&number| segment_name(number)).collect();
            if cut.len() > SEGMENTS_NAMED {
                segments.push("…".to_owned());
            }
            tracing::warn!(path = %self.path.display(), segments = segments.join(", "), blocks = cut.values().sum::<u64>(),
                "segments are shorter than what was written to them, and blocks are cut off");
        }
        Ok(())
    }

    /// Erases what is torn, goes on with segments that are not full, and makes all that durable.
    fn put_right(
        self: &Arc<Self>,
        to_erase: &[ToErase],
        unfinished: Vec<Unfinished>,
        rewrite: bool,
    ) -> Result<(), StoreError> {
        // What they tell was adopted: it must not be lost now, least of all when another copy is given up for it.
        for Unfinished { segment, .. } in &unfinished {
            segment.sync(self)?;
        }
        for &ToErase { block, place } in to_erase {
            if let Some(segment) = self.segment_if_there(place.segment)? {
                self.mark_erased(&segment, block, place);
                self.punch(&segment, place);
            }
        }
        let mut lanes = [&self.small, &self.large].into_iter();
        for Unfinished { segment, end } in unfinished {
            let Some(end) = end else { continue };
            segment.file.truncate(u64::from(end)).map_err(super::io_error("cut off a torn end"))?;
            segment.sync(self)?;
            if end == 0 {
                rfs::unlinkat(&self.segments, segment_name(segment.number), rfs::AtFlags::empty())
                    .map_err(super::io_error("remove an empty segment"))?;
                lock(&self.books).removed(segment.number);
                self.close_segment(segment.number);
            } else if end < self.segment_bytes / 2
                && let Some(lane) = lanes.next()
            {
                lane.resume(&segment, end);
            } else {
                self.unless_full(self.seal(&segment, end))?;
            }
        }
        if rewrite || lock(&self.books).wants_rewriting() {
            self.unless_full(self.rewrite_journal())?;
        }
        // Read, it may not be durable yet; erased blocks are told to be gone because of it (BL-5).
        let journal = lock(&self.books).journal();
        journal.map_or(Ok(()), |journal| journal.sync(self))
    }

    /// A full disk is not a lost one: what has no room now is done later, the journal by [`Store::maintain`], a seal
    /// at the next opening.
    fn unless_full(&self, result: Result<(), StoreError>) -> Result<(), StoreError> {
        match result {
            Err(error) if error.code() == BlockError::NoSpace => {
                tracing::warn!(path = %self.path.display(), %error, "the disk is full");
                Ok(())
            }
            result => result,
        }
    }
}
