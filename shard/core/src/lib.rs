//! The metadata of one shard as a deterministic state machine.
//!
//! Reading order: [`schema`] (what is stored under which key), [`machine`] (commands in, answers
//! out), `ops/` (one file per operation), [`prepare`] (what the leader chooses before it logs),
//! [`read`], [`list`] and [`walk`] (what changes nothing), [`check`] (fsck).
//!
//! Invariants, cited by [`check`] and the tests. `check` looks for the first ten and SH-19 in the rows;
//! the rest are about how states follow each other, and the tests hold them.
//!
//! - **SH-1** Every row has a known tag, a well-formed key and a value that decodes.
//! - **SH-2** The directory of every edge, living or dead, exists on this shard (removed ones do).
//! - **SH-3** The target of a living edge, or of a dead one that owns it, exists when its inode belongs to this shard. A
//!   living edge never leads to a file in writing.
//! - **SH-4** A removed directory has no living edges; the root is never removed and owns itself.
//! - **SH-5** The intervals `[created_at, died_at)` of one name are not empty and do not overlap; the
//!   living one comes last.
//! - **SH-6** A file is published (F) or in writing (E), never both; every span belongs to one.
//! - **SH-7** The spans of a file begin at 0, leave no gap, sum to its size and have together its CRC.
//!   The pending span of a file in writing begins at its size; that of copies of blocks holds just these. An expired file
//!   has what is not erased yet.
//! - **SH-8** B holds, for every block service and file, how many blocks of the file's spans are there.
//! - **SH-9** Inodes and blocks made by this shard have ids below its counters; nothing in it is dated
//!   later than its clock.
//! - **SH-10** A lock on an edge or a directory is of a transaction whose step that locks it is remembered as done.
//! - **SH-11** A refused operation changes nothing (a coordinator's step: nothing but the memory of
//!   the refusal).
//! - **SH-12** The past does not change: what a directory held at an instant is the same whenever one
//!   asks after that instant, but for names that were purged since.
//! - **SH-13** A coordinator's step runs once; repeated, it gives its first answer, and once its
//!   transaction has been forgotten everywhere it is refused.
//! - **SH-14** A span becomes part of a file only with the proofs of exactly its blocks.
//! - **SH-15** No command, read or listing makes the machine panic or fail, whatever its bytes.
//! - **SH-16** Of the edges that lead or led to an inode, one owns it: the living one, or the dead one marked so. While a
//!   coordinator's transaction changes which, that one is locked, or the transaction is not over.
//! - **SH-17** Leave to erase is given for the blocks of expired eden files only. What such a file lists never becomes part of
//!   a file again, and is listed until its erasure is proven or its block service is gone for good.
//! - **SH-18** The contents of a published file never change. Its blocks do: by proven copies of the blocks that are there, or
//!   all at once by spans of the same size and CRC; in the same step the old ones are listed as garbage.
//! - **SH-19** The blocks of a span are on different block services.

pub mod check;
pub mod cluster;
mod context;
mod counts;
mod dead_edges;
mod eden;
mod edges;
mod garbage;
pub mod list;
pub mod machine;
mod ops;
mod placement;
pub mod prepare;
pub mod read;
pub mod schema;
mod sign;
mod span;
mod stored;
pub mod walk;

pub use check::check;
pub use cluster::Cluster;
pub use machine::ShardMachine;
pub use prepare::prepare;
pub use read::{expirable, needs_secret, read};
pub use sign::{sign, sign_garbage};
pub use walk::walk;
