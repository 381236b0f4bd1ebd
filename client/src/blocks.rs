//! Blocks over the wire: one write or fetch, with its patience.
//!
//! A transfer may take as long as it moves; one that stands still for `block_timeout` has failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_client_core::read::{BadBlock, Damage, Fetch, FetchFailure, Standing};
use eggs_client_core::retry::Backoff;
use eggs_client_core::write::WriteBlock;
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb::block_service_client::BlockServiceClient;
use eggs_proto::pb::{fetch_block_reply, registry_request, write_block_reply, write_block_request};
use eggs_proto::{BlockError, BlockServiceId, InodeId, Retry, ServiceError, pb};
use futures_util::stream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::ask::status_words;
use crate::connection::{Shared, entropy};
use crate::error::block_error_words;

/// A block service that breaks off or cannot be connected to is asked again for this long: a daemon that
/// restarts is back by then, and one that is not is replaced soon enough.
const RECONNECT_MAX: Duration = Duration::from_millis(1500);
/// A block service that has too much to do is asked for this long while the registry thinks well of it: the others have as much
/// to do, most likely, and to begin again with them is more to do for all. A disk that hangs is told of before that.
const BUSY_MAX: Duration = Duration::from_secs(60);
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a block was not written there.
enum WriteFailure {
    /// It said no.
    Refused(String),
    /// It has too much to do.
    Busy(String),
    /// It could not be talked to.
    Transport(String),
}

pub(crate) fn client(channel: Channel) -> BlockServiceClient<Channel> {
    BlockServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

impl Shared {
    /// How long a block service is asked that has too much to do.
    pub fn busy_patience(self: &Arc<Self>, service: BlockServiceId) -> Duration {
        if self.map().writable(service) { BUSY_MAX } else { self.options.block_timeout }
    }

    /// Writes one block, in pieces of at most a message; returns the proof, or why not.
    pub async fn write_block(
        self: &Arc<Self>,
        block: &WriteBlock,
        pieces: &[Bytes],
    ) -> Result<Bytes, String> {
        // Each has its own: who was busy for long and is started anew just now is waited for as any other.
        let (mut busy, mut away) = (None, None);
        let mut backoff = Backoff::default();
        loop {
            let seen = self.map_time();
            let failure = match self.map().service(block.service) {
                None => WriteFailure::Transport("not in the cluster map".to_owned()),
                Some(peer) => match self.write_block_once(peer.bulk.clone(), block, pieces).await {
                    Ok(proof) => return Ok(proof),
                    Err(failure) => failure,
                },
            };
            let now = Instant::now();
            let (why, since, patience) = match failure {
                WriteFailure::Refused(why) => return Err(why),
                WriteFailure::Busy(why) => {
                    away = None;
                    (why, *busy.get_or_insert(now), self.busy_patience(block.service))
                }
                WriteFailure::Transport(why) => (why, *away.get_or_insert(now), RECONNECT_MAX),
            };
            let pause = backoff.pause(entropy());
            if since.elapsed() + pause > patience {
                return Err(why);
            }
            // Where a busy service is has not changed.
            if away.is_some() {
                self.renew_within(seen, pause).await;
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn write_block_once(
        &self,
        channel: Channel,
        block: &WriteBlock,
        pieces: &[Bytes],
    ) -> Result<Bytes, WriteFailure> {
        use write_block_request::Part;
        let start = pb::WriteStart {
            header: Some(self.header()),
            block_service: block.service.0,
            block: block.block.0,
            size: block.size,
            crc: block.crc,
            certificate: block.certificate.clone(),
        };
        let moved = Arc::new(AtomicUsize::new(0));
        let taken = moved.clone();
        let pieces = pieces.to_vec();
        let parts = std::iter::once(Part::Start(start)).chain(pieces.into_iter().map(Part::Data));
        let messages = parts.map(move |part| {
            taken.fetch_add(1, Ordering::Relaxed);
            pb::WriteBlockRequest { part: Some(part) }
        });
        let mut client = client(channel);
        let call = client.write(stream::iter(messages));
        let reply = match while_moving(call, &moved, self.options.block_timeout).await {
            None => return Err(WriteFailure::Refused(silent(self.options.block_timeout))),
            Some(Err(status)) => return Err(WriteFailure::Transport(status_words(&status))),
            Some(Ok(reply)) => reply.into_inner(),
        };
        self.observe(reply.header.as_ref());
        match reply.result {
            Some(write_block_reply::Result::Proof(proof)) => Ok(proof),
            Some(write_block_reply::Result::Error(error)) => match BlockError::from_code(error.code) {
                // It moved to another host: the map will say.
                Some(BlockError::UnknownBlockService) => {
                    Err(WriteFailure::Transport(block_error_words(&error)))
                }
                Some(BlockError::Busy) => Err(WriteFailure::Busy(block_error_words(&error))),
                _ => Err(WriteFailure::Refused(block_error_words(&error))),
            },
            None => Err(WriteFailure::Refused("an answer that says nothing".to_owned())),
        }
    }

    /// Fetches a range of a block, in the pieces it came in.
    pub async fn fetch_block(self: &Arc<Self>, fetch: Fetch) -> Result<Vec<Bytes>, FetchFailure> {
        let unreachable = |why: String| FetchFailure::Unreachable(why);
        let map = self.map();
        let seen = self.map_time();
        let peer = map
            .service(fetch.service)
            .ok_or_else(|| FetchFailure::Refused("not in the cluster map".to_owned()))?;
        let request = pb::FetchBlockRequest {
            header: Some(self.header()),
            block_service: fetch.service.0,
            block: fetch.block.0,
            offset: fetch.offset,
            length: fetch.length,
        };
        let patience = self.options.block_timeout;
        let mut client = client(peer.bulk.clone());
        let stream = match tokio::time::timeout(patience, client.fetch(request)).await {
            Err(_) => return Err(unreachable(silent(patience))),
            Ok(Err(status)) => {
                let why = status_words(&status);
                self.renew_soon(seen);
                return Err(unreachable(why));
            }
            Ok(Ok(response)) => response.into_inner(),
        };
        collect(stream, fetch.length as usize, patience).await
    }

    /// Tells the registry of a damaged block, in the background, once.
    pub fn report(self: &Arc<Self>, file: InodeId, bad: &BadBlock) {
        if !self.first_report(bad.service.0, bad.block.0) {
            return;
        }
        let (block, service, damage) = (bad.block, bad.service, bad.damage);
        tracing::warn!(%file, %block, block_service = %service, ?damage, "damaged block");
        let kind = match bad.damage {
            Damage::Missing => pb::BadBlockKind::BadBlockMissing,
            Damage::Corrupt => pb::BadBlockKind::BadBlockCorrupt,
        };
        let block = pb::BadBlock {
            block_service: bad.service.0,
            block: bad.block.0,
            file: file.0,
            kind: kind as i32,
        };
        let op = registry_request::Op::ReportBlocks(pb::ReportBlocks { blocks: vec![block] });
        let shared = self.clone();
        self.tasks.spawn(async move {
            if let Err(error) = shared.registry(op, REPORT_TIMEOUT).await {
                tracing::warn!(%error, "a damaged block could not be reported");
            }
        });
    }

    /// What is thought of services before they are asked for blocks.
    pub fn standing(self: &Arc<Self>) -> impl Fn(BlockServiceId) -> Standing {
        let (map, shared) = (self.map(), self.clone());
        move |service| match map.readable(service) {
            false => Standing::Avoided,
            true if shared.options.hedge && shared.is_slow(service) => Standing::Slow,
            true => Standing::Good,
        }
    }
}

pub(crate) fn silent(patience: Duration) -> String {
    format!("no answer for {:.1} s", patience.as_secs_f64())
}

/// Waits as long as `moved` grows at least once in `patience`.
async fn while_moving<T>(
    call: impl Future<Output = T>,
    moved: &AtomicUsize,
    patience: Duration,
) -> Option<T> {
    let mut call = std::pin::pin!(call);
    let mut before = 0;
    loop {
        match tokio::time::timeout(patience, &mut call).await {
            Ok(result) => return Some(result),
            Err(_) if moved.load(Ordering::Relaxed) == before => return None,
            Err(_) => before = moved.load(Ordering::Relaxed),
        }
    }
}

async fn collect(
    mut stream: Streaming<pb::FetchBlockReply>,
    length: usize,
    patience: Duration,
) -> Result<Vec<Bytes>, FetchFailure> {
    use fetch_block_reply::Part;
    let unreachable = |why: &str| Err(FetchFailure::Unreachable(why.to_owned()));
    let mut pieces = Vec::new();
    let mut total = 0;
    loop {
        let message = match tokio::time::timeout(patience, stream.message()).await {
            Err(_) => return Err(FetchFailure::Unreachable(silent(patience))),
            Ok(Err(status)) => return Err(FetchFailure::Unreachable(status_words(&status))),
            Ok(Ok(message)) => message,
        };
        match message.and_then(|message| message.part) {
            Some(Part::Data(bytes)) if !bytes.is_empty() && total + bytes.len() <= length => {
                total += bytes.len();
                pieces.push(bytes);
            }
            Some(Part::Data(_)) => return unreachable("more bytes than asked for"),
            // The cells' own CRCs say more than this one, which is of what was sent.
            Some(Part::Crc(_)) if total == length => return Ok(pieces),
            Some(Part::Crc(_)) | None => return unreachable("fewer bytes than asked for"),
            Some(Part::Error(error)) => return Err(fetch_failure(&error)),
        }
    }
}

/// What a block service's refusal says of the block.
pub(crate) fn fetch_failure(error: &pb::Error) -> FetchFailure {
    match BlockError::from_code(error.code) {
        Some(BlockError::UnknownBlock) => FetchFailure::Damaged(Damage::Missing),
        Some(BlockError::Corrupt) => FetchFailure::Damaged(Damage::Corrupt),
        Some(code) if code.retry() == Retry::Never => FetchFailure::Refused(block_error_words(error)),
        _ => FetchFailure::Unreachable(block_error_words(error)),
    }
}
