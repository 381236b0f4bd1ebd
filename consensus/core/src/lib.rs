//! Many raft groups in one deterministic, clockless loop.
//!
//! [`Host`] owns a [`raft::RawNode`] per group and does for all of them together, in each
//! [`Host::turn`]: collect every group's `Ready` → apply and answer what was decided before, where it leads → **one** log
//! write and **one** fsync → apply and answer the rest. Group commit is the design, not an optimisation. It has no threads, clock or
//! sockets: the shell (`eggs-consensus`) and the simulation drive it over the traits of [`storage`].
//!
//! Truth is the snapshot file plus the log; the state store holds what those two make.
//!
//! Invariants:
//! - **CO-1** An answer leaves only after the entry it answers is durable on a quorum and applied; a vote or
//!   an acknowledgement leaves only after what it promises is durable here.
//! - **CO-2** State rows, applied index, members and state hash of a group change together: after a crash all
//!   that was applied of it at once is there, or nothing of that.
//! - **CO-3** A group's log is truncated only up to a snapshot of it that is durable and whose rows
//!   were found to have the state hash they should.
//! - **CO-4** State that was not stopped cleanly is used only after its rows were found to have its
//!   state hash, and only when the log continues it; else it is rebuilt from snapshot and log.
//! - **CO-5** A group at rest is not looked at: a turn costs by groups with work, not by groups. At rest
//!   stores say one thing to each other, that they are there, not one for each group; who leads is compared with who is to lead every ten seconds.
//! - **CO-6** The commands of a group are applied in log order, each exactly once.
//! - **CO-7** A read is answered from state that was the leader's after the read came in: a quorum said so
//!   since, or a lease says that nobody else can lead yet.
//! - **CO-8** A store that has lost something it promised (an empty disk, a damaged log) never takes part
//!   under the same id; a replica that was removed keeps its votes.
//! - **CO-9** Members change one at a time, first more, then fewer, and never so that those alive and caught up
//!   are no quorum.
//! - **CO-10** A group sleeps only while every member that is heard of has the same log, applied to the same
//!   state hash; it wakes when anything is asked or said of it, and when a store it depends on falls silent or restarts.
//! - **CO-11** A snapshot that came from another store is used only after every byte of it was verified and is
//!   durable here.
//! - **CO-12** A host whose clock is further off than the bound neither takes proposals that another could take
//!   nor stands for election, unless nobody was elected for long: then it may have what no other log has, and
//!   hands that over.

mod group_log;
mod host;
mod membership;
pub mod memory;
mod network;
mod open;
mod peer;
mod peers;
mod replica;
mod snapshots;
pub mod storage;
mod taking;
mod ticks;
mod transfers;
mod turn;
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
pub use ticks::Ticks;
pub use turn::BegunTurn;
pub use wanted::Wanted;
