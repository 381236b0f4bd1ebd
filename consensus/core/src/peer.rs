//! What stores say to one another.

use bytes::Bytes;
use eggs_machine::hash::StateHash;
use eggs_proto::{GroupId, Time, pb};
use raft::eraftpb;
use std::time::Duration;

/// What one store says to another about one group.
#[derive(Debug, Clone, PartialEq)]
pub enum PeerMessage {
    /// Raft's own; a snapshot message carries no rows, those are fetched in pieces.
    Raft(eraftpb::Message),
    /// Leader to follower: everybody has everything up to `index`; nothing more is said until something happens.
    Sleep { term: u64, index: u64, hash: StateHash },
    /// Asks for the snapshot file of (index, term) from `offset` on.
    Want { index: u64, term: u64, offset: u64 },
    /// A piece of it; `total` is the length of the file, 0 when there is no such file (any more).
    Piece { index: u64, term: u64, offset: u64, total: u64, bytes: Bytes },
}

/// What goes to a store at once: one heartbeat for all groups, and what there is to say of each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PeerBatch {
    pub heartbeat: pb::PeerHeartbeat,
    pub messages: Vec<(GroupId, PeerMessage)>,
}

/// The clocks of this host, as the shell reads them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Now {
    /// Never goes back; since whenever.
    pub monotonic: Duration,
    pub wall: Time,
}
