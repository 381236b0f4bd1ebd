//! Reading files: ranges, streams, whole files (CL-1, CL-2, CL-3).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use eggs_client_core::span::{StoredSpan, check_page};
use eggs_proto::{InodeId, ShardError, Time, pb};
use futures_util::stream::{self, StreamExt};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::Client;
use crate::ahead::Ahead;
use crate::connection::lock;
use crate::error::{ClientError, Refusal, Result};
use crate::path::Path;
use crate::read_many::join;
use crate::reading::{Listener, Reading, Wanted};
use crate::stream::FileStream;
use crate::types::{CreateOptions, Metadata, Published, Span};
use crate::walk::{Start, Want};

/// Spans of one file remembered; of longer files the last ones asked for.
const SPANS_MAX: usize = 2048;
/// A read looks up a span again so often because its blocks are elsewhere by then.
const MOVES_MAX: u32 = 8;
/// Spans of one `read_at` fetched at the same time.
const SPANS_IN_FLIGHT: usize = 4;

/// An open file. Files never change, so what it reads is one version whatever happens to the name.
#[derive(Debug, Clone)]
pub struct FileReader {
    open: Arc<Open>,
}

#[derive(Debug)]
pub(crate) struct Open {
    pub reading: Reading,
    pub metadata: Metadata,
    spans: Mutex<BTreeMap<u64, Arc<StoredSpan>>>,
    ahead: Ahead,
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
    pub(crate) fn new(
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
        let reading = Reading::new(client, metadata.inode, what);
        let open = Open { reading, metadata, spans: Mutex::new(spans), ahead: Ahead::new() };
        Ok(FileReader { open: Arc::new(open) })
    }

    /// All its spans, when they came with it.
    pub(crate) fn known_spans(&self) -> Option<Vec<Arc<StoredSpan>>> {
        let spans = lock(&self.open.spans);
        let whole = spans.values().next_back().map_or(0, |span| span.end()) == self.size();
        let first = spans.keys().next().copied().unwrap_or_default();
        (whole && first == 0).then(|| spans.values().cloned().collect())
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

    /// The same file, whose fetches are told of.
    pub(crate) fn heard_by(&self, listener: &Arc<Listener>) -> FileReader {
        let mut open = self.open.twin();
        open.reading.listener = Some(listener.clone());
        FileReader { open: Arc::new(open) }
    }

    /// Up to `length` bytes at `offset`; fewer only at the end of the file. Who reads on where it stopped is read ahead
    /// for ([`crate::Options::read_ahead`]); any other read fetches exactly the cells it needs.
    pub async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes> {
        match self.open.ahead.serve(&self.open, offset, length).await {
            Some(bytes) => Ok(bytes),
            None => self.read_exactly(offset, length).await,
        }
    }

    /// Nothing but the cells needed.
    pub(crate) async fn read_exactly(&self, offset: u64, length: usize) -> Result<Bytes> {
        let end = offset.saturating_add(length as u64).min(self.size());
        let mut parts = Vec::new();
        let mut at = offset;
        while at < end {
            let span = self.open.span(at).await?;
            let to = span.end().min(end);
            parts.push((span, at..to));
            at = to;
        }
        let reads =
            stream::iter(parts).map(|(span, range)| async move { self.open.read(&span, range).await });
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
            let words = format!("{}: {} bytes are more than {limit}", self.open.reading.what, self.size());
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
        FileStream::new(self.open.clone(), offset)
    }

    /// Everything, in order; `progress` hears the bytes written so far.
    pub async fn copy_to(
        &self,
        output: &mut (dyn AsyncWrite + Unpin + Send),
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<u64> {
        let local = |error| ClientError::local(format_args!("output of {}", self.open.reading.what), error);
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
            wrote.unwrap_or_else(|error| Err(std::io::Error::other(error.to_string()))).map_err(|error| {
                ClientError::local(format_args!("output of {}", self.open.reading.what), error)
            })?;
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

impl Open {
    /// The same file, opened once more.
    pub fn twin(&self) -> Open {
        Open {
            reading: self.reading.clone(),
            metadata: self.metadata.clone(),
            spans: Mutex::new(lock(&self.spans).clone()),
            ahead: Ahead::new(),
        }
    }

    /// The span that holds `offset`, which is inside the file.
    pub async fn span(&self, offset: u64) -> Result<Arc<StoredSpan>> {
        let known = {
            let mut spans = lock(&self.spans);
            if self.reading.moved.swap(false, Ordering::Relaxed) {
                spans.clear();
            }
            spans.range(..=offset).next_back().map(|(_, span)| span.clone())
        };
        if let Some(span) = known.filter(|span| offset < span.end()) {
            return Ok(span);
        }
        let (page, more) = self
            .reading
            .client
            .span_page(self.metadata.inode, offset)
            .await
            .map_err(|error| error.on(&self.reading.what))?;
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

    pub fn corrupt(&self, what: String) -> ClientError {
        self.reading.corrupt(what)
    }

    /// `range` is of the file, inside the span.
    pub async fn read(&self, span: &Arc<StoredSpan>, range: Range<u64>) -> Result<Vec<Bytes>> {
        let (mut span, mut pieces) = (Arc::clone(span), Vec::new());
        let (mut at, mut moves) = (range.start, 0);
        loop {
            let to = span.end().min(range.end);
            let within = (at - span.offset) as u32..(to - span.offset) as u32;
            match self.reading.read(&span, Wanted::Bytes(within)).await? {
                Some(read) => {
                    pieces.extend(read);
                    at = to;
                }
                None if moves < MOVES_MAX => moves += 1,
                None => return Err(self.corrupt(format!("the blocks at {at} are elsewhere each time"))),
            }
            if at >= range.end {
                return Ok(pieces);
            }
            // It may be cut into other spans by now.
            span = self.span(at).await?;
        }
    }
}
