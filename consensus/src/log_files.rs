//! The raft logs in raft-engine: every write of a turn is one batch and one fdatasync.
//!
//! Each batch carries the number of the write in a region of its own, so that a log that ends too early is known
//! ([`log_check`](crate::log_check)).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use eggs_consensus_core::eraftpb::{Entry, HardState};
use eggs_consensus_core::{GroupId, LogChange, LogState, LogStore, LogWrite, StorageError};
use eggs_proto::StoreId;
use raft_engine::{Command, Config, Engine, Error, LogBatch, MessageExt, ReadableSize, RecoveryMode};

use crate::handle::ConsensusError;
use crate::log_check::{self, Mark, Written};
use crate::sled_state::sync_directory;

/// A log file is this long; space is given back by whole files.
const FILE_BYTES: ReadableSize = ReadableSize(32 << 20);
/// Old entries of slow groups are moved together when the log is longer than this.
const PURGE_BYTES: ReadableSize = ReadableSize(256 << 20);
/// Keys of a group's region.
const HARD_STATE: &[u8] = b"hard";
/// Store ids, 8 bytes each, little-endian.
const FOUNDING: &[u8] = b"founding";
const REMOVED: &[u8] = b"removed";
/// Term and index, 8 bytes each, little-endian.
const FLOOR: &[u8] = b"floor";
/// The region that is no group's; groups' are far below.
const WRITES: u64 = 1 << 32;
/// Its key: the number of the write, 8 bytes, little-endian.
const SEQUENCE: &[u8] = b"sequence";

struct RaftEntry;

impl MessageExt for RaftEntry {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

pub(crate) struct LogFiles {
    name: &'static str,
    engine: Engine,
    log: PathBuf,
    written: Mutex<Written>,
}

impl LogFiles {
    /// Opens `DIR/log`.
    ///
    /// # Errors
    /// `Damaged` when it has lost what was acknowledged.
    pub(crate) fn open(directory: &Path, name: &'static str) -> Result<Self, ConsensusError> {
        let log = directory.join("log");
        let failed = |error: &dyn std::fmt::Display| {
            ConsensusError::Storage(format!("log in {}: {error}", log.display()))
        };
        let before = Written::load(directory).map_err(|error| failed(&error))?;
        log_check::no_file_is_missing(&log)?;
        let dir = log.to_str().ok_or_else(|| failed(&"the path is not UTF-8"))?;
        let config = Config {
            dir: dir.to_owned(),
            target_file_size: FILE_BYTES,
            purge_threshold: PURGE_BYTES,
            // A torn last record was never acknowledged.
            recovery_mode: RecoveryMode::TolerateTailCorruption,
            recovery_threads: 2,
            ..Config::default()
        };
        let engine = Engine::open(config).map_err(|error| match is_damage(&error) {
            true => ConsensusError::Damaged(format!("log in {}: {error}", log.display())),
            false => failed(&error),
        })?;
        sync_directory(directory).map_err(|error| failed(&error))?;
        let (moved_file, moved_bytes) = log_check::verify(&log)?;
        let sequence = engine.get(WRITES, SEQUENCE).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
        let sequence = sequence.map_or(0, u64::from_le_bytes);
        let mark = Mark { sequence, moved_file, moved_bytes };
        if let Some(before) = before {
            not_before(&log, &mark, &before)?;
        }
        let written = Mutex::new(Written::create(directory, mark).map_err(|error| failed(&error))?);
        Ok(LogFiles { name, engine, log, written })
    }

    /// Gives back the space of entries no longer needed. Slow: not for the consensus thread.
    pub(crate) fn purge(&self) -> Result<(), StorageError> {
        self.engine.purge_expired_files().map_err(failed)?;
        let io_failed = |error| StorageError::new(format!("log in {}: {error}", self.log.display()));
        let (moved_file, moved_bytes) = log_check::moved(&self.log).map_err(io_failed)?;
        let mut written = self.written();
        let mark = Mark { moved_file, moved_bytes, ..written.mark() };
        written.save(mark).map_err(io_failed)
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hard(&self, region: u64) -> Result<Option<HardState>, StorageError> {
        self.engine.get_message(region, HARD_STATE).map_err(failed)
    }
}

/// `Damaged` when the log is not as far as it was.
fn not_before(log: &Path, mark: &Mark, before: &Mark) -> Result<(), ConsensusError> {
    let lost = |what: String| Err(ConsensusError::Damaged(format!("log in {}: {what}", log.display())));
    if mark.sequence < before.sequence {
        return lost(format!(
            "it ends after write {} but write {} was acknowledged: records are damaged or cut off",
            mark.sequence, before.sequence
        ));
    }
    if (mark.moved_file, mark.moved_bytes) < (before.moved_file, before.moved_bytes) {
        return lost(format!(
            "file {:016}.rewrite had {} bytes: records are damaged or cut off",
            before.moved_file, before.moved_bytes
        ));
    }
    Ok(())
}

/// raft-engine's region 0 is reserved.
fn region(group: GroupId) -> u64 {
    u64::from(group.0) + 1
}

fn failed(error: Error) -> StorageError {
    let what = format!("log: {error}");
    if is_damage(&error) { StorageError::damaged(what) } else { StorageError::new(what) }
}

fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Corruption(_) | Error::Codec(_) | Error::Protobuf(_))
}

fn encode_founding(founding: &[StoreId]) -> Vec<u8> {
    founding.iter().flat_map(|store| store.0.to_le_bytes()).collect()
}

fn encode_floor((term, index): (u64, u64)) -> Vec<u8> {
    [term.to_le_bytes(), index.to_le_bytes()].concat()
}

fn decode_floor(bytes: &[u8]) -> Result<(u64, u64), StorageError> {
    let number = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let floor = number(0).zip(number(8)).filter(|_| bytes.len() == 16);
    floor.ok_or_else(|| StorageError::damaged("the log's floor of a group is not 16 bytes"))
}

fn decode_founding(bytes: &[u8]) -> Result<Vec<StoreId>, StorageError> {
    let (ids, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(StorageError::new("log: the founding voters are not ids"));
    }
    Ok(ids.iter().map(|&id| StoreId(u64::from_le_bytes(id))).collect())
}

impl LogStore for LogFiles {
    fn groups(&self) -> Result<Vec<GroupId>, StorageError> {
        let regions = self.engine.raft_groups().into_iter();
        let mut groups: Vec<GroupId> =
            regions.filter_map(|region| u16::try_from(region.checked_sub(1)?).ok().map(GroupId)).collect();
        groups.sort_unstable();
        Ok(groups)
    }

    fn load(&self, group: GroupId) -> Result<Option<LogState>, StorageError> {
        let region = region(group);
        let hard = self.hard(region)?;
        let founding = self.engine.get(region, FOUNDING);
        let removed = self.engine.get(region, REMOVED).is_some();
        let first = self.engine.first_index(region);
        if hard.is_none() && founding.is_none() && !removed && first.is_none() {
            return Ok(None);
        }
        Ok(Some(LogState {
            hard: hard.unwrap_or_default(),
            first: first.unwrap_or(1),
            last: self.engine.last_index(region).unwrap_or(0),
            founding: founding.as_deref().map(decode_founding).transpose()?.unwrap_or_default(),
            removed,
            floor: self
                .engine
                .get(region, FLOOR)
                .as_deref()
                .map(decode_floor)
                .transpose()?
                .unwrap_or_default(),
        }))
    }

    fn entries(
        &self,
        group: GroupId,
        low: u64,
        high: u64,
        max_bytes: u64,
    ) -> Result<Vec<Entry>, StorageError> {
        let mut entries = Vec::new();
        let max = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        self.engine
            .fetch_entries_to::<RaftEntry>(region(group), low, high, Some(max), &mut entries)
            .map_err(failed)?;
        Ok(entries)
    }

    fn write(&self, writes: Vec<LogWrite>) -> Result<(), StorageError> {
        let mut batch = LogBatch::with_capacity(2 * writes.len() + 1);
        // Of groups that come more than once.
        let mut hards: BTreeMap<u64, HardState> = BTreeMap::new();
        for write in writes {
            let region = region(write.group);
            let mut hard = write.hard;
            if let Some(change) = write.change {
                if hard.is_none() {
                    let before = hards.get(&region).cloned();
                    hard = Some(
                        before.map_or_else(|| self.hard(region), |hard| Ok(Some(hard)))?.unwrap_or_default(),
                    );
                }
                // All of the region goes; what follows in the batch stays.
                batch.add_command(region, Command::Clean);
                match change {
                    LogChange::Found(founding) => {
                        batch.put(region, FOUNDING.to_vec(), encode_founding(&founding)).map_err(failed)?;
                    }
                    LogChange::Restart { floor } => {
                        batch.put(region, FLOOR.to_vec(), encode_floor(floor)).map_err(failed)?;
                    }
                    LogChange::Remove { floor } => {
                        batch.put(region, FLOOR.to_vec(), encode_floor(floor)).map_err(failed)?;
                        batch.put(region, REMOVED.to_vec(), vec![1]).map_err(failed)?;
                    }
                }
            }
            if let Some(hard) = hard {
                batch.put_message(region, HARD_STATE.to_vec(), &hard).map_err(failed)?;
                hards.insert(region, hard);
            }
            if !write.entries.is_empty() {
                batch.add_entries::<RaftEntry>(region, &write.entries).map_err(failed)?;
            }
        }
        let mut written = self.written();
        let before = written.mark();
        let mark = Mark { sequence: before.sequence + 1, ..before };
        let sequence = mark.sequence.to_le_bytes().to_vec();
        batch.put(WRITES, SEQUENCE.to_vec(), sequence).map_err(failed)?;
        let bytes = self.engine.write(&mut batch, true).map_err(failed)?;
        metrics::counter!("eggs_consensus_fsyncs_total", "host" => self.name).increment(1);
        metrics::counter!("eggs_consensus_log_bytes_total", "host" => self.name).increment(bytes as u64);
        let saved = written.save(mark);
        saved.map_err(|error| StorageError::new(format!("log in {}: {error}", self.log.display())))
    }

    fn truncate(&self, group: GroupId, first: u64) -> Result<(), StorageError> {
        self.engine.compact_to(region(group), first);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn entry(index: u64, term: u64, data: &'static [u8]) -> Entry {
        Entry { index, term, data: data.into(), ..Entry::default() }
    }

    fn hard(term: u64) -> HardState {
        HardState { term, vote: 1, commit: 0, ..HardState::default() }
    }

    fn write(group: GroupId, entries: Vec<Entry>) -> LogWrite {
        LogWrite { group, hard: None, entries, change: None }
    }

    fn change(group: GroupId, change: LogChange) -> LogWrite {
        LogWrite { group, hard: None, entries: Vec::new(), change: Some(change) }
    }

    fn open(directory: &Path) -> LogFiles {
        LogFiles::open(directory, "test").unwrap()
    }

    #[test]
    fn what_was_written_is_there_after_opening_again() {
        let directory = tempfile::tempdir().unwrap();
        let group = GroupId(0);
        {
            let log = open(directory.path());
            assert_eq!(log.load(group).unwrap(), None);
            let entries = vec![entry(1, 1, b"a"), entry(2, 1, b"b"), entry(3, 1, b"c")];
            log.write(vec![LogWrite { hard: Some(hard(2)), ..write(group, entries) }]).unwrap();
            log.write(vec![write(group, vec![entry(3, 2, b"C")])]).unwrap();
        }
        let log = open(directory.path());
        assert_eq!(log.groups().unwrap(), [group]);
        let state = log.load(group).unwrap().unwrap();
        assert_eq!((state.first, state.last, state.hard.term), (1, 3, 2));
        let entries = log.entries(group, 2, 4, u64::MAX).unwrap();
        assert_eq!(entries, [entry(2, 1, b"b"), entry(3, 2, b"C")]);
        log.truncate(group, 3).unwrap();
        assert_eq!(log.load(group).unwrap().unwrap().first, 3);
    }

    #[test]
    fn changes_keep_what_follows_them_in_the_same_write() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b, c] = [GroupId(0), GroupId(7), GroupId(257)];
        let voters = vec![StoreId(9), StoreId(u64::MAX)];
        let check = |log: &LogFiles, round: &str| {
            let state = log.load(a).unwrap().unwrap();
            assert_eq!((state.first, state.last, state.hard.term), (41, 42, 5), "{round}");
            assert_eq!((state.founding, state.removed), (vec![], false), "{round}");
            assert_eq!(log.entries(a, 41, 43, u64::MAX).unwrap().len(), 2, "{round}");
            let state = log.load(b).unwrap().unwrap();
            assert_eq!((state.hard.term, state.removed, state.last), (3, true, 0), "{round}");
            assert_eq!(state.founding, [], "{round}");
            let state = log.load(c).unwrap().unwrap();
            assert_eq!((state.founding, state.hard, state.last), (voters.clone(), HardState::default(), 0));
            assert_eq!(log.groups().unwrap(), [a, b, c]);
        };
        {
            let log = open(directory.path());
            let found = |group| change(group, LogChange::Found(voters.clone()));
            log.write(vec![found(a), found(b)]).unwrap();
            assert_eq!(log.load(a).unwrap().unwrap().founding, voters);
            let entries = || vec![entry(1, 1, b"a"), entry(2, 1, b"b"), entry(3, 1, b"c")];
            log.write(vec![
                LogWrite { hard: Some(hard(3)), ..write(a, entries()) },
                LogWrite { hard: Some(hard(3)), ..write(b, entries()) },
            ])
            .unwrap();
            let restart = LogWrite { hard: Some(hard(5)), ..change(a, LogChange::Restart { floor: (3, 9) }) };
            log.write(vec![
                LogWrite { entries: vec![entry(41, 5, b"x"), entry(42, 5, b"y")], ..restart },
                change(b, LogChange::Remove { floor: (3, 9) }),
                found(c),
            ])
            .unwrap();
            check(&log, "written");
        }
        for round in ["opened", "opened again"] {
            check(&open(directory.path()), round);
        }
        let log = open(directory.path());
        log.write(vec![change(b, LogChange::Restart { floor: (3, 9) })]).unwrap();
        let state = log.load(b).unwrap().unwrap();
        assert_eq!((state.hard.term, state.removed), (3, false));
    }

    /// Hundreds of megabytes through a few groups, one of them restarted and one removed in the middle: files are given back
    /// and entries moved, and nothing is lost by it.
    #[test]
    fn restarts_survive_purging() {
        let directory = tempfile::tempdir().unwrap();
        let [busy, slow, restarted, removed] = [0, 1, 2, 3].map(GroupId);
        // Random enough not to be compressed away.
        let mut state = 1u64;
        let mut noise = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        let data: Vec<u8> = (0..512 << 10).flat_map(|_| noise()).collect();
        let data = bytes::Bytes::from(data);
        let mut index = 0;
        for round in 0..4 {
            let log = open(directory.path());
            if round == 0 {
                let first = [slow, restarted, removed].map(|group| LogWrite {
                    hard: Some(hard(7)),
                    ..write(group, vec![entry(1, 1, b"a"), entry(2, 1, b"b")])
                });
                log.write(first.to_vec()).unwrap();
            }
            for _ in 0..30 {
                index += 1;
                let big = Entry { index, term: 1, data: data.clone(), ..Entry::default() };
                log.write(vec![write(busy, vec![big])]).unwrap();
                log.truncate(busy, index).unwrap();
            }
            if round == 1 {
                let restart = change(restarted, LogChange::Restart { floor: (3, 9) });
                let restart = LogWrite { entries: vec![entry(100, 7, b"x")], ..restart };
                log.write(vec![restart, change(removed, LogChange::Remove { floor: (3, 9) })]).unwrap();
            }
            log.purge().unwrap();
            if round >= 1 {
                for log in [log].into_iter().chain(std::iter::once_with(|| open(directory.path()))) {
                    let state = log.load(restarted).unwrap().unwrap();
                    assert_eq!((state.first, state.last, state.hard.term), (100, 100, 7), "round {round}");
                    assert!(log.load(removed).unwrap().unwrap().removed, "round {round}");
                    assert_eq!(log.entries(slow, 1, 3, u64::MAX).unwrap().len(), 2);
                }
            }
        }
        let (file, bytes) = log_check::moved(&directory.path().join("log")).unwrap();
        assert!(file > 0 && bytes > 100, "nothing was moved: {file} {bytes}");
        let path = directory.path().join(format!("log/{file:016}.rewrite"));
        let good = fs::read(&path).unwrap();
        let written = fs::read(directory.path().join("log.written")).unwrap();
        for bad in [&good[..usize::try_from(bytes).unwrap() - 1], &good[..60], &flipped(&good, 150)] {
            fs::write(&path, bad).unwrap();
            fs::write(directory.path().join("log.written"), &written).unwrap();
            assert_damaged(directory.path(), "moved entries");
        }
    }

    fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 0x10;
        flipped
    }

    #[track_caller]
    fn assert_damaged(directory: &Path, what: &str) {
        match LogFiles::open(directory, "test") {
            Err(ConsensusError::Damaged(why)) => {
                let path = directory.join("log");
                assert!(why.contains(path.to_str().unwrap()) && !why.contains('\n'), "{what}: {why}");
            }
            Err(other) => panic!("{what}: {other:?}"),
            Ok(_) => panic!("{what}: opened"),
        }
    }

    #[test]
    fn acknowledged_records_that_are_damaged_or_gone_are_noticed_and_torn_ones_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let group = GroupId(3);
        {
            let log = open(directory.path());
            for index in 1..=5 {
                let hard = Some(hard(index));
                log.write(vec![LogWrite { hard, ..write(group, vec![entry(index, 1, b"some data")]) }])
                    .unwrap();
            }
        }
        let path = directory.path().join("log/0000000000000001.raftlog");
        let (marks, lock) = (directory.path().join("log.written"), directory.path().join("log/LOCK"));
        let (good, written) = (fs::read(&path).unwrap(), fs::read(&marks).unwrap());
        let put = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            fs::write(&marks, &written).unwrap();
            assert!(lock.exists());
        };
        // What raft-engine does not use of its file header harms nobody.
        for at in (0..61).step_by(10).chain(69..good.len()) {
            put(&flipped(&good, at));
            assert_damaged(directory.path(), &format!("byte {at} flipped"));
        }
        for at in [0, 1, 60, 69, 100, good.len() / 2, good.len() - 1] {
            put(&good[..at]);
            assert_damaged(directory.path(), &format!("cut at {at}"));
        }
        fs::rename(directory.path().join("log"), directory.path().join("gone")).unwrap();
        fs::write(&marks, &written).unwrap();
        assert_damaged(directory.path(), "no log");
        fs::remove_dir_all(directory.path().join("log")).unwrap();
        fs::rename(directory.path().join("gone"), directory.path().join("log")).unwrap();

        for garbage in [&[0; 4096][..], &[0xa5; 300], &good[good.len() / 2..], &good[69..]] {
            put(&[&good[..], garbage].concat());
            let log = open(directory.path());
            assert_eq!(log.load(group).unwrap().unwrap().last, 5);
            log.write(vec![write(group, vec![entry(6, 1, b"more")])]).unwrap();
        }
        // Not synced, so a power cut may take it.
        put(&good);
        fs::remove_file(&marks).unwrap();
        assert_eq!(open(directory.path()).load(group).unwrap().unwrap().hard.term, 5);
        assert!(marks.exists());
    }

    #[test]
    fn a_missing_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path()));
        let file = |n: u64| directory.path().join(format!("log/{n:016}.raftlog"));
        fs::copy(file(1), file(3)).unwrap();
        assert_damaged(directory.path(), "a file is missing");
    }
}
