//! ExchangeEdge, a step: a name leads to another inode from now on, which was elsewhere until now; the one it led to goes
//! there.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, TransactionId, pb};

use super::link_edge::target;
use crate::context::{Answer, Context};
use crate::edges::quoted;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::ExchangeEdge) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let new = target(context, op.new_target, TransactionId(op.transaction))?;
    let edge = context.free_edge(directory, &op.name, TransactionId(op.transaction))?;
    if edge.target != op.target || edge.target == new.0 {
        return Err(ShardError::Changed.with(quoted(&op.name)).into());
    }
    let now = context.time;
    context.exchange(directory, &op.name, &edge, new, now)?;
    context.touch(directory, row)?;
    let reply = pb::LinkReply { inode: new.0, replaced: edge.target, created_at: now.0 };
    Ok(pb::write_result::Result::Link(reply))
}
