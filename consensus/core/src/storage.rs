//! What a host keeps, as it asks its shell for it: log, state and snapshots.

use bytes::Bytes;
use eggs_machine::hash::StateHash;
use eggs_machine::{Batch, Row, Table, TableError};
use eggs_proto::{StoreId, pb};
use prost::Message;
use raft::eraftpb::{Entry, HardState};

use crate::host::HostError;
use crate::membership::Membership;

pub use eggs_proto::GroupId;

/// Storage failed or holds what cannot be. The host stops; nothing is answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}")]
pub struct StorageError {
    what: String,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Truth,
    Lost,
    State,
}

impl StorageError {
    /// Of the log or the snapshots: the truth.
    pub fn new(what: impl Into<String>) -> Self {
        StorageError { what: what.into(), kind: Kind::Truth }
    }

    /// The log or the snapshots have lost what was promised to others: the store must not take part any more (CO-8).
    pub fn damaged(what: impl Into<String>) -> Self {
        StorageError { what: what.into(), kind: Kind::Lost }
    }

    /// Of the state, which can be rebuilt from the truth.
    pub fn of_state(what: impl Into<String>) -> Self {
        StorageError { what: what.into(), kind: Kind::State }
    }

    /// Whether only the state is in trouble.
    pub fn is_of_state(&self) -> bool {
        self.kind == Kind::State
    }

    pub fn is_damage(&self) -> bool {
        self.kind == Kind::Lost
    }
}

impl From<HostError> for StorageError {
    /// Of the same kind, naming the group.
    fn from(error: HostError) -> Self {
        StorageError { what: error.to_string(), kind: error.error.kind }
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
    /// The voters it was founded with here; empty when it came here by a snapshot.
    pub founding: Vec<StoreId>,
    /// The replica was removed; what it promised in elections is still held.
    pub removed: bool,
    /// Term and index up to which a log that was here before may have acknowledged entries: until this one is as far, it
    /// has no say in elections (CO-8).
    pub floor: (u64, u64),
}

/// What one turn adds to a group's log. Entries replace those from their first index on.
#[derive(Debug, Clone)]
pub struct LogWrite {
    pub group: GroupId,
    pub hard: Option<HardState>,
    pub entries: Vec<Entry>,
    pub change: Option<LogChange>,
}

/// What happens to the log as a whole, before the hard state and entries of the same write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogChange {
    /// It begins, with these voters. (Nothing is there of it, or a removed one.)
    Found(Vec<StoreId>),
    /// All entries go, and the founding voters: it goes on after a snapshot, or as a replica that waits for one. It is not
    /// removed (any more).
    Restart { floor: (u64, u64) },
    /// All but the hard state goes, and [`LogState::removed`] is set.
    Remove { floor: (u64, u64) },
}

/// The durable raft logs of all groups of a store.
pub trait LogStore: Send + Sync + 'static {
    /// All groups that anything was ever written of, removed ones too, in order.
    fn groups(&self) -> Result<Vec<GroupId>, StorageError>;

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

    /// Writes all of it with one fsync, all or nothing; durable when it returns.
    fn write(&self, writes: Vec<LogWrite>) -> Result<(), StorageError>;

    /// Entries below `first` are no longer needed. Need not be durable.
    fn truncate(&self, group: GroupId, first: u64) -> Result<(), StorageError>;
}

/// How far the state of a group is, changed together with the rows (CO-2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AppliedRow {
    pub index: u64,
    pub term: u64,
    pub hash: StateHash,
    pub membership: Membership,
}

impl AppliedRow {
    /// An encoded [`pb::AppliedRow`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let row = pb::AppliedRow {
            index: self.index,
            term: self.term,
            hash: Bytes::copy_from_slice(&self.hash.to_bytes()),
            membership: Some((&self.membership).into()),
        };
        row.encode_to_vec()
    }

    /// `None` when it is not one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let row = pb::AppliedRow::decode(bytes).ok()?;
        let hash = <[u8; 16]>::try_from(&row.hash[..]).ok()?;
        let membership = (&row.membership?).into();
        Some(AppliedRow { index: row.index, term: row.term, hash: StateHash::from_bytes(hash), membership })
    }
}

/// What a run of entries changes in a group's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupCommit {
    pub group: GroupId,
    pub batch: Batch,
    pub applied: AppliedRow,
}

/// The state of all groups: rebuildable, so it need not be durable — but what it holds of a group is
/// some earlier state of it with the applied row of that very state.
pub trait StateStore {
    type Table: Table;

    /// Makes room for a group: before anything else is asked of it. Again is no harm.
    fn add(&mut self, group: GroupId) -> Result<(), StorageError>;

    fn table(&self, group: GroupId) -> &Self::Table;

    /// `None`: no state of this group.
    fn applied(&self, group: GroupId) -> Result<Option<AppliedRow>, StorageError>;

    /// Whether it was closed in order, so that its rows need no verification.
    fn closed_cleanly(&self) -> bool;

    /// Makes all changes; after a crash all of a group's are there, or none (CO-2).
    fn commit(&mut self, commits: Vec<GroupCommit>) -> Result<(), StorageError>;

    /// Removes all of a group: the rows and the applied row.
    fn clear(&mut self, group: GroupId) -> Result<(), StorageError>;
}

/// Where a snapshot stands in its group's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMeta {
    pub index: u64,
    pub term: u64,
    pub hash: StateHash,
    /// Bytes of all keys and values.
    pub bytes: u64,
    pub membership: Membership,
}

/// A piece of a snapshot as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub bytes: Bytes,
    /// Bytes of the whole.
    pub total: u64,
}

/// Durable, checksummed snapshots: the newest of each group.
pub trait SnapshotStore {
    fn latest(&self, group: GroupId) -> Result<Option<SnapshotMeta>, StorageError>;

    /// A page of rows of the newest snapshot, in order, and where the next begins; the first is at 0. An error when
    /// any byte of it is wrong.
    fn page(&self, group: GroupId, at: u64) -> Result<(Vec<Row>, Option<u64>), StorageError>;

    /// Begins a new snapshot; one at a time. What was begun before is dropped.
    fn begin(&mut self, group: GroupId) -> Result<(), StorageError>;

    /// Adds rows to the one begun.
    fn add(&mut self, rows: &[Row]) -> Result<(), StorageError>;

    /// Seals the one begun; true once it is durable and has replaced the one before. The work may go
    /// on elsewhere: ask again.
    fn seal(&mut self, meta: SnapshotMeta) -> Result<bool, StorageError>;

    /// At most `max` stored bytes of the newest snapshot from `offset` on; `None` when the newest is not
    /// of (index, term).
    fn piece(
        &self,
        group: GroupId,
        at: (u64, u64),
        offset: u64,
        max: usize,
    ) -> Result<Option<Piece>, StorageError>;

    /// How many bytes of another store's snapshot of (index, term) are here already, to go on from.
    fn received(&self, group: GroupId, at: (u64, u64)) -> Result<u64, StorageError>;

    /// Keeps a piece of another store's snapshot of (index, term); offset 0 begins anew. Need not be durable.
    fn receive(
        &mut self,
        group: GroupId,
        at: (u64, u64),
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), StorageError>;

    /// Verifies every byte of what was received of (index, term), makes it durable and the group's newest snapshot, and
    /// answers what it is. `None`: the work goes on elsewhere, ask again; one at a time. An error that is of the state:
    /// what was received is no such snapshot, it is gone and can be fetched anew.
    fn install(&mut self, group: GroupId, at: (u64, u64)) -> Result<Option<SnapshotMeta>, StorageError>;

    /// Removes all of a group.
    fn remove(&mut self, group: GroupId) -> Result<(), StorageError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_applied_row() {
        let mut hash = StateHash::default();
        hash.insert(b"key", b"value");
        let membership = Membership { voters: vec![StoreId(1)], learners: vec![], index: 4 };
        let row = AppliedRow { index: 0x0102, term: 3, hash, membership };
        let bytes = row.to_bytes();
        assert_eq!(bytes[..7], [8, 0x82, 2, 16, 3, 0x1a, 16]);
        assert_eq!(bytes[7..23], hash.to_bytes());
        assert_eq!(bytes[23..], [0x22, 12, 10, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0x18, 4]);
        assert_eq!(AppliedRow::from_bytes(&bytes), Some(row));
        assert_eq!(AppliedRow::from_bytes(&bytes[1..]), None);
    }
}
