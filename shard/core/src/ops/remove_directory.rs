//! RemoveDirectory, a step: an empty directory loses its owner; from here on nothing can be put into it.
//! Undo, RestoreDirectory: it gets its owner back, if this transaction took it.

use eggs_machine::Table;
use eggs_machine::table::prefix_end;
use eggs_proto::{InodeId, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, done, local_directory};
use crate::machine::{forbid, outcome};
use crate::schema::{self, Step};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::RemoveDirectory) -> Answer {
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
    row.owner = 0;
    context.put(schema::directory_key(directory), &row)?;
    done()
}

pub(crate) fn undo<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::RestoreDirectory) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    match outcome(context, TransactionId(op.transaction), Step::RemoveDirectory)? {
        None => forbid(context, op.transaction, Step::RemoveDirectory)?,
        Some(pb::WriteResult { result: Some(pb::write_result::Result::Done(_)), .. }) => {
            let key = schema::directory_key(directory);
            let row: Option<pb::DirectoryRow> = schema::get(&*context.tx, &key)?;
            let mut row = row.ok_or(ShardError::NotFound)?;
            if !InodeId(op.owner).is_directory() {
                return Err(ShardError::Malformed.with("owner").into());
            }
            if row.owner == 0 {
                row.owner = op.owner;
                context.put(key, &row)?;
            }
        }
        // It was refused: there is nothing to give back.
        Some(_) => {}
    }
    done()
}
