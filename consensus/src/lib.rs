//! The shell of the raft host: one thread that owns a [`Host`](eggs_consensus_core::Host) on log
//! files (raft-engine), state (sled) and snapshot files, and the streams to the other stores.
//!
//! ```text
//! DIR/log/        raft-engine: the logs of all groups
//! DIR/log.written how far the log is: what is missing of it was lost
//! DIR/state/      sled: what snapshots and logs make; may be deleted, it is rebuilt
//! DIR/state.clean present only after an orderly stop: the state needs no verification
//! DIR/snapshots/  GROUP.snap: the newest snapshot of each group; *.incoming: what has come of another store's
//! ```
//!
//! [`spawn`] starts it, [`Handle`] is how async code writes and reads, [`Runner::stop`] ends it in
//! order. A storage error stops the thread; every request then gets [`ConsensusError::Stopped`], and
//! the process should exit: [`Handle::stopped`] says so. [`peer_streams`] is what a port serves to the other stores.
//!
//! Invariants:
//! - **CS-1** A log that has lost or damaged what was acknowledged is not opened ([`ConsensusError::Damaged`]): such a replica
//!   may have forgotten its votes. A last record cut by a crash is no damage.
//! - **CS-2** Nothing of a stream between stores is used before its greeting was found good: version, cluster, secret, and that
//!   it is meant for this store.
//! - **CS-3** A read is answered by a run that saw only groups confirmed since it was asked for.
//! - **CS-4** What peers and clients send is bounded where it waits; what does not fit is refused (`Busy`), dropped (messages to
//!   peers), or not read from its stream (messages from peers).
//! - **CS-5** A store whose groups have no other members sleeps until it is asked, once its state is written; otherwise time passes
//!   once per tick, never in bursts.

mod handle;
mod inbox;
mod log_check;
mod log_files;
mod open;
mod own_runtime;
mod peer_codec;
mod places;
mod reads;
mod recent_rows;
mod runner;
mod sled_state;
mod snapshot_files;
mod transport;
mod turner;

pub use eggs_consensus_core::{GroupId, GroupStatus, Membership, Progress, Role};
pub use handle::{Applied, ConsensusError, Handle, Views};
pub use open::Options;
pub use runner::{Event, Runner, spawn};
pub use transport::{PeerHandler, peer_streams};
