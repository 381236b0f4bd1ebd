//! ExtendEden: completes the span in progress, places the next one; with neither, only pushes the
//! deadline out.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context};
use crate::eden::check_place;
use crate::machine::Choices;

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: pb::ExtendEden,
    choices: &Choices,
) -> Answer {
    let (file, mut row) = context.writing(op.file, op.cookie)?;
    let certified = match &op.certify {
        Some(certify) => context.certified(file, &mut row, certify, &choices.proven_blocks)?,
        None => None,
    };
    if let Some(new) = &op.span {
        if row.pending.is_some() {
            return Err(ShardError::BadSpan.with("a span is still in progress").into());
        }
        let size = row.size + certified.as_ref().map_or(0, |span| u64::from(span.size));
        check_place(new, size, &choices.block_services)?;
    }
    if let Some(span) = certified {
        context.append(file, &mut row, span)?;
    }
    let blocks = match op.span {
        Some(span) => context.place(file, &mut row, span, &choices.block_services)?,
        None => Vec::new(),
    };
    Ok(context.keep_eden(file, &mut row, blocks, choices.under_spread)?)
}
