//! The ordered table a core's state lives in.

use bytes::Bytes;

/// Reading or writing the table failed: the disk, or bytes that are not a row. It stops the replica;
/// it is never an answer to a request.
#[derive(Debug, Clone, thiserror::Error)]
#[error("state table: {0}")]
pub struct TableError(pub String);

/// A key and its value.
pub type Row = (Bytes, Bytes);

/// An ordered map from bytes to bytes: the view of one group's state.
///
/// Keys sort by bytes. The keys that start with [`RESERVED`] belong to [`crate::group`] (sessions,
/// clock), not to the machine.
pub trait Table {
    /// The value under `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, TableError>;

    /// Rows with `from <= key < to` in order, at most `limit`; `to` empty: to the end.
    ///
    /// Paged, not an iterator: a page is a bounded piece of work, and a caller that wants more asks
    /// again from the last key (see [`scan`]).
    fn page(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Row>, TableError>;
}

/// Tag byte of the rows of sessions and clock; a machine's tags are ASCII letters.
pub const RESERVED: u8 = 0x00;

/// Calls `each` for the rows with `from <= key < to` in order until it returns false.
pub fn scan(
    table: &(impl Table + ?Sized),
    from: &[u8],
    to: &[u8],
    mut each: impl FnMut(&Bytes, &Bytes) -> Result<bool, TableError>,
) -> Result<(), TableError> {
    const PAGE: usize = 256;
    let mut from = from.to_vec();
    // Most scans end within a few rows: start small, go on in full pages.
    let mut limit = 16;
    loop {
        let rows = table.page(&from, to, limit)?;
        for (key, value) in &rows {
            if !each(key, value)? {
                return Ok(());
            }
        }
        if rows.len() < limit {
            return Ok(());
        }
        from = after(&rows[rows.len() - 1].0);
        limit = PAGE;
    }
}

/// A page of `table` as it is with changes on top: `changes` are those with `from <= key < to`, in order; `None`
/// deletes.
pub fn page_under<'a, T: Table + ?Sized>(
    table: &T,
    changes: impl Iterator<Item = (&'a Bytes, Option<&'a Bytes>)>,
    from: &[u8],
    to: &[u8],
    limit: usize,
) -> Result<Vec<Row>, TableError> {
    /// Rows of the table may be deleted by the changes: a few more than asked for save going there again.
    const BELOW_MIN: usize = 64;
    let mut changes = changes.peekable();
    if changes.peek().is_none() {
        return table.page(from, to, limit);
    }
    let mut merged = Vec::new();
    let mut from = from.to_vec();
    let asked = limit.max(BELOW_MIN);
    loop {
        let below = table.page(&from, to, asked)?;
        // Beyond the last row of a full page the table has rows that were not seen.
        let more = (below.len() == asked).then(|| below.last().map(|(last, _)| last.clone())).flatten();
        let mut below = below.into_iter().peekable();
        while merged.len() < limit {
            let change = match (below.peek(), changes.peek()) {
                (None, None) => break,
                (Some(_), None) => false,
                (None, Some((key, _))) => {
                    if more.as_ref().is_some_and(|seen| *key > seen) {
                        break;
                    }
                    true
                }
                (Some((row, _)), Some((key, _))) => *key <= row,
            };
            if !change {
                merged.extend(below.next());
                continue;
            }
            if let Some((key, value)) = changes.next() {
                below.next_if(|(row, _)| row == key);
                merged.extend(value.map(|value| (key.clone(), value.clone())));
            }
        }
        match more {
            Some(seen) if merged.len() < limit => from = after(&seen),
            _ => return Ok(merged),
        }
    }
}

/// The smallest key after `key`.
pub fn after(key: &[u8]) -> Vec<u8> {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next
}

/// The smallest key after all that start with `prefix`; empty when there is none.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end
}

/// Changes to one table, in key order: `None` deletes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    pub changes: Vec<(Bytes, Option<Bytes>)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ends() {
        assert_eq!(prefix_end(b"ab"), b"ac");
        assert_eq!(prefix_end(&[1, 255]), [2]);
        assert!(prefix_end(&[255, 255]).is_empty());
    }
}
