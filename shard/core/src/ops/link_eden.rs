//! LinkEden: publishes a file under a name; the span in progress is certified in the same step.

use eggs_machine::Table;
use eggs_proto::{InodeId, InodeType, ServiceError, ShardError, TransactionId, pb};

use crate::context::{Answer, Context, Stop, permissions};
use crate::machine::Choices;
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::LinkEden,
    choices: &Choices,
) -> Answer {
    let (file, mut row) = context.writing(op.file, op.cookie)?;
    let (directory, directory_row) = context.directory(op.directory)?;
    let old = context.replaceable(directory, &op.name, file, op.replace, TransactionId(0))?;
    let certified = match &op.certify {
        Some(certify) => context.certified(file, &mut row, certify, &choices.proven_blocks)?,
        None => None,
    };
    if row.pending.is_some() {
        return Err(ShardError::BadSpan.with("a span is still in progress").into());
    }
    let (mut size, mut crc) = (row.size, row.crc);
    if let Some(span) = &certified {
        size += u64::from(span.size);
        crc = crate::span::combine(crc, span.crc, u64::from(span.size));
    }
    if (size, crc) != (op.size, op.crc) {
        let what = format_args!(
            "{size} bytes with CRC {crc:#010x} were written, not {} with {:#010x}",
            op.size, op.crc
        );
        return Err(ShardError::BadSpan.with(what).into());
    }
    keep_garbage(context, file, &mut row)?;
    if let Some(span) = certified {
        context.append(file, &mut row, span)?;
    }
    let attributes = row.attributes.unwrap_or_default();
    let published = pb::FileRow {
        size: row.size,
        created_at: row.created_at,
        mtime: attributes.mtime.unwrap_or(context.time.0),
        atime: context.time.0,
        mode: permissions(attributes.mode),
        uid: attributes.uid,
        gid: attributes.gid,
        crc: row.crc,
        xattrs: Vec::new(),
        scrubbed_at: 0,
    };
    context.put(schema::file_key(file), &published)?;
    context.tx.delete(schema::eden_key(file))?;
    let reply = context.link(directory, &op.name, file, old.as_ref())?;
    context.touch(directory, directory_row)?;
    Ok(reply)
}

/// Blocks that were replaced while the file was written may hold bytes: they stay listed under an
/// eden file of their own that has already expired.
fn keep_garbage<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    file: InodeId,
    row: &mut pb::EdenRow,
) -> Result<(), Stop> {
    if row.garbage.is_empty() {
        return Ok(());
    }
    let id = context.new_inode(InodeType::File)?;
    let left = pb::EdenRow {
        cookie: row.cookie,
        deadline: context.time.0,
        note: format!("replaced blocks of {file}"),
        created_at: context.time.0,
        expired: true,
        garbage: std::mem::take(&mut row.garbage),
        ..Default::default()
    };
    Ok(context.put(schema::eden_key(id), &left)?)
}
