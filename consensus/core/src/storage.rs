//! What a host keeps, as it asks its shell for it: log, state and snapshots.

use std::fmt;

use eggs_machine::hash::StateHash;
use eggs_machine::{Batch, Row, Table, TableError};
use raft::eraftpb::{Entry, HardState};

/// One raft group of a host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u16);

impl fmt::Debug for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group {}", self.0)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Storage failed or holds what cannot be. The host stops; nothing is answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}")]
pub struct StorageError {
    what: String,
    of_state: bool,
}

impl StorageError {
    /// Of the log or the snapshots: the truth.
    pub fn new(what: impl Into<String>) -> Self {
        StorageError { what: what.into(), of_state: false }
    }

    /// Of the state, which can be rebuilt from the truth.
    pub fn of_state(what: impl Into<String>) -> Self {
        StorageError { what: what.into(), of_state: true }
    }

    /// Whether only the state is in trouble.
    pub fn is_of_state(&self) -> bool {
        self.of_state
    }
}

impl From<TableError> for StorageError {
    fn from(error: TableError) -> Self {
        StorageError::of_state(error.to_string())
    }
}

/// What is durable of a group's log: entries `first..=last` (none when `last < first`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogState {
    pub hard: HardState,
    pub first: u64,
    pub last: u64,
}

/// What one turn adds to a group's log. Entries replace those from their first index on.
#[derive(Debug, Clone)]
pub struct LogWrite {
    pub group: GroupId,
    pub hard: Option<HardState>,
    pub entries: Vec<Entry>,
}

/// The durable raft logs of all groups of a host.
pub trait LogStore: Send + Sync + 'static {
    /// `None`: nothing was ever written of this group.
    fn load(&self, group: GroupId) -> Result<Option<LogState>, StorageError>;

    /// Entries `low..high`, cut when they exceed `max_bytes`, but at least one.
    fn entries(
        &self,
        group: GroupId,
        low: u64,
        high: u64,
        max_bytes: u64,
    ) -> Result<Vec<Entry>, StorageError>;

    /// Writes all of it with one fsync; durable when it returns.
    fn write(&self, writes: Vec<LogWrite>) -> Result<(), StorageError>;

    /// Entries below `first` are no longer needed. Need not be durable.
    fn truncate(&self, group: GroupId, first: u64) -> Result<(), StorageError>;
}

/// How far the state of a group is, stored in the same batch as the rows (CO-2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AppliedRow {
    pub index: u64,
    pub term: u64,
    pub hash: StateHash,
}

impl AppliedRow {
    /// Index, term (little-endian u64), hash: 32 bytes.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&self.index.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.term.to_le_bytes());
        bytes[16..].copy_from_slice(&self.hash.to_bytes());
        bytes
    }

    /// `None` unless there are 32 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 32] = bytes.try_into().ok()?;
        let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
        let hash = <[u8; 16]>::try_from(&bytes[16..]).ok()?;
        Some(AppliedRow { index: number(0), term: number(8), hash: StateHash::from_bytes(hash) })
    }
}

/// What one turn changes in a group's state.
#[derive(Debug, Clone)]
pub struct GroupCommit {
    pub group: GroupId,
    pub batch: Batch,
    pub applied: AppliedRow,
}

/// The state of all groups: rebuildable, so it need not be durable — but what it holds of a group is
/// some earlier state of it with the applied row of that very state.
pub trait StateStore {
    type Table: Table;

    fn table(&self, group: GroupId) -> &Self::Table;

    /// `None`: no state of this group.
    fn applied(&self, group: GroupId) -> Result<Option<AppliedRow>, StorageError>;

    /// Whether it was closed in order, so that its rows need no verification.
    fn closed_cleanly(&self) -> bool;

    /// Applies all commits in one batch.
    fn commit(&mut self, commits: Vec<GroupCommit>) -> Result<(), StorageError>;

    /// Removes all of a group: the rows and the applied row.
    fn clear(&mut self, group: GroupId) -> Result<(), StorageError>;
}

/// Where a snapshot stands in its group's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotMeta {
    pub index: u64,
    pub term: u64,
    pub hash: StateHash,
    /// Bytes of all keys and values.
    pub bytes: u64,
}

/// Durable, checksummed snapshots: the newest of each group.
pub trait SnapshotStore {
    fn latest(&self, group: GroupId) -> Result<Option<SnapshotMeta>, StorageError>;

    /// All rows of the newest snapshot, in pages; an error when any byte of it is wrong.
    fn read(
        &self,
        group: GroupId,
        each: &mut dyn FnMut(Vec<Row>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError>;

    /// Begins a new snapshot; one at a time. What was begun before is dropped.
    fn begin(&mut self, group: GroupId) -> Result<(), StorageError>;

    /// Adds rows to the one begun.
    fn add(&mut self, rows: &[Row]) -> Result<(), StorageError>;

    /// Seals the one begun; true once it is durable and has replaced the one before. The work may go
    /// on elsewhere: ask again.
    fn seal(&mut self, meta: SnapshotMeta) -> Result<bool, StorageError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_applied_row() {
        let mut hash = StateHash::default();
        hash.insert(b"key", b"value");
        let row = AppliedRow { index: 0x0102, term: 3, hash };
        let bytes = row.to_bytes();
        assert_eq!(bytes[..16], [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..], hash.to_bytes());
        assert_eq!(AppliedRow::from_bytes(&bytes), Some(row));
        assert_eq!(AppliedRow::from_bytes(&bytes[1..]), None);
    }
}
