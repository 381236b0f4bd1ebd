//! LockDeadEdge, a step: the target of a dead edge, which owns it, is to live in another directory; nobody else brings it
//! back or purges it meanwhile.
//! FreeDeadEdge ends it: the target lives, so that the edge does not own it any more, or (undo) it does not.

use eggs_machine::Table;
use eggs_proto::{Time, TransactionId, pb};

use crate::context::{Answer, Context, check_name, done, local_directory};
use crate::dead_edges::Death;
use crate::machine::{forbid, outcome};
use crate::schema::{self, Step};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::LockDeadEdge) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let death = Death { directory, name: &op.name, died_at: Time(op.died_at) };
    let transaction = TransactionId(op.transaction);
    let row = context.owning_edge(death, op.target, transaction)?;
    context.lock_dead_edge(death, &row, transaction)?;
    done()
}

pub(crate) fn free<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::FreeDeadEdge) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    check_name(&op.name)?;
    let transaction = TransactionId(op.transaction);
    let death = Death { directory, name: &op.name, died_at: Time(op.died_at) };
    if outcome(context, transaction, Step::LockDeadEdge)?.is_none() {
        forbid(context, op.transaction, Step::LockDeadEdge)?;
    }
    let key = schema::dead_key(directory, &op.name, death.died_at);
    let row: Option<pb::DeadEdgeRow> = schema::get(&*context.tx, &key)?;
    match row.filter(|row| row.transaction == op.transaction) {
        Some(row) if op.lives => context.disown(death, &row)?,
        Some(row) => context.lock_dead_edge(death, &row, TransactionId(0))?,
        None => {}
    }
    done()
}
