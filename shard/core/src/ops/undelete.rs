//! Undelete: a dead edge that owns its target becomes a living one again, in the same directory and from now on. What the
//! past shows stays as it was; the dead edge does not own the target any more.
//!
//! The target's inode may be of any shard: what an edge owns exists (SH-16), for whoever purges it takes the edge first.
//! UndeleteEdge, a step, does the same to a directory, which the transaction has revived.

use eggs_machine::Table;
use eggs_proto::{InodeId, ServiceError, ShardError, Time, TransactionId, pb};

use crate::context::{Answer, Context, local_directory};
use crate::dead_edges::Death;
use crate::edges::quoted;
use crate::ops::link_edge;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::Undelete) -> Answer {
    if InodeId(op.target).is_directory() {
        return Err(ShardError::IsDirectory.with(quoted(&op.name)).into());
    }
    let new_name = if op.new_name.is_empty() { &op.name } else { &op.new_name };
    let directory = local_directory(context.shard, op.directory)?;
    let death = Death { directory, name: &op.name, died_at: Time(op.died_at) };
    undelete(context, death, op.target, new_name, TransactionId(0))
}

pub(crate) fn step<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::UndeleteEdge) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let death = Death { directory, name: &op.name, died_at: Time(op.died_at) };
    undelete(context, death, op.target, &op.new_name, TransactionId(op.transaction))
}

fn undelete<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    death: Death<'_>,
    target: u64,
    new_name: &[u8],
    transaction: TransactionId,
) -> Answer {
    let (directory, row) = context.directory(death.directory.0)?;
    let dead = context.owning_edge(death, target, transaction)?;
    let target = link_edge::target(context, target, transaction)?;
    context.replaceable(directory, new_name, target, pb::Replace::Refuse.into(), transaction)?;
    context.disown(death, &dead)?;
    let reply = context.link(directory, new_name, target, None)?;
    context.touch(directory, row)?;
    Ok(reply)
}
