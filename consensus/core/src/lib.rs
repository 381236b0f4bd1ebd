//! Many raft groups in one deterministic, clockless loop.
//!
//! [`Host`] owns a [`raft::RawNode`] per group and does for all of them together, in each
//! [`Host::turn`]: collect every group's `Ready` → **one** log write and **one** fsync → apply in one
//! batch → answers. Group commit is the design, not an optimisation. It has no threads, clock or
//! sockets: the shell (`eggs-consensus`) and the simulation drive it over the traits of [`storage`].
//!
//! Truth is the snapshot file plus the log; the state store holds what those two make.
//!
//! Invariants:
//! - **CO-1** An answer leaves only after the entry it answers is durable in the log and applied.
//! - **CO-2** State rows, applied index and state hash of a group change in one batch.
//! - **CO-3** A group's log is truncated only up to a snapshot of it that is durable and whose rows
//!   were found to have the state hash they should.
//! - **CO-4** State that was not stopped cleanly is used only after its rows were found to have its
//!   state hash, and only when the log continues it; else it is rebuilt from snapshot and log.
//! - **CO-5** A group at rest is not looked at: a turn costs by groups with work, not by groups.
//! - **CO-6** The commands of a group are applied in log order, each exactly once.

mod group_log;
mod host;
mod membership;
pub mod memory;
mod open;
mod peer;
mod peers;
mod replica;
mod snapshot;
pub mod storage;
mod transfers;
mod wanted;

pub use host::{
    Answer, Grant, GroupStatus, Host, HostError, HostOptions, Progress, Proposal, ProposalId, ProposeError,
    ReadTicket, Role, TICK, Turn,
};
pub use membership::Membership;
pub use peer::{Now, PeerBatch, PeerMessage};
pub use raft::eraftpb;
pub use storage::{
    AppliedRow, GroupCommit, GroupId, LogChange, LogState, LogStore, LogWrite, Piece, SnapshotMeta,
    SnapshotStore, StateStore, StorageError,
};
pub use wanted::Wanted;
