//! The raft logs in raft-engine: every write of a turn is one batch and one fdatasync.

use std::path::Path;

use eggs_consensus_core::eraftpb::{Entry, HardState};
use eggs_consensus_core::{GroupId, LogState, LogStore, LogWrite, StorageError};
use raft_engine::{Config, Engine, LogBatch, MessageExt, ReadableSize, RecoveryMode};

/// A log file is this long; space is given back by whole files.
const FILE_BYTES: ReadableSize = ReadableSize(32 << 20);
/// Old entries of slow groups are moved together when the log is longer than this.
const PURGE_BYTES: ReadableSize = ReadableSize(256 << 20);
const HARD_STATE: &[u8] = b"hard";

struct RaftEntry;

impl MessageExt for RaftEntry {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

pub(crate) struct LogFiles {
    engine: Engine,
}

impl LogFiles {
    pub(crate) fn open(directory: &Path) -> Result<Self, StorageError> {
        let dir = directory
            .to_str()
            .ok_or_else(|| StorageError::new(format!("{} is not UTF-8", directory.display())))?;
        let config = Config {
            dir: dir.to_owned(),
            target_file_size: FILE_BYTES,
            purge_threshold: PURGE_BYTES,
            // A torn last record was never acknowledged.
            recovery_mode: RecoveryMode::TolerateTailCorruption,
            recovery_threads: 2,
            ..Config::default()
        };
        let engine = Engine::open(config)
            .map_err(|error| StorageError::new(format!("log in {}: {error}", directory.display())))?;
        Ok(LogFiles { engine })
    }

    /// Gives back the space of entries no longer needed. Slow: not for the consensus thread.
    pub(crate) fn purge(&self) -> Result<(), StorageError> {
        self.engine.purge_expired_files().map(drop).map_err(failed)
    }
}

/// raft-engine's region 0 is reserved.
fn region(group: GroupId) -> u64 {
    u64::from(group.0) + 1
}

fn failed(error: raft_engine::Error) -> StorageError {
    StorageError::new(format!("log: {error}"))
}

impl LogStore for LogFiles {
    fn load(&self, group: GroupId) -> Result<Option<LogState>, StorageError> {
        let region = region(group);
        let Some(hard) = self.engine.get_message::<HardState>(region, HARD_STATE).map_err(failed)? else {
            return Ok(None);
        };
        let first = self.engine.first_index(region).unwrap_or(1);
        let last = self.engine.last_index(region).unwrap_or(0);
        Ok(Some(LogState { hard, first, last }))
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
        let mut batch = LogBatch::with_capacity(writes.len());
        for write in writes {
            let region = region(write.group);
            if !write.entries.is_empty() {
                batch.add_entries::<RaftEntry>(region, &write.entries).map_err(failed)?;
            }
            if let Some(hard) = write.hard {
                batch.put_message(region, HARD_STATE.to_vec(), &hard).map_err(failed)?;
            }
        }
        self.engine.write(&mut batch, true).map(drop).map_err(failed)
    }

    fn truncate(&self, group: GroupId, first: u64) -> Result<(), StorageError> {
        self.engine.compact_to(region(group), first);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64, data: &'static [u8]) -> Entry {
        Entry { index, term, data: data.into(), ..Entry::default() }
    }

    #[test]
    fn what_was_written_is_there_after_opening_again() {
        let directory = tempfile::tempdir().unwrap();
        let group = GroupId(0);
        {
            let log = LogFiles::open(directory.path()).unwrap();
            assert_eq!(log.load(group).unwrap(), None);
            let hard = HardState { term: 2, vote: 1, commit: 0, ..HardState::default() };
            let entries = vec![entry(1, 1, b"a"), entry(2, 1, b"b"), entry(3, 1, b"c")];
            log.write(vec![LogWrite { group, hard: Some(hard), entries }]).unwrap();
            log.write(vec![LogWrite { group, hard: None, entries: vec![entry(3, 2, b"C")] }]).unwrap();
        }
        let log = LogFiles::open(directory.path()).unwrap();
        let state = log.load(group).unwrap().unwrap();
        assert_eq!((state.first, state.last, state.hard.term), (1, 3, 2));
        let entries = log.entries(group, 2, 4, u64::MAX).unwrap();
        assert_eq!(entries, [entry(2, 1, b"b"), entry(3, 2, b"C")]);
        log.truncate(group, 3).unwrap();
        assert_eq!(log.load(group).unwrap().unwrap().first, 3);
    }
}
