//! ReplaceBlocks: other block services for some blocks of the span in progress.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context};
use crate::eden::{GARBAGE_BLOCKS_MAX, check_services, garbage, placed_blocks};
use crate::machine::Choices;

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::ReplaceBlocks,
    choices: &Choices,
) -> Answer {
    let (file, mut row) = context.writing(op.file, op.cookie)?;
    let room = GARBAGE_BLOCKS_MAX.saturating_sub(row.garbage.len());
    let blocks = pending_blocks(&mut row)?;
    let indexes = check_indexes(&op.indexes, blocks.blocks.len())?;
    check_services(indexes.len(), &choices.block_services)?;
    if indexes.len() > room {
        return Err(ShardError::NoBlockServices.with("too many blocks were replaced").into());
    }
    // The span may have changed since the leader chose.
    let kept = |index: &usize| !indexes.contains(index);
    if (0..blocks.blocks.len())
        .filter(kept)
        .any(|index| choices.block_services.contains(&blocks.blocks[index].block_service))
    {
        return Err(ShardError::Changed.with("blocks of the span in progress").into());
    }
    let mut replaced = Vec::with_capacity(indexes.len());
    for (&index, &service) in indexes.iter().zip(&choices.block_services) {
        let block = &mut blocks.blocks[index];
        replaced.push(garbage(block));
        block.block_service = service;
        block.block = context.new_block()?.0;
    }
    let placed = placed_blocks(blocks, indexes);
    row.garbage.extend(replaced);
    Ok(context.keep_eden(file, &mut row, placed, choices.under_spread)?)
}

pub(crate) fn pending_blocks(row: &mut pb::EdenRow) -> Result<&mut pb::Blocks, pb::Error> {
    row.pending
        .as_mut()
        .and_then(|span| span.blocks.as_mut())
        .ok_or_else(|| ShardError::BadSpan.with("no span in blocks is in progress"))
}

/// The indexes, when they are distinct ones of the span's blocks.
pub(crate) fn check_indexes(indexes: &[u32], blocks: usize) -> Result<Vec<usize>, pb::Error> {
    let mut checked = Vec::with_capacity(indexes.len().min(blocks));
    for &index in indexes {
        let index = index as usize;
        if index >= blocks || checked.contains(&index) {
            return Err(ShardError::Malformed.with(format_args!("block {index} of {blocks} to replace")));
        }
        checked.push(index);
    }
    if checked.is_empty() {
        return Err(ShardError::Malformed.with("no block to replace"));
    }
    Ok(checked)
}
