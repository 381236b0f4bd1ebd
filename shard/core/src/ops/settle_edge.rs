//! SettleEdge, a step: a name that the transaction has locked leads to another inode as of the instant at which the
//! other name was given to what it led to; it is unlocked.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, Time, TransactionId, pb};

use super::link_edge::target;
use crate::context::{Answer, Context, done};
use crate::edges::quoted;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::SettleEdge) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let new = target(context, op.new_target, TransactionId(op.transaction))?;
    let edge = context.free_edge(directory, &op.name, TransactionId(op.transaction))?;
    // Only a locked one could not be read as living since then.
    if edge.target != op.target || edge.target == new.0 || edge.transaction != op.transaction {
        return Err(ShardError::Changed.with(quoted(&op.name)).into());
    }
    let at = Time(op.exchanged_at);
    if at.0 <= edge.created_at || at > context.time {
        return Err(ShardError::Malformed.with(format_args!("an exchange at {}", at.0)).into());
    }
    context.exchange(directory, &op.name, &edge, new, at)?;
    context.touch(directory, row)?;
    done()
}
