//! Rename: another name in the same directory.

use eggs_machine::Table;
use eggs_proto::{InodeId, TransactionId, pb};

use crate::context::{Answer, Context};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::Rename) -> Answer {
    let (directory, row) = context.directory(op.directory)?;
    let edge = context.free_edge(directory, &op.old_name, TransactionId(0))?;
    if op.old_name == op.new_name {
        // As rename(2): nothing to do, and nothing is replaced.
        let reply = pb::LinkReply { inode: edge.target, replaced: 0, created_at: edge.created_at };
        return Ok(pb::write_result::Result::Link(reply));
    }
    let target = InodeId(edge.target);
    let old = context.replaceable(directory, &op.new_name, target, op.replace, TransactionId(0))?;
    // The inode lives on under its new name.
    context.unlink(directory, &op.old_name, &edge, false, context.time)?;
    let reply = context.link(directory, &op.new_name, target, old.as_ref())?;
    context.touch(directory, row)?;
    Ok(reply)
}
