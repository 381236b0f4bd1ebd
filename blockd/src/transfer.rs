//! One block on its way between the network and the disk: on one side a task, on the other a blocking
//! thread, between them a short bounded queue of pieces. Every wait has a bound (BL-9).

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_blockd_core::WriteAdmission;
use eggs_blockd_core::admission::check_range;
use eggs_proto::pb::write_block_request::Part;
use eggs_proto::{BlockError, BlockId, mac, pb};
use futures_util::{Stream, StreamExt};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::disk::Refusal;
use crate::limits::{READ_PIECE_BYTES, SILENCE_MAX};
use crate::store::{Begun, Store, StoreError};

/// The next message of a write; `None` at its end.
pub async fn next_part<S, E>(messages: &mut S, deadline: Instant) -> Result<Option<Part>, Refusal>
where
    S: Stream<Item = Result<pb::WriteBlockRequest, E>> + Unpin,
{
    match timeout(wait(deadline), messages.next()).await {
        Err(_) => Err(Refusal::new(BlockError::Malformed, "the writer was silent for too long")),
        Ok(None) => Ok(None),
        Ok(Some(Err(_))) => Err(Refusal::new(BlockError::Malformed, "the writer broke off")),
        Ok(Some(Ok(pb::WriteBlockRequest { part: None }))) => {
            Err(Refusal::new(BlockError::Malformed, "a message of a write says nothing"))
        }
        Ok(Some(Ok(pb::WriteBlockRequest { part }))) => Ok(part),
    }
}

/// From the network to the disk's thread. Ends at the last byte, not at the end of the stream: the
/// writer may wait for the answer first.
pub async fn forward<S, E>(
    messages: &mut S,
    pieces: &mpsc::Sender<Bytes>,
    size: u32,
    deadline: Instant,
) -> Result<(), Refusal>
where
    S: Stream<Item = Result<pb::WriteBlockRequest, E>> + Unpin,
{
    let mut missing = u64::from(size);
    while missing > 0 {
        let part = tokio::select! {
            // The thread knows better: refused, or stored already.
            () = pieces.closed() => return Ok(()),
            part = next_part(messages, deadline) => part?,
        };
        let piece = match part {
            Some(Part::Data(piece)) => piece,
            Some(Part::Start(_)) => return Err(Refusal::new(BlockError::Malformed, "a write has one start")),
            None => return Ok(()),
        };
        missing = missing.saturating_sub(piece.len() as u64);
        match timeout(wait(deadline), pieces.send(piece)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err(Refusal::new(BlockError::Busy, "the disk does not keep up")),
        }
    }
    Ok(())
}

/// On the disk's thread: from the queue into the file.
pub fn receive(
    store: &Arc<Store>,
    admission: WriteAdmission,
    mut pieces: mpsc::Receiver<Bytes>,
) -> Result<mac::Mac, StoreError> {
    let mut incoming = match store.begin(admission)? {
        Begun::Stored(proof) => return Ok(proof),
        Begun::Arriving(incoming) => incoming,
    };
    while incoming.missing() > 0 {
        match pieces.blocking_recv() {
            Some(piece) => incoming.append(&piece)?,
            None => break,
        }
    }
    incoming.finish()
}

/// On the disk's thread: from the file to `give`, which says whether anybody still listens. The CRC of
/// what was given.
pub fn send(
    store: &Store,
    block: BlockId,
    offset: u32,
    length: u32,
    mut give: impl FnMut(Bytes) -> bool,
) -> Result<u32, StoreError> {
    let block = store.read(block)?;
    check_range(block.size(), offset, length)?;
    if length > READ_PIECE_BYTES {
        block.will_read(offset, length);
    }
    let mut hasher = crc32fast::Hasher::new();
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let piece = block.read_at(at, READ_PIECE_BYTES.min(end - at))?;
        hasher.update(&piece);
        at += piece.len() as u32;
        if !give(piece) {
            return Err(BlockError::Busy.into());
        }
    }
    let crc = hasher.finalize();
    if (offset, length) == (0, block.size()) {
        block.check_crc(crc)?;
    }
    Ok(crc)
}

/// Hands a piece to the network from a thread; false when nobody takes it.
pub fn give(
    runtime: &Handle,
    pieces: &mpsc::Sender<pb::FetchBlockReply>,
    piece: Bytes,
    deadline: Instant,
) -> bool {
    let message = pb::FetchBlockReply { part: Some(pb::fetch_block_reply::Part::Data(piece)) };
    match pieces.try_send(message) {
        Ok(()) => true,
        Err(mpsc::error::TrySendError::Closed(_)) => false,
        Err(mpsc::error::TrySendError::Full(message)) => {
            let sent = runtime.block_on(async { timeout(wait(deadline), pieces.send(message)).await });
            matches!(sent, Ok(Ok(())))
        }
    }
}

/// What the disk's thread comes to. It cannot be cut off; whoever waits for it can.
pub async fn outcome<T>(
    task: JoinHandle<Result<T, Refusal>>,
    deadline: Instant,
    what: impl Fn() -> String,
) -> Result<T, Refusal> {
    // Room for the last of it to become durable.
    let wait = deadline.saturating_duration_since(Instant::now()).max(SILENCE_MAX);
    match timeout(wait, task).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Refusal::new(BlockError::Internal, what())),
        Err(_) => Err(Refusal::new(BlockError::Busy, format!("{}: the disk does not answer", what()))),
    }
}

/// How long to wait for the peer's or the disk's next move.
fn wait(deadline: Instant) -> Duration {
    SILENCE_MAX.min(deadline.saturating_duration_since(Instant::now()))
}
