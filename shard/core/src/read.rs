//! Reads that change nothing: attributes, spans, files in writing. Listing is in [`crate::list`],
//! walking in [`crate::walk`].

use eggs_machine::table::{after, prefix_end, scan};
use eggs_machine::{Table, TableError};
use eggs_proto::limits::{MESSAGE_BYTES_MAX, PAGE_ENTRIES_MAX};
use eggs_proto::pb::shard_reply::Result as Reply;
use eggs_proto::pb::shard_request::Op;
use eggs_proto::{InodeId, ServiceError, ShardError, ShardId, Time, pb};
use prost::Message;

use crate::context::{Stop, local};
use crate::eden::overdue;
use crate::schema::{self, Key};
use crate::{check, garbage, list, stored};

/// A page ends when its entries have this many bytes, so that a reply fits a message with room for
/// the last entry.
pub(crate) const PAGE_BYTES: usize = MESSAGE_BYTES_MAX / 2;
/// Spans that come with the attributes of a file have no more bytes than this, the first of them aside.
const FIRST_SPANS_BYTES: usize = 256 << 10;

/// Answers every read of one shard but walks and status.
///
/// # Errors
/// The state cannot be read. Everything else is an answer.
pub fn read<T: Table + ?Sized>(shard: ShardId, view: &T, op: &Op, _now: Time) -> Result<Reply, TableError> {
    let reply = match op {
        Op::Stat(op) => stat(shard, view, op).map(Reply::Stat),
        Op::GetSpans(op) => get_spans(shard, view, op).map(Reply::GetSpans),
        Op::List(op) => list::list(shard, view, op).map(Reply::List),
        Op::ListEden(op) => list_eden(view, op).map(Reply::ListEden),
        Op::Check(op) => check(shard, view, op).map(Reply::Check).map_err(Stop::Failed),
        Op::OpenMany(op) => open_many(shard, view, op).map(Reply::OpenMany),
        Op::ListFiles(op) => stored::list_files(view, op).map(Reply::ListFiles),
        Op::ListServiceFiles(op) => stored::list_service_files(view, op).map(Reply::ListServiceFiles),
        Op::ListGarbage(op) => garbage::list(view, op).map(Reply::ListGarbage),
        Op::Walk(_) | Op::Status(_) | Op::Write(_) => {
            Err(ShardError::Malformed.with("not a read of one shard's rows").into())
        }
    };
    match reply {
        Ok(reply) => Ok(reply),
        Err(Stop::Refused(error)) => Ok(Reply::Error(error)),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Whether only daemons may ask this: reads of the janitor.
pub fn needs_secret(op: &Op) -> bool {
    matches!(op, Op::ListFiles(_) | Op::ListServiceFiles(_) | Op::ListGarbage(_))
}

/// Whether an [`pb::ExpireEden`] would find something to do: a shard at rest logs nothing.
pub fn expirable<T: Table + ?Sized>(view: &T, now: Time) -> Result<bool, TableError> {
    let mut found = false;
    scan(view, &[schema::EDEN], &prefix_end(&[schema::EDEN]), |_, value| {
        let row: pb::EdenRow = schema::decode(value.clone())?;
        found = overdue(&row, now);
        Ok(!found)
    })?;
    Ok(found)
}

fn stat<T: Table + ?Sized>(shard: ShardId, view: &T, op: &pb::Stat) -> Result<pb::StatReply, Stop> {
    let inode = local(shard, op.inode)?;
    let attributes =
        attributes(view, inode)?.ok_or_else(|| ShardError::NotFound.with(format_args!("inode {inode}")))?;
    Ok(pb::StatReply { attributes: Some(attributes) })
}

/// Of an inode of the view's shard. A removed directory still has them; a file in writing has none.
pub(crate) fn attributes<T: Table + ?Sized>(
    view: &T,
    inode: InodeId,
) -> Result<Option<pb::Attributes>, TableError> {
    if inode.is_directory() {
        let row: Option<pb::DirectoryRow> = schema::get(view, &schema::directory_key(inode))?;
        Ok(row.map(|row| of_directory(inode, row)))
    } else {
        let row: Option<pb::FileRow> = schema::get(view, &schema::file_key(inode))?;
        Ok(row.map(|row| of_file(inode, row)))
    }
}

pub(crate) fn of_directory(inode: InodeId, row: pb::DirectoryRow) -> pb::Attributes {
    pb::Attributes {
        inode: inode.0,
        size: 0,
        mtime: row.mtime,
        atime: row.atime,
        mode: row.mode,
        uid: row.uid,
        gid: row.gid,
        crc: None,
        parent: Some(row.owner),
        xattrs: row.xattrs,
        policies: Some(row.policies.unwrap_or_default()),
        created_at: row.created_at,
    }
}

fn of_file(inode: InodeId, row: pb::FileRow) -> pb::Attributes {
    pb::Attributes {
        inode: inode.0,
        size: row.size,
        mtime: row.mtime,
        atime: row.atime,
        mode: row.mode,
        uid: row.uid,
        gid: row.gid,
        crc: Some(row.crc),
        parent: None,
        xattrs: row.xattrs,
        policies: None,
        created_at: row.created_at,
    }
}

fn get_spans<T: Table + ?Sized>(
    shard: ShardId,
    view: &T,
    op: &pb::GetSpans,
) -> Result<pb::GetSpansReply, Stop> {
    let file = local(shard, op.file)?;
    if file.is_directory() {
        return Err(ShardError::IsDirectory.with(format_args!("inode {file}")).into());
    }
    if view.get(&schema::file_key(file))?.is_none() {
        return Err(ShardError::NotFound.with(format_args!("inode {file}")).into());
    }
    let (spans, more) = spans(view, file, op.offset, page_limit(op.limit), PAGE_BYTES)?;
    Ok(pb::GetSpansReply { spans, more })
}

fn open_many<T: Table + ?Sized>(
    shard: ShardId,
    view: &T,
    op: &pb::OpenMany,
) -> Result<pb::OpenManyReply, Stop> {
    let (mut reply, mut total) = (pb::OpenManyReply::default(), 0);
    for &inode in op.inodes.iter().take(PAGE_ENTRIES_MAX as usize) {
        let opened = match local(shard, inode) {
            Ok(inode) => open(view, inode)?,
            Err(error) => pb::Opened { error: Some(error), ..Default::default() },
        };
        total += opened.encoded_len();
        if total > PAGE_BYTES && !reply.inodes.is_empty() {
            break;
        }
        reply.inodes.push(opened);
    }
    Ok(reply)
}

fn open<T: Table + ?Sized>(view: &T, inode: InodeId) -> Result<pb::Opened, TableError> {
    let Some(attributes) = attributes(view, inode)? else {
        let error = ShardError::NotFound.with(format_args!("inode {inode}"));
        return Ok(pb::Opened { error: Some(error), ..Default::default() });
    };
    let (spans, more) = first_spans(view, &attributes)?;
    Ok(pb::Opened { error: None, attributes: Some(attributes), spans, all_spans: !more })
}

/// The first spans of an inode, and whether there are more: a help beside its attributes, so no more than
/// [`FIRST_SPANS_BYTES`] of them.
pub(crate) fn first_spans<T: Table + ?Sized>(
    view: &T,
    attributes: &pb::Attributes,
) -> Result<(Vec<pb::Span>, bool), TableError> {
    let inode = InodeId(attributes.inode);
    if inode.is_directory() || attributes.size == 0 {
        return Ok((Vec::new(), false));
    }
    spans(view, inode, 0, PAGE_ENTRIES_MAX as usize, FIRST_SPANS_BYTES)
}

/// The span that begins at `offset`.
pub(crate) fn span_at<T: Table + ?Sized>(
    view: &T,
    file: InodeId,
    offset: u64,
) -> Result<Option<pb::Span>, TableError> {
    let (spans, _) = spans(view, file, offset, 1, usize::MAX)?;
    Ok(spans.into_iter().next().filter(|span| span.offset == offset))
}

/// The spans from the one that holds `offset` on, and whether there are more.
pub(crate) fn spans<T: Table + ?Sized>(
    view: &T,
    file: InodeId,
    offset: u64,
    limit: usize,
    bytes: usize,
) -> Result<(Vec<pb::Span>, bool), TableError> {
    let (mut spans, mut more, mut total) = (Vec::new(), false, 0);
    let end = prefix_end(&schema::id_key(schema::SPAN, file.0));
    scan(view, &schema::span_key(file, offset), &end, |_, value| {
        total += value.len();
        more = spans.len() == limit || (total > bytes && !spans.is_empty());
        if !more {
            spans.push(schema::decode(value.clone())?);
        }
        Ok(!more)
    })?;
    Ok((spans, more))
}

/// A page's size: what was asked for, within the limit; 0 is the limit.
pub(crate) fn page_limit(limit: u32) -> usize {
    match limit {
        0 => PAGE_ENTRIES_MAX as usize,
        limit => limit.min(PAGE_ENTRIES_MAX) as usize,
    }
}

fn list_eden<T: Table + ?Sized>(view: &T, op: &pb::ListEden) -> Result<pb::ListEdenReply, Stop> {
    let limit = page_limit(op.limit);
    let (mut files, mut more, mut total) = (Vec::new(), false, 0);
    let from = after(&schema::eden_key(InodeId(op.after_file)));
    scan(view, &from, &prefix_end(&[schema::EDEN]), |key, value| {
        more = files.len() == limit || total > PAGE_BYTES;
        if more {
            return Ok(false);
        }
        let Some(Key::Eden(file)) = Key::parse(key) else {
            return Err(TableError("a key of the eden table is not one".to_owned()));
        };
        let row: pb::EdenRow = schema::decode(value.clone())?;
        let entry = pb::EdenFile {
            file: file.0,
            deadline: row.deadline,
            note: row.note,
            size: row.size,
            expired: row.expired,
        };
        total += entry.encoded_len();
        files.push(entry);
        Ok(true)
    })?;
    Ok(pb::ListEdenReply { files, more })
}
