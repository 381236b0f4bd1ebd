//! The state of all groups in one sled tree, with what changed in the last seconds still in memory.
//!
//! Each group is written as a batch of sled's with its applied row: what a crash leaves is an earlier state of it.
//! sled's `flush` is not an fsync, so what it holds is verified row by row or rebuilt unless the marker
//! of an orderly stop is there: only that stop fsyncs sled's files, and the marker holds their CRCs.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_consensus_core::{AppliedRow, GroupCommit, GroupId, StateStore, StorageError};
use eggs_machine::on_sled::SledTable;
use eggs_machine::table::after;
use eggs_machine::{Batch, Table};

use crate::recent_rows::RecentRows;

/// Prefix under which the applied rows are, keyed by group.
const APPLIED: u16 = u16::MAX;
/// Pages sled keeps in memory.
const CACHE_BYTES: u64 = 64 << 20;
/// Rows deleted in one batch when a group is cleared.
const CLEAR_ROWS: usize = 4096;
/// Bytes of changes in memory; the oldest are written when there are more. After a crash what they come from is
/// applied again: some ten thousand commands.
const BYTES_MAX: usize = 16 << 20;
/// Of one group: writing more would take the consensus thread too long.
const GROUP_BYTES_MAX: usize = 256 << 10;
/// Changes stay in memory no longer than this.
const WRITE_AFTER: Duration = Duration::from_secs(5);
/// sled writes what it holds by itself this often; nothing relies on it.
const FLUSH_EVERY_MS: u64 = 5000;
/// sled lets go of its file within this time.
const LET_GO_MAX: Duration = Duration::from_secs(10);

pub(crate) struct SledState {
    db: sled::Db,
    directory: PathBuf,
    tables: BTreeMap<GroupId, RecentRows>,
    /// For groups that were never added.
    nothing: RecentRows,
    applied: SledTable,
    /// Groups with changes in memory, by the time of their first; those written since are still in it.
    changed: VecDeque<(Instant, GroupId)>,
    /// Of all changes in memory.
    bytes: usize,
    clean: bool,
}

impl SledState {
    /// Opens `DIR/state`.
    pub(crate) fn open(directory: &Path) -> Result<Self, StorageError> {
        let state = directory.join("state");
        let clean = take_marker(directory)?;
        wait_for_the_last(&state.join("db"));
        let config =
            sled::Config::new().path(&state).cache_capacity(CACHE_BYTES).flush_every_ms(Some(FLUSH_EVERY_MS));
        let db =
            config.open().map_err(|error| StorageError::of_state(format!("{}: {error}", state.display())))?;
        sync_directory(directory)?;
        let applied = SledTable::new((*db).clone(), APPLIED);
        let nothing = RecentRows::new(applied.clone(), None);
        let (directory, tables, changed) = (directory.to_owned(), BTreeMap::new(), VecDeque::new());
        Ok(SledState { db, directory, tables, nothing, applied, changed, bytes: 0, clean })
    }

    /// When [`SledState::write_due`] has something to do.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.changed.front().map(|&(since, _)| since + WRITE_AFTER)
    }

    /// Writes the group whose changes have been in memory the longest, if that is long enough.
    pub(crate) fn write_due(&mut self, now: Instant) -> Result<(), StorageError> {
        self.forget_written();
        if self.due().is_some_and(|due| due <= now) {
            self.write_oldest()?;
        }
        Ok(())
    }

    fn write_oldest(&mut self) -> Result<(), StorageError> {
        self.forget_written();
        let oldest = self.changed.pop_front();
        oldest.map_or(Ok(()), |(_, group)| self.write(group))
    }

    /// Those at the front that were written for their size.
    fn forget_written(&mut self) {
        while let Some(&(since, group)) = self.changed.front()
            && self.table(group).since() != Some(since)
        {
            self.changed.pop_front();
        }
    }

    fn write_all(&mut self) -> Result<(), StorageError> {
        while let Some((_, group)) = self.changed.pop_front() {
            self.write(group)?;
        }
        Ok(())
    }

    /// A group's changes become sled's.
    fn write(&mut self, group: GroupId) -> Result<(), StorageError> {
        let Some(table) = self.tables.get_mut(&group) else { return Ok(()) };
        self.bytes -= table.bytes();
        let Some((batch, applied)) = table.take() else { return Ok(()) };
        let row = (applied_key(group), Some(Bytes::from(applied.to_bytes())));
        let mut staged = sled::Batch::default();
        table.below().stage(batch, &mut staged);
        self.applied.stage(Batch { changes: vec![row] }, &mut staged);
        self.db.apply_batch(staged).map_err(|error| StorageError::of_state(format!("state: {error}")))
    }

    /// Reads every row, unless the files are as they were left: a page that cannot be read is found
    /// here and not in the middle of the work.
    pub(crate) fn read_all(&self) -> Result<(), StorageError> {
        if self.clean {
            return Ok(());
        }
        self.db
            .iter()
            .try_for_each(|row| row.map(drop))
            .map_err(|error| StorageError::of_state(format!("state: {error}")))
    }

    /// Moves a state that cannot be opened or read out of the way: the next opening finds none. It is
    /// kept: should the log be in trouble too, it may hold what the log lost.
    pub(crate) fn put_aside(directory: &Path) -> Result<(), StorageError> {
        let state = directory.join("state");
        if !state.exists() {
            return Ok(());
        }
        let names =
            std::iter::once("state.damaged".to_owned()).chain((2..).map(|n| format!("state.damaged.{n}")));
        let mut asides = names.map(|name| directory.join(name));
        let Some(aside) = asides.find(|aside| !aside.exists()) else { return Ok(()) };
        fs::rename(&state, &aside).map_err(|error| io_failed(&state, &error))?;
        sync_directory(directory)
    }

    /// Makes the state durable and leaves the marker that says so.
    pub(crate) fn close(mut self) -> Result<(), StorageError> {
        self.write_all()?;
        let SledState { db, directory, tables, nothing, applied, .. } = self;
        db.flush().map_err(|error| StorageError::new(format!("state: {error}")))?;
        drop((tables, nothing, applied));
        drop(db);
        let state = directory.join("state");
        sync_tree(&state).map_err(|error| io_failed(&state, &error))?;
        let marker = clean_marker(&directory);
        let crc = crc_of_tree(&state).map_err(|error| io_failed(&state, &error))?;
        let written =
            fs::write(&marker, format!("{crc:08x}\n")).and_then(|()| File::open(&marker)?.sync_all());
        written.map_err(|error| io_failed(&marker, &error))?;
        sync_directory(&directory)
    }
}

/// sled's threads hold the lock of its file for a moment after it was dropped; to sled that is an error.
/// The data directory is ours alone, so nobody else can have it.
fn wait_for_the_last(db: &Path) {
    let Ok(file) = File::open(db) else { return };
    let end = Instant::now() + LET_GO_MAX;
    while matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn applied_key(group: GroupId) -> Bytes {
    Bytes::copy_from_slice(&group.0.to_be_bytes())
}

fn clean_marker(directory: &Path) -> PathBuf {
    directory.join("state.clean")
}

/// Whether the state is as an orderly stop left it. The marker is gone (durably) before anything
/// changes the state again.
fn take_marker(directory: &Path) -> Result<bool, StorageError> {
    let (state, marker) = (directory.join("state"), clean_marker(directory));
    let stored = match fs::read_to_string(&marker) {
        Ok(stored) => stored,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io_failed(&marker, &error)),
    };
    fs::remove_file(&marker).map_err(|error| io_failed(&marker, &error))?;
    sync_directory(directory)?;
    let crc = crc_of_tree(&state).ok();
    Ok(crc.is_some_and(|crc| stored == format!("{crc:08x}\n")))
}

/// CRC-32 over the names and bytes of all files below `path`, in order of their names.
fn crc_of_tree(path: &Path) -> io::Result<u32> {
    fn add(path: &Path, hasher: &mut crc32fast::Hasher, buffer: &mut [u8]) -> io::Result<()> {
        let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            hasher.update(entry.file_name().as_encoded_bytes());
            if entry.file_type()?.is_dir() {
                add(&entry.path(), hasher, buffer)?;
                continue;
            }
            let mut file = File::open(entry.path())?;
            loop {
                match file.read(buffer)? {
                    0 => break,
                    n => hasher.update(&buffer[..n]),
                }
            }
        }
        Ok(())
    }
    let mut hasher = crc32fast::Hasher::new();
    add(path, &mut hasher, &mut vec![0; 1 << 20])?;
    Ok(hasher.finalize())
}

fn io_failed(path: &Path, error: &io::Error) -> StorageError {
    StorageError::new(format!("{}: {error}", path.display()))
}

pub(crate) fn sync_directory(directory: &Path) -> Result<(), StorageError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(|error| io_failed(directory, &error))
}

fn sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(path)?.sync_all()
}

impl StateStore for SledState {
    type Table = RecentRows;

    fn add(&mut self, group: GroupId) -> Result<(), StorageError> {
        if self.tables.contains_key(&group) {
            return Ok(());
        }
        let row = self.applied.get(&applied_key(group))?;
        let applied = row.and_then(|bytes| AppliedRow::from_bytes(&bytes));
        let tree: sled::Tree = (*self.db).clone();
        self.tables.insert(group, RecentRows::new(SledTable::new(tree, group.0), applied));
        Ok(())
    }

    fn table(&self, group: GroupId) -> &RecentRows {
        self.tables.get(&group).unwrap_or(&self.nothing)
    }

    fn applied(&self, group: GroupId) -> Result<Option<AppliedRow>, StorageError> {
        Ok(self.table(group).applied().cloned())
    }

    fn closed_cleanly(&self) -> bool {
        self.clean
    }

    fn commit(&mut self, commits: Vec<GroupCommit>) -> Result<(), StorageError> {
        let now = Instant::now();
        for commit in commits {
            let group = commit.group;
            let Some(table) = self.tables.get_mut(&group) else {
                return Err(StorageError::new(format!("{group} was never added to the state")));
            };
            self.bytes -= table.bytes();
            if table.commit(commit, now) {
                self.changed.push_back((now, group));
            }
            self.bytes += table.bytes();
            if table.bytes() > GROUP_BYTES_MAX {
                self.write(group)?;
            }
        }
        if self.bytes > BYTES_MAX {
            self.write_oldest()?;
        }
        Ok(())
    }

    fn clear(&mut self, group: GroupId) -> Result<(), StorageError> {
        let Some(table) = self.tables.get_mut(&group) else { return Ok(()) };
        self.bytes -= table.bytes();
        table.forget();
        let table = table.below().clone();
        let mut staged = sled::Batch::default();
        self.applied.stage(Batch { changes: vec![(applied_key(group), None)] }, &mut staged);
        self.db.apply_batch(staged).map_err(|error| StorageError::of_state(format!("state: {error}")))?;
        let mut from = Vec::new();
        loop {
            let rows = table.page(&from, &[], CLEAR_ROWS)?;
            let Some((last, _)) = rows.last() else { return Ok(()) };
            from = after(last);
            let mut staged = sled::Batch::default();
            let changes = rows.into_iter().map(|(key, _)| (key, None)).collect();
            table.stage(Batch { changes }, &mut staged);
            self.db.apply_batch(staged).map_err(|error| StorageError::of_state(format!("state: {error}")))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use eggs_consensus_core::Membership;
    use eggs_machine::hash::StateHash;
    use eggs_machine::table::prefix_end;
    use eggs_proto::StoreId;

    use super::*;

    fn commit(group: GroupId, index: u64) -> GroupCommit {
        let changes = vec![(Bytes::from_static(b"key"), Some(Bytes::from(index.to_string())))];
        let membership = Membership::founding(&[StoreId(7)]);
        let applied = AppliedRow { index, term: 1, hash: StateHash::default(), membership };
        GroupCommit { group, batch: Batch { changes }, applied }
    }

    fn open(directory: &Path) -> SledState {
        let mut state = SledState::open(directory).unwrap();
        for group in [GroupId(0), GroupId(257)] {
            state.add(group).unwrap();
        }
        state
    }

    #[test]
    fn only_an_orderly_stop_leaves_trusted_state() {
        let directory = tempfile::tempdir().unwrap();
        let groups = [GroupId(0), GroupId(257)];
        let mut state = open(directory.path());
        assert!(!state.closed_cleanly());
        state.commit(groups.iter().map(|&group| commit(group, 7)).collect()).unwrap();
        state.close().unwrap();
        let state = open(directory.path());
        assert!(state.closed_cleanly());
        assert!(!clean_marker(directory.path()).exists());
        assert_eq!(state.applied(GroupId(257)).unwrap(), Some(commit(GroupId(257), 7).applied));
        assert_eq!(state.table(GroupId(0)).get(b"key").unwrap().unwrap(), "7");
        drop(state);
        let mut state = open(directory.path());
        assert!(!state.closed_cleanly());
        state.clear(GroupId(0)).unwrap();
        assert_eq!(state.applied(GroupId(0)).unwrap(), None);
        assert_eq!(state.table(GroupId(0)).page(b"", b"", 10).unwrap(), []);
        assert_eq!(state.table(GroupId(257)).page(b"", b"", 10).unwrap().len(), 1);
        assert_eq!(prefix_end(&APPLIED.to_be_bytes()), b"");
    }

    /// All of it, or the state before it.
    #[test]
    fn a_crash_keeps_of_each_group_what_was_written_last() {
        let directory = tempfile::tempdir().unwrap();
        let groups = [GroupId(0), GroupId(257)];
        let mut state = open(directory.path());
        let start = Instant::now();
        for index in 7..=9 {
            state.commit(groups.map(|group| commit(group, index)).to_vec()).unwrap();
        }
        let due = state.due().unwrap();
        assert!(due >= start + WRITE_AFTER && due <= Instant::now() + WRITE_AFTER);
        state.write_due(due - Duration::from_nanos(1)).unwrap();
        assert_eq!(state.due(), Some(due));
        // One group at a time.
        state.write_due(due).unwrap();
        state.commit(vec![commit(GroupId(0), 10)]).unwrap();
        assert_eq!(state.table(GroupId(0)).get(b"key").unwrap().unwrap(), "10");
        assert_eq!(state.table(GroupId(257)).get(b"key").unwrap().unwrap(), "9");
        drop(state);
        let state = open(directory.path());
        assert_eq!(state.applied(GroupId(0)).unwrap().unwrap().index, 9);
        assert_eq!(state.table(GroupId(0)).get(b"key").unwrap().unwrap(), "9");
        assert_eq!(state.applied(GroupId(257)).unwrap(), None);
        assert_eq!(state.table(GroupId(257)).get(b"key").unwrap(), None);
    }

    #[test]
    fn what_waits_is_bounded_in_time_and_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path());
        for index in 1..=10_000 {
            let mut commit = commit(GroupId(0), index);
            commit.batch.changes.push((Bytes::from(format!("{index}")), Some(Bytes::from(vec![0; 100]))));
            state.commit(vec![commit]).unwrap();
            assert!(state.table(GroupId(0)).bytes() <= GROUP_BYTES_MAX);
        }
        let mut now = Instant::now() + WRITE_AFTER;
        while let Some(due) = state.due() {
            now = now.max(due);
            state.write_due(now).unwrap();
        }
        drop(state);
        let state = open(directory.path());
        assert_eq!(state.applied(GroupId(0)).unwrap().unwrap().index, 10_000);
        assert_eq!(state.table(GroupId(0)).page(b"", b"", 20_000).unwrap().len(), 10_001);
    }

    #[test]
    fn a_cleared_group_stays_cleared() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path());
        state.commit(vec![commit(GroupId(0), 7)]).unwrap();
        state.write_all().unwrap();
        state.commit(vec![commit(GroupId(0), 8)]).unwrap();
        state.clear(GroupId(0)).unwrap();
        assert_eq!(state.table(GroupId(0)).get(b"key").unwrap(), None);
        state.write_all().unwrap();
        drop(state);
        let state = open(directory.path());
        assert_eq!(state.applied(GroupId(0)).unwrap(), None);
        assert_eq!(state.table(GroupId(0)).page(b"", b"", 10).unwrap(), []);
    }

    #[test]
    fn a_state_changed_after_the_stop_is_not_trusted() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path());
        state.commit(vec![commit(GroupId(0), 7)]).unwrap();
        state.close().unwrap();
        let path = directory.path().join("state/db");
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(!take_marker(directory.path()).unwrap());
    }
}
