//! Many files read at once: one request to each shard opens many, one to each host fetches ranges of many blocks.
//!
//! What a batch does not bring (a block is gone, a host is silent) is read as any file is. Everything is checked
//! against the CRCs of the metadata (CL-1).
//!
//! Memory: [`WINDOWS_IN_FLIGHT`] windows of [`WINDOW_BYTES`] and two chunks of opened files, whose inline contents are
//! at most [`OPEN_AT_ONCE`] times 16 KiB.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use eggs_client_core::read::{Damage, Fetch, ReadSpan, ReadStep};
use eggs_proto::pb::{shard_reply, shard_request};
use eggs_proto::{InodeId, ShardId, pb};
use futures_util::{StreamExt, stream};
use tokio_util::task::AbortOnDropHandle;

use crate::error::{ClientError, Result};
use crate::put_many::SMALL_FILE_BYTES_MAX;
use crate::types::Metadata;
use crate::{Client, FileReader};

/// Files opened by one call.
const OPEN_AT_ONCE: usize = 512;
const SHARDS_IN_FLIGHT: usize = 8;
/// Contents fetched as one.
const WINDOW_BYTES: u64 = 4 << 20;
const WINDOWS_IN_FLIGHT: usize = 3;
/// Files of a window that are read one by one at the same time.
const SINGLE_IN_FLIGHT: usize = 4;

/// One of many files.
#[derive(Debug, Clone)]
pub struct ReadFile {
    pub file: FileReader,
    /// All of it; none when it is longer than [`SMALL_FILE_BYTES_MAX`]: such files are better streamed.
    pub contents: Option<Bytes>,
}

/// Files read ahead of their consumer, in the order asked for ([`Client::read_many`]).
#[derive(Debug)]
pub struct ManyReader {
    client: Client,
    /// Not opened yet.
    waiting: VecDeque<Result<InodeId>>,
    opening: Option<AbortOnDropHandle<Vec<Result<FileReader>>>>,
    opened: VecDeque<Result<FileReader>>,
    windows: VecDeque<AbortOnDropHandle<Vec<Result<ReadFile>>>>,
    ready: VecDeque<Result<ReadFile>>,
}

impl Client {
    /// Reads many files; nothing is asked for before the first [`ManyReader::next`].
    pub fn read_many(&self, files: impl IntoIterator<Item = InodeId>) -> ManyReader {
        self.read_found(files.into_iter().map(Ok))
    }

    /// As [`Client::read_many`], by path; links are followed. Directories that many of the paths share are looked at once.
    pub async fn read_paths(&self, paths: &[impl AsRef<[u8]> + Sync]) -> ManyReader {
        self.read_found(self.find_many(paths).await)
    }

    fn read_found(&self, files: impl IntoIterator<Item = Result<InodeId>>) -> ManyReader {
        ManyReader {
            client: self.clone(),
            waiting: files.into_iter().collect(),
            opening: None,
            opened: VecDeque::new(),
            windows: VecDeque::new(),
            ready: VecDeque::new(),
        }
    }

    /// Opens many files, those of a shard with one request; in the order asked for.
    pub async fn open_many(&self, files: &[InodeId]) -> Vec<Result<FileReader>> {
        let mut shards = BTreeMap::<ShardId, Vec<usize>>::new();
        for (n, file) in files.iter().enumerate() {
            shards.entry(file.shard()).or_default().push(n);
        }
        let asks = shards.into_iter().map(|(shard, places)| async move {
            let inodes: Vec<u64> = places.iter().map(|&n| files[n].0).collect();
            (places, self.open_of_shard(shard, inodes).await)
        });
        let mut asks = stream::iter(asks.collect::<Vec<_>>()).buffer_unordered(SHARDS_IN_FLIGHT);
        let mut answers: Vec<Option<Result<FileReader>>> = files.iter().map(|_| None).collect();
        while let Some((places, opened)) = asks.next().await {
            for (n, opened) in places.into_iter().zip(opened) {
                answers[n] = Some(opened);
            }
        }
        let missing = || Err(ClientError::protocol("no answer"));
        answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }

    async fn open_of_shard(&self, shard: ShardId, inodes: Vec<u64>) -> Vec<Result<FileReader>> {
        let mut opened = Vec::with_capacity(inodes.len());
        while opened.len() < inodes.len() {
            let rest = &inodes[opened.len()..];
            let page = match self.open_page(shard, rest).await {
                Ok(page) => page,
                Err(error) => {
                    opened.extend(rest.iter().map(|_| Err(error.clone())));
                    break;
                }
            };
            let files = rest.iter().zip(page).map(|(&inode, page)| self.opened(InodeId(inode), page));
            opened.extend(files.collect::<Vec<_>>());
        }
        opened
    }

    /// Of the first of the inodes, at least one.
    async fn open_page(&self, shard: ShardId, inodes: &[u64]) -> Result<Vec<pb::Opened>> {
        let op = shard_request::Op::OpenMany(pb::OpenMany { inodes: inodes.to_vec() });
        match self.shared.shard_read(shard, op).await? {
            Ok(shard_reply::Result::OpenMany(reply)) if (1..=inodes.len()).contains(&reply.inodes.len()) => {
                Ok(reply.inodes)
            }
            Ok(_) => Err(ClientError::other_reply("open")),
            Err(error) => Err(ClientError::from_shard(&error, format_args!("shard {shard}"))),
        }
    }

    fn opened(&self, inode: InodeId, opened: pb::Opened) -> Result<FileReader> {
        let what = format!("inode {inode}");
        if let Some(error) = opened.error {
            return Err(ClientError::from_shard(&error, what));
        }
        let attributes = opened.attributes.ok_or_else(|| ClientError::not_found(&what))?;
        let metadata = Metadata::from_wire(inode, attributes)?;
        FileReader::new(self, metadata, opened.spans, opened.all_spans, &what)
    }

    /// The contents of files of one window.
    async fn read_window(&self, files: Vec<Result<FileReader>>) -> Vec<Result<ReadFile>> {
        let mut batch = Batch::new(self, &files);
        batch.fetch(self).await;
        let contents = batch.contents(self, &files);
        let reads = files.into_iter().zip(contents).map(|(file, contents)| async move {
            let file = file?;
            if contents.is_some() || file.size() > SMALL_FILE_BYTES_MAX {
                return Ok(ReadFile { file, contents });
            }
            let contents = file.read_all(SMALL_FILE_BYTES_MAX).await?;
            Ok(ReadFile { file, contents: Some(contents) })
        });
        stream::iter(reads.collect::<Vec<_>>()).buffered(SINGLE_IN_FLIGHT).collect().await
    }
}

/// The spans of the files of one window on their way in.
struct Batch {
    /// Of each file its spans in order; none when it is not read here.
    files: Vec<Option<Vec<Reading>>>,
    fetches: Vec<(usize, usize, Fetch)>,
}

struct Reading {
    machine: ReadSpan,
    bytes: Option<Vec<Bytes>>,
}

impl Batch {
    fn new(client: &Client, files: &[Result<FileReader>]) -> Batch {
        let mut batch = Batch { files: Vec::with_capacity(files.len()), fetches: Vec::new() };
        let shared = &client.shared;
        for (n, file) in files.iter().enumerate() {
            let spans = match file {
                Ok(file) if file.size() <= SMALL_FILE_BYTES_MAX => file.known_spans(),
                _ => None,
            };
            let readings = spans.map(|spans| {
                let readings = spans.into_iter().map(|span| {
                    let whole = 0..span.size;
                    let machine = ReadSpan::new(Arc::clone(&span), whole, shared.standing(), shared.turn());
                    Reading { machine, bytes: None }
                });
                readings.collect::<Vec<_>>()
            });
            batch.files.push(readings);
            batch.poll(client, files, n);
        }
        batch
    }

    /// Takes what a file's spans want next.
    fn poll(&mut self, client: &Client, files: &[Result<FileReader>], n: usize) {
        let Some(spans) = &mut self.files[n] else { return };
        for (at, reading) in spans.iter_mut().enumerate() {
            while let Some(step) = reading.machine.poll() {
                match step {
                    ReadStep::Fetch(fetch) => self.fetches.push((n, at, fetch)),
                    ReadStep::Done(bytes) => reading.bytes = Some(bytes),
                    // The blocks may be elsewhere by now: the ordinary way finds out.
                    ReadStep::Report(bad) if bad.damage == Damage::Missing => {}
                    ReadStep::Report(bad) => {
                        if let Ok(file) = &files[n] {
                            client.shared.report(file.inode(), &bad);
                        }
                    }
                    // The ordinary way finds out more.
                    ReadStep::Lost(_) => {}
                }
            }
        }
    }

    async fn fetch(&mut self, client: &Client) {
        if self.fetches.is_empty() {
            return;
        }
        let fetches = std::mem::take(&mut self.fetches);
        let ranges = fetches.iter().map(|(_, _, fetch)| pb::BlockRange {
            block_service: fetch.service.0,
            block: fetch.block.0,
            offset: fetch.offset,
            length: fetch.length,
        });
        let fetched = client.shared.fetch_many(ranges.collect()).await;
        for ((n, at, fetch), fetched) in fetches.into_iter().zip(fetched) {
            let Some(reading) = self.files[n].as_mut().and_then(|spans| spans.get_mut(at)) else { continue };
            match fetched {
                Ok(bytes) => reading.machine.fetched(fetch.id, vec![bytes]),
                Err(failure) => reading.machine.failed(fetch.id, failure),
            }
        }
        self.fetches.clear();
    }

    /// Of the files that are whole and right.
    fn contents(mut self, client: &Client, files: &[Result<FileReader>]) -> Vec<Option<Bytes>> {
        (0..files.len()).for_each(|n| self.poll(client, files, n));
        let whole = |(file, spans): (&Result<FileReader>, Option<Vec<Reading>>)| {
            let (file, spans) = (file.as_ref().ok()?, spans?);
            let pieces: Vec<Vec<Bytes>> = spans.into_iter().map(|span| span.bytes).collect::<Option<_>>()?;
            let contents = join(pieces.concat());
            let crc = file.metadata().crc.unwrap_or_default();
            (crc32fast::hash(&contents) == crc).then_some(contents)
        };
        files.iter().zip(self.files).map(whole).collect()
    }
}

pub(crate) fn join(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() <= 1 {
        return pieces.pop().unwrap_or_default();
    }
    let mut joined = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    for piece in pieces {
        joined.extend_from_slice(&piece);
    }
    joined.freeze()
}

impl ManyReader {
    /// The next file, in the order asked for; `None` after the last one.
    pub async fn next(&mut self) -> Option<Result<ReadFile>> {
        loop {
            self.go_on().await;
            if let Some(ready) = self.ready.pop_front() {
                return Some(ready);
            }
            let window = self.windows.pop_front()?;
            match window.await {
                Ok(files) => self.ready = files.into(),
                Err(error) => return Some(Err(ClientError::protocol(error))),
            }
        }
    }

    /// Keeps windows in flight, and files opened for the one after.
    async fn go_on(&mut self) {
        while self.windows.len() < WINDOWS_IN_FLIGHT {
            if self.opened.is_empty() {
                self.open_ahead();
                let Some(opening) = self.opening.take() else { return };
                match opening.await {
                    Ok(opened) => self.opened = opened.into(),
                    Err(error) => self.ready.push_back(Err(ClientError::protocol(error))),
                }
                self.open_ahead();
            }
            let mut window = Vec::new();
            let mut bytes = 0;
            while let Some(file) = self.opened.front() {
                let size = file.as_ref().map_or(0, FileReader::size);
                let size = if size > SMALL_FILE_BYTES_MAX { 0 } else { size };
                if !window.is_empty() && bytes + size > WINDOW_BYTES {
                    break;
                }
                bytes += size;
                window.extend(self.opened.pop_front());
            }
            if window.is_empty() {
                continue;
            }
            let client = self.client.clone();
            let read = async move { client.read_window(window).await };
            self.windows.push_back(AbortOnDropHandle::new(tokio::spawn(read)));
        }
    }

    fn open_ahead(&mut self) {
        if self.opening.is_some() || self.waiting.is_empty() {
            return;
        }
        let count = self.waiting.len().min(OPEN_AT_ONCE);
        let chunk: Vec<Result<InodeId>> = self.waiting.drain(..count).collect();
        let client = self.client.clone();
        let open = async move {
            let inodes: Vec<InodeId> =
                chunk.iter().filter_map(|found| found.as_ref().ok().copied()).collect();
            let mut opened = client.open_many(&inodes).await.into_iter();
            let missing = || Err(ClientError::protocol("no answer"));
            chunk.into_iter().map(|found| found.and_then(|_| opened.next().unwrap_or_else(missing))).collect()
        };
        self.opening = Some(AbortOnDropHandle::new(tokio::spawn(open)));
    }
}
