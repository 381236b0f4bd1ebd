//! Which files there are, and which have blocks on a block service: what the janitor goes through.

use eggs_machine::table::{after, prefix_end, scan};
use eggs_machine::{Table, TableError};
use eggs_proto::{BlockServiceId, InodeId, InodeType, ShardId, pb};

use crate::context::Stop;
use crate::counts;
use crate::read::page_limit;
use crate::schema::{self, Key};

/// Symlinks are left out: they are never in blocks.
pub(crate) fn list_files<T: Table + ?Sized>(
    view: &T,
    op: &pb::ListFiles,
) -> Result<pb::ListFilesReply, Stop> {
    let limit = page_limit(op.limit);
    let mut reply = pb::ListFilesReply::default();
    let from = after(&schema::file_key(InodeId(op.after_file)));
    let to = schema::file_key(InodeId::new(InodeType::Symlink, ShardId(0), 0));
    scan(view, &from, &to, |key, value| {
        reply.more = reply.files.len() == limit;
        if reply.more {
            return Ok(false);
        }
        let Some(Key::File(file)) = Key::parse(key) else { return Err(not_a_key()) };
        let row: pb::FileRow = schema::decode(value.clone())?;
        reply.files.push(pb::StoredFile {
            file: file.0,
            size: row.size,
            crc: row.crc,
            scrubbed_at: row.scrubbed_at,
            created_at: row.created_at,
        });
        Ok(true)
    })?;
    Ok(reply)
}

/// Those whose blocks spans have are in an index. Blocks that are being written no span has yet: they are looked for in the
/// files in writing.
pub(crate) fn list_service_files<T: Table + ?Sized>(
    view: &T,
    op: &pb::ListServiceFiles,
) -> Result<pb::ListServiceFilesReply, Stop> {
    let limit = page_limit(op.limit);
    let mut reply = pb::ListServiceFilesReply::default();
    let service = BlockServiceId(op.block_service);
    let from = after(&schema::blocks_key(service, InodeId(op.after_file)));
    let to = prefix_end(&schema::id_key(schema::BLOCKS, service.0));
    scan(view, &from, &to, |key, value| {
        reply.more = reply.files.len() == limit;
        if reply.more {
            return Ok(false);
        }
        let Some(Key::Blocks(_, file)) = Key::parse(key) else { return Err(not_a_key()) };
        let row: pb::BlockCountRow = schema::decode(value.clone())?;
        let published = view.get(&schema::file_key(file))?.is_some();
        reply.files.push(pb::ServiceFile { file: file.0, blocks: row.blocks, published });
        Ok(true)
    })?;
    let to = match reply.files.last() {
        Some(last) if reply.more => after(&schema::eden_key(InodeId(last.file))),
        _ => prefix_end(&[schema::EDEN]),
    };
    // One more than fits, so that it is known whether there are more.
    for (file, blocks) in being_written(view, service, InodeId(op.after_file), &to, limit + 1)? {
        match reply.files.binary_search_by_key(&file.0, |listed| listed.file) {
            Ok(at) => reply.files[at].blocks += blocks,
            Err(at) => {
                reply.files.insert(at, pb::ServiceFile { file: file.0, blocks, published: false });
            }
        }
    }
    reply.more |= reply.files.len() > limit;
    reply.files.truncate(limit);
    Ok(reply)
}

/// Files after `after_file` with blocks of a span in progress on a service, no more than `limit`.
fn being_written<T: Table + ?Sized>(
    view: &T,
    service: BlockServiceId,
    after_file: InodeId,
    to: &[u8],
    limit: usize,
) -> Result<Vec<(InodeId, u32)>, TableError> {
    let mut files = Vec::new();
    scan(view, &after(&schema::eden_key(after_file)), to, |key, value| {
        let Some(Key::Eden(file)) = Key::parse(key) else { return Err(not_a_key()) };
        let row: pb::EdenRow = schema::decode(value.clone())?;
        let pending = row.pending.iter().filter(|_| !row.expired).flat_map(counts::blocks);
        let blocks = pending.filter(|block| block.block_service == service.0).count();
        if blocks > 0 {
            files.push((file, blocks as u32));
        }
        Ok(files.len() < limit)
    })?;
    Ok(files)
}

fn not_a_key() -> TableError {
    TableError("a key of the files or their blocks is not one".to_owned())
}
