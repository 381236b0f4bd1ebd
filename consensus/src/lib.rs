//! The shell of the raft host: one thread that owns a [`Host`](eggs_consensus_core::Host) on log
//! files (raft-engine), state (sled) and snapshot files.
//!
//! ```text
//! DIR/log/        raft-engine: the logs of all groups
//! DIR/state/      sled: what snapshots and logs make; may be deleted, it is rebuilt
//! DIR/state.clean present only after an orderly stop: the state needs no verification
//! DIR/snapshots/  GROUP.snap: the newest snapshot of each group
//! ```
//!
//! [`spawn`] starts it, [`Handle`] is how async code writes and reads, [`Runner::stop`] ends it in
//! order. A storage error stops the thread; every request then gets [`ConsensusError::Stopped`], and
//! the process should exit: [`Handle::stopped`] says so.

mod handle;
mod log_files;
mod runner;
mod sled_state;
mod snapshot_files;

pub use eggs_consensus_core::{GroupId, GroupStatus};
pub use handle::{Applied, ConsensusError, Handle, Views};
pub use runner::{Options, Runner, spawn};
