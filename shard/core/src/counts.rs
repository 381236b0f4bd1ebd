//! The reverse index: how many blocks of the spans of a file each block service has (the B table, SH-8).
//!
//! Blocks that no span has are not in it, those of a span in progress and replaced ones: they go by the deadline of their
//! eden file.

use std::collections::BTreeMap;

use eggs_machine::{Table, TableError};
use eggs_proto::{BlockServiceId, InodeId, pb};

use crate::context::Context;
use crate::schema;

/// The blocks of a span; none of one without.
pub(crate) fn blocks(span: &pb::Span) -> &[pb::Block] {
    span.blocks.as_ref().map_or(&[], |blocks| &blocks.blocks)
}

/// How many of the blocks each block service has.
pub(crate) fn count<'a>(blocks: impl IntoIterator<Item = &'a pb::Block>) -> BTreeMap<BlockServiceId, u32> {
    let mut counts = BTreeMap::new();
    for block in blocks {
        *counts.entry(BlockServiceId(block.block_service)).or_default() += 1;
    }
    counts
}

impl<T: Table + ?Sized> Context<'_, '_, T> {
    /// Some blocks of the file's spans are gone, others have come.
    pub fn recount<'a>(
        &mut self,
        file: InodeId,
        gone: impl IntoIterator<Item = &'a pb::Block>,
        come: impl IntoIterator<Item = &'a pb::Block>,
    ) -> Result<(), TableError> {
        let (gone, come) = (count(gone), count(come));
        for service in gone.keys().chain(come.keys().filter(|service| !gone.contains_key(service))) {
            let (minus, plus) =
                (gone.get(service).copied().unwrap_or(0), come.get(service).copied().unwrap_or(0));
            if minus == plus {
                continue;
            }
            let key = schema::blocks_key(*service, file);
            let old: Option<pb::BlockCountRow> = schema::get(&*self.tx, &key)?;
            let blocks = old.map_or(0, |old| old.blocks).saturating_add(plus).saturating_sub(minus);
            match blocks {
                0 => self.tx.delete(key)?,
                blocks => self.put(key, &pb::BlockCountRow { blocks })?,
            }
        }
        Ok(())
    }
}
