//! The life of a store of replicas: what the daemons whose data is replicated have in common.
//!
//! [`start`] opens a data directory and the consensus in it, and decides what becomes of a damaged log.
//! [`Replica`] adds the cluster: it joins through shuckle, registers by heartbeat, follows the cluster map, tells how it feels and
//! stops in order. [`Quorum`] finds words for a group that does not get on. What the groups do is not known here.
//!
//! Invariants of this crate:
//! - **RE-1** a store whose log is damaged takes part in nothing any more: what it held is put aside and another store takes its
//!   place, but only where the cluster has other replicas; else the daemon does not start ([`start`]).
//! - **RE-2** no replica speaks to another before the directory is claimed for the cluster ([`Replica::join`]).

mod quorum;
mod replica;
mod start;

pub use quorum::Quorum;
pub use replica::{InFlight, Joined, Replica, Settings};
pub use start::{StartError, StoreOptions, start};
