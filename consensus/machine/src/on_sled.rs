//! The table of one group inside a sled tree: every key behind the group's two-byte prefix.
//!
//! sled is state that can be rebuilt, never the only copy: its `flush` is not an fsync. The consensus
//! shell decides when to trust it.

use bytes::Bytes;

use crate::table::{Batch, Row, Table, TableError, prefix_end};

/// One group's rows.
#[derive(Debug, Clone)]
pub struct SledTable {
    tree: sled::Tree,
    prefix: [u8; 2],
}

impl SledTable {
    pub fn new(tree: sled::Tree, group: u16) -> Self {
        SledTable { tree, prefix: group.to_be_bytes() }
    }

    /// Adds the changes to a batch of the whole tree, which the host applies once for all groups.
    pub fn stage(&self, batch: Batch, into: &mut sled::Batch) {
        for (key, value) in batch.changes {
            match value {
                Some(value) => into.insert(self.key(&key), &value[..]),
                None => into.remove(self.key(&key)),
            }
        }
    }

    fn key(&self, key: &[u8]) -> Vec<u8> {
        [&self.prefix, key].concat()
    }
}

impl Table for SledTable {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, TableError> {
        let value = self.tree.get(self.key(key)).map_err(failed)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn page(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Row>, TableError> {
        if !to.is_empty() && from >= to {
            return Ok(Vec::new());
        }
        let end = if to.is_empty() { prefix_end(&self.prefix) } else { self.key(to) };
        let from = self.key(from);
        // The last group's rows end where the tree ends.
        let rows = if end.is_empty() { self.tree.range(from..) } else { self.tree.range(from..end) };
        rows.take(limit)
            .map(|row| {
                let (key, value) = row.map_err(failed)?;
                let key = key
                    .get(self.prefix.len()..)
                    .ok_or_else(|| TableError("a key without a group".to_owned()))?;
                Ok((Bytes::copy_from_slice(key), Bytes::copy_from_slice(&value)))
            })
            .collect()
    }
}

fn failed(error: sled::Error) -> TableError {
    TableError(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_do_not_see_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let db = sled::open(directory.path()).unwrap();
        let tables: Vec<SledTable> =
            [0, 1, 255, 256, u16::MAX].map(|group| SledTable::new((*db).clone(), group)).to_vec();
        let mut batch = sled::Batch::default();
        for (n, table) in tables.iter().enumerate() {
            let value = Bytes::from(vec![n as u8]);
            table.stage(Batch { changes: vec![(Bytes::from_static(b"k"), Some(value))] }, &mut batch);
        }
        db.apply_batch(batch).unwrap();
        for (n, table) in tables.iter().enumerate() {
            assert_eq!(table.get(b"k").unwrap().unwrap(), vec![n as u8]);
            assert_eq!(table.page(b"", b"", 10).unwrap().len(), 1);
            assert_eq!(table.page(b"a", b"k", 10).unwrap().len(), 0);
        }
    }
}
