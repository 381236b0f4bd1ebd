//! What a replicated core implements, and the ordered table it writes.
//!
//! A core is a [`Machine`]: `apply(tx, time, command) -> outcome`, with no clock, no randomness, no
//! IO of its own. Everything it keeps is in an ordered [`Table`]; it changes that only through a
//! [`Tx`], which reads its own writes and becomes one [`Batch`] together with the applied index and
//! the state hash.
//!
//! [`group`] puts what every group needs around a machine: exactly-once sessions and the group's
//! clock. The consensus host and the simulation both call [`group::apply`], so it is one code.

pub mod group;
pub mod hash;
pub mod machine;
pub mod memory;
#[cfg(feature = "sled")]
pub mod on_sled;
pub mod table;
pub mod tx;

pub use machine::{Machine, Outcome};
pub use memory::MemoryTable;
pub use table::{Batch, Row, Table, TableError};
pub use tx::Tx;
