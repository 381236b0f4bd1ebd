//! StartEden: begins a file in the shard of a directory; with a span, also places its first one.

use eggs_machine::Table;
use eggs_proto::{InodeType, ServiceError, ShardError, pb};

use crate::context::{Answer, Context};
use crate::eden::{check_place, cut_note};
use crate::machine::Choices;

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: pb::StartEden,
    choices: &Choices,
) -> Answer {
    context.directory(op.directory)?;
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
    Ok(context.keep_eden(file, &mut row, blocks)?)
}
