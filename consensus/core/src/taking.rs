//! Taking a snapshot of one group in small steps while the group goes on.
//!
//! The snapshot is of one applied index. Rows are read in key order, a page per step; a row that is
//! about to change before it was read leaves its old value behind first (copy on write).

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_machine::hash::StateHash;
use eggs_machine::table::after;
use eggs_machine::{Batch, Row, Table};

use crate::storage::{GroupId, SnapshotMeta, SnapshotStore, StorageError};

/// Rows read in one step: about half a millisecond of a turn.
const STEP_ROWS: usize = 512;

pub(crate) struct Taking {
    pub(crate) group: GroupId,
    meta: SnapshotMeta,
    /// Rows before this one are in the snapshot.
    cursor: Vec<u8>,
    old: BTreeMap<Bytes, Option<Bytes>>,
    hash: StateHash,
    all_rows: bool,
}

impl Taking {
    pub(crate) fn new(group: GroupId, meta: SnapshotMeta) -> Self {
        Taking {
            group,
            meta,
            cursor: Vec::new(),
            old: BTreeMap::new(),
            hash: StateHash::default(),
            all_rows: false,
        }
    }

    /// All rows are read and written; the store is making them durable.
    pub(crate) fn is_sealing(&self) -> bool {
        self.all_rows
    }

    /// Must see every batch of the group before it reaches the table.
    pub(crate) fn before_commit(&mut self, table: &impl Table, batch: &Batch) -> Result<(), StorageError> {
        if self.all_rows {
            return Ok(());
        }
        for (key, _) in &batch.changes {
            if key[..] >= self.cursor[..] && !self.old.contains_key(key) {
                self.old.insert(key.clone(), table.get(key)?);
            }
        }
        Ok(())
    }

    /// One page further; the snapshot's meta once it is durable.
    pub(crate) fn step(
        &mut self,
        table: &impl Table,
        store: &mut impl SnapshotStore,
    ) -> Result<Option<SnapshotMeta>, StorageError> {
        if !self.all_rows {
            let rows = self.next_rows(table)?;
            for (key, value) in &rows {
                self.hash.insert(key, value);
                self.meta.bytes += (key.len() + value.len()) as u64;
            }
            store.add(&rows)?;
            if !self.all_rows {
                return Ok(None);
            }
            if self.hash != self.meta.hash {
                // CO-3: the table does not hold what was applied to it.
                return Err(StorageError::of_state(format!(
                    "state of {} at index {} has hash {}, not {}: the state store is damaged",
                    self.group, self.meta.index, self.hash, self.meta.hash
                )));
            }
        }
        Ok(store.seal(self.meta.clone())?.then(|| self.meta.clone()))
    }

    fn next_rows(&mut self, table: &impl Table) -> Result<Vec<Row>, StorageError> {
        let rows = table.page(&self.cursor, &[], STEP_ROWS)?;
        self.all_rows = rows.len() < STEP_ROWS;
        let old = match rows.last() {
            Some((last, _)) if !self.all_rows => {
                self.cursor = after(last);
                let later = self.old.split_off(&self.cursor[..]);
                std::mem::replace(&mut self.old, later)
            }
            _ => std::mem::take(&mut self.old),
        };
        if old.is_empty() {
            return Ok(rows);
        }
        let mut merged: BTreeMap<Bytes, Bytes> = rows.into_iter().collect();
        for (key, value) in old {
            match value {
                Some(value) => merged.insert(key, value),
                None => merged.remove(&key),
            };
        }
        Ok(merged.into_iter().collect())
    }
}
