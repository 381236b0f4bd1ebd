//! Living and dead edges: with [`crate::dead_edges`] the only code that changes the L and X tables.

use bytes::Bytes;
use eggs_machine::{Table, TableError};
use eggs_proto::{InodeId, ServiceError, ShardError, Time, TransactionId, pb};

use crate::context::{Context, Stop, check_name};
use crate::schema;

impl<T: Table + ?Sized> Context<'_, '_, T> {
    /// The living edge under a valid name.
    pub fn edge(&self, directory: InodeId, name: &[u8]) -> Result<Option<pb::EdgeRow>, Stop> {
        check_name(name)?;
        Ok(schema::get(&*self.tx, &schema::living_key(directory, name))?)
    }

    /// The living edge, which must exist and be free for `transaction` (0: for anybody).
    pub fn free_edge(
        &self,
        directory: InodeId,
        name: &[u8],
        transaction: TransactionId,
    ) -> Result<pb::EdgeRow, Stop> {
        let edge = self.edge(directory, name)?.ok_or_else(|| ShardError::NotFound.with(quoted(name)))?;
        not_locked(&edge, name, transaction)?;
        Ok(edge)
    }

    /// What `target` would replace under the name; refuses what cannot be replaced.
    pub fn replaceable(
        &self,
        directory: InodeId,
        name: &[u8],
        target: InodeId,
        replace: i32,
        transaction: TransactionId,
    ) -> Result<Option<pb::EdgeRow>, Stop> {
        let replace = pb::Replace::try_from(replace)
            .map_err(|_| ShardError::Malformed.with(format_args!("replace {replace}")))?;
        let Some(old) = self.edge(directory, name)? else { return Ok(None) };
        // Locked, it may have been moved away already.
        not_locked(&old, name, transaction)?;
        let refusal = match (replace, target.is_directory(), InodeId(old.target).is_directory()) {
            (pb::Replace::Refuse, ..) | (_, true, true) => Some(ShardError::Exists),
            (_, false, true) => Some(ShardError::IsDirectory),
            (_, true, false) => Some(ShardError::NotDirectory),
            (_, false, false) => None,
        };
        if let Some(refusal) = refusal {
            return Err(refusal.with(quoted(name)).into());
        }
        Ok(Some(old))
    }

    /// Links `target` now; `old`, what had the name, dies now.
    pub fn link(
        &mut self,
        directory: InodeId,
        name: &[u8],
        target: InodeId,
        old: Option<&pb::EdgeRow>,
    ) -> Result<pb::write_result::Result, TableError> {
        if let Some(old) = old {
            self.bury(directory, name, old, true, self.time)?;
        }
        let row = pb::EdgeRow { target: target.0, created_at: self.time.0, transaction: 0 };
        self.put(schema::living_key(directory, name), &row)?;
        Ok(pb::write_result::Result::Link(pb::LinkReply {
            inode: target.0,
            replaced: old.map_or(0, |old| old.target),
            created_at: self.time.0,
        }))
    }

    /// The name leads to `target` instead as of an instant, at which `old` dies; its inode lives on elsewhere.
    pub fn exchange(
        &mut self,
        directory: InodeId,
        name: &[u8],
        old: &pb::EdgeRow,
        target: InodeId,
        at: Time,
    ) -> Result<(), TableError> {
        self.bury(directory, name, old, false, at)?;
        let row = pb::EdgeRow { target: target.0, created_at: at.0, transaction: 0 };
        self.put(schema::living_key(directory, name), &row)
    }

    /// Records the death of `old`. The caller removes or overwrites the living edge.
    fn bury(
        &mut self,
        directory: InodeId,
        name: &[u8],
        old: &pb::EdgeRow,
        owned: bool,
        died_at: Time,
    ) -> Result<(), TableError> {
        let row = pb::DeadEdgeRow { target: old.target, created_at: old.created_at, owned, transaction: 0 };
        self.put(schema::dead_key(directory, name, died_at), &row)
    }

    /// Moves the living edge to the dead map: now, or as of an instant since which nobody could read it as living.
    pub fn unlink(
        &mut self,
        directory: InodeId,
        name: &[u8],
        old: &pb::EdgeRow,
        owned: bool,
        died_at: Time,
    ) -> Result<(), TableError> {
        self.bury(directory, name, old, owned, died_at)?;
        self.tx.delete(schema::living_key(directory, name))
    }
}

fn not_locked(edge: &pb::EdgeRow, name: &[u8], transaction: TransactionId) -> Result<(), Stop> {
    if edge.transaction != 0 && edge.transaction != transaction.0 {
        return Err(ShardError::Locked.with(quoted(name)).into());
    }
    Ok(())
}

/// A name for people.
pub(crate) fn quoted(name: &[u8]) -> String {
    format!("'{}'", name.escape_ascii())
}

/// An edge that was visible at an instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub target: InodeId,
    pub created_at: u64,
    /// Not 0: a move that may have taken it away by that instant.
    pub locked_by: u64,
}

/// The living or dead edge of a name that was visible at an instant (`at` 0: now).
///
/// The living edge is visible from `created_at` on. Before that, the first death after the instant
/// decides: the intervals of a name do not overlap (SH-5).
pub(crate) fn resolve<T: Table + ?Sized>(
    table: &T,
    directory: InodeId,
    name: &[u8],
    at: Time,
) -> Result<Option<Seen>, TableError> {
    let living: Option<pb::EdgeRow> = schema::get(table, &schema::living_key(directory, name))?;
    if at.is_unset() || living.is_some_and(|edge| edge.created_at <= at.0) {
        return Ok(living.map(|edge| Seen {
            target: InodeId(edge.target),
            created_at: edge.created_at,
            locked_by: edge.transaction,
        }));
    }
    if at == Time::MAX {
        return Ok(None);
    }
    let from = schema::dead_key(directory, name, at.next());
    let to = schema::dead_name_end(directory, name);
    let first = table.page(&from, &to, 1)?.into_iter().next();
    let edge: Option<pb::DeadEdgeRow> =
        first.map(|(_, value): (Bytes, Bytes)| schema::decode(value)).transpose()?;
    let edge = edge.filter(|edge| edge.created_at <= at.0);
    Ok(edge.map(|edge| Seen { target: InodeId(edge.target), created_at: edge.created_at, locked_by: 0 }))
}
