//! Giving back the room of what was erased: segments that are mostly dead have their blocks moved, and are removed.
//!
//! A few blocks at a time: they are copied, the copies made durable, the index switched to them, and only then
//! are the originals given up (BL-11). A crash in between leaves two copies, of which the next opening keeps a
//! good one. Damage is copied as it is, with the checksums that tell it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_blockd_core::record::{Record, pages};
use eggs_blockd_core::recovery::VERIFY_BYTES;
use eggs_blockd_core::{Place, WriteAdmission};
use eggs_proto::BlockId;
use rustix::fs::{self as rfs, AtFlags};

use super::incoming::Streamed;
use super::segment::{Segment, WHOLE_BYTES_MAX, Whole};
use super::{Claim, Store, StoreError, io_error, lock, segment_name};
use crate::limits::{COMPACTION_BATCH_BYTES, COMPACTION_BYTES_PER_SECOND};

impl Store {
    /// What the disk needs from time to time: a shorter journal, fewer dead bytes. Ends early when `stop` says so.
    ///
    /// # Errors
    /// The disk's; nothing is lost by that.
    pub fn maintain(self: &Arc<Self>, stop: &dyn Fn() -> bool) -> Result<(), StoreError> {
        if self.is_read_only() {
            return Ok(());
        }
        let wanted = lock(&self.books).wants_rewriting();
        // Compaction does not need it, and may make the room it needs.
        let rewritten = if wanted { self.rewrite_journal() } else { Ok(()) };
        while !stop() {
            let pressed = self.space()?.available_bytes() == 0;
            let Some(victim) = lock(&self.books).index.victim(pressed) else { break };
            if !self.compact(victim, stop)? {
                break;
            }
        }
        rewritten
    }

    /// Empties and removes a sealed segment; false: not to the end, come back later.
    ///
    /// # Errors
    /// The disk's.
    pub fn compact(self: &Arc<Self>, number: u32, stop: &dyn Fn() -> bool) -> Result<bool, StoreError> {
        let live = || lock(&self.books).index.segment(number).map_or(0, |used| used.live_blocks);
        if live() > 0 {
            let Some(segment) = self.segment_if_there(number)? else { return Ok(false) };
            let begun = Instant::now();
            let mut copied = 0;
            for batch in self.batches(number) {
                if stop() {
                    return Ok(false);
                }
                copied += self.move_blocks(&segment, batch)?;
                // Throttled: the disk is for others.
                let due = Duration::from_secs_f64(copied as f64 / COMPACTION_BYTES_PER_SECOND as f64);
                while begun.elapsed() < due && !stop() {
                    std::thread::sleep(Duration::from_millis(10).min(due));
                }
            }
        }
        if live() > 0 {
            // Something in it is being changed, or cannot be read. Not again until more of it is dead.
            lock(&self.books).index.stuck(number);
            return Ok(false);
        }
        // Removed first, forgotten after: a segment that the journal does not know any more would be looked through.
        rfs::unlinkat(&self.segments, segment_name(number), AtFlags::empty())
            .map_err(io_error("remove a segment"))?;
        lock(&self.books).removed(number);
        self.close_segment(number);
        self.counters.compacted_segment();
        Ok(true)
    }

    /// The live blocks of a segment in the order they lie, in runs that are moved at once.
    fn batches(&self, number: u32) -> Vec<Vec<(BlockId, Place)>> {
        let mut live: Vec<(BlockId, Place)> =
            lock(&self.books).index.blocks().filter(|(_, place)| place.segment == number).collect();
        live.sort_unstable_by_key(|(_, place)| place.offset);
        let mut batches = vec![Vec::new()];
        let mut bytes = 0;
        for (block, place) in live {
            if bytes + place.extent().bytes() > COMPACTION_BATCH_BYTES && bytes > 0 {
                batches.push(Vec::new());
                bytes = 0;
            }
            bytes += place.extent().bytes();
            if let Some(batch) = batches.last_mut() {
                batch.push((block, place));
            }
        }
        batches
    }

    /// Moves blocks to the end of the segments being written; how many bytes.
    fn move_blocks(
        self: &Arc<Self>,
        from: &Arc<Segment>,
        blocks: Vec<(BlockId, Place)>,
    ) -> Result<u64, StoreError> {
        // One that is being written again or erased right now is left for the next time.
        let mut claims = Vec::new();
        let mut small = Vec::new();
        let mut bytes = 0;
        for (block, place) in blocks {
            let Ok(claim) = Claim::take(self, block) else { continue };
            if lock(&self.books).index.get(block) != Some(place) {
                continue;
            }
            bytes += place.extent().bytes();
            if place.size > WHOLE_BYTES_MAX {
                if let Err(error) = self.move_large(from, block, place)? {
                    self.cannot_move(block, &error);
                }
                continue;
            }
            match read_whole(from, block, place) {
                Ok(whole) => small.push(whole),
                Err(error) => {
                    self.cannot_move(block, &error);
                    continue;
                }
            }
            claims.push(claim);
        }
        if !small.is_empty() {
            let (hold, places) = self.small.append(self, &small)?;
            let placed: Vec<_> = small.iter().map(|whole| whole.admission.block).zip(places).collect();
            self.sync_whole(&hold.segment, &placed)?;
            self.moved(&placed);
        }
        self.counters.compacted(bytes);
        Ok(bytes)
    }

    /// One that cannot be read stays where it is, and its segment with it.
    fn cannot_move(&self, block: BlockId, error: &dyn std::fmt::Display) {
        tracing::warn!(path = %self.path().display(), %block, %error, "a block cannot be moved");
    }

    /// Inside: whether it could be read.
    fn move_large(
        self: &Arc<Self>,
        from: &Arc<Segment>,
        block: BlockId,
        place: Place,
    ) -> Result<io::Result<()>, StoreError> {
        let mut copy = Streamed::begin(self, Record::block(block, place.size, place.crc))?;
        let extent = place.extent();
        let read = |at: u32, length: u32| from.file.read(u64::from(at), length as usize);
        let mut offset = 0;
        while offset < place.size {
            let length = VERIFY_BYTES.min(place.size - offset);
            match read(extent.data_at + offset, length) {
                Ok(bytes) => copy.write(offset, &bytes)?,
                Err(error) => return Ok(Err(error)),
            }
            offset += length;
        }
        match read(extent.sums_at(), 4 * pages(place.size)) {
            Ok(sums) => copy.finish(&sums)?,
            Err(error) => return Ok(Err(error)),
        }
        self.moved(&[(block, copy.place)]);
        Ok(Ok(()))
    }

    /// The originals keep their bytes for those who are reading them; their segment will go as a whole.
    fn moved(&self, placed: &[(BlockId, Place)]) {
        let before = lock(&self.books).put(placed);
        for (&(block, _), before) in placed.iter().zip(before) {
            if let Some(before) = before
                && let Ok(Some(segment)) = self.segment_if_there(before.segment)
            {
                self.mark_erased(&segment, block, before);
            }
        }
    }
}

fn read_whole(from: &Segment, block: BlockId, place: Place) -> Result<Whole, StoreError> {
    let extent = place.extent();
    let read = |at: u32, length: u32| {
        from.file.read(u64::from(at), length as usize).map_err(io_error("read a block"))
    };
    Ok(Whole {
        admission: WriteAdmission { block, size: place.size, crc: place.crc, proof: [0; 16] },
        sums: read(extent.sums_at(), 4 * pages(place.size))?,
        pieces: vec![Bytes::from(read(extent.data_at, place.size)?)],
    })
}
