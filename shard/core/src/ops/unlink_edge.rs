//! UnlinkEdge, a step: the living entry moves to the dead map; `owned` false when the inode lives on
//! elsewhere. It may hold the transaction's own lock, which goes with it.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, Time, TransactionId, pb};

use crate::context::{Answer, Context, done};
use crate::edges::quoted;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::UnlinkEdge) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let edge = context.free_edge(directory, &op.name, TransactionId(op.transaction))?;
    if edge.target != op.target {
        return Err(ShardError::Changed.with(quoted(&op.name)).into());
    }
    let died_at = match Time(op.died_at) {
        Time::ZERO => context.time,
        // It is locked since before, so it cannot be of then or later, nor can that be to come.
        at if at.0 > edge.created_at && at <= context.time => at,
        at => return Err(ShardError::Malformed.with(format_args!("a death at {}", at.0)).into()),
    };
    context.unlink(directory, &op.name, &edge, op.owned, died_at)?;
    context.touch(directory, row)?;
    done()
}
