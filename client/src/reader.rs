//! Reading files: ranges, streams, whole files (CL-1, CL-2, CL-3).

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{IoSlice, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use eggs_client_core::read::{Fetch, FetchFailure, ReadSpan, ReadStep};
use eggs_client_core::retry::Backoff;
use eggs_client_core::span::{Body, StoredSpan, check_page};
use eggs_proto::{InodeId, ShardError, Time, pb};
use futures_util::future::Either;
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::Client;
use crate::connection::{entropy, lock};
use crate::error::{ClientError, Refusal, Result};
use crate::path::Path;
use crate::types::{CreateOptions, Metadata, Published, Span};
use crate::walk::{Start, Want};

/// Bytes a stream fetches as one: several messages from each block.
const SEGMENT_BYTES: u64 = 8 << 20;
/// Spans of one file remembered; of longer files the last ones asked for.
const SPANS_MAX: usize = 2048;
/// Spans of one `read_at` fetched at the same time.
const SPANS_IN_FLIGHT: usize = 4;

/// An open file. Files never change, so what it reads is one version whatever happens to the name.
#[derive(Debug, Clone)]
pub struct FileReader {
    open: Arc<Open>,
}

#[derive(Debug)]
struct Open {
    client: Client,
    metadata: Metadata,
    what: String,
    spans: Mutex<BTreeMap<u64, Arc<StoredSpan>>>,
}

impl Client {
    /// Opens a file for reading; follows links.
    pub async fn open(&self, path: impl AsRef<[u8]>) -> Result<FileReader> {
        self.open_at(path, Time::ZERO).await
    }

    /// Opens what was at the path at an instant.
    pub async fn open_at(&self, path: impl AsRef<[u8]>, at: Time) -> Result<FileReader> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        self.open_from(&Start::root(), path, at, &what).await
    }

    pub(crate) async fn open_from(
        &self,
        start: &Start,
        path: Path,
        at: Time,
        what: &str,
    ) -> Result<FileReader> {
        let want = Want { at, attributes: true, spans: true, follow: true, ..Want::default() };
        let walked = self.walk(start, path, want, what).await?;
        let (spans, all) = (walked.spans, walked.all_spans);
        let attributes = walked.attributes.ok_or_else(|| ClientError::not_found(what))?;
        let metadata = Metadata::from_wire(walked.inode, attributes)?;
        FileReader::new(self, metadata, spans, all, what)
    }

    pub async fn open_inode(&self, file: InodeId) -> Result<FileReader> {
        let start = Start { inode: file, policies: pb::Policies::default() };
        self.open_from(&start, Path::default(), Time::ZERO, &format!("inode {file}")).await
    }

    /// How a file is stored: all its spans.
    pub async fn spans(&self, file: InodeId) -> Result<Vec<Span>> {
        let mut spans: Vec<Span> = Vec::new();
        let mut offset = 0;
        loop {
            let (page, more) = self.span_page(file, offset).await?;
            let end = page.last().map(|span| span.offset.saturating_add(span.size.into()));
            match end {
                _ if !more && (page.is_empty() || end > Some(offset)) => {
                    spans.extend(page);
                    return Ok(spans);
                }
                Some(end) if end > offset => offset = end,
                _ => return Err(ClientError::protocol("a page of spans does not follow the one before")),
            }
            spans.extend(page);
        }
    }

    /// Copies a file's contents; the copy has the attributes `options` say.
    pub async fn copy(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let source = self.open(from).await?;
        let options = CreateOptions { size_hint: Some(source.size()), ..options.clone() };
        let mut writer = self.create(to, &options).await?;
        let mut stream = source.stream(0);
        while let Some(bytes) = stream.next().await? {
            writer.write(&bytes).await?;
            progress(writer.written());
        }
        writer.finish().await
    }
}

impl FileReader {
    fn new(
        client: &Client,
        metadata: Metadata,
        spans: Vec<pb::Span>,
        all: bool,
        what: &str,
    ) -> Result<FileReader> {
        if metadata.is_directory() {
            return Err(ClientError::refused(Refusal::IsDirectory, ShardError::IsDirectory, what));
        }
        let checked = check_page(spans, 0, false, metadata.size, all);
        let checked = checked.map_err(|error| ClientError::Corrupt {
            file: metadata.inode,
            path: what.to_owned(),
            what: error.to_string(),
        })?;
        let spans = checked.into_iter().map(|span| (span.offset, Arc::new(span))).collect();
        let open = Open { client: client.clone(), metadata, what: what.to_owned(), spans: Mutex::new(spans) };
        Ok(FileReader { open: Arc::new(open) })
    }

    pub fn metadata(&self) -> &Metadata {
        &self.open.metadata
    }

    pub fn inode(&self) -> InodeId {
        self.open.metadata.inode
    }

    pub fn size(&self) -> u64 {
        self.open.metadata.size
    }

    /// Up to `length` bytes at `offset`; fewer only at the end of the file.
    pub async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes> {
        let end = offset.saturating_add(length as u64).min(self.size());
        let mut parts = Vec::new();
        let mut at = offset;
        while at < end {
            let span = self.open.span(at).await?;
            let to = span.end().min(end);
            parts.push((span, at..to));
            at = to;
        }
        let reads = stream::iter(parts).map(|(span, range)| self.open.clone().read(span, range));
        let mut reads = reads.buffered(SPANS_IN_FLIGHT);
        let mut pieces = Vec::new();
        while let Some(read) = reads.next().await {
            pieces.extend(read?);
        }
        Ok(join(pieces))
    }

    /// The whole file; `Invalid` when it is longer than `limit`.
    pub async fn read_all(&self, limit: u64) -> Result<Bytes> {
        if self.size() > limit {
            let words = format!("{}: {} bytes are more than {limit}", self.open.what, self.size());
            return Err(ClientError::Invalid(words));
        }
        let mut stream = self.stream(0);
        let mut pieces = Vec::new();
        while let Some(piece) = stream.next().await? {
            pieces.push(piece);
        }
        Ok(join(pieces))
    }

    /// In order from `offset`; from 0 the CRC of the whole file is checked at the end.
    pub fn stream(&self, offset: u64) -> FileStream {
        let offset = offset.min(self.size());
        FileStream {
            open: self.open.clone(),
            scheduled: offset,
            in_flight: VecDeque::new(),
            ready: VecDeque::new(),
            crc: (offset == 0).then(crc32fast::Hasher::new),
            failed: None,
        }
    }

    /// Everything, in order; `progress` hears the bytes written so far.
    pub async fn copy_to(
        &self,
        output: &mut (dyn AsyncWrite + Unpin + Send),
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<u64> {
        let local = |error| ClientError::local(format_args!("output of {}", self.open.what), error);
        let mut stream = self.stream(0);
        let mut written = 0;
        while let Some(bytes) = stream.next().await? {
            output.write_all(&bytes).await.map_err(local)?;
            written += bytes.len() as u64;
            progress(written);
        }
        output.flush().await.map_err(local)?;
        Ok(written)
    }

    /// Everything, to a file of this host opened for writing (the fastest way).
    pub async fn copy_to_file(&self, output: File, progress: &mut (dyn FnMut(u64) + Send)) -> Result<u64> {
        let output = Arc::new(output);
        let mut stream = self.stream(0);
        let mut written = 0;
        while let Some(pieces) = stream.next_segment().await? {
            let length: usize = pieces.iter().map(Bytes::len).sum();
            let file = output.clone();
            let wrote = tokio::task::spawn_blocking(move || write_all(&file, &pieces)).await;
            wrote
                .unwrap_or_else(|error| Err(std::io::Error::other(error.to_string())))
                .map_err(|error| ClientError::local(format_args!("output of {}", self.open.what), error))?;
            written += length as u64;
            progress(written);
        }
        Ok(written)
    }
}

fn write_all(mut file: &File, pieces: &[Bytes]) -> std::io::Result<()> {
    // As many as Linux takes in one call.
    for pieces in pieces.chunks(1024) {
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut slices = &mut slices[..];
        while !slices.is_empty() {
            match file.write_vectored(slices) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut slices, written),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn join(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() <= 1 {
        return pieces.pop().unwrap_or_default();
    }
    let mut joined = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    for piece in pieces {
        joined.extend_from_slice(&piece);
    }
    joined.freeze()
}

impl Open {
    /// The span that holds `offset`, which is inside the file.
    async fn span(&self, offset: u64) -> Result<Arc<StoredSpan>> {
        let known = {
            let spans = lock(&self.spans);
            spans.range(..=offset).next_back().map(|(_, span)| span.clone())
        };
        if let Some(span) = known.filter(|span| offset < span.end()) {
            return Ok(span);
        }
        let (page, more) =
            self.client.span_page(self.metadata.inode, offset).await.map_err(|error| error.on(&self.what))?;
        let corrupt = |what: String| self.corrupt(what);
        let page = check_page(page, offset, true, self.metadata.size, !more)
            .map_err(|error| corrupt(error.to_string()))?;
        let page: Vec<Arc<StoredSpan>> = page.into_iter().map(Arc::new).collect();
        let first = page.first().cloned().ok_or_else(|| corrupt(format!("no span holds byte {offset}")))?;
        let mut spans = lock(&self.spans);
        if spans.len() + page.len() > SPANS_MAX {
            spans.clear();
        }
        spans.extend(page.into_iter().map(|span| (span.offset, span)));
        Ok(first)
    }

    fn corrupt(&self, what: String) -> ClientError {
        ClientError::Corrupt { file: self.metadata.inode, path: self.what.clone(), what }
    }

    /// Bytes of one span; `range` is of the file, inside the span. Block services that do not answer may
    /// be back soon: with too few blocks because of them it tries again until the timeout.
    async fn read(self: Arc<Self>, span: Arc<StoredSpan>, range: Range<u64>) -> Result<Vec<Bytes>> {
        let shared = &self.client.shared;
        let (started, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            let seen = shared.map_time();
            let (missing, away) = match self.read_once(&span, &range).await? {
                Attempt::Read(pieces) => return Ok(pieces),
                Attempt::Lost { missing, away } => (missing, away),
            };
            if !away {
                let (file, path, offset) = (self.metadata.inode, self.what.clone(), span.offset);
                return Err(ClientError::DataLost { file, path, offset, missing });
            }
            let pause = backoff.pause(entropy());
            if started.elapsed() + pause > shared.options.timeout {
                return Err(ClientError::Unreachable { tried: missing, after: started.elapsed() });
            }
            shared.renew_within(seen, pause).await;
            sleep(pause).await;
        }
    }

    async fn read_once(self: &Arc<Self>, span: &Arc<StoredSpan>, range: &Range<u64>) -> Result<Attempt> {
        let shared = &self.client.shared;
        let within = (range.start - span.offset) as u32..(range.end - span.offset) as u32;
        let mut machine = ReadSpan::new(span.clone(), within, shared.readable(), shared.turn());
        let mut events = FuturesUnordered::new();
        let mut away = false;
        loop {
            match machine.poll() {
                Some(ReadStep::Fetch(fetch)) => {
                    events.push(Either::Left(self.fetch(fetch)));
                    events.push(Either::Right(self.hedge(fetch.id)));
                }
                Some(ReadStep::Report(bad)) => shared.report(self.metadata.inode, &bad),
                Some(ReadStep::Done(bytes)) => return Ok(Attempt::Read(bytes)),
                Some(ReadStep::Lost(missing)) => return Ok(Attempt::Lost { missing, away }),
                None => match events.next().await {
                    Some(Event::Fetched(id, Ok(pieces))) => machine.fetched(id, pieces),
                    Some(Event::Fetched(id, Err(failure))) => {
                        away |= matches!(failure, FetchFailure::Unreachable(_));
                        machine.failed(id, failure);
                    }
                    Some(Event::Late(id)) => machine.late(id),
                    None => return Err(self.corrupt("a read came to no end".to_owned())),
                },
            }
        }
    }

    async fn fetch(&self, fetch: Fetch) -> Event {
        let fetched = self.client.shared.fetch_block(fetch).await;
        if let Err(FetchFailure::Unreachable(why)) = &fetched {
            tracing::debug!(block = %fetch.block, block_service = %fetch.service, %why, "block not fetched");
        }
        Event::Fetched(fetch.id, fetched)
    }

    async fn hedge(&self, id: u32) -> Event {
        sleep(self.client.shared.options.hedge_after).await;
        Event::Late(id)
    }
}

enum Attempt {
    Read(Vec<Bytes>),
    /// `away`: some block services did not answer.
    Lost {
        missing: String,
        away: bool,
    },
}

enum Event {
    Fetched(u32, Result<Vec<Bytes>, FetchFailure>),
    Late(u32),
}

/// A file read in order, ahead of its consumer.
#[derive(Debug)]
pub struct FileStream {
    open: Arc<Open>,
    /// Bytes before this are in flight, ready, or given out.
    scheduled: u64,
    in_flight: VecDeque<(u64, AbortOnDropHandle<Result<Vec<Bytes>>>)>,
    ready: VecDeque<Bytes>,
    /// Of everything given out, when that began at 0.
    crc: Option<crc32fast::Hasher>,
    failed: Option<ClientError>,
}

impl FileStream {
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
        // Before the consumer works on these, more are on their way.
        self.schedule().await?;
        if let Some(crc) = &mut self.crc {
            pieces.iter().for_each(|piece| crc.update(piece));
        }
        Ok(Some(pieces))
    }

    async fn schedule(&mut self) -> Result<()> {
        let limit = self.open.client.shared.options.read_ahead.max(1);
        let size = self.open.metadata.size;
        while self.scheduled < size && self.in_flight.iter().map(|(length, _)| length).sum::<u64>() < limit {
            let span = self.open.span(self.scheduled).await?;
            let end = segment_end(&span, self.scheduled);
            let range = self.scheduled..end;
            let read = self.open.clone().read(span, range);
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
fn segment_end(span: &StoredSpan, from: u64) -> u64 {
    let Body::Blocks { layout, .. } = &span.body else {
        return span.end().min(from + SEGMENT_BYTES);
    };
    let stripe = layout.stripe_size() as u64;
    let stripes = (SEGMENT_BYTES / stripe).max(1);
    let first = (from - span.offset) / stripe;
    (span.offset + (first + stripes) * stripe).min(span.end())
}
