//! PutSmall: creates, fills and links a small file or a symlink in one step.

use eggs_machine::Table;
use eggs_proto::limits::{INLINE_BYTES_MAX, PATH_BYTES_MAX};
use eggs_proto::{InodeId, InodeType, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, permissions};
use crate::{schema, span};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: pb::PutSmall) -> Answer {
    let kind = check_contents(&op)?;
    let (directory, directory_row) = context.directory(op.directory)?;
    // Any file replaces the same things.
    let some_file = InodeId::new(kind, context.shard, 0);
    let old = context.replaceable(directory, &op.name, some_file, op.replace, TransactionId(0))?;
    let file = context.new_inode(kind)?;
    let attributes = op.attributes.unwrap_or_default();
    let crc = crc32fast::hash(&op.bytes);
    let row = pb::FileRow {
        size: op.bytes.len() as u64,
        created_at: context.time.0,
        mtime: attributes.mtime.unwrap_or(context.time.0),
        atime: context.time.0,
        mode: permissions(attributes.mode),
        uid: attributes.uid,
        gid: attributes.gid,
        crc,
        xattrs: Vec::new(),
        scrubbed_at: 0,
    };
    context.put(schema::file_key(file), &row)?;
    if !op.bytes.is_empty() {
        context.put(schema::span_key(file, row.size - 1), &span::inline(op.bytes, crc))?;
    }
    let reply = context.link(directory, &op.name, file, old.as_ref())?;
    context.touch(directory, directory_row)?;
    Ok(reply)
}

fn check_contents(op: &pb::PutSmall) -> Result<InodeType, pb::Error> {
    if !op.symlink {
        if op.bytes.len() > INLINE_BYTES_MAX as usize {
            return Err(ShardError::TooLarge.with(format_args!("{} bytes in one request", op.bytes.len())));
        }
        return Ok(InodeType::File);
    }
    if op.bytes.len() >= PATH_BYTES_MAX {
        return Err(ShardError::NameTooLong.with("target of a symlink"));
    }
    if op.bytes.is_empty() || op.bytes.contains(&0) {
        return Err(ShardError::Malformed.with("target of a symlink"));
    }
    Ok(InodeType::Symlink)
}
