//! What a block service admits and how its bytes lie on disk. Pure: no IO, no clock, no randomness.
//!
//! Read [`identity`] (what makes a folder a disk), [`record`] (how a block lies in a segment), [`index`] (which
//! block lies where), [`journal`] (the same, on disk) and [`recovery`] (what a disk holds, found out when it is
//! opened), then [`admission`] (what is let in, and what a refused request is told).
//!
//! # Invariants
//!
//! - **BL-1** A proof of a write leaves only after the block's bytes, the headers that lead to it and the name of its segment
//!   are durable. The same certificate presented again gets the same proof, after the same care.
//! - **BL-2** A block is there only when it is whole: size and CRC are those of its certificate. A record that is
//!   not whole is erased when its write ends, or when the disk is next opened.
//! - **BL-3** Nothing is written or erased without a certificate under the disk's own key.
//! - **BL-4** A block never changes: another size or CRC for a stored block's id is refused.
//! - **BL-5** A proof of erasure leaves only after the absence of the block is durable.
//! - **BL-6** A disk is formatted once, when its folder is empty. One that has gone is lost until it
//!   is back with the identity it had; a folder, an identity or the folder of its segments is never made
//!   again in its place.
//! - **BL-7** A disk of another cluster or another format is refused and left as it is; one process
//!   at a time has a disk.
//! - **BL-8** What comes back from a fetch is the range asked for, every page of it with the checksum it was written
//!   with, and the CRC of what was read; bytes that are not what was written are an error, never data with a good CRC.
//! - **BL-9** A disk that fails, fills or hangs holds only its own share of the process: blocks in
//!   flight, and their bytes, are bounded per disk and in total, and every queue and wait has a bound.
//! - **BL-10** The last bytes of a disk are not for blocks: a write that would take them is refused
//!   before it begins, and one that finds the disk full leaves nothing behind.
//! - **BL-11** The segments alone tell what a disk holds; the journal only makes it known sooner. While a block is
//!   moved, one whole and durable copy of it is there at every instant; opening a disk gives no copy up before the
//!   one that stays is durable, and none because of a read that failed.

pub mod admission;
pub mod identity;
pub mod index;
pub mod journal;
pub mod record;
pub mod recovery;

pub use admission::{Receiving, WriteAdmission};
pub use identity::{DISK_FORMAT, Identity, IdentityError};
pub use index::{Index, Place, Totals};
pub use record::{Extent, Record};
