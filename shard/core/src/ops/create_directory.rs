//! CreateDirectory, a step: a directory that no edge leads to yet.
//! Undo, DiscardDirectory: it goes, as if it had never been.

use eggs_machine::table::prefix_end;
use eggs_machine::{Table, TableError};
use eggs_proto::{InodeId, InodeType, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, done, local_directory, permissions};
use crate::machine::outcome;
use crate::schema::{self, Step};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::CreateDirectory) -> Answer {
    if !InodeId(op.owner).is_directory() {
        return Err(ShardError::Malformed.with(format_args!("owner {}", InodeId(op.owner))).into());
    }
    let directory = context.new_inode(InodeType::Directory)?;
    make(context, directory, op.owner, op.attributes)?;
    let created_at = context.time.0;
    Ok(pb::write_result::Result::Link(pb::LinkReply { inode: directory.0, replaced: 0, created_at }))
}

/// A new directory's row.
pub(crate) fn make<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    directory: InodeId,
    owner: u64,
    attributes: Option<pb::NewAttributes>,
) -> Result<(), TableError> {
    let attributes = attributes.unwrap_or_default();
    let now = context.time.0;
    let row = pb::DirectoryRow {
        owner,
        created_at: now,
        mtime: attributes.mtime.unwrap_or(now),
        atime: now,
        mode: permissions(attributes.mode),
        uid: attributes.uid,
        gid: attributes.gid,
        policies: None,
        xattrs: Vec::new(),
        transaction: 0,
    };
    context.put(schema::directory_key(directory), &row)
}

pub(crate) fn undo<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::DiscardDirectory) -> Answer {
    let directory = local_directory(context.shard, op.directory)?;
    let made = outcome(context, TransactionId(op.transaction), Step::CreateDirectory)?;
    let made = match made.and_then(|outcome| outcome.result) {
        Some(pb::write_result::Result::Link(reply)) => reply.inode,
        _ => 0,
    };
    if made != directory.0 {
        return Err(ShardError::Changed.with("this transaction did not make the directory").into());
    }
    for tag in [schema::LIVING, schema::DEAD] {
        let prefix = schema::id_key(tag, directory.0);
        if !context.tx.page(&prefix, &prefix_end(&prefix), 1)?.is_empty() {
            return Err(ShardError::NotEmpty.with(format_args!("directory {directory}")).into());
        }
    }
    context.tx.delete(schema::directory_key(directory))?;
    done()
}
