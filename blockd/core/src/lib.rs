//! What a block service admits and how its bytes lie on disk. Pure: no IO, no clock, no randomness.
//!
//! Read [`identity`] (what makes a folder a disk), [`header`] (what a block's file begins with and
//! where it lies), then [`admission`] (what is let in, and what a refused request is told).
//!
//! # Invariants
//!
//! - **BL-1** A proof of a write leaves only after the block's bytes, its name and the folders above
//!   it are durable. The same certificate presented again gets the same proof, after the same care.
//! - **BL-2** A block has its name only when it is whole: size and CRC are those of its certificate.
//!   What is still arriving lies in `tmp/`, which is emptied when the disk is opened.
//! - **BL-3** Nothing is written or erased without a certificate under the disk's own key.
//! - **BL-4** A block never changes: another size or CRC for a stored block's id is refused.
//! - **BL-5** A proof of erasure leaves only after the absence of the block is durable.
//! - **BL-6** A disk is formatted once, when its folder is empty. One that has gone is lost until it
//!   is back with the identity it had; a folder, an identity or the folder of its blocks is never made
//!   again in its place.
//! - **BL-7** A disk of another cluster or a newer format is refused and left as it is; one process
//!   at a time has a disk.
//! - **BL-8** What comes back from a fetch is the range asked for, with the CRC of what was read; a
//!   whole block that is not what was written is an error, never data with a good CRC.
//! - **BL-9** A disk that fails, fills or hangs holds only its own share of the process: blocks in
//!   flight are bounded per disk and in total, and every queue and wait has a bound.
//! - **BL-10** The last bytes of a disk are not for blocks: a write that would take them is refused
//!   before it begins, and one that finds the disk full leaves nothing behind.

pub mod admission;
pub mod header;
pub mod identity;

pub use admission::{Receiving, WriteAdmission};
pub use header::{BlockHeader, BlockPath, HEADER_BYTES};
pub use identity::{Identity, IdentityError};
