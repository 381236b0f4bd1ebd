//! LockEdge, a step: nobody but the transaction can change the edge until it is unlocked or unlinked.
//! Undo, UnlockEdge.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, done, local_directory};
use crate::edges::quoted;
use crate::machine::{forbid, outcome};
use crate::schema::{self, Step};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::LockEdge) -> Answer {
    let (directory, _) = context.directory(op.directory)?;
    let mut edge = context.free_edge(directory, &op.name, TransactionId(op.transaction))?;
    if edge.target != op.target {
        return Err(ShardError::Changed.with(quoted(&op.name)).into());
    }
    edge.transaction = op.transaction;
    context.put(schema::living_key(directory, &op.name), &edge)?;
    done()
}

pub(crate) fn undo<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::UnlockEdge) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let edge = context.edge(directory, &op.name)?;
    if outcome(context, TransactionId(op.transaction), Step::LockEdge)?.is_none() {
        forbid(context, op.transaction, Step::LockEdge)?;
    }
    if let Some(mut edge) = edge.filter(|edge| edge.transaction == op.transaction) {
        edge.transaction = 0;
        context.put(schema::living_key(directory, &op.name), &edge)?;
    }
    done()
}
