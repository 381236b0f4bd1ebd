//! PlaceReplacements: copies of some blocks of a published span are placed elsewhere. They are an eden file's, as everything
//! that is being written is, until SwapBlocks makes them the span's.

use eggs_machine::Table;
use eggs_proto::{InodeId, InodeType, ServiceError, ShardError, ShardId, pb};

use crate::context::{Answer, Context, Stop, local};
use crate::eden::{check_services, placed_blocks};
use crate::machine::Choices;
use crate::{read, schema};

/// What is to be replaced: blocks of a span that is there.
pub(crate) struct Meant {
    pub file: InodeId,
    pub span: pb::Span,
    pub blocks: pb::Blocks,
    pub indexes: Vec<usize>,
}

impl Meant {
    /// Services of the span's other blocks.
    pub fn kept(&self) -> Vec<u64> {
        let kept = |index: &usize| !self.indexes.contains(index);
        (0..self.blocks.blocks.len())
            .filter(kept)
            .map(|index| self.blocks.blocks[index].block_service)
            .collect()
    }

    /// Services of the blocks that are to be replaced.
    pub fn replaced(&self) -> Vec<u64> {
        self.indexes.iter().map(|&index| self.blocks.blocks[index].block_service).collect()
    }
}

/// The published span, when the blocks at those indexes are the ones that are meant.
pub(crate) fn meant<T: Table + ?Sized>(
    shard: ShardId,
    view: &T,
    op: &pb::PlaceReplacements,
) -> Result<Meant, Stop> {
    let file = local(shard, op.file)?;
    published_blocks(view, file, op.offset, &op.indexes, &op.blocks)
}

/// As [`meant`], of a file of this shard.
pub(crate) fn published_blocks<T: Table + ?Sized>(
    view: &T,
    file: InodeId,
    offset: u64,
    indexes: &[u32],
    blocks: &[u64],
) -> Result<Meant, Stop> {
    if view.get(&schema::file_key(file))?.is_none() {
        return Err(ShardError::NotFound.with(format_args!("inode {file}")).into());
    }
    let mut checked: Vec<usize> = indexes.iter().map(|&index| index as usize).collect();
    checked.sort_unstable();
    checked.dedup();
    if indexes.is_empty() || checked.len() != indexes.len() || indexes.len() != blocks.len() {
        return Err(ShardError::Malformed.with("indexes of blocks to replace").into());
    }
    let changed = || ShardError::Changed.with(format_args!("span at {offset} of {file}"));
    let mut span = read::span_at(view, file, offset)?.ok_or_else(changed)?;
    let there = span.blocks.take().ok_or_else(changed)?;
    let indexes: Vec<usize> = indexes.iter().map(|&index| index as usize).collect();
    let same = |(&index, &block): (&usize, &u64)| there.blocks.get(index).is_some_and(|b| b.block == block);
    if !indexes.iter().zip(blocks).all(same) {
        return Err(changed().into());
    }
    Ok(Meant { file, span, blocks: there, indexes })
}

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::PlaceReplacements,
    choices: &Choices,
) -> Answer {
    let meant = meant(context.shard, &*context.tx, op)?;
    check_services(meant.indexes.len(), &choices.block_services)?;
    let kept = meant.kept();
    if choices.block_services.iter().any(|service| kept.contains(service)) {
        // The span has changed since the leader chose.
        return Err(ShardError::Changed.with("other blocks of the span").into());
    }
    if choices.cookie == 0 {
        return Err(ShardError::Internal.with("no cookie was chosen").into());
    }
    let eden = context.new_inode(InodeType::File)?;
    let Meant { file, span, mut blocks, indexes } = meant;
    let old = std::mem::take(&mut blocks.blocks);
    for (&index, &block_service) in indexes.iter().zip(&choices.block_services) {
        let block = context.new_block()?.0;
        blocks.blocks.push(pb::Block { block_service, block, ..old[index].clone() });
    }
    let mut placed = placed_blocks(&blocks, 0..blocks.blocks.len());
    for (placed, &index) in placed.iter_mut().zip(&op.indexes) {
        placed.index = index;
    }
    let mut row = pb::EdenRow {
        cookie: choices.cookie,
        note: format!("replacements for {file}"),
        created_at: context.time.0,
        pending: Some(pb::Span { blocks: Some(blocks), ..span }),
        replacement: Some(pb::Replacement {
            file: file.0,
            offset: op.offset,
            indexes: op.indexes.clone(),
            blocks: op.blocks.clone(),
        }),
        ..Default::default()
    };
    Ok(context.keep_eden(eden, &mut row, placed, choices.under_spread)?)
}
