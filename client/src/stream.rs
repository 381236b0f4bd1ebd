//! A file read in order, ahead of its consumer.
//!
//! Memory: [`crate::Options::read_ahead`] bytes and one segment.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use eggs_client_core::span::{Body, StoredSpan};
use tokio_util::task::AbortOnDropHandle;

use crate::error::{ClientError, Result};
use crate::reader::Open;

/// Bytes a stream fetches as one: several messages from each block.
const SEGMENT_BYTES: u64 = 8 << 20;

/// A file read in order, ahead of its consumer.
#[derive(Debug)]
pub struct FileStream {
    open: Arc<Open>,
    /// Bytes before this are in flight, ready, or given out.
    scheduled: u64,
    in_flight: VecDeque<(u64, AbortOnDropHandle<Result<Vec<Bytes>>>)>,
    ready: VecDeque<Bytes>,
    /// Fetched ahead; it grows with what is read, when it began small.
    window: u64,
    /// Of everything given out, when that began at 0.
    crc: Option<crc32fast::Hasher>,
    failed: Option<ClientError>,
}

impl FileStream {
    /// From `offset`, which is inside the file or its end.
    pub(crate) fn new(open: Arc<Open>, offset: u64) -> FileStream {
        FileStream {
            scheduled: offset,
            window: open.reading.client.shared.options.read_ahead.max(1),
            in_flight: VecDeque::new(),
            ready: VecDeque::new(),
            crc: (offset == 0).then(crc32fast::Hasher::new),
            failed: None,
            open,
        }
    }

    /// As [`FileStream::new`] for a reader of whom it is not known how far it goes: the window begins at `window`
    /// bytes, and nothing is said of the whole.
    pub(crate) fn carefully(open: Arc<Open>, offset: u64, window: u64) -> FileStream {
        let stream = FileStream::new(open, offset);
        FileStream { window: window.clamp(1, stream.window), crc: None, ..stream }
    }

    /// The next bytes; `None` at the end of the file.
    ///
    /// # Errors
    /// After an error it gives the same again.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        while self.ready.is_empty() {
            match self.next_segment().await? {
                Some(pieces) => self.ready = pieces.into(),
                None => return Ok(None),
            }
        }
        Ok(self.ready.pop_front())
    }

    /// Several pieces at once.
    pub(crate) async fn next_segment(&mut self) -> Result<Option<Vec<Bytes>>> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let segment = self.advance().await;
        if let Err(error) = &segment {
            self.failed = Some(error.clone());
            self.in_flight.clear();
        }
        segment
    }

    async fn advance(&mut self) -> Result<Option<Vec<Bytes>>> {
        self.schedule().await?;
        let Some((_, segment)) = self.in_flight.pop_front() else {
            return self.check_whole().map(|()| None);
        };
        let failed = |error: tokio::task::JoinError| self.open.corrupt(error.to_string());
        let pieces = segment.await.map_err(failed)??;
        let most = self.open.reading.client.shared.options.read_ahead.max(1);
        self.window = self.window.saturating_mul(2).min(most);
        // Before the consumer works on these, more are on their way.
        self.schedule().await?;
        if let Some(crc) = &mut self.crc {
            pieces.iter().for_each(|piece| crc.update(piece));
        }
        Ok(Some(pieces))
    }

    async fn schedule(&mut self) -> Result<()> {
        let size = self.open.metadata.size;
        while self.scheduled < size
            && self.in_flight.iter().map(|(length, _)| length).sum::<u64>() < self.window
        {
            let span = self.open.span(self.scheduled).await?;
            let end = segment_end(&span, self.scheduled, self.window.min(SEGMENT_BYTES));
            let range = self.scheduled..end;
            let open = self.open.clone();
            let read = async move { open.read(&span, range).await };
            self.in_flight.push_back((end - self.scheduled, AbortOnDropHandle::new(tokio::spawn(read))));
            self.scheduled = end;
        }
        Ok(())
    }

    /// Every cell was checked; this says that they are all of the file, in its order.
    fn check_whole(&mut self) -> Result<()> {
        let Some(crc) = self.crc.take() else { return Ok(()) };
        let (found, expected) = (crc.finalize(), self.open.metadata.crc.unwrap_or_default());
        if found != expected {
            let words = format!("the file's CRC is {found:#010x}, not {expected:#010x}");
            return Err(self.open.corrupt(words));
        }
        Ok(())
    }
}

/// Where a segment that begins at `from` ends: after whole stripes, so that no cell is fetched twice.
fn segment_end(span: &StoredSpan, from: u64, length: u64) -> u64 {
    let Body::Blocks { layout, .. } = &span.body else {
        return span.end().min(from + length);
    };
    let stripe = layout.stripe_size() as u64;
    let stripes = (length / stripe).max(1);
    let first = (from - span.offset) / stripe;
    (span.offset + (first + stripes) * stripe).min(span.end())
}
