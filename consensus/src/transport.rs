//! Between stores: one stream each way, opened when there is something to say: a TCP connection with frames
//! (docs/adr/0017).
//!
//! - [`frames`]: how messages lie on a stream.
//! - [`outgoing`]: the stream to another store: opened, opened again, and what waits for it ([`link`]). While one batch is
//!   being sent the next ones are merged; what does not fit is dropped, which raft bears, and the newest heartbeat stays.
//! - [`incoming`]: who opens streams to a store here. Nothing of a stream is looked at before its greeting was found good.
//! - [`stream`]: one stream of a peer, and who reads it: the runtime, or under load the consensus thread itself. What that
//!   has not taken in yet stops the reading.
//! - [`farewell`]: how a stream ends.

mod farewell;
mod frames;
mod incoming;
mod link;
mod outgoing;
mod stream;

pub use incoming::{PeerHandler, peer_streams};
pub(crate) use outgoing::Outbox;

use eggs_consensus_core::PeerMessage;

/// Bytes of messages that are merged into one batch. A message that is longer goes alone.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Bytes of one command: an entry and its message must fit one batch.
pub(crate) const COMMAND_BYTES_MAX: usize = 16 << 20;
/// Bytes of one batch as it is taken in: the longest entry with the entries that raft sends with it.
const DECODED_BYTES_MAX: usize = BATCH_BYTES_MAX + COMMAND_BYTES_MAX;

/// Snapshots that are being sent or received: for the metrics.
fn snapshot_bytes(message: &PeerMessage) -> Option<(u64, bool)> {
    match message {
        PeerMessage::Piece { offset, total, bytes, .. } => {
            let length = bytes.len() as u64;
            Some((length, *total > 0 && offset.saturating_add(length) >= *total))
        }
        _ => None,
    }
}

fn label(store: eggs_proto::StoreId) -> String {
    format!("{:016x}", store.0)
}
