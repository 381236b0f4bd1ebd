//! Reading ahead for who reads an open file piece by piece in order.
//!
//! The first reads of a sequence fetch what they need; from the third on a stream runs ahead of them, first a little,
//! then up to [`crate::Options::read_ahead`]. A read elsewhere ends it. Only one sequence per open file is followed.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex;

use crate::error::Result;
use crate::reader::Open;
use crate::stream::FileStream;

/// Reads that go on where the one before stopped, before anything is fetched ahead.
const SEQUENCE_MIN: u32 = 2;
/// Fetched ahead at first.
const WINDOW_FIRST: u64 = 1 << 20;
/// Longer reads gain nothing: they are parallel in themselves.
const READ_BYTES_MAX: usize = 4 << 20;

#[derive(Debug)]
pub(crate) struct Ahead {
    /// Whoever finds it locked reads for itself.
    sequence: Mutex<Sequence>,
}

#[derive(Debug, Default)]
struct Sequence {
    /// Where the next read of the sequence begins.
    next: u64,
    reads: u32,
    stream: Option<FileStream>,
    /// Of the stream, not yet given out.
    rest: Bytes,
}

impl Ahead {
    pub fn new() -> Ahead {
        Ahead { sequence: Mutex::default() }
    }

    /// The bytes of a read that goes on a sequence; `None`: it is to fetch for itself.
    pub async fn serve(&self, open: &Arc<Open>, offset: u64, length: usize) -> Option<Bytes> {
        let size = open.metadata.size;
        if length == 0 || length > READ_BYTES_MAX || offset >= size {
            return None;
        }
        let mut sequence = self.sequence.try_lock().ok()?;
        let end = size.min(offset + length as u64);
        let goes_on = offset == sequence.next && offset > 0;
        sequence.next = end;
        if !goes_on {
            (sequence.reads, sequence.stream, sequence.rest) = (1, None, Bytes::new());
            return None;
        }
        sequence.reads = sequence.reads.saturating_add(1);
        if sequence.reads <= SEQUENCE_MIN {
            return None;
        }
        if sequence.stream.is_none() {
            let window = WINDOW_FIRST.max(4 * length as u64);
            // Of a twin: the open file must not keep itself alive.
            sequence.stream = Some(FileStream::carefully(Arc::new(open.twin()), offset, window));
        }
        // Dropped half-way, it has taken bytes that nobody got.
        sequence.next = u64::MAX;
        let read = sequence.take((end - offset) as usize).await;
        if read.is_err() || end == size {
            (sequence.stream, sequence.rest) = (None, Bytes::new());
        }
        // What went wrong ahead may not concern this read: it finds out for itself.
        let bytes = read.ok()?;
        sequence.next = end;
        Some(bytes)
    }
}

impl Sequence {
    async fn take(&mut self, length: usize) -> Result<Bytes> {
        let mut whole = BytesMut::new();
        loop {
            let step = self.rest.len().min(length - whole.len());
            let piece = self.rest.split_to(step);
            if step == length {
                return Ok(piece);
            }
            whole.extend_from_slice(&piece);
            if whole.len() == length {
                return Ok(whole.freeze());
            }
            let next = match &mut self.stream {
                Some(stream) => stream.next().await?,
                None => None,
            };
            self.rest = next.ok_or_else(|| crate::ClientError::protocol("a file ended early"))?;
        }
    }
}
