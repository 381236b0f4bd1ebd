//! ReviveDirectory, a step: a removed directory gets an owner again, as it was but for that. It is locked, as no name leads
//! to it yet: nobody who remembers it can put anything into it. Undo: RemoveDirectory.

use eggs_machine::Table;
use eggs_proto::{InodeId, ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done, local_directory};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::ReviveDirectory) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    if !InodeId(op.owner).is_directory() || op.owner == op.directory {
        return Err(ShardError::Malformed.with(format_args!("owner {}", InodeId(op.owner))).into());
    }
    let key = schema::directory_key(directory);
    let row: Option<pb::DirectoryRow> = schema::get(&*context.tx, &key)?;
    let mut row = row.ok_or_else(|| ShardError::NotFound.with(format_args!("directory {directory}")))?;
    if row.transaction != 0 {
        return Err(ShardError::Locked.with(format_args!("directory {directory}")).into());
    }
    if row.owner != 0 {
        return Err(ShardError::NotOwned.with(format_args!("directory {directory} lives")).into());
    }
    row.owner = op.owner;
    row.transaction = op.transaction;
    context.put(key, &row)?;
    done()
}
