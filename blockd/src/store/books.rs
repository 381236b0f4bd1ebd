//! What is known of a disk's blocks: the index in memory, and the journal that will make it again.
//!
//! Both change together under one lock, so that the journal's order is that of the changes. The journal is
//! rewritten when most of what it says is not true any more; that holds the lock only for a copy of the index.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use eggs_blockd_core::journal::{ENTRY_BYTES, Entry, head};
use eggs_blockd_core::{Index, Place};
use eggs_proto::BlockId;
use rustix::fs::{self as rfs, Mode, OFlags};

use super::files::DiskFile;
use super::segment::GroupSync;
use super::{Store, StoreError, io_error, lock};

/// The journal's name in the disk's folder …
pub const JOURNAL: &str = "journal";
/// … and while a new one is written.
pub const JOURNAL_NEW: &str = "journal.new";
/// Rewritten when it has this many entries more than twice what is needed.
const SPARE_ENTRIES: u64 = 64 << 10;
/// Room is taken for so many bytes at a time, so that blocks can still be erased from a full disk.
const ROOM_BYTES: u64 = 1 << 20;

/// Entries written to a new journal while nobody can tell anything: a few pages …
const LAST_ENTRIES_MAX: usize = 1024;
/// … unless more come as fast as they are written.
const ROUNDS_MAX: u32 = 8;

#[derive(Debug)]
pub struct Books {
    pub index: Index,
    journal: Option<Arc<JournalFile>>,
    /// Number of the next entry.
    next: u64,
    /// The journal has room up to here.
    room: u64,
    /// Told since the rewriting that is under way has begun.
    since: Option<Vec<Entry>>,
    /// Segments with headers that say "erased" and may not be durable yet.
    pub marked: BTreeSet<u32>,
}

#[derive(Debug)]
pub struct JournalFile {
    file: DiskFile,
    group: GroupSync,
}

impl JournalFile {
    pub fn new(file: DiskFile) -> Arc<JournalFile> {
        Arc::new(JournalFile { file, group: GroupSync::default() })
    }

    /// Makes what it was told durable.
    ///
    /// # Errors
    /// The disk's.
    pub fn sync(&self, store: &Store) -> Result<(), StoreError> {
        self.group.sync(&self.file, &store.counters).map_err(io_error("make the journal durable"))
    }
}

impl Books {
    /// `next`: the number after the journal's last good entry.
    pub fn new(index: Index, journal: Option<Arc<JournalFile>>, next: u64) -> Books {
        Books { index, journal, next, room: 0, since: None, marked: BTreeSet::new() }
    }

    /// Blocks are in their places, durably. Where they lay before, if anywhere.
    pub fn put(&mut self, blocks: &[(BlockId, Place)]) -> Vec<Option<Place>> {
        let entries: Vec<Entry> = blocks.iter().map(|&(block, place)| Entry::Put { block, place }).collect();
        // Without its entries, the journal must not call the segment sealed: it is then not used any more.
        let _ = self.tell(&entries);
        blocks.iter().map(|&(block, place)| self.index.put(block, place)).collect()
    }

    /// Tells of erased blocks; they are erased once the journal that is returned is durable.
    ///
    /// # Errors
    /// The journal's; they are still there then.
    pub fn erase(&mut self, blocks: &[(BlockId, Place)]) -> Result<Arc<JournalFile>, StoreError> {
        let entries: Vec<Entry> =
            blocks.iter().map(|&(block, place)| Entry::Erased { block, place }).collect();
        let journal = self.tell(&entries).map_err(io_error("write the journal"))?;
        for (block, _) in blocks {
            self.index.remove(*block);
        }
        Ok(journal)
    }

    pub fn sealed(&mut self, segment: u32) {
        self.index.seal(segment);
        let _ = self.tell(&[Entry::Sealed { segment }]);
    }

    pub fn removed(&mut self, segment: u32) {
        self.index.drop_segment(segment);
        self.marked.remove(&segment);
        let _ = self.tell(&[Entry::Removed { segment }]);
    }

    /// Whether it is worth rewriting, or cannot be written as it is.
    pub fn wants_rewriting(&self) -> bool {
        let needed = self.index.len() as u64 + self.index.totals().segments;
        self.usable().is_none() || self.next > 2 * needed + SPARE_ENTRIES
    }

    /// The journal, while it is good.
    pub fn journal(&self) -> Option<Arc<JournalFile>> {
        self.usable().cloned()
    }

    /// It cannot be told anything until it is rewritten.
    pub fn is_broken(&self) -> bool {
        self.usable().is_none()
    }

    fn usable(&self) -> Option<&Arc<JournalFile>> {
        self.journal.as_ref().filter(|journal| !journal.group.has_failed())
    }

    fn tell(&mut self, entries: &[Entry]) -> io::Result<Arc<JournalFile>> {
        if let Some(since) = &mut self.since {
            since.extend_from_slice(entries);
        }
        let Some(journal) = self.usable().cloned() else {
            return Err(io::Error::other("the journal is out of use"));
        };
        let bytes = encoded(entries, self.next);
        let at = self.next * ENTRY_BYTES as u64;
        if at + bytes.len() as u64 + ROOM_BYTES / 4 > self.room {
            self.room = at + bytes.len() as u64 + ROOM_BYTES;
            // For later: there may be room for this yet.
            let _ = journal.file.allocate(at, self.room - at, true);
        }
        if let Err(error) = journal.file.write_all(&bytes, at) {
            tracing::warn!(file = journal.file.name(), %error, "the journal cannot be written");
            self.journal = None;
            return Err(error);
        }
        self.next += entries.len() as u64;
        Ok(journal)
    }
}

fn encoded(entries: &[Entry], first: u64) -> Vec<u8> {
    (first..).zip(entries).flat_map(|(number, entry)| entry.encode(number)).collect()
}

impl Store {
    /// Writes the journal anew, with nothing but what is true.
    ///
    /// # Errors
    /// The disk's; the old one stays.
    pub fn rewrite_journal(&self) -> Result<(), StoreError> {
        let (entries, marked) = {
            let mut books = lock(&self.books);
            if books.since.is_some() {
                return Ok(());
            }
            books.since = Some(Vec::new());
            let puts = books.index.blocks().map(|(block, place)| Entry::Put { block, place });
            let sealed = books.index.segments().filter(|(_, used)| used.sealed);
            let sealed = sealed.map(|(segment, _)| Entry::Sealed { segment });
            let entries: Vec<Entry> = puts.chain(sealed).collect();
            (entries, std::mem::take(&mut books.marked))
        };
        let result = self.write_journal(entries, &marked);
        if result.is_err() {
            let mut books = lock(&self.books);
            books.since = None;
            books.marked.extend(marked);
        }
        result
    }

    fn write_journal(&self, entries: Vec<Entry>, marked: &BTreeSet<u32>) -> Result<(), StoreError> {
        // The new one does not tell of blocks that are erased: their headers must. Where they cannot be made durable
        // any more, it tells.
        let (mut failed, mut told) = (BTreeSet::new(), Vec::new());
        for &number in marked {
            let Some(segment) = self.segment_if_there(number)? else { continue };
            let result = segment.sync(self);
            if segment.group.has_failed() {
                told.extend(self.erased_in(&segment)?);
                failed.insert(number);
            } else {
                result?;
            }
        }
        // First: a block whose erasure is under way is still there.
        told.extend(entries);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let fd = rfs::openat(&self.root, JOURNAL_NEW, flags, Mode::from_raw_mode(0o600))
            .map_err(io_error("make a journal"))?;
        let journal = JournalFile::new(self.file(fd, JOURNAL_NEW));
        let mut bytes = head(self.identity.service).to_vec();
        bytes.extend(encoded(&told, 1));
        let mut next = 1 + told.len() as u64;
        drop(told);
        journal.file.write_all(&bytes, 0).map_err(io_error("write a journal"))?;
        drop(bytes);
        journal.sync(self)?;
        // What was told meanwhile, until it is little: that is written under the lock, since what is told from then
        // on is told to the new one.
        let mut append = |since: Vec<Entry>| {
            let bytes = encoded(&since, next);
            journal.file.write_all(&bytes, next * ENTRY_BYTES as u64).map_err(io_error("write a journal"))?;
            next += since.len() as u64;
            journal.sync(self)
        };
        let take = |books: &mut Books| books.since.as_mut().map(std::mem::take).unwrap_or_default();
        for _ in 0..ROUNDS_MAX {
            let since = take(&mut lock(&self.books));
            let little = since.len() <= LAST_ENTRIES_MAX;
            append(since)?;
            if little {
                break;
            }
        }
        let mut books = lock(&self.books);
        append(take(&mut books))?;
        rfs::renameat(&self.root, JOURNAL_NEW, &self.root, JOURNAL).map_err(io_error("name a journal"))?;
        // The old one has no name now, and the new one perhaps none after a power cut: until that is certain none
        // is in use, nothing can be erased, and it is written again.
        books.journal = None;
        self.sync_names().map_err(io_error("make a journal's name durable"))?;
        (books.journal, books.next, books.room, books.since) = (Some(journal), next, 0, None);
        books.marked.extend(failed);
        Ok(())
    }
}
