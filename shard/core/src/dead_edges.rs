//! Dead edges after their death: undeleted, locked, purged. With [`crate::edges`] the only code that changes the X table.

use eggs_machine::{Table, TableError};
use eggs_proto::{InodeId, ServiceError, ShardError, Time, TransactionId, pb};

use crate::context::{Context, Stop, check_name};
use crate::edges::quoted;
use crate::schema;

/// One death of one name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Death<'a> {
    pub directory: InodeId,
    pub name: &'a [u8],
    pub died_at: Time,
}

impl Death<'_> {
    fn key(&self) -> Vec<u8> {
        schema::dead_key(self.directory, self.name, self.died_at)
    }

    fn words(&self) -> String {
        format!("{} that died at {}", quoted(self.name), self.died_at.0)
    }
}

impl<T: Table + ?Sized> Context<'_, '_, T> {
    /// The dead edge, which must lead to `target` and be free for `transaction` (0: for anybody).
    pub fn dead_edge(
        &self,
        death: Death<'_>,
        target: u64,
        transaction: TransactionId,
    ) -> Result<pb::DeadEdgeRow, Stop> {
        check_name(death.name)?;
        let row: Option<pb::DeadEdgeRow> = schema::get(&*self.tx, &death.key())?;
        let row = row.ok_or_else(|| ShardError::NotFound.with(death.words()))?;
        if row.transaction != 0 && row.transaction != transaction.0 {
            return Err(ShardError::Locked.with(death.words()).into());
        }
        if row.target != target {
            return Err(ShardError::Changed.with(death.words()).into());
        }
        Ok(row)
    }

    /// As [`Context::dead_edge`], and it must own its target (SH-16).
    pub fn owning_edge(
        &self,
        death: Death<'_>,
        target: u64,
        transaction: TransactionId,
    ) -> Result<pb::DeadEdgeRow, Stop> {
        let row = self.dead_edge(death, target, transaction)?;
        if !row.owned {
            return Err(ShardError::NotOwned.with(death.words()).into());
        }
        Ok(row)
    }

    /// The past keeps it; its target lives elsewhere now.
    pub fn disown(&mut self, death: Death<'_>, row: &pb::DeadEdgeRow) -> Result<(), TableError> {
        self.put(death.key(), &pb::DeadEdgeRow { owned: false, transaction: 0, ..*row })
    }

    /// Locked by `transaction`; 0: by nobody.
    pub fn lock_dead_edge(
        &mut self,
        death: Death<'_>,
        row: &pb::DeadEdgeRow,
        transaction: TransactionId,
    ) -> Result<(), TableError> {
        self.put(death.key(), &pb::DeadEdgeRow { transaction: transaction.0, ..*row })
    }

    /// The past does not have it any more.
    pub fn purge_edge(&mut self, death: Death<'_>) -> Result<(), TableError> {
        self.tx.delete(death.key())
    }
}
