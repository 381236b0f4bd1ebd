//! LockDirectory, a step: an empty directory is to be removed; nothing can be put into it, and it cannot be changed.
//! Or it is removed already and is to be purged: then it must not have dead entries either.
//! Undo, UnlockDirectory. That also ends the lock of a directory that was revived.

use eggs_machine::Table;
use eggs_machine::table::prefix_end;
use eggs_proto::{InodeId, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, Stop, done, local_directory};
use crate::machine::{forbid, outcome};
use crate::schema::{self, Step};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::LockDirectory) -> Answer {
    if InodeId(op.directory) == InodeId::ROOT {
        return Err(ShardError::IsRoot.into());
    }
    let (directory, mut row) =
        if op.removed { removed(context, op.directory)? } else { context.directory(op.directory)? };
    if !op.removed && row.owner != op.owner {
        return Err(ShardError::Changed.with(format_args!("owner of directory {directory}")).into());
    }
    let maps: &[u8] = if op.removed { &[schema::LIVING, schema::DEAD] } else { &[schema::LIVING] };
    for &tag in maps {
        let entries = schema::id_key(tag, directory.0);
        if !context.tx.page(&entries, &prefix_end(&entries), 1)?.is_empty() {
            return Err(ShardError::NotEmpty.with(format_args!("directory {directory}")).into());
        }
    }
    row.transaction = op.transaction;
    context.put(schema::directory_key(directory), &row)?;
    done()
}

/// A directory that is removed, and that nobody works on.
fn removed<T: Table + ?Sized>(
    context: &Context<'_, '_, T>,
    id: u64,
) -> Result<(InodeId, pb::DirectoryRow), Stop> {
    let id = local_directory(context.shard, id)?;
    let row: Option<pb::DirectoryRow> = schema::get(&*context.tx, &schema::directory_key(id))?;
    let row = row.ok_or_else(|| ShardError::NotFound.with(format_args!("directory {id}")))?;
    if row.transaction != 0 {
        return Err(ShardError::Locked.with(format_args!("directory {id}")).into());
    }
    if row.owner != 0 {
        return Err(ShardError::NotOwned.with(format_args!("directory {id} lives")).into());
    }
    Ok((id, row))
}

pub(crate) fn undo<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::UnlockDirectory) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let transaction = TransactionId(op.transaction);
    let revived = outcome(context, transaction, Step::ReviveDirectory)?.is_some();
    if !revived && outcome(context, transaction, Step::LockDirectory)?.is_none() {
        forbid(context, op.transaction, Step::LockDirectory)?;
    }
    let key = schema::directory_key(directory);
    let row: Option<pb::DirectoryRow> = schema::get(&*context.tx, &key)?;
    if let Some(mut row) = row.filter(|row| row.transaction == op.transaction) {
        row.transaction = 0;
        context.put(key, &row)?;
    }
    done()
}
