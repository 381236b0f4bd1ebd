//! Segments that are being written, and the sync that their writers share.
//!
//! A disk has two segments open: one for blocks that come whole, many at a time, and one for those that stream,
//! so that a sync of small blocks does not wait for megabytes that somebody else is writing. Room is given
//! out under the lane's lock, together with the record's header ([`eggs_blockd_core::record`]).

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bytes::Bytes;
use eggs_blockd_core::record::{ALIGNED_BYTES_MIN, SEGMENT_BYTES_MAX, record_bytes_max};
use eggs_blockd_core::{Extent, Place, Record, WriteAdmission};

use super::files::DiskFile;
use super::{Counters, Store, StoreError, io_error, lock};

/// One sync for all who wait for one (group commit): the first of them does it, the others wait for it.
#[derive(Debug, Default)]
pub struct GroupSync {
    state: Mutex<Syncing>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct Syncing {
    asked: u64,
    durable: u64,
    busy: bool,
    /// After a failed sync the kernel may have dropped what was not written: nothing more is believed.
    failed: bool,
}

impl GroupSync {
    /// Makes everything durable that the caller has written to `file`.
    ///
    /// # Errors
    /// The disk's, now and for ever.
    pub fn sync(&self, file: &DiskFile, counters: &Counters) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.asked += 1;
        let mine = state.asked;
        loop {
            if state.durable >= mine {
                return Ok(());
            }
            if state.failed {
                return Err(rustix::io::Errno::IO.into());
            }
            if state.busy {
                state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.busy = true;
            let (together, all) = (state.asked - state.durable, state.asked);
            drop(state);
            let result = file.sync();
            counters.synced(together);
            state = lock(&self.state);
            state.busy = false;
            match &result {
                Ok(()) => state.durable = all,
                Err(_) => state.failed = true,
            }
            self.done.notify_all();
            result?;
        }
    }

    pub fn has_failed(&self) -> bool {
        lock(&self.state).failed
    }
}

/// An open segment.
#[derive(Debug)]
pub struct Segment {
    pub number: u32,
    pub file: DiskFile,
    pub group: GroupSync,
    /// Who still writes to it: its lane, and each record on its way. The last one seals it.
    holds: AtomicU32,
    /// Where its records end, once its lane has let go of it.
    end: AtomicU32,
}

impl Segment {
    /// One that is only read, and that nobody will seal.
    pub fn new(number: u32, file: DiskFile) -> Segment {
        Segment {
            number,
            file,
            group: GroupSync::default(),
            holds: AtomicU32::new(0),
            end: AtomicU32::new(0),
        }
    }

    /// Makes what was written to it durable, together with others.
    ///
    /// # Errors
    /// The disk's.
    pub fn sync(&self, store: &Store) -> Result<(), StoreError> {
        self.group.sync(&self.file, &store.counters).map_err(io_error("make blocks durable"))
    }

    /// One who wrote to it is done; the last one seals it.
    fn release(&self, store: &Store) {
        if self.holds.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let end = self.end.load(Ordering::Acquire);
        // Not sealed, it is looked through when the disk is next opened: no harm.
        if end > 0
            && !self.group.has_failed()
            && let Err(error) = store.seal(self, end)
        {
            tracing::warn!(path = %store.path().display(), %error, "a segment was not sealed");
        }
    }
}

/// A record on its way into a segment: the segment is not sealed before this is dropped.
#[derive(Debug)]
pub struct Hold {
    store: Arc<Store>,
    pub segment: Arc<Segment>,
}

impl Hold {
    fn take(store: &Arc<Store>, segment: &Arc<Segment>) -> Hold {
        segment.holds.fetch_add(1, Ordering::AcqRel);
        Hold { store: Arc::clone(store), segment: Arc::clone(segment) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.segment.release(&self.store);
    }
}

/// A block that is whole in memory, with the checksums of its pages.
#[derive(Debug)]
pub struct Whole {
    pub admission: WriteAdmission,
    pub pieces: Vec<Bytes>,
    pub sums: Vec<u8>,
}

/// Where writes of one kind go.
#[derive(Debug, Default)]
pub struct Lane {
    open: Mutex<Option<Open>>,
}

/// The lane is one of those who hold the segment.
#[derive(Debug)]
struct Open {
    segment: Arc<Segment>,
    end: u32,
}

impl Lane {
    /// Goes on writing a segment at its end.
    pub fn resume(&self, segment: &Arc<Segment>, end: u32) {
        *lock(&self.open) = Some(Open::new(Arc::clone(segment), end));
    }

    /// Writes whole blocks, one after the other; they are not durable yet. Where they lie, in order.
    ///
    /// # Errors
    /// The disk's; none of them is there then.
    pub fn append(&self, store: &Arc<Store>, blocks: &[Whole]) -> Result<(Hold, Vec<Place>), StoreError> {
        let room = blocks.iter().map(|block| record_bytes_max(block.admission.size)).sum();
        let mut slot = lock(&self.open);
        let open = Lane::with_room(&mut slot, store, room)?;
        let (segment, start) = (Arc::clone(&open.segment), open.end);
        let mut places = Vec::with_capacity(blocks.len());
        let mut bytes = Vec::with_capacity(room as usize);
        let mut end = start;
        for Whole { admission, pieces, sums } in blocks {
            let extent = Extent::new(end, admission.size);
            let record = Record::block(admission.block, admission.size, admission.crc);
            let relative = |at: u32| (at - start) as usize;
            bytes.extend_from_slice(&record.encode(store.seal_key(), segment.number, u64::from(end)));
            bytes.extend_from_slice(sums);
            bytes.resize(relative(extent.data_at), 0);
            pieces.iter().for_each(|piece| bytes.extend_from_slice(piece));
            bytes.resize(relative(extent.end), 0);
            places.push(Place {
                segment: segment.number,
                offset: extent.offset,
                size: admission.size,
                crc: admission.crc,
            });
            end = extent.end;
        }
        let hold = Hold::take(store, &segment);
        if let Err(error) = segment.file.write_all(&bytes, u64::from(start)) {
            if segment.file.truncate(u64::from(start)).is_err() {
                // Records of which nobody will hear may lie there: looked through at the next opening.
                Lane::close(&mut slot, store);
            }
            return Err(io_error("write blocks")(error));
        }
        open.end = end;
        store.grow(segment.number, i64::from(end - start));
        Ok((hold, places))
    }

    /// Gives out room for one block that will stream, and writes its header.
    ///
    /// # Errors
    /// The disk's.
    pub fn reserve(&self, store: &Arc<Store>, record: Record) -> Result<(Hold, Place), StoreError> {
        let mut slot = lock(&self.open);
        let open = Lane::with_room(&mut slot, store, record_bytes_max(record.size))?;
        let (segment, offset) = (Arc::clone(&open.segment), open.end);
        let extent = record.extent(offset);
        let hold = Hold::take(store, &segment);
        let header = record.encode(store.seal_key(), segment.number, u64::from(offset));
        segment.file.write_all(&header, u64::from(offset)).map_err(io_error("write a block's header"))?;
        open.end = extent.end;
        store.grow(segment.number, extent.bytes() as i64);
        drop(slot);
        Ok((hold, Place { segment: segment.number, offset, size: record.size, crc: record.crc }))
    }

    /// The open segment, another one when there is none with room.
    fn with_room<'a>(
        slot: &'a mut Option<Open>,
        store: &Arc<Store>,
        room: u64,
    ) -> Result<&'a mut Open, StoreError> {
        let full = |open: &Open| {
            open.segment.group.has_failed()
                || open.end >= store.segment_bytes()
                || u64::from(open.end) + room > u64::from(SEGMENT_BYTES_MAX)
        };
        if slot.as_ref().is_some_and(full) {
            Lane::close(slot, store);
        }
        match slot {
            Some(open) => Ok(open),
            None => Ok(slot.insert(Open::new(store.new_segment()?, 0))),
        }
    }

    fn close(slot: &mut Option<Open>, store: &Store) {
        if let Some(open) = slot.take() {
            open.segment.end.store(open.end, Ordering::Release);
            open.segment.release(store);
        }
    }
}

impl Open {
    fn new(segment: Arc<Segment>, end: u32) -> Open {
        segment.holds.fetch_add(1, Ordering::AcqRel);
        Open { segment, end }
    }
}

/// Blocks up to this size are gathered in memory and written with others in one piece.
pub const WHOLE_BYTES_MAX: u32 = 256 << 10;

const _: () = assert!(ALIGNED_BYTES_MIN <= WHOLE_BYTES_MAX);
