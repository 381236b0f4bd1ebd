//! StartEden: begins a file in the shard of a directory; with a span, also places its first one.
//!
//! What is to replace the contents of a published file has to be in that file's shard, which may have no directory: there the
//! file stands for one.

use eggs_machine::Table;
use eggs_proto::{InodeId, InodeType, ServiceError, ShardError, pb};

use crate::context::{Answer, Context, Stop};
use crate::eden::{check_place, cut_note};
use crate::machine::Choices;
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: pb::StartEden,
    choices: &Choices,
) -> Answer {
    beside(context, op.directory)?;
    if choices.cookie == 0 {
        return Err(ShardError::Internal.with("no cookie was chosen").into());
    }
    if let Some(span) = &op.span {
        check_place(span, 0, &choices.block_services)?;
    }
    let file = context.new_inode(InodeType::File)?;
    let mut row = pb::EdenRow {
        cookie: choices.cookie,
        note: cut_note(op.note),
        attributes: Some(op.attributes.unwrap_or_default()),
        created_at: context.time.0,
        ..Default::default()
    };
    let blocks = match op.span {
        Some(span) => context.place(file, &mut row, span, &choices.block_services)?,
        None => Vec::new(),
    };
    Ok(context.keep_eden(file, &mut row, blocks, choices.under_spread)?)
}

/// Refuses what is neither a directory of this shard nor a published file.
fn beside<T: Table + ?Sized>(context: &Context<'_, '_, T>, id: u64) -> Result<(), Stop> {
    if !InodeId(id).is_file() {
        return context.directory(id).map(drop);
    }
    let file = context.local(id)?;
    match context.tx.get(&schema::file_key(file))? {
        Some(_) => Ok(()),
        None => Err(ShardError::NotFound.with(format_args!("inode {file}")).into()),
    }
}
