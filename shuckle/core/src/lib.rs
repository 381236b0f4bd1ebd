//! The registry as deterministic state machines.
//!
//! Two cores and a plan. The [`RegistryMachine`] is replicated and remembers what must survive: the
//! cluster's id, which disks and stores exist, who replicates which group and who is to, flags. [`Health`]
//! is volatile: what heartbeats say. It decides which of them is worth logging, and makes the cluster map
//! and the summary from both. [`plan`] says, from both, what is to change about groups.
//!
//! Reading order: [`machine`], [`health`] (`stores`, `members`, `janitor`, `forgetting`, `map`), [`planner`],
//! [`summary`] (`troubles`, [`repairs`]), [`validate`].
//!
//! # Invariants
//!
//! - **RG-1** A cluster is founded once; its id never changes.
//! - **RG-2** A refused command changes nothing: all it names is done, or none of it.
//! - **RG-3** The id of a block service belongs to one key until it is forgotten (RG-20): a second disk with the same id is
//!   refused (Conflict). So is, while a disk is heard of and well (and, after a start, until the registry has
//!   listened long enough), the same disk from another process: a copy, or one that was restarted elsewhere.
//! - **RG-4** Of a block service's flags, people set NO_READ, NO_WRITE and DECOMMISSIONED, and nothing
//!   else changes them; STALE and LOST are derived from what is heard and never stored.
//! - **RG-5** A store has one kind for ever and, while it is heard of (and, after a start, until the
//!   registry has listened long enough), one process: another at another address, or one that was followed by
//!   a later, is refused (Conflict). So is a second live store of a kind on one host.
//! - **RG-6** Nothing is kept that does not fit the limits: no id 0, keys of 32 bytes, classes from 2
//!   up, bounded texts, bounded numbers of everything.
//! - **RG-7** A heartbeat that says nothing new is not logged.
//! - **RG-8** Keys of block services leave the registry only for those who have the cluster secret.
//! - **RG-9** No request or command makes the registry panic or fail, whatever its bytes.
//! - **RG-10** The voters a group is to have are known stores of its kind, none twice, and the one that is to
//!   lead is among them.
//! - **RG-11** A group is founded once, with the voters it is to have; when those or its members have
//!   changed, nobody is told to found it any more.
//! - **RG-12** A store that another of its kind and host has replaced is forgotten with its last replica,
//!   and no other store is.
//! - **RG-13** Of two stores that say they lead a group, the one with the higher term does.
//! - **RG-14** Without force people do not ask for fewer replicas than the cluster is to have, for two on
//!   one host, for a new one on a store that is away or drained, or where no quorum lives. No force makes
//!   unknown stores or such of another kind members.
//! - **RG-15** The planner wants no group to have fewer voters than it is to have (people may have forced fewer)
//!   or there are hosts for, never two on one host while there is a choice, none new on a store that is not alive; and when nothing
//!   happens it comes to rest.
//! - **RG-16** The planner leaves a group without a live leader as it is, and moves nothing only to level the
//!   load while any group of the kind is on its way, without a leader, or has a voter that is away.
//! - **RG-17** Flags of block services are set, block services forgotten and jobs given only by those who have the cluster secret.
//! - **RG-18** One janitor works at a time: the first that is heard of, until it is not heard of any more. What it says
//!   changes nothing but what is shown, and how far its jobs are.
//! - **RG-19** A job is kept, with how far it is, until it is done or cancelled; its id is never given again.
//! - **RG-20** A block service is forgotten only when people say so, it is decommissioned, nobody has it any more and the janitor
//!   has found nothing on it; a host that says it has lost it does not bring it back.

mod forgetting;
pub mod health;
mod janitor;
pub mod machine;
mod map;
mod members;
pub mod planner;
pub mod repairs;
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
