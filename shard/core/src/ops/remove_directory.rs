//! RemoveDirectory, a step: a directory that the transaction has locked, and whose name is gone, loses its owner.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done, local_directory};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::RemoveDirectory) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let key = schema::directory_key(directory);
    let row: Option<pb::DirectoryRow> = schema::get(&*context.tx, &key)?;
    let Some(mut row) = row.filter(|row| row.transaction == op.transaction) else {
        return Err(ShardError::Changed.with(format_args!("directory {directory} is not locked")).into());
    };
    row.owner = 0;
    row.transaction = 0;
    context.put(key, &row)?;
    done()
}
