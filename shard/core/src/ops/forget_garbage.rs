//! ForgetGarbage: blocks of expired eden files are erased, which the leader has verified; what lists them lists them no more.
//! An eden file of which nothing is left goes.

use std::collections::{BTreeMap, BTreeSet};

use eggs_machine::Table;
use eggs_proto::limits::PAGE_ENTRIES_MAX;
use eggs_proto::{InodeId, ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done};
use crate::garbage::SPANS_MAX;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::ForgetGarbage) -> Answer {
    if op.blocks.len() > PAGE_ENTRIES_MAX as usize {
        return Err(ShardError::Malformed.with(format_args!("{} blocks at once", op.blocks.len())).into());
    }
    let mut erased: BTreeMap<InodeId, BTreeSet<(u64, u64)>> = BTreeMap::new();
    for block in &op.blocks {
        let file = context.local(block.file)?;
        erased.entry(file).or_default().insert((block.block_service, block.block));
    }
    let mut spans = SPANS_MAX;
    for (file, erased) in erased {
        context.forget(file, &erased, &mut spans)?;
    }
    done()
}
