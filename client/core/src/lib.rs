//! How a client stores and reads files: which pieces, where, what to do when one fails.
//!
//! Pure: no sockets, no clock, no randomness. The machines ([`read::ReadSpan`], [`write::WriteSpan`]) say what
//! to do next and are told what came of it; `client/` drives them over the network, the simulation over a
//! simulated one.
//!
//! Invariants, cited in asserts, checkers and tests:
//!
//! - **CL-1** Nothing is handed to a reader that was not checked against a CRC of the metadata: cells as they
//!   come in, rebuilt cells again after rebuilding.
//! - **CL-2** A span of (D, P) blocks is read as long as, in every stripe asked for, any D cells are right.
//! - **CL-3** A read fetches only cells of stripes its range touches, each cell at most once, and cells of
//!   parity only when a cell of data cannot be had in time.
//! - **CL-4** A span is certified only with one proof for each of its blocks, each from the block service the
//!   block was last placed on.
//! - **CL-5** A block that could not be written is placed anew without losing the others, a bounded number
//!   of times; the services that failed are named to be avoided.
//! - **CL-6** A span from the wire is used only after it was found whole: sizes within the limits, one CRC
//!   per cell, blocks that can hold it. Hostile metadata gives an error, never a panic nor a large allocation.
//! - **CL-7** The spans of a file follow each other without gap or overlap from 0 to its size.
//! - **CL-8** Padding is zeros, is part of the cells' CRCs, and is less than one [`layout::CELL_STEP`] per cell.
//! - **CL-9** A file has its name only once all of its spans are certified (the shard's rule; a writer asks
//!   for the name together with the last certification and never before).
//! - **CL-10** Every retry of one write carries the same session and sequence; a new sequence is used only
//!   after the answer to the one before.
//! - **CL-11** In a round of a search nobody is asked twice, and hints lead to at most
//!   [`search::STRANGERS_MAX`] addresses that the map does not name; between rounds there is a pause.
//! - **CL-12** While a host that was asked is silent, the other replicas are asked: one that is away costs a
//!   request its patience, never its deadline.
//! - **CL-13** A fetch that is late, by what its service takes and at most twice what the others take, is no longer waited for
//!   alone; hedges cost a share of the fetches at most, and a service that was late twice in a row is asked last for a while.
//! - **CL-14** What a batch of files is refused, or does not bring, is that file's alone and goes the way of a single file.

pub mod code;
pub mod crc;
pub mod encode;
pub mod latency;
pub mod layout;
pub mod read;
pub mod retry;
pub mod search;
pub mod span;
pub mod verify;
pub mod write;
