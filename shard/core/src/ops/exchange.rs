//! Exchange: two names of one directory come to lead to each other's inode, at one instant.

use eggs_machine::Table;
use eggs_proto::{InodeId, TransactionId, pb};

use crate::context::{Answer, Context};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::Exchange) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let one = context.free_edge(directory, &op.name, TransactionId(0))?;
    let other = context.free_edge(directory, &op.other_name, TransactionId(0))?;
    if op.name == op.other_name {
        // As rename(2): nothing to do.
        let reply = pb::LinkReply { inode: one.target, replaced: 0, created_at: one.created_at };
        return Ok(pb::write_result::Result::Link(reply));
    }
    let now = context.time;
    context.exchange(directory, &op.name, &one, InodeId(other.target), now)?;
    context.exchange(directory, &op.other_name, &other, InodeId(one.target), now)?;
    context.touch(directory, row)?;
    Ok(pb::write_result::Result::Link(pb::LinkReply {
        inode: other.target,
        replaced: one.target,
        created_at: now.0,
    }))
}
