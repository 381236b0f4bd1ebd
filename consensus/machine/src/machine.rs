//! What a replicated core implements.

use bytes::Bytes;
use eggs_proto::Time;

use crate::table::{Table, TableError};
use crate::tx::Tx;

/// What applying a command came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome<E> {
    /// For the caller; kept with its session. A refusal is a reply.
    pub reply: Bytes,
    /// What the shell has to do because of it, as data. Not kept: the machine must be able to say
    /// again, from its state, what is still to be done.
    pub effects: Vec<E>,
}

/// A deterministic state machine over a [`Table`].
///
/// The same commands at the same times on the same table give the same outcome and rows, on every
/// replica and in every build of one version.
pub trait Machine {
    /// What it asks its shell to do.
    type Effect;

    /// Writes the rows a new group starts with, before its first command.
    fn genesis<T: Table + ?Sized>(&self, _tx: &mut Tx<'_, T>) -> Result<(), TableError> {
        Ok(())
    }

    /// Applies one command. `time` is later than that of every command before it in this group;
    /// a machine that needs several instants may use up to `time + 2^16 - 1` ns.
    ///
    /// # Errors
    /// Only when the table fails or holds what cannot be: the replica stops. Bytes that are no
    /// command are a refusal, not an error.
    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        time: Time,
        command: &[u8],
    ) -> Result<Outcome<Self::Effect>, TableError>;
}
