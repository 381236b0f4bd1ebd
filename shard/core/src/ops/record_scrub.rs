//! RecordScrub: every block of these files was looked at and was right. Files that were purged meanwhile are left out.

use eggs_machine::Table;
use eggs_proto::limits::PAGE_ENTRIES_MAX;
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::RecordScrub) -> Answer {
    if op.files.len() > PAGE_ENTRIES_MAX as usize {
        return Err(ShardError::Malformed.with(format_args!("{} files at once", op.files.len())).into());
    }
    let files = op.files.iter().map(|&file| context.local(file)).collect::<Result<Vec<_>, _>>()?;
    for file in files {
        let key = schema::file_key(file);
        if let Some(row) = schema::get::<pb::FileRow, _>(&*context.tx, &key)? {
            context.put(key, &pb::FileRow { scrubbed_at: context.time.0, ..row })?;
        }
    }
    done()
}
