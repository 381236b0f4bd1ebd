//! One command's reads and writes on a table.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use crate::hash::StateHash;
use crate::table::{Batch, Row, Table, TableError, page_under};

/// Reads its own writes; nothing reaches the table until [`Tx::finish`] turns it into a batch.
///
/// One transaction can span several commands of a group (the host applies a run of committed entries
/// in one batch).
#[derive(Debug)]
pub struct Tx<'a, T: Table + ?Sized = dyn Table + 'a> {
    table: &'a T,
    writes: BTreeMap<Bytes, Write>,
    /// What was read and not written: most rows are read before they are written, and the state hash
    /// needs the value before. As short-lived as the transaction.
    reads: RefCell<BTreeMap<Bytes, Option<Bytes>>>,
    hash: StateHash,
}

#[derive(Debug)]
struct Write {
    before: Option<Bytes>,
    now: Option<Bytes>,
}

impl<'a, T: Table + ?Sized> Tx<'a, T> {
    /// `hash` is the state hash of `table` as it is.
    pub fn new(table: &'a T, hash: StateHash) -> Self {
        Tx { table, writes: BTreeMap::new(), reads: RefCell::default(), hash }
    }

    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<(), TableError> {
        self.write(key.into(), Some(value.into()))
    }

    pub fn delete(&mut self, key: impl Into<Bytes>) -> Result<(), TableError> {
        self.write(key.into(), None)
    }

    fn write(&mut self, key: Bytes, value: Option<Bytes>) -> Result<(), TableError> {
        if let Some(write) = self.writes.get_mut(&key) {
            write.now = value;
        } else {
            let before = match self.reads.get_mut().remove(&key) {
                Some(before) => before,
                None => self.table.get(&key)?,
            };
            self.writes.insert(key, Write { before, now: value });
        }
        Ok(())
    }

    /// The changes in key order, and the state hash with them applied.
    pub fn finish(self) -> (Batch, StateHash) {
        let Tx { writes, mut hash, .. } = self;
        let mut changes = Vec::with_capacity(writes.len());
        for (key, Write { before, now }) in writes {
            if before == now {
                continue;
            }
            if let Some(before) = &before {
                hash.remove(&key, before);
            }
            if let Some(now) = &now {
                hash.insert(&key, now);
            }
            changes.push((key, now));
        }
        (Batch { changes }, hash)
    }
}

impl<T: Table + ?Sized> Table for Tx<'_, T> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, TableError> {
        match self.writes.get(key) {
            Some(write) => Ok(write.now.clone()),
            None => {
                if let Some(value) = self.reads.borrow().get(key) {
                    return Ok(value.clone());
                }
                let value = self.table.get(key)?;
                self.reads.borrow_mut().insert(Bytes::copy_from_slice(key), value.clone());
                Ok(value)
            }
        }
    }

    fn page(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Row>, TableError> {
        if !to.is_empty() && from >= to {
            return Ok(Vec::new());
        }
        let end = if to.is_empty() { Bound::Unbounded } else { Bound::Excluded(to) };
        let writes = self.writes.range::<[u8], _>((Bound::Included(from), end));
        page_under(self.table, writes.map(|(key, write)| (key, write.now.as_ref())), from, to, limit)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::MemoryTable;

    type Change = (Vec<u8>, Option<Vec<u8>>);

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let key = prop::collection::vec(0u8..4, 0..3);
        prop::collection::vec((key, prop::option::of(prop::collection::vec(0u8..3, 0..2))), 0..20)
    }

    fn write(table: &mut MemoryTable, hash: StateHash, all: &[Change]) -> StateHash {
        let mut tx = Tx::new(&*table, hash);
        for (key, value) in all {
            match value {
                Some(value) => tx.put(key.clone(), value.clone()).unwrap(),
                None => tx.delete(key.clone()).unwrap(),
            }
        }
        let (batch, hash) = tx.finish();
        table.apply(batch);
        hash
    }

    proptest! {
        #[test]
        fn a_transaction_reads_as_the_table_will_after_it(
            base in changes(), all in changes(), from in prop::collection::vec(0u8..4, 0..3),
            to in prop::collection::vec(0u8..4, 0..3), limit in 1usize..8,
        ) {
            let mut table = MemoryTable::default();
            let hash = write(&mut table, StateHash::default(), &base);
            let mut after = table.clone();
            write(&mut after, hash, &all);
            let mut tx = Tx::new(&table, hash);
            for (key, value) in &all {
                match value {
                    Some(value) => tx.put(key.clone(), value.clone()).unwrap(),
                    None => tx.delete(key.clone()).unwrap(),
                }
            }
            prop_assert_eq!(tx.page(&from, &to, limit).unwrap(), after.page(&from, &to, limit).unwrap());
            prop_assert_eq!(tx.get(&from).unwrap(), after.get(&from).unwrap());
        }

        #[test]
        fn the_running_hash_is_the_hash_of_the_rows(first in changes(), second in changes()) {
            let mut table = MemoryTable::default();
            let hash = write(&mut table, StateHash::default(), &first);
            let hash = write(&mut table, hash, &second);
            let mut whole = StateHash::default();
            for (key, value) in table.iter() {
                whole.insert(key, value);
            }
            prop_assert_eq!(hash, whole);
        }
    }
}
