//! ForgetTransactions: the coordinator has recorded these as finished, so their outcomes may go. What
//! is older than `floor` has ended everywhere: a late duplicate of one of its steps is refused (SH-13).

use eggs_machine::Table;
use eggs_machine::table::prefix_end;
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done};
use crate::schema;

/// A transaction has at most one outcome for each kind of step.
const OUTCOMES_MAX: usize = 256;
/// Transactions one operation forgets: a bounded piece of work.
const TRANSACTIONS_MAX: usize = 16_384;

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::ForgetTransactions,
) -> Answer {
    if op.transactions.len() > TRANSACTIONS_MAX {
        return Err(ShardError::Malformed.with("too many transactions to forget").into());
    }
    for &transaction in &op.transactions {
        let prefix = schema::id_key(schema::TRANSACTION, transaction);
        for (key, _) in context.tx.page(&prefix, &prefix_end(&prefix), OUTCOMES_MAX)? {
            context.tx.delete(key)?;
        }
    }
    if op.floor > context.meta()?.transactions_floor {
        context.change_meta()?.transactions_floor = op.floor;
    }
    done()
}
