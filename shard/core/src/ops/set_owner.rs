//! SetOwner, a step: a directory that was moved belongs to another one.

use eggs_machine::Table;
use eggs_proto::{InodeId, ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::SetOwner) -> Answer {
    if InodeId(op.directory) == InodeId::ROOT {
        return Err(ShardError::IsRoot.into());
    }
    if !InodeId(op.owner).is_directory() || op.owner == op.directory {
        return Err(ShardError::Malformed.with(format_args!("owner {}", InodeId(op.owner))).into());
    }
    let (directory, mut row) = context.directory(op.directory)?;
    row.owner = op.owner;
    context.put(schema::directory_key(directory), &row)?;
    done()
}
