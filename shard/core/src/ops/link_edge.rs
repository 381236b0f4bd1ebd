//! LinkEdge, a step: an inode, of any shard, gets a name in a directory.

use eggs_machine::Table;
use eggs_proto::{InodeId, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, Stop};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::LinkEdge) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let transaction = TransactionId(op.transaction);
    let target = target(context, op.target, transaction)?;
    let old = context.replaceable(directory, &op.name, target, op.replace, transaction)?;
    if old.is_some_and(|old| old.target == target.0) {
        return Err(ShardError::Exists.with("the name already leads to this inode").into());
    }
    let reply = context.link(directory, &op.name, target, old.as_ref())?;
    context.touch(directory, row)?;
    Ok(reply)
}

/// The target; one of this shard must exist (SH-3). A directory may be locked by the transaction, which revived it.
pub(crate) fn target<T: Table + ?Sized>(
    context: &Context<'_, '_, T>,
    id: u64,
    transaction: TransactionId,
) -> Result<InodeId, Stop> {
    let target = InodeId(id);
    if target.is_null() || target.kind().is_none() || target == InodeId::ROOT {
        return Err(ShardError::Malformed.with(format_args!("target {target}")).into());
    }
    if target.shard() != context.shard {
        return Ok(target);
    }
    if target.is_directory() {
        return Ok(context.directory_for(id, transaction)?.0);
    }
    if context.tx.get(&schema::file_key(target))?.is_none() {
        return Err(ShardError::NotFound.with(format_args!("inode {target}")).into());
    }
    Ok(target)
}
