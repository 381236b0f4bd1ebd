//! SetOwner, a step: a directory that was moved belongs to another one.

use eggs_machine::Table;
use eggs_proto::{InodeId, ServiceError, ShardError, pb};

use crate::context::{Answer, Context, Stop, done};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::SetOwner) -> Answer {
    let (directory, row) = owned(context, op.directory, op.owner)?;
    context.put(schema::directory_key(directory), &row)?;
    done()
}

/// The directory's row with its new owner.
pub(crate) fn owned<T: Table + ?Sized>(
    context: &Context<'_, '_, T>,
    directory: u64,
    owner: u64,
) -> Result<(InodeId, pb::DirectoryRow), Stop> {
    if InodeId(directory) == InodeId::ROOT {
        return Err(ShardError::IsRoot.into());
    }
    if !InodeId(owner).is_directory() || owner == directory {
        return Err(ShardError::Malformed.with(format_args!("owner {}", InodeId(owner))).into());
    }
    let (directory, row) = context.directory(directory)?;
    Ok((directory, pb::DirectoryRow { owner, ..row }))
}
