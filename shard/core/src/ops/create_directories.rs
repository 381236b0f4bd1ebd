//! CreateDirectories, a step: a directory that no edge leads to yet, in it the directory of the first name, in that the
//! one of the next, and so on: all on this shard, so it takes one write, however many there are.
//! Undo, DiscardDirectories: they go, as if they had never been.

use eggs_machine::Table;
use eggs_machine::table::prefix_end;
use eggs_proto::limits::MKDIR_NAMES_MAX;
use eggs_proto::{InodeId, InodeType, ServiceError, ShardError, TransactionId, pb};

use super::create_directory::make;
use crate::context::{Answer, Context, Stop, check_name, done, local_directory};
use crate::machine::outcome;
use crate::schema::{self, Step};

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::CreateDirectories,
) -> Answer {
    if !InodeId(op.owner).is_directory() {
        return Err(ShardError::Malformed.with(format_args!("owner {}", InodeId(op.owner))).into());
    }
    if op.names.len() >= MKDIR_NAMES_MAX {
        return Err(ShardError::Malformed.with(format_args!("{} names", op.names.len())).into());
    }
    for name in &op.names {
        check_name(name)?;
    }
    let count = op.names.len() as u64 + 1;
    if context.meta()?.next_directory > InodeId::COUNTER_MAX - count {
        return Err(ShardError::Internal.with("no inode numbers are left").into());
    }
    let first = context.new_inode(InodeType::Directory)?;
    let (mut directory, mut owner) = (first, op.owner);
    for name in &op.names {
        make(context, directory, owner, op.on_the_way)?;
        let next = context.new_inode(InodeType::Directory)?;
        context.link(directory, name, next, None)?;
        (directory, owner) = (next, directory.0);
    }
    make(context, directory, owner, op.attributes)?;
    let created_at = context.time.0;
    Ok(pb::write_result::Result::Link(pb::LinkReply { inode: first.0, replaced: 0, created_at }))
}

pub(crate) fn undo<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::DiscardDirectories,
) -> Answer {
    let first = local_directory(context.shard, op.directory)?;
    let made = outcome(context, TransactionId(op.transaction), Step::CreateDirectories)?;
    let made = match made.and_then(|outcome| outcome.result) {
        Some(pb::write_result::Result::Link(reply)) => reply.inode,
        _ => 0,
    };
    if made != first.0 || op.names.len() >= MKDIR_NAMES_MAX {
        return Err(ShardError::Changed.with("this transaction did not make the directories").into());
    }
    // Their counters follow each other.
    let directories: Vec<InodeId> = (0..=op.names.len() as u64).map(|n| InodeId(first.0 + n)).collect();
    for (n, &directory) in directories.iter().enumerate() {
        let below = op.names.get(n).zip(directories.get(n + 1));
        only_holds(context, directory, below.map(|(name, &next)| (&name[..], next)))?;
    }
    for (n, &directory) in directories.iter().enumerate() {
        if let Some(name) = op.names.get(n) {
            context.tx.delete(schema::living_key(directory, name))?;
        }
        context.tx.delete(schema::directory_key(directory))?;
    }
    done()
}

/// Nothing was ever in the directory but what it was made with.
fn only_holds<T: Table + ?Sized>(
    context: &Context<'_, '_, T>,
    directory: InodeId,
    entry: Option<(&[u8], InodeId)>,
) -> Result<(), Stop> {
    let not_empty = || ShardError::NotEmpty.with(format_args!("directory {directory}"));
    let page = |tag: u8| {
        let prefix = schema::id_key(tag, directory.0);
        context.tx.page(&prefix, &prefix_end(&prefix), 2)
    };
    if !page(schema::DEAD)?.is_empty() || page(schema::LIVING)?.len() != usize::from(entry.is_some()) {
        return Err(not_empty().into());
    }
    if let Some((name, next)) = entry
        && context.edge(directory, name)?.is_none_or(|edge| edge.target != next.0)
    {
        return Err(not_empty().into());
    }
    Ok(())
}
