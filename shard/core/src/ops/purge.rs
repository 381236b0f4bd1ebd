//! Purge: a dead edge goes for good, and the file it owns with it. PurgeDeadEdge, a step, takes an edge that owns its
//! target; the transaction purges the target next.
//!
//! The directory may be removed. What lives is never touched: a dead edge owns nothing that lives (SH-16).

use eggs_machine::Table;
use eggs_proto::{InodeId, ServiceError, ShardError, Time, TransactionId, pb};

use crate::context::{Answer, Context, done, local_directory};
use crate::dead_edges::Death;
use crate::edges::quoted;
use crate::ops::purge_file;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::Purge) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let death = Death { directory, name: &op.name, died_at: Time(op.died_at) };
    // Who saw it own its target means to end that: undeleted since, it is another wish.
    let row = if op.owned {
        context.owning_edge(death, op.target, TransactionId(0))?
    } else {
        context.dead_edge(death, op.target, TransactionId(0))?
    };
    if row.owned {
        let target = InodeId(row.target);
        if target.is_directory() {
            return Err(ShardError::IsDirectory.with(quoted(&op.name)).into());
        }
        if target.shard() != context.shard {
            let what = format_args!("{} leads to a file of shard {}", quoted(&op.name), target.shard());
            return Err(ShardError::Malformed.with(what).into());
        }
        purge_file::purge(context, target)?;
    }
    context.purge_edge(death)?;
    done()
}

pub(crate) fn step<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::PurgeDeadEdge) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let death = Death { directory, name: &op.name, died_at: Time(op.died_at) };
    context.owning_edge(death, op.target, TransactionId(op.transaction))?;
    context.purge_edge(death)?;
    done()
}
