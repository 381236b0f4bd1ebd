//! LockDirectory, a step: an empty directory is to be removed; nothing can be put into it, and it cannot be changed.
//! Undo, UnlockDirectory.

use eggs_machine::Table;
use eggs_machine::table::prefix_end;
use eggs_proto::{InodeId, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, done, local_directory};
use crate::machine::{forbid, outcome};
use crate::schema::{self, Step};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::LockDirectory) -> Answer {
    if InodeId(op.directory) == InodeId::ROOT {
        return Err(ShardError::IsRoot.into());
    }
    let (directory, mut row) = context.directory(op.directory)?;
    if row.owner != op.owner {
        return Err(ShardError::Changed.with(format_args!("owner of directory {directory}")).into());
    }
    let entries = schema::id_key(schema::LIVING, directory.0);
    if !context.tx.page(&entries, &prefix_end(&entries), 1)?.is_empty() {
        return Err(ShardError::NotEmpty.with(format_args!("directory {directory}")).into());
    }
    row.transaction = op.transaction;
    context.put(schema::directory_key(directory), &row)?;
    done()
}

pub(crate) fn undo<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::UnlockDirectory) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    if outcome(context, TransactionId(op.transaction), Step::LockDirectory)?.is_none() {
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
