//! Bugs put in on purpose, to see that the checkers find them. None touches the cores' code: a bug is
//! a store, a shell or a table that does not do what it should.

use std::fmt;
use std::str::FromStr;

use eggs_machine::table::prefix_end;
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::Time;
use eggs_shard_core::ShardMachine;

macro_rules! bugs {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// A bug to plant.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Bug { $($(#[$doc])* $variant,)* }

        impl Bug {
            /// Every bug, in the order they are documented.
            pub const ALL: &[Bug] = &[$(Bug::$variant,)*];

            /// As it is typed.
            pub fn name(self) -> &'static str {
                match self { $(Bug::$variant => $name,)* }
            }
        }
    };
}

bugs! {
    /// The shards' logs say that they are durable and are not.
    SkipFsync = "skip-fsync";
    /// A shard answers a write before it is in the log.
    AckBeforeCommit = "ack-before-commit";
    /// Shards do not remember the outcome of a coordinator's step (T rows).
    NoTransactionCheck = "no-transaction-check";
    /// Shards do not remember the last reply of a session (C rows).
    NoSessionCheck = "no-session-check";
    /// Now and then a shard loses an entry of the dead map.
    ForgetDeadMap = "forget-dead-map";
    /// A shard's clock now and then goes back.
    ClockGoesBack = "clock-goes-back";
    /// The coordinator does not take up what it had begun before it stopped.
    NoRecovery = "no-recovery";
    /// A block service proves a block before it is durable.
    ProofBeforeSync = "proof-before-sync";
    /// A reader believes every cell it gets.
    IgnoreCellCrc = "ignore-cell-crc";
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Bug {
    type Err = String;

    fn from_str(name: &str) -> Result<Bug, String> {
        Bug::ALL.iter().copied().find(|bug| bug.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
            format!("no such bug; there are {}", names.join(", "))
        })
    }
}

/// The shard's machine with a bug around it, or without.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BuggyShard {
    pub machine: ShardMachine,
    pub bug: Option<Bug>,
}

impl Machine for BuggyShard {
    type Effect = std::convert::Infallible;

    fn genesis<T: Table + ?Sized>(&self, tx: &mut Tx<'_, T>) -> Result<(), TableError> {
        self.machine.genesis(tx)
    }

    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        time: Time,
        command: &[u8],
    ) -> Result<Outcome<Self::Effect>, TableError> {
        let mut time = time;
        match self.bug {
            Some(Bug::NoSessionCheck) => delete(tx, &[0, b'C'], 0, 1)?,
            Some(Bug::ClockGoesBack) if time.0.is_multiple_of(8) => time = Time(time.0 - 20_000_000),
            _ => {}
        }
        let outcome = self.machine.apply(tx, time, command)?;
        match self.bug {
            Some(Bug::NoTransactionCheck) => forget_steps(tx)?,
            // Deterministic, as a machine must be: by what is in the command's time.
            Some(Bug::ForgetDeadMap) => delete(tx, b"X", time.0, 8)?,
            _ => {}
        }
        Ok(outcome)
    }
}

/// More than any table of a run has.
const ROWS_MAX: usize = 1 << 20;

/// Deletes the rows under a prefix when `by` is a multiple of `one_in`.
fn delete<T: Table + ?Sized>(tx: &mut Tx<'_, T>, prefix: &[u8], by: u64, one_in: u64) -> Result<(), TableError> {
    if !by.is_multiple_of(one_in) {
        return Ok(());
    }
    let rows = tx.page(prefix, &prefix_end(prefix), ROWS_MAX)?;
    let one = if one_in > 1 { 1 } else { rows.len() };
    for (key, _) in rows.into_iter().take(one) {
        tx.delete(key)?;
    }
    Ok(())
}

/// All outcomes but those of LockEdge, which an undo reads (and `check` looks for).
fn forget_steps<T: Table + ?Sized>(tx: &mut Tx<'_, T>) -> Result<(), TableError> {
    for (key, _) in tx.page(b"T", b"U", ROWS_MAX)? {
        if key.last() != Some(&24) {
            tx.delete(key)?;
        }
    }
    Ok(())
}
