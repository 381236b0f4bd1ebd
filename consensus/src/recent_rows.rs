//! A group's rows: those of sled, under those that were changed since sled was last told.
//!
//! Rows that change with every command (a directory, a session, the clock) reach sled once for many commands, and those
//! that come and go (locks, transactions) not at all. What is not there yet a crash loses: the log has it, and it is applied
//! again.

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
            if value.is_none() && self.came_and_went(&key) {
                continue;
            }
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

    /// A row is deleted that sled was never told of: there is nothing to tell.
    fn came_and_went(&mut self, key: &Bytes) -> bool {
        let is_new = self.changes.contains_key(key) && matches!(self.below.get(key), Ok(None));
        if is_new && let Some(old) = self.changes.remove(key) {
            self.bytes -= key.len() + ROW_OVERHEAD_BYTES + old.map_or(0, |old| old.len());
        }
        is_new
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

#[cfg(test)]
mod tests {
    use eggs_consensus_core::{GroupId, Membership};
    use eggs_machine::hash::StateHash;

    use super::*;

    #[test]
    fn sled_is_told_of_what_stays_and_of_what_it_has_that_goes() {
        let db = sled::Config::new().temporary(true).open().unwrap();
        let below = SledTable::new((*db).clone(), 1);
        let mut staged = sled::Batch::default();
        let old = Batch { changes: vec![(Bytes::from("old"), Some(Bytes::from("1")))] };
        below.stage(old, &mut staged);
        db.apply_batch(staged).unwrap();
        let mut rows = RecentRows::new(below, None);
        let commit = |rows: &mut RecentRows, changes: &[(&'static str, Option<&'static str>)]| {
            let changes = changes.iter().map(|&(key, value)| (Bytes::from(key), value.map(Bytes::from)));
            let membership = Membership::default();
            let applied = AppliedRow { index: 1, term: 1, hash: StateHash::default(), membership };
            let batch = Batch { changes: changes.collect() };
            rows.commit(GroupCommit { group: GroupId(1), batch, applied }, Instant::now())
        };
        assert!(commit(&mut rows, &[("new", Some("22")), ("lock", Some("333"))]));
        assert!(!commit(&mut rows, &[("old", Some("4444")), ("lock", Some("5"))]));
        let full = rows.bytes();
        commit(&mut rows, &[("lock", None), ("old", None), ("never", None)]);
        assert!(rows.bytes() < full);
        let keys = |rows: &RecentRows| -> Vec<Bytes> {
            rows.page(&[], &[], 9).unwrap().into_iter().map(|(key, _)| key).collect()
        };
        assert_eq!(keys(&rows), ["new"]);
        assert_eq!((rows.get(b"lock").unwrap(), rows.get(b"old").unwrap()), (None, None));
        // It comes again.
        commit(&mut rows, &[("lock", Some("6"))]);
        assert_eq!(keys(&rows), ["lock", "new"]);
        commit(&mut rows, &[("lock", None)]);
        let (batch, _) = rows.take().unwrap();
        let told: Vec<_> = batch.changes.iter().map(|(key, value)| (&key[..], value.is_some())).collect();
        assert_eq!(told, [(&b"never"[..], false), (b"new", true), (b"old", false)]);
        assert_eq!(rows.bytes(), 0);
    }
}
