//! Blocks that nobody needs any more: those of expired eden files.
//!
//! What an expired eden file lists never becomes part of a file again, and ids of blocks are used once: leave to erase them
//! stays right however old it is (SH-17). A block is listed until its erasure is proven. Of a span some of whose blocks are
//! erased the others stay where they are; the span goes with the last of them, the file with its last span.
//!
//! A file whose first spans have no blocks is listed with a block of id 0 on the service of id 0, which no cluster has: to
//! forget that is to let go of those spans.

use std::collections::BTreeSet;

use bytes::Bytes;
use eggs_machine::table::{after, prefix_end, scan};
use eggs_machine::{Table, TableError};
use eggs_proto::{InodeId, pb};

use crate::context::{Context, Stop};
use crate::read::page_limit;
use crate::schema::{self, Key};
use crate::{counts, eden};

/// Spans one page of garbage is of, and one command to forget looks at: the forgotten blocks of a page are found by it.
pub(crate) const SPANS_MAX: usize = 4096;

pub(crate) fn list<T: Table + ?Sized>(view: &T, op: &pb::ListGarbage) -> Result<pb::ListGarbageReply, Stop> {
    let limit = page_limit(op.limit);
    let mut reply = pb::ListGarbageReply::default();
    let mut spans = SPANS_MAX;
    let from = after(&schema::eden_key(InodeId(op.after_file)));
    scan(view, &from, &prefix_end(&[schema::EDEN]), |key, value| {
        let row: pb::EdenRow = schema::decode(value.clone())?;
        if !row.expired {
            return Ok(true);
        }
        let Some(Key::Eden(file)) = Key::parse(key) else {
            return Err(TableError("a key of the eden table is not one".to_owned()));
        };
        reply.more = reply.blocks.len() >= limit || spans == 0;
        if reply.more {
            return Ok(false);
        }
        let mut blocks = of_file(view, file, row, &mut spans)?;
        // A file too large for a page of its own is listed in part: the rest when that is erased.
        reply.more = !reply.blocks.is_empty() && reply.blocks.len() + blocks.len() > limit;
        if !reply.more {
            blocks.truncate(limit);
            reply.blocks.append(&mut blocks);
        }
        Ok(!reply.more)
    })?;
    Ok(reply)
}

/// What an expired file lists, as far as `spans` goes.
fn of_file<T: Table + ?Sized>(
    view: &T,
    file: InodeId,
    row: pb::EdenRow,
    spans: &mut usize,
) -> Result<Vec<pb::GarbageBlock>, TableError> {
    let mut blocks = row.garbage;
    blocks.extend(row.pending.iter().flat_map(counts::blocks).map(eden::garbage));
    let prefix = schema::id_key(schema::SPAN, file.0);
    scan(view, &prefix, &prefix_end(&prefix), |_, value| {
        if *spans == 0 {
            return Ok(false);
        }
        *spans -= 1;
        let span: pb::Span = schema::decode(value.clone())?;
        blocks.extend(counts::blocks(&span).iter().map(eden::garbage));
        Ok(true)
    })?;
    if blocks.is_empty() {
        blocks.push(pb::Block::default());
    }
    let garbage = |block: pb::Block| pb::GarbageBlock {
        file: file.0,
        block_service: block.block_service,
        block: block.block,
        certificate: Bytes::new(),
    };
    Ok(blocks.into_iter().map(garbage).collect())
}

impl<T: Table + ?Sized> Context<'_, '_, T> {
    /// These blocks (service, block) of the file are erased; of what lives, or has a writer, nothing is forgotten.
    pub fn forget(
        &mut self,
        file: InodeId,
        erased: &BTreeSet<(u64, u64)>,
        spans: &mut usize,
    ) -> Result<(), TableError> {
        let row: Option<pb::EdenRow> = schema::get(&*self.tx, &schema::eden_key(file))?;
        let Some(mut row) = row.filter(|row| row.expired) else { return Ok(()) };
        let is_left = |block: &pb::Block| !erased.contains(&(block.block_service, block.block));
        let mut found = row.garbage.extract_if(.., |block| !is_left(block)).count();
        if let Some(blocks) = row.pending.as_mut().and_then(|pending| pending.blocks.as_mut()) {
            found += blocks.blocks.extract_if(.., |block| !is_left(block)).count();
            if blocks.blocks.is_empty() {
                row.pending = None;
            }
        }
        let (mut gone, mut changed, mut left) = (Vec::new(), Vec::new(), false);
        let prefix = schema::id_key(schema::SPAN, file.0);
        scan(&*self.tx, &prefix, &prefix_end(&prefix), |key, value| {
            // All are found: what follows is left as it is.
            if *spans == 0 || found + gone.len() >= erased.len() {
                left = true;
                return Ok(false);
            }
            *spans -= 1;
            let mut span: pb::Span = schema::decode(value.clone())?;
            let before = gone.len();
            let kept = span.blocks.as_mut().is_some_and(|blocks| {
                gone.extend(blocks.blocks.extract_if(.., |block| !is_left(block)));
                !blocks.blocks.is_empty()
            });
            left |= kept;
            if !kept || gone.len() > before {
                changed.push((key.clone(), kept.then_some(span)));
            }
            Ok(true)
        })?;
        for (key, span) in changed {
            match span {
                Some(span) => self.put(key.to_vec(), &span)?,
                None => self.tx.delete(key)?,
            }
        }
        self.recount(file, &gone, &[])?;
        if left || row.pending.is_some() || !row.garbage.is_empty() {
            return self.put(schema::eden_key(file), &row);
        }
        self.tx.delete(schema::eden_key(file))
    }
}
