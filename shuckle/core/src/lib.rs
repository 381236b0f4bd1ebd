//! The registry as deterministic state machines.
//!
//! Two cores. The [`RegistryMachine`] is replicated and remembers what must survive: the cluster's id,
//! which disks exist, who serves which shard, flags. [`Health`] is volatile: what heartbeats say. It
//! decides which of them is worth logging, and makes the cluster map and the summary from both.
//!
//! Reading order: [`machine`], [`health`], [`summary`], [`validate`].
//!
//! # Invariants
//!
//! - **RG-1** A cluster is founded once; its id never changes.
//! - **RG-2** A refused command changes nothing: all it names is done, or none of it.
//! - **RG-3** The id of a block service belongs to one key for ever: a second disk with the same id is
//!   refused (Conflict).
//! - **RG-4** Of a block service's flags, people set NO_READ, NO_WRITE and DECOMMISSIONED, and nothing
//!   else changes them; STALE and LOST are derived from what is heard and never stored.
//! - **RG-5** A shard, and the coordinator, has one place. While the host there is heard of (and, after
//!   a start, until the registry has listened long enough) another host is refused (ShardTaken).
//! - **RG-6** Nothing is kept that does not fit the limits: no id 0, keys of 32 bytes, classes from 2
//!   up, bounded texts, bounded numbers of everything.
//! - **RG-7** A heartbeat that says nothing new is not logged.
//! - **RG-8** Keys of block services leave the registry only for those who have the cluster secret.
//! - **RG-9** No request or command makes the registry panic or fail, whatever its bytes.

pub mod health;
pub mod machine;
mod map;
mod members;
pub mod planner;
mod schema;
mod stores;
pub mod summary;
mod troubles;
pub mod validate;

pub use health::{Health, REPLACE_AFTER, Reported, Step};
pub use machine::{RegistryMachine, hello};
pub use planner::plan;
pub use schema::{groups_of, kind_name, kind_of};
pub use summary::{Capacity, Reason, State, Summary, summarize};
pub use troubles::{Host, hosts};
