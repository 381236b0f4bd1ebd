//! A group's rows: those of sled, under those that were changed since sled was last told.
//!
//! Rows that change with every command (a directory, a session, the clock) reach sled once for many commands. What is
//! not there yet a crash loses: the log has it, and it is applied again.

use std::collections::BTreeMap;
use std::mem::take;
use std::ops::Bound;
use std::time::Instant;

use bytes::Bytes;
use eggs_consensus_core::{AppliedRow, GroupCommit};
use eggs_machine::on_sled::SledTable;
use eggs_machine::table::page_under;
use eggs_machine::{Batch, Row, Table, TableError};

/// What a row costs in memory besides its bytes.
const ROW_OVERHEAD_BYTES: usize = 96;

#[derive(Debug)]
pub(crate) struct RecentRows {
    below: SledTable,
    changes: BTreeMap<Bytes, Option<Bytes>>,
    /// Of the changes.
    bytes: usize,
    /// With the changes.
    applied: Option<AppliedRow>,
    /// The first of the changes.
    since: Option<Instant>,
}

impl RecentRows {
    pub(crate) fn new(below: SledTable, applied: Option<AppliedRow>) -> Self {
        RecentRows { below, changes: BTreeMap::new(), bytes: 0, applied, since: None }
    }

    pub(crate) fn applied(&self) -> Option<&AppliedRow> {
        self.applied.as_ref()
    }

    /// Bytes of memory that wait for sled.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// When the first change came that sled has not been told of.
    pub(crate) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Whether nothing waited before.
    pub(crate) fn commit(&mut self, commit: GroupCommit, now: Instant) -> bool {
        for (key, value) in commit.batch.changes {
            let new = key.len() + ROW_OVERHEAD_BYTES;
            self.bytes += value.as_ref().map_or(0, Bytes::len);
            match self.changes.insert(key, value) {
                Some(old) => self.bytes -= old.map_or(0, |old| old.len()),
                None => self.bytes += new,
            }
        }
        self.applied = Some(commit.applied);
        let first = self.since.is_none();
        self.since.get_or_insert(now);
        first
    }

    /// What sled has to be told, and what is applied with it.
    pub(crate) fn take(&mut self) -> Option<(Batch, &AppliedRow)> {
        self.since.take()?;
        self.bytes = 0;
        let batch = Batch { changes: take(&mut self.changes).into_iter().collect() };
        Some((batch, self.applied.as_ref()?))
    }

    /// Nothing waits, and nothing is applied.
    pub(crate) fn forget(&mut self) {
        *self = RecentRows::new(self.below.clone(), None);
    }

    pub(crate) fn below(&self) -> &SledTable {
        &self.below
    }
}

impl Table for RecentRows {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, TableError> {
        match self.changes.get(key) {
            Some(value) => Ok(value.clone()),
            None => self.below.get(key),
        }
    }

    fn page(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Row>, TableError> {
        if !to.is_empty() && from >= to {
            return Ok(Vec::new());
        }
        let end = if to.is_empty() { Bound::Unbounded } else { Bound::Excluded(to) };
        let changes = self.changes.range::<[u8], _>((Bound::Included(from), end));
        page_under(&self.below, changes.map(|(key, value)| (key, value.as_ref())), from, to, limit)
    }
}
