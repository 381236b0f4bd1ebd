//! Reads a file and tells how: who was asked for what, and how long each took.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_proto::pb;

use crate::Client;
use crate::connection::lock;
use crate::error::{ClientError, Result};
use crate::hops::{self, Hop};
use crate::reader::FileReader;
use crate::reading::{FetchTold, Listener};
use crate::types::{Metadata, Span};

/// Read at once; nothing of it is kept.
const STEP_BYTES: u64 = 8 << 20;

/// How a read went.
#[derive(Debug, Clone)]
pub struct Explanation {
    pub metadata: Metadata,
    /// Finding and opening the file.
    pub resolved: Vec<Hop>,
    pub resolve_took: Duration,
    /// Learning where the rest of its spans are.
    pub mapped: Vec<Hop>,
    /// Those the range touches.
    pub spans: Vec<Span>,
    /// In the order they ended.
    pub fetches: Vec<FetchTold>,
    /// Bytes read; with a failure, those before the span that failed.
    pub bytes: u64,
    pub read_took: Duration,
    /// The CRC of the whole file was right; none when not all of it was read.
    pub crc_right: Option<bool>,
    /// What ended the read early.
    pub failed: Option<ClientError>,
    /// Where the block services are.
    pub map: pb::ClusterMapReply,
}

impl Client {
    /// Reads up to `length` bytes of a file from `offset`, and tells how that went: of a read that failed, up to there.
    ///
    /// # Errors
    /// Only when the file or where its spans are cannot be had.
    pub async fn explain(&self, path: impl AsRef<[u8]>, offset: u64, length: u64) -> Result<Explanation> {
        let map = self.cluster_map().await?;
        let began = Instant::now();
        let (file, resolved) = hops::heard(self.open(path)).await;
        let file = file?;
        let resolve_took = began.elapsed();
        let end = offset.saturating_add(length).min(file.size());
        let (spans, mapped) = hops::heard(self.spans(file.inode())).await;
        let touched =
            |span: &Span| span.offset < end && span.offset.saturating_add(span.size.into()) > offset;
        let spans: Vec<Span> = spans?.into_iter().filter(touched).collect();
        let listener = Arc::new(Listener::new());
        let heard = file.heard_by(&listener);
        let began = Instant::now();
        let (bytes, read) = read(&heard, &spans, offset..end).await;
        let read_took = began.elapsed();
        let whole = offset == 0 && end == file.size();
        let (crc_right, failed) = match read {
            Ok(crc) => (file.metadata().crc.filter(|_| whole).map(|expected| crc == expected), None),
            Err(error) => (None, Some(error)),
        };
        let fetches = std::mem::take(&mut *lock(&listener.fetches));
        let metadata = file.metadata().clone();
        Ok(Explanation {
            metadata,
            resolved,
            resolve_took,
            mapped,
            spans,
            fetches,
            bytes,
            read_took,
            crc_right,
            failed,
            map,
        })
    }
}

/// How many bytes were read, and their CRC. No step crosses the end of a span: all before one that cannot be read is told of.
async fn read(file: &FileReader, spans: &[Span], range: Range<u64>) -> (u64, Result<u32>) {
    let mut crc = crc32fast::Hasher::new();
    let mut at = range.start;
    for span in spans {
        let end = span.offset.saturating_add(span.size.into()).min(range.end);
        while at < end {
            let step = (end - at).min(STEP_BYTES);
            match file.read_exactly(at, step as usize).await {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => {
                    crc.update(&bytes);
                    at += bytes.len() as u64;
                }
                Err(error) => return (at - range.start, Err(error)),
            }
        }
    }
    (at - range.start, Ok(crc.finalize()))
}
