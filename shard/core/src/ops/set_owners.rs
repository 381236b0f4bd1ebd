//! SetOwners, a step: directories of one shard that were exchanged belong to others. All of them, or none.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, pb};

use super::set_owner::owned;
use crate::context::{Answer, Context, done};
use crate::schema;

/// An exchange has two.
const DIRECTORIES_MAX: usize = 2;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::SetOwners) -> Answer {
    if op.owners.is_empty() || op.owners.len() > DIRECTORIES_MAX {
        return Err(ShardError::Malformed.with(format_args!("{} owners", op.owners.len())).into());
    }
    let mut rows = Vec::with_capacity(op.owners.len());
    for pb::DirectoryOwner { directory, owner } in &op.owners {
        rows.push(owned(context, *directory, *owner)?);
    }
    for (directory, row) in rows {
        context.put(schema::directory_key(directory), &row)?;
    }
    done()
}
