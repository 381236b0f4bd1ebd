//! What the operations on files in writing have in common: finding one, placing a span, accepting it.

use eggs_machine::{Table, TableError};
use eggs_proto::limits::{EDEN_DEADLINE, NOTE_BYTES_MAX};
use eggs_proto::{InodeId, ServiceError, ShardError, Time, pb};

use crate::context::{Context, Stop};
use crate::span;
use crate::{counts, schema};

/// Replaced blocks one file in writing may leave behind.
pub(crate) const GARBAGE_BLOCKS_MAX: usize = 256;

impl<T: Table + ?Sized> Context<'_, '_, T> {
    /// The file in writing, for its writer and before its deadline.
    pub fn eden(&self, file: u64, cookie: u64) -> Result<(InodeId, pb::EdenRow), Stop> {
        let file = self.local(file)?;
        let row: Option<pb::EdenRow> = schema::get(&*self.tx, &schema::eden_key(file))?;
        let row = row
            .filter(|row| cookie != 0 && row.cookie == cookie)
            .ok_or_else(|| ShardError::NotWriter.with(format_args!("file {file}")))?;
        if row.expired || row.deadline < self.time.0 {
            return Err(ShardError::Expired.with(format_args!("file {file}")).into());
        }
        Ok((file, row))
    }

    /// As [`Context::eden`], and it is to become a file: it does not hold copies of blocks.
    pub fn writing(&self, file: u64, cookie: u64) -> Result<(InodeId, pb::EdenRow), Stop> {
        let (file, row) = self.eden(file, cookie)?;
        if row.replacement.is_some() {
            return Err(ShardError::BadSpan.with(format_args!("{file} holds copies of blocks")).into());
        }
        Ok((file, row))
    }

    /// Writes the file back with its deadline pushed out, and answers its writer.
    pub fn keep_eden(
        &mut self,
        file: InodeId,
        row: &mut pb::EdenRow,
        blocks: Vec<pb::PlacedBlock>,
        under_spread: bool,
    ) -> Result<pb::write_result::Result, TableError> {
        row.deadline = self.time.saturating_add(EDEN_DEADLINE).0;
        self.put(schema::eden_key(file), row)?;
        let reply =
            pb::EdenReply { file: file.0, cookie: row.cookie, deadline: row.deadline, blocks, under_spread };
        Ok(pb::write_result::Result::Eden(reply))
    }

    /// Adds `new` to the end of the file: at once when it needs no blocks, else as the pending span on
    /// the block services chosen.
    pub fn place(
        &mut self,
        file: InodeId,
        row: &mut pb::EdenRow,
        new: pb::NewSpan,
        services: &[u64],
    ) -> Result<Vec<pb::PlacedBlock>, Stop> {
        let mut span = span::stored(new);
        let Some(blocks) = &mut span.blocks else {
            self.append(file, row, span)?;
            return Ok(Vec::new());
        };
        for (block, service) in blocks.blocks.iter_mut().zip(services) {
            block.block_service = *service;
            block.block = self.new_block()?.0;
        }
        let placed = placed_blocks(blocks, 0..blocks.blocks.len());
        row.pending = Some(span);
        Ok(placed)
    }

    /// Makes a span part of the file: S, B and the sums in E.
    pub fn append(&mut self, file: InodeId, row: &mut pb::EdenRow, span: pb::Span) -> Result<(), TableError> {
        row.crc = span::combine(row.crc, span.crc, u64::from(span.size));
        row.size += u64::from(span.size);
        self.recount(file, &[], counts::blocks(&span))?;
        self.put(schema::span_key(file, row.size - 1), &span)
    }

    /// What a certification does to the file, without doing it: the span to append (SH-14).
    pub fn certified(
        &self,
        file: InodeId,
        row: &mut pb::EdenRow,
        certify: &pb::CertifySpan,
        proven: &[u64],
    ) -> Result<Option<pb::Span>, Stop> {
        let bad = || ShardError::BadSpan.with(format_args!("certified span at {}", certify.offset));
        let Some(pending) = row.pending.take() else {
            // A span without blocks was appended as it came: its certification says nothing new.
            let last: Option<pb::Span> = match row.size.checked_sub(1) {
                None => None,
                Some(last) => schema::get(&*self.tx, &schema::span_key(file, last))?,
            };
            return match last {
                Some(span) if span.offset == certify.offset && span.blocks.is_none() => Ok(None),
                _ => Err(bad().into()),
            };
        };
        if pending.offset != certify.offset {
            return Err(bad().into());
        }
        let blocks = pending.blocks.as_ref().map_or(&[][..], |blocks| &blocks.blocks[..]);
        check_proven(blocks, proven)?;
        Ok(Some(pending))
    }

    /// The writer is gone. What may be in blocks stays listed until it is erased; a file that left
    /// nothing behind goes at once.
    pub fn expire(&mut self, file: InodeId, mut row: pb::EdenRow) -> Result<(), TableError> {
        let spans = schema::id_key(schema::SPAN, file.0);
        let spans = self.tx.page(&spans, &eggs_machine::table::prefix_end(&spans), 1)?;
        if spans.is_empty() && row.pending.is_none() && row.garbage.is_empty() {
            return self.tx.delete(schema::eden_key(file));
        }
        row.expired = true;
        self.put(schema::eden_key(file), &row)
    }
}

/// Refuses a new span that does not go on where the file ends, or for which the leader chose no
/// places. Everything of it is checked here, so that [`Context::place`] cannot refuse.
pub(crate) fn check_place(new: &pb::NewSpan, size: u64, services: &[u64]) -> Result<(), pb::Error> {
    span::validate(new)?;
    if new.offset != size {
        let what = format_args!("span at {} of a file of {size} bytes", new.offset);
        return Err(ShardError::BadSpan.with(what));
    }
    let needed = match &new.body {
        Some(pb::new_span::Body::Blocks(blocks)) => blocks.blocks.len(),
        _ => 0,
    };
    check_services(needed, services)
}

/// Refuses when the leader has not verified the proofs of exactly these blocks (SH-14).
pub(crate) fn check_proven(blocks: &[pb::Block], proven: &[u64]) -> Result<(), pb::Error> {
    if blocks.iter().map(|block| block.block).eq(proven.iter().copied()) {
        return Ok(());
    }
    Err(ShardError::BadProof.with("the proofs are not of the blocks of the span in progress"))
}

/// One service per block, no two the same.
pub(crate) fn check_services(needed: usize, services: &[u64]) -> Result<(), pb::Error> {
    let mut distinct = services.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    if distinct.len() != needed || services.len() != needed {
        return Err(ShardError::NoBlockServices.bare());
    }
    Ok(())
}

/// What the writer has to write where, for the blocks with these indexes; unsigned.
pub(crate) fn placed_blocks(
    blocks: &pb::Blocks,
    indexes: impl IntoIterator<Item = usize>,
) -> Vec<pb::PlacedBlock> {
    let size = u32::try_from(span::block_size(blocks.stripes, blocks.cell_size)).unwrap_or(u32::MAX);
    indexes
        .into_iter()
        .filter_map(|index| Some((index, blocks.blocks.get(index)?)))
        .map(|(index, block)| pb::PlacedBlock {
            index: index as u32,
            block_service: block.block_service,
            block: block.block,
            certificate: bytes::Bytes::new(),
            size,
            crc: block.crc,
        })
        .collect()
}

/// A note cut to what is kept.
pub(crate) fn cut_note(mut note: String) -> String {
    note.truncate(note.floor_char_boundary(NOTE_BYTES_MAX));
    note
}

/// Whether the writer of `row` has run out of time.
pub(crate) fn overdue(row: &pb::EdenRow, now: Time) -> bool {
    !row.expired && row.deadline < now.0
}

/// A replaced block as garbage: where it may be, without its CRCs.
pub(crate) fn garbage(block: &pb::Block) -> pb::Block {
    pb::Block { block_service: block.block_service, block: block.block, crc: 0, cell_crcs: Vec::new() }
}
