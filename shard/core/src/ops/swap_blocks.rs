//! SwapBlocks: copies of blocks, proven to be where they were placed, take the place of those they copy. One step: before
//! it the span has the old ones, after it the new ones, and the old ones are listed as garbage.
//!
//! Refused when the blocks that were copied are not the span's any more (SH-18): then somebody else was quicker, or the
//! contents were swapped, and what was copied here is garbage itself.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done};
use crate::eden::{check_proven, garbage};
use crate::machine::Choices;
use crate::ops::place_replacements::{Meant, published_blocks};
use crate::{counts, schema};

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::SwapBlocks,
    choices: &Choices,
) -> Answer {
    let (eden, mut row) = context.eden(op.eden, op.cookie)?;
    let (Some(replacement), Some(pending)) = (row.replacement.take(), row.pending.take()) else {
        return Err(ShardError::BadSpan.with(format_args!("{eden} holds no copies of blocks")).into());
    };
    let copies = counts::blocks(&pending);
    check_proven(copies, &choices.proven_blocks)?;
    let file = context.local(replacement.file)?;
    let pb::Replacement { offset, indexes, blocks, .. } = &replacement;
    let meant = published_blocks(&*context.tx, file, *offset, indexes, blocks)?;
    let kept = meant.kept();
    if copies.iter().any(|copy| kept.contains(&copy.block_service)) {
        // Another swap has put one of the others there (SH-19).
        return Err(ShardError::Changed
            .with(format_args!("places of the span at {offset} of {file}"))
            .into());
    }
    let Meant { span, mut blocks, indexes, .. } = meant;
    let mut old = Vec::with_capacity(indexes.len());
    for (index, copy) in indexes.into_iter().zip(copies) {
        old.push(std::mem::replace(&mut blocks.blocks[index], copy.clone()));
    }
    context.recount(file, &old, copies)?;
    let last = span.offset + u64::from(span.size).saturating_sub(1);
    context.put(schema::span_key(file, last), &pb::Span { blocks: Some(blocks), ..span })?;
    row.garbage = old.iter().map(garbage).collect();
    context.expire(eden, row)?;
    done()
}
