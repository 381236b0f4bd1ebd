//! PurgeDirectory, a step: a removed directory that the transaction has locked without any entry, and that no edge owns any
//! more, goes for good.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done, local_directory};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::PurgeDirectory) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let key = schema::directory_key(directory);
    let row: Option<pb::DirectoryRow> = schema::get(&*context.tx, &key)?;
    if !row.is_some_and(|row| row.owner == 0 && row.transaction == op.transaction) {
        return Err(ShardError::Changed.with(format_args!("directory {directory} is not locked")).into());
    }
    context.tx.delete(key)?;
    done()
}
