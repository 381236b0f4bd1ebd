//! One group's log as raft reads it: bounds in memory, the newest entries cached, the rest fetched.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;

use eggs_proto::StoreId;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError as RaftStorageError};

use crate::membership::Membership;
use crate::storage::{GroupId, LogState, LogStore, SnapshotMeta, StorageError};

/// Entries kept in memory until they are applied; a group further behind reads the log again.
const CACHE_ENTRIES_MAX: usize = 4096;

pub(crate) struct GroupLog<L> {
    group: GroupId,
    store: Arc<L>,
    hard: HardState,
    conf: ConfState,
    /// The entry before `first`: what the snapshot stands for.
    before: (u64, u64),
    last: u64,
    /// Of the entry at `last`: raft takes no error when it asks for that.
    last_term: u64,
    cache: VecDeque<Entry>,
    /// What can be sent to a follower.
    snapshot: Option<SnapshotMeta>,
    /// Index of the applied members: an older snapshot may be from a former life of a member.
    members_index: u64,
    /// Raft asked for a snapshot that is not there.
    snapshot_asked: Cell<bool>,
    /// The store failed while raft was reading, which has no way to say so.
    failure: RefCell<Option<StorageError>>,
}

impl<L: LogStore> GroupLog<L> {
    /// `before`: index and term the log begins after; `last_term`: of its last entry; `membership`: of the applied
    /// state.
    pub(crate) fn new(
        group: GroupId,
        store: Arc<L>,
        state: LogState,
        before: (u64, u64),
        last_term: u64,
        membership: &Membership,
        snapshot: Option<SnapshotMeta>,
    ) -> Self {
        // What the log holds up to the snapshot counts as truncated, whether or not it is gone yet.
        let last = state.last.max(before.0);
        let (conf, cache, snapshot_asked) = (membership.to_conf(), VecDeque::new(), Cell::new(false));
        let failure = RefCell::new(None);
        GroupLog {
            group,
            store,
            hard: state.hard,
            conf,
            before,
            last,
            last_term,
            cache,
            snapshot,
            members_index: membership.index,
            snapshot_asked,
            failure,
        }
    }

    /// The index the log begins after.
    pub(crate) fn before(&self) -> u64 {
        self.before.0
    }

    pub(crate) fn hard(&self) -> &HardState {
        &self.hard
    }

    /// A snapshot is durable and can be sent.
    pub(crate) fn set_snapshot(&mut self, meta: SnapshotMeta) {
        self.snapshot = Some(meta);
    }

    /// The members are those of the entry at `index`.
    pub(crate) fn set_members(&mut self, index: u64) {
        self.members_index = index;
    }

    /// Whether a snapshot is needed that is not there; told once.
    pub(crate) fn take_snapshot_asked(&self) -> bool {
        self.snapshot_asked.take()
    }

    /// Why reading failed, if it did since this was asked last.
    pub(crate) fn take_failure(&self) -> Option<StorageError> {
        self.failure.take()
    }

    /// All entries are gone; the log goes on after (index, term).
    pub(crate) fn restarted(&mut self, index: u64, term: u64) {
        self.cache.clear();
        self.before = (index, term);
        (self.last, self.last_term) = (index, term);
    }

    /// After the entries were written (durably).
    pub(crate) fn appended(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first().map(|entry| entry.index) else { return };
        while self.cache.back().is_some_and(|entry| entry.index >= first) {
            self.cache.pop_back();
        }
        let last = &entries[entries.len() - 1];
        (self.last, self.last_term) = (last.index, last.term);
        self.cache.extend(entries);
        while self.cache.len() > CACHE_ENTRIES_MAX {
            self.cache.pop_front();
        }
    }

    pub(crate) fn set_hard(&mut self, hard: HardState) {
        self.hard = hard;
    }

    /// Entries up to `index` were applied.
    pub(crate) fn applied(&mut self, index: u64) {
        while self.cache.front().is_some_and(|entry| entry.index <= index) {
            self.cache.pop_front();
        }
        if self.cache.is_empty() {
            // A busy group's buffer is not kept by a group at rest.
            self.cache.shrink_to(8);
        }
    }

    /// A snapshot at (index, term) is durable: what came up to it is gone.
    pub(crate) fn truncated(&mut self, index: u64, term: u64) {
        self.before = (index, term);
    }

    fn cached(&self, index: u64) -> Option<&Entry> {
        let first = self.cache.front()?.index;
        self.cache.get(usize::try_from(index.checked_sub(first)?).ok()?)
    }
}

impl<L: LogStore> Storage for GroupLog<L> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.before.0 {
            return Err(raft::Error::Store(RaftStorageError::Compacted));
        }
        if high > self.last + 1 {
            return Err(raft::Error::Store(RaftStorageError::Unavailable));
        }
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        if self.cached(low).is_none() {
            return self.store.entries(self.group, low, high, max_bytes).map_err(|error| {
                self.failure.replace(Some(error));
                raft::Error::Store(RaftStorageError::LogTemporarilyUnavailable)
            });
        }
        let mut bytes = 0;
        let cached = (low..high).map_while(|index| self.cached(index));
        let fits = cached.enumerate().take_while(|(n, entry)| {
            bytes += entry.data.len() as u64;
            *n == 0 || bytes <= max_bytes
        });
        Ok(fits.map(|(_, entry)| entry.clone()).collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.before.0 {
            return Ok(self.before.1);
        }
        if index < self.before.0 {
            return Err(raft::Error::Store(RaftStorageError::Compacted));
        }
        if index == self.last {
            return Ok(self.last_term);
        }
        if let Some(entry) = self.cached(index) {
            return Ok(entry.term);
        }
        let context = GetEntriesContext::empty(false);
        // Raft bears no other error here.
        let unavailable = || raft::Error::Store(RaftStorageError::Unavailable);
        let entries = self.entries(index, index + 1, None, context).map_err(|_| unavailable())?;
        entries.first().map(|entry| entry.term).ok_or_else(unavailable)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        // One from before `to` became a member is no use to it: it would not find itself in there.
        let fit = |meta: &&SnapshotMeta| {
            let members = &meta.membership;
            meta.index >= request_index
                && members.index >= self.members_index
                && members.contains(StoreId(to))
        };
        let Some(meta) = self.snapshot.as_ref().filter(fit) else {
            self.snapshot_asked.set(true);
            return Err(raft::Error::Store(RaftStorageError::SnapshotTemporarilyUnavailable));
        };
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = meta.index;
        snapshot.mut_metadata().term = meta.term;
        snapshot.mut_metadata().set_conf_state(meta.membership.to_conf());
        Ok(snapshot)
    }
}
