//! UnlinkEdge, a step: the living entry moves to the dead map; `owned` false when the inode lives on
//! elsewhere. It may hold the transaction's own lock, which goes with it.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, done};
use crate::edges::quoted;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::UnlinkEdge) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let edge = context.free_edge(directory, &op.name, TransactionId(op.transaction))?;
    if edge.target != op.target {
        return Err(ShardError::Changed.with(quoted(&op.name)).into());
    }
    context.unlink(directory, &op.name, &edge, op.owned)?;
    context.touch(directory, row)?;
    done()
}
