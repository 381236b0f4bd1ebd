//! Unlink: a file or symlink moves to the dead map.

use eggs_machine::Table;
use eggs_proto::{InodeId, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, done};
use crate::edges::quoted;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::Unlink) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let edge = context.free_edge(directory, &op.name, TransactionId(0))?;
    if op.expected != 0 && op.expected != edge.target {
        return Err(ShardError::Changed.with(quoted(&op.name)).into());
    }
    if InodeId(edge.target).is_directory() {
        return Err(ShardError::IsDirectory.with(quoted(&op.name)).into());
    }
    context.unlink(directory, &op.name, &edge, true, context.time)?;
    context.touch(directory, row)?;
    done()
}
