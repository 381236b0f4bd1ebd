//! Blocks on their way in: one that streams, or several that are there whole.

use std::sync::Arc;

use bytes::Bytes;
use eggs_blockd_core::record::{PageSums, record_bytes_max};
use eggs_blockd_core::{Place, Receiving, Record, WriteAdmission};
use eggs_proto::{BlockError, BlockId, mac};

use super::segment::{Hold, Segment, WHOLE_BYTES_MAX, Whole};
use super::{Claim, Promise, Store, StoreError, io_error, lock};

/// How an admitted write goes on.
#[derive(Debug)]
pub enum Begun {
    /// The block is there, whole and durable: here is its proof again.
    Stored(mac::Mac),
    Arriving(Box<Incoming>),
}

/// A block whose bytes are arriving. Dropped before [`Incoming::finish`], it leaves nothing.
#[derive(Debug)]
pub struct Incoming {
    store: Arc<Store>,
    admission: WriteAdmission,
    receiving: Receiving,
    sums: PageSums,
    coming: Coming,
    claim: Claim,
}

#[derive(Debug)]
enum Coming {
    /// Small: gathered in one piece, however short those are that come, and written with others when it is whole.
    Gathered(Vec<u8>, Promise),
    /// Large: every piece goes to its place at once.
    Streamed(Streamed),
}

/// A record that has its place and not yet its bytes.
#[derive(Debug)]
pub(super) struct Streamed {
    store: Arc<Store>,
    pub hold: Hold,
    record: Record,
    pub place: Place,
    kept: bool,
}

/// A whole block that wants to be written.
#[derive(Debug)]
pub struct Wanted {
    pub admission: WriteAdmission,
    pub data: Bytes,
}

impl Store {
    /// Begins an admitted write.
    ///
    /// # Errors
    /// `Busy` while the same block is being written or erased, `NoSpace`, `WrongCrc` when the block is
    /// there with other contents (BL-4), or the disk's.
    pub fn begin(self: &Arc<Self>, admission: WriteAdmission) -> Result<Begun, StoreError> {
        let claim = Claim::take(self, admission.block)?;
        if self.stored(&admission)? {
            return Ok(Begun::Stored(admission.proof));
        }
        let promise = Promise::take(self, record_bytes_max(admission.size), 1)?;
        let coming = if admission.size <= WHOLE_BYTES_MAX {
            Coming::Gathered(Vec::with_capacity(admission.size as usize), promise)
        } else {
            let record = Record::block(admission.block, admission.size, admission.crc);
            // With the room taken, the promise is kept.
            Coming::Streamed(Streamed::begin(self, record)?)
        };
        Ok(Begun::Arriving(Box::new(Incoming {
            store: Arc::clone(self),
            receiving: Receiving::new(admission.size, admission.crc),
            sums: PageSums::new(admission.block, admission.size),
            admission,
            coming,
            claim,
        })))
    }

    /// Whether the block is there already: a retry is idempotent (BL-1). What is there is believed only when it
    /// still reads right; a damaged one is written again, and the new one takes its place.
    fn stored(&self, admission: &WriteAdmission) -> Result<bool, StoreError> {
        let block = match self.read(admission.block) {
            Ok(block) => block,
            Err(StoreError::Refused(BlockError::UnknownBlock)) => return Ok(false),
            Err(error) => return Err(error),
        };
        if (block.size(), block.crc()) != (admission.size, admission.crc) {
            return Err(BlockError::WrongCrc.into());
        }
        match block.verify() {
            // In the index it is durable: it came there after its sync.
            Ok(()) => Ok(true),
            Err(StoreError::Corrupt(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes whole blocks with one sync (BL-1, BL-2). The proofs, in order; each block stands for itself.
    pub fn write_many(self: &Arc<Self>, blocks: Vec<Wanted>) -> Vec<Result<mac::Mac, StoreError>> {
        let mut results: Vec<Result<mac::Mac, StoreError>> = Vec::with_capacity(blocks.len());
        let mut claims = Vec::new();
        let mut numbers = Vec::new();
        let mut whole = Vec::new();
        for (number, Wanted { admission, data }) in blocks.into_iter().enumerate() {
            results.push(Ok(admission.proof));
            match self.want(&admission, &data) {
                Ok(None) => {}
                Ok(Some((claim, sums))) => {
                    claims.push(claim);
                    numbers.push(number);
                    whole.push(Whole { admission, pieces: vec![data], sums });
                }
                Err(error) => results[number] = Err(error),
            }
        }
        if let Err(error) = self.write_whole(&whole) {
            for number in numbers {
                results[number] = Err(same(&error));
            }
        }
        drop(claims);
        results
    }

    /// `None`: it is there already.
    fn want(
        self: &Arc<Self>,
        admission: &WriteAdmission,
        data: &Bytes,
    ) -> Result<Option<(Claim, Vec<u8>)>, StoreError> {
        let claim = Claim::take(self, admission.block)?;
        let mut receiving = Receiving::new(admission.size, admission.crc);
        receiving.push_all(data)?;
        receiving.finish()?;
        if self.stored(admission)? {
            return Ok(None);
        }
        let mut sums = PageSums::new(admission.block, admission.size);
        sums.push(data);
        Ok(Some((claim, sums.finish())))
    }

    fn write_whole(self: &Arc<Self>, blocks: &[Whole]) -> Result<(), StoreError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let room = blocks.iter().map(|block| record_bytes_max(block.admission.size)).sum();
        let promise = Promise::take(self, room, blocks.len())?;
        self.write_promised(blocks, promise)
    }

    fn write_promised(self: &Arc<Self>, blocks: &[Whole], promise: Promise) -> Result<(), StoreError> {
        let (hold, places) = self.small.append(self, blocks)?;
        drop(promise);
        let placed: Vec<_> = blocks.iter().map(|block| block.admission.block).zip(places).collect();
        self.sync_whole(&hold.segment, &placed)?;
        self.placed(&placed);
        self.counters.batched(blocks.len());
        Ok(())
    }

    /// Makes appended blocks durable. When that fails they must not be taken for durable ones at the next opening,
    /// when they read right from memory: they are erased, as far as that can be done now.
    pub(super) fn sync_whole(
        &self,
        segment: &Segment,
        placed: &[(BlockId, Place)],
    ) -> Result<(), StoreError> {
        let result = segment.sync(self);
        if result.is_err() {
            placed.iter().for_each(|&(block, place)| self.mark_erased(segment, block, place));
        }
        result
    }

    /// Blocks have become durable in their places. Copies that they replace are given up.
    pub(super) fn placed(&self, placed: &[(BlockId, Place)]) {
        let before = lock(&self.books).put(placed);
        for (&(block, _), before) in placed.iter().zip(before) {
            if let Some(before) = before {
                self.give_up(block, before);
            }
        }
    }
}

/// The same failure, for another block of the batch.
pub(super) fn same(error: &StoreError) -> StoreError {
    match error {
        StoreError::Refused(error) => StoreError::Refused(*error),
        StoreError::Corrupt(what) => StoreError::Corrupt(what.clone()),
        StoreError::Io { what, source } => {
            let source = match source.raw_os_error() {
                Some(code) => std::io::Error::from_raw_os_error(code),
                None => source.kind().into(),
            };
            StoreError::Io { what, source }
        }
    }
}

impl Incoming {
    /// Takes the next piece of the block.
    ///
    /// # Errors
    /// As [`Receiving::push`], or the disk's. The block is then lost: drop it.
    pub fn append(&mut self, piece: &Bytes) -> Result<(), StoreError> {
        let offset = self.admission.size - self.receiving.missing();
        self.receiving.push(piece)?;
        self.sums.push(piece);
        match &mut self.coming {
            Coming::Gathered(bytes, _) => bytes.extend_from_slice(piece),
            Coming::Streamed(streamed) => streamed.write(offset, piece)?,
        }
        Ok(())
    }

    /// Bytes still to come.
    pub fn missing(&self) -> u32 {
        self.receiving.missing()
    }

    /// Checks the whole, makes it durable and makes it known (BL-1, BL-2).
    ///
    /// # Errors
    /// `WrongSize`, `WrongCrc`, or the disk's; the block is then not there.
    pub fn finish(self) -> Result<mac::Mac, StoreError> {
        let Incoming { store, admission, receiving, sums, coming, claim } = self;
        receiving.finish()?;
        let sums = sums.finish();
        match coming {
            Coming::Gathered(bytes, promise) => {
                let pieces = vec![Bytes::from(bytes)];
                store.write_promised(&[Whole { admission, pieces, sums }], promise)?;
            }
            Coming::Streamed(mut streamed) => {
                streamed.finish(&sums)?;
                store.placed(&[(admission.block, streamed.place)]);
            }
        }
        drop(claim);
        Ok(admission.proof)
    }
}

impl Streamed {
    /// Takes room for a record: a full disk refuses before the data comes, and the block lies in one piece.
    pub fn begin(store: &Arc<Store>, record: Record) -> Result<Streamed, StoreError> {
        let (hold, place) = store.large.reserve(store, record)?;
        let streamed = Streamed { store: Arc::clone(store), hold, record, place, kept: false };
        let extent = place.extent();
        streamed
            .hold
            .segment
            .file
            .allocate(u64::from(extent.offset), extent.bytes(), false)
            .map_err(io_error("make room for a block"))?;
        Ok(streamed)
    }

    /// Bytes of the block, from `offset` of it.
    pub fn write(&mut self, offset: u32, bytes: &[u8]) -> Result<(), StoreError> {
        let at = u64::from(self.place.extent().data_at) + u64::from(offset);
        self.hold.segment.file.write_all(bytes, at).map_err(io_error("write a block"))
    }

    /// All bytes are written: with the checksums it is whole, and durable.
    pub fn finish(&mut self, sums: &[u8]) -> Result<(), StoreError> {
        let at = u64::from(self.place.extent().sums_at());
        self.hold.segment.file.write_all(sums, at).map_err(io_error("write a block"))?;
        self.hold.segment.sync(&self.store)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        if !self.kept {
            // What cannot be done now is done when the disk is next opened: its bytes do not have its CRC.
            self.store.mark_erased(&self.hold.segment, self.record.block, self.place);
            self.store.punch(&self.hold.segment, self.place);
        }
    }
}
