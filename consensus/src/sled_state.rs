//! The state of all groups in one sled tree, and what the last turn changed in another.
//!
//! sled's `flush` is not an fsync, so what it holds is verified row by row or rebuilt unless the marker
//! of an orderly stop is there: only that stop fsyncs sled's files, and the marker holds their CRCs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use eggs_consensus_core::{AppliedRow, GroupCommit, GroupId, StateStore, StorageError};
use eggs_machine::on_sled::SledTable;
use eggs_machine::table::after;
use eggs_machine::{Batch, Table};

use crate::redo;

/// Prefix under which the applied rows are, keyed by group.
const APPLIED: u16 = u16::MAX;
/// The tree, and its only row, with what the last turn changed.
const REDO: &str = "redo";
/// Pages sled keeps in memory.
const CACHE_BYTES: u64 = 64 << 20;
/// Rows deleted in one batch when a group is cleared.
const CLEAR_ROWS: usize = 4096;

pub(crate) struct SledState {
    db: sled::Db,
    directory: PathBuf,
    tables: BTreeMap<GroupId, SledTable>,
    applied: SledTable,
    redo: sled::Tree,
    clean: bool,
}

impl SledState {
    /// Opens `DIR/state`.
    pub(crate) fn open(directory: &Path) -> Result<Self, StorageError> {
        let state = directory.join("state");
        let clean = take_marker(directory)?;
        let config = sled::Config::new().path(&state).cache_capacity(CACHE_BYTES).flush_every_ms(Some(1000));
        let db =
            config.open().map_err(|error| StorageError::of_state(format!("{}: {error}", state.display())))?;
        sync_directory(directory)?;
        let redo = db
            .open_tree(REDO)
            .map_err(|error| StorageError::of_state(format!("{}: {error}", state.display())))?;
        let applied = SledTable::new((*db).clone(), APPLIED);
        let mut opened =
            SledState { db, directory: directory.to_owned(), tables: BTreeMap::new(), applied, redo, clean };
        if !clean {
            opened.mend()?;
        }
        Ok(opened)
    }

    /// Makes the changes of the last turn again where a crash came between them.
    fn mend(&mut self) -> Result<(), StorageError> {
        let row = self.redo.get(REDO).map_err(|error| StorageError::of_state(format!("state: {error}")))?;
        let changes = row.and_then(|row| redo::decode(Bytes::copy_from_slice(&row)));
        for redo::Change { before, commit } in changes.unwrap_or_default() {
            // Of a group that had no state, or has none any more, there is nothing to mend.
            let torn = self.applied(commit.group)?.is_some_and(|row| row.index == before);
            if torn {
                self.add(commit.group)?;
                self.apply(&commit)?;
            }
        }
        Ok(())
    }

    fn apply(&self, commit: &GroupCommit) -> Result<(), StorageError> {
        let key = Bytes::copy_from_slice(&commit.group.0.to_be_bytes());
        let value = Bytes::copy_from_slice(&commit.applied.to_bytes());
        self.table(commit.group).apply(&commit.batch).map_err(StorageError::from)?;
        self.applied.apply(&Batch { changes: vec![(key, Some(value))] }).map_err(StorageError::from)
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
    pub(crate) fn close(self) -> Result<(), StorageError> {
        let SledState { db, directory, tables, applied, redo, .. } = self;
        db.flush().map_err(|error| StorageError::new(format!("state: {error}")))?;
        drop((tables, applied, redo));
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
    type Table = SledTable;

    fn add(&mut self, group: GroupId) -> Result<(), StorageError> {
        let tree: sled::Tree = (*self.db).clone();
        self.tables.entry(group).or_insert_with(|| SledTable::new(tree, group.0));
        Ok(())
    }

    fn table(&self, group: GroupId) -> &SledTable {
        // Only groups that were added are ever asked for; any other has no rows anywhere.
        self.tables.get(&group).unwrap_or(&self.applied)
    }

    fn applied(&self, group: GroupId) -> Result<Option<AppliedRow>, StorageError> {
        let row = self.applied.get(&group.0.to_be_bytes())?;
        Ok(row.and_then(|bytes| AppliedRow::from_bytes(&bytes)))
    }

    fn closed_cleanly(&self) -> bool {
        self.clean
    }

    fn commit(&mut self, commits: Vec<GroupCommit>) -> Result<(), StorageError> {
        let mut changes = Vec::with_capacity(commits.len());
        for commit in &commits {
            changes.push((self.applied(commit.group)?.map_or(0, |row| row.index), commit));
        }
        if let Some(row) = redo::encode(&changes) {
            let written = self.redo.insert(REDO, row);
            written.map_err(|error| StorageError::of_state(format!("state: {error}")))?;
            return commits.iter().try_for_each(|commit| self.apply(commit));
        }
        let mut staged = sled::Batch::default();
        for commit in commits {
            let key = Bytes::copy_from_slice(&commit.group.0.to_be_bytes());
            let value = Bytes::copy_from_slice(&commit.applied.to_bytes());
            self.table(commit.group).stage(commit.batch, &mut staged);
            self.applied.stage(Batch { changes: vec![(key, Some(value))] }, &mut staged);
        }
        self.db.apply_batch(staged).map_err(|error| StorageError::of_state(format!("state: {error}")))
    }

    fn clear(&mut self, group: GroupId) -> Result<(), StorageError> {
        let row = Bytes::copy_from_slice(&group.0.to_be_bytes());
        let mut staged = sled::Batch::default();
        self.applied.stage(Batch { changes: vec![(row, None)] }, &mut staged);
        self.db.apply_batch(staged).map_err(|error| StorageError::of_state(format!("state: {error}")))?;
        let table = self.table(group).clone();
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

    /// The crash comes after every one of a turn's changes, and before the first.
    #[test]
    fn a_turn_that_a_crash_cut_is_made_whole() {
        let groups = [GroupId(0), GroupId(257)];
        let turn = |index: u64| -> Vec<GroupCommit> {
            let of = |group: GroupId| {
                let mut commit = commit(group, index);
                let removed = Bytes::from(format!("only {}", index - 1));
                let added = Bytes::from(format!("only {index}"));
                commit.batch.changes.extend([(removed, None), (added, Some(Bytes::new()))]);
                commit
            };
            groups.map(of).to_vec()
        };
        let before = turn(7);
        let rows = |state: &SledState| groups.map(|group| state.table(group).page(b"", b"", 10).unwrap());
        // One row of a change, or the applied row, is one write.
        let writes = turn(8).iter().map(|commit| commit.batch.changes.len() + 1).sum::<usize>();
        for cut in 0..=writes {
            let directory = tempfile::tempdir().unwrap();
            let mut state = open(directory.path());
            state.commit(before.clone()).unwrap();
            let turn = turn(8);
            let changes: Vec<_> = turn.iter().map(|commit| (7, commit)).collect();
            state.redo.insert(REDO, redo::encode(&changes).unwrap()).unwrap();
            let mut left = cut;
            for commit in &turn {
                let changes: Vec<_> = commit.batch.changes.iter().take(left).cloned().collect();
                left -= changes.len();
                state.table(commit.group).apply(&Batch { changes }).unwrap();
                if left > 0 {
                    left -= 1;
                    let row = Bytes::copy_from_slice(&commit.applied.to_bytes());
                    let key = Bytes::copy_from_slice(&commit.group.0.to_be_bytes());
                    state.applied.apply(&Batch { changes: vec![(key, Some(row))] }).unwrap();
                } else {
                    break;
                }
            }
            drop(state);
            let state = open(directory.path());
            for group in groups {
                assert_eq!(state.applied(group).unwrap().unwrap().index, 8, "{cut}");
                assert_eq!(state.table(group).get(b"key").unwrap().unwrap(), "8", "{cut}");
            }
            let whole = tempfile::tempdir().unwrap();
            let mut other = open(whole.path());
            other.commit(before.clone()).unwrap();
            other.commit(turn).unwrap();
            assert_eq!(rows(&state), rows(&other), "{cut}");
        }
    }

    #[test]
    fn a_row_of_an_older_turn_or_of_a_group_without_state_mends_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path());
        state.commit(vec![commit(GroupId(0), 7)]).unwrap();
        let old = [(5, &commit(GroupId(0), 6)), (7, &commit(GroupId(257), 8))]
            .map(|(before, c)| (before, c.clone()));
        let old: Vec<_> = old.iter().map(|(before, commit)| (*before, commit)).collect();
        state.redo.insert(REDO, redo::encode(&old).unwrap()).unwrap();
        drop(state);
        let state = open(directory.path());
        assert_eq!(state.applied(GroupId(0)).unwrap().unwrap().index, 7);
        assert_eq!(state.applied(GroupId(257)).unwrap(), None);
        assert_eq!(state.table(GroupId(257)).page(b"", b"", 10).unwrap(), []);
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
