//! What the janitor decides: what to repair, check and move, in which order, and how fast.
//!
//! Pure: no sockets, no clock, no randomness; time is an argument. `janitor/` does what is decided here, the
//! simulation the same over a simulated network.
//!
//! Reading order: [`disks`] (what is known of disks), [`need`] (what a span needs), [`queue`] (in which order),
//! [`lost`] (when a disk is given up), [`throttle`], [`scrub`], [`rebalance`], [`spread`].
//!
//! Invariants, cited in asserts and tests:
//!
//! - **JA-1** A block is replaced only when it is lost, damaged, on a disk that is to be emptied, on one that is fuller than
//!   the others, or in a failure domain with others of its span; a disk that is away for a moment is none of these.
//! - **JA-2** Of the spans that are known to need repair the one that can lose the fewest blocks more comes first; of
//!   those that can lose as many, one that has lost blocks before one whose disk is to be emptied. Those that there was no
//!   room for come after all others while the same disks take blocks; those that have lost too many come last.
//! - **JA-3** A block that can be read is copied, one that cannot is rebuilt; a span that has lost more blocks than its
//!   parity is named, left as it is, and looked at again when a disk comes back.
//! - **JA-4** The janitor gives up no disk by itself before it was away for the time it was told, nor more at once than
//!   it may; when more are away it gives up none, and says so.
//! - **JA-5** What it keeps in memory is bounded whatever the cluster holds: spans that do not fit the queue, the least
//!   urgent, are found again.
//! - **JA-6** In any time, it moves no more bytes than its rate allows for that time and a burst.
//! - **JA-7** Rebalancing comes to rest: a block moves only to a disk that stays emptier than the one it leaves.
//!   Nor does it share its failure domain with more blocks of its span there.
//! - **JA-8** Spreading comes to rest: a block moves only to a failure domain that has at least two blocks of its span less
//!   than the one it leaves. So every move leaves fewer pairs of blocks that share a domain, and rebalancing makes no more.
//!   What has something to repair, or blocks that are away, does not move.

pub mod disks;
pub mod lost;
pub mod need;
pub mod queue;
pub mod rebalance;
pub mod scrub;
pub mod spread;
pub mod throttle;

pub use disks::{Disk, Disks, Presence};
pub use need::Need;
pub use queue::{NoRoom, Queue, SpanKey, Urgency};
