//! PurgeFile, a step: a file or symlink that no edge owns any more goes for good.
//!
//! It becomes what a writer who died leaves behind: an expired eden file, which lists its blocks until they are erased.
//! One without blocks is gone at once.

use eggs_machine::table::prefix_end;
use eggs_machine::{Table, TableError};
use eggs_proto::{InodeId, ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done};
use crate::schema;

/// Spans without blocks that go at once; with more of them a file is left for the eraser.
const SPANS_AT_ONCE: usize = 64;
/// A cookie nobody was given: nobody writes it.
const NO_WRITER: u64 = 1;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::PurgeFile) -> Answer {
    let file = context.local(op.file)?;
    if file.is_directory() {
        return Err(ShardError::IsDirectory.with(format_args!("inode {file}")).into());
    }
    purge(context, file)?;
    done()
}

/// Of what is not there nothing is left to purge.
pub(crate) fn purge<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    file: InodeId,
) -> Result<(), TableError> {
    let key = schema::file_key(file);
    let Some(row) = schema::get::<pb::FileRow, _>(&*context.tx, &key)? else { return Ok(()) };
    let prefix = schema::id_key(schema::SPAN, file.0);
    let spans = context.tx.page(&prefix, &prefix_end(&prefix), SPANS_AT_ONCE + 1)?;
    let mut left = spans.len() > SPANS_AT_ONCE;
    for (_, span) in &spans {
        left |= schema::decode::<pb::Span>(span.clone())?.blocks.is_some();
    }
    context.tx.delete(key)?;
    if !left {
        for (key, _) in spans {
            context.tx.delete(key)?;
        }
        return Ok(());
    }
    let eden = pb::EdenRow {
        cookie: NO_WRITER,
        deadline: context.time.0,
        note: "purged".to_owned(),
        created_at: row.created_at,
        size: row.size,
        crc: row.crc,
        expired: true,
        ..Default::default()
    };
    context.put(schema::eden_key(file), &eden)
}
