//! The state machine: commands with every choice made go in, answers come out.

use bytes::Bytes;
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::limits::BATCH_OPS_MAX;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, ServiceError, ShardError, ShardId, Time, TransactionId, pb};
use prost::Message;

use crate::context::{Answer, Context, Stop};
use crate::ops;
use crate::schema::{self, Step};

/// One shard. All state is in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardMachine {
    pub shard: ShardId,
}

impl Machine for ShardMachine {
    type Effect = std::convert::Infallible;

    /// The root directory, on its shard.
    fn genesis<T: Table + ?Sized>(&self, tx: &mut Tx<'_, T>) -> Result<(), TableError> {
        if self.shard != InodeId::ROOT.shard() {
            return Ok(());
        }
        let root = pb::DirectoryRow { owner: InodeId::ROOT.0, mode: 0o755, ..Default::default() };
        tx.put(schema::directory_key(InodeId::ROOT), root.encode_to_vec())
    }

    /// `command` is an encoded [`pb::ShardCommand`], the reply an encoded [`pb::WriteReply`] with one
    /// result per operation. Operation i happens at `time + i`.
    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        time: Time,
        command: &[u8],
    ) -> Result<Outcome<Self::Effect>, TableError> {
        let results = match pb::ShardCommand::decode(command) {
            Ok(command) if command.ops.len() <= BATCH_OPS_MAX => self.apply_all(tx, time, command.ops)?,
            _ => {
                let error = ShardError::Malformed.with("command");
                vec![result(time, pb::write_result::Result::Error(error))]
            }
        };
        let reply = pb::WriteReply { results };
        Ok(Outcome { reply: Bytes::from(reply.encode_to_vec()), effects: Vec::new() })
    }
}

impl ShardMachine {
    fn apply_all<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        time: Time,
        ops: Vec<pb::ChosenOp>,
    ) -> Result<Vec<pb::WriteResult>, TableError> {
        let mut context = Context::new(self.shard, time, tx);
        let mut results = Vec::with_capacity(ops.len());
        for (instant, op) in (time.0..=u64::MAX).chain(std::iter::repeat(u64::MAX)).zip(ops) {
            context.time = Time(instant);
            results.push(apply_one(&mut context, op)?);
        }
        context.finish()?;
        Ok(results)
    }
}

/// What the leader chose for one operation.
#[derive(Debug)]
pub(crate) struct Choices {
    pub cookie: u64,
    pub block_services: Vec<u64>,
    pub proven_blocks: Vec<u64>,
    pub under_spread: bool,
}

fn apply_one<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    chosen: pb::ChosenOp,
) -> Result<pb::WriteResult, TableError> {
    let pb::ChosenOp { op, cookie, block_services, refused, proven_blocks, under_spread } = chosen;
    let choices = Choices { cookie, block_services, proven_blocks, under_spread };
    let answer = match (refused, op.and_then(|op| op.op)) {
        (Some(error), _) => Err(Stop::Refused(error)),
        (None, None) => Err(ShardError::Malformed.with("operation").into()),
        (None, Some(op)) => match dispatch(context, op, &choices) {
            Dispatched::Client(answer) => answer,
            Dispatched::Step(result) => return result,
        },
    };
    settle(context.time, answer)
}

fn settle(time: Time, answer: Answer) -> Result<pb::WriteResult, TableError> {
    match answer {
        Ok(answer) => Ok(result(time, answer)),
        Err(Stop::Refused(error)) => Ok(result(time, pb::write_result::Result::Error(error))),
        Err(Stop::Failed(error)) => Err(error),
    }
}

fn result(time: Time, result: pb::write_result::Result) -> pb::WriteResult {
    pb::WriteResult { result: Some(result), time: time.0 }
}

enum Dispatched {
    Client(Answer),
    /// Remembered under its transaction.
    Step(Result<pb::WriteResult, TableError>),
}

fn dispatch<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: Op, choices: &Choices) -> Dispatched {
    let answer = match op {
        Op::StartEden(op) => ops::start_eden::apply(context, op, choices),
        Op::ExtendEden(op) => ops::extend_eden::apply(context, op, choices),
        Op::ReplaceBlocks(op) => ops::replace_blocks::apply(context, &op, choices),
        Op::LinkEden(op) => ops::link_eden::apply(context, &op, choices),
        Op::AbandonEden(op) => ops::abandon_eden::apply(context, &op),
        Op::PutSmall(op) => ops::put_small::apply(context, op),
        Op::Rename(op) => ops::rename::apply(context, &op),
        Op::Exchange(op) => ops::exchange::apply(context, &op),
        Op::Unlink(op) => ops::unlink::apply(context, &op),
        Op::SetAttributes(op) => ops::set_attributes::apply(context, op),
        Op::SetPolicy(op) => ops::set_policy::apply(context, op),
        Op::Undelete(op) => ops::undelete::apply(context, &op),
        Op::Purge(op) => ops::purge::apply(context, &op),
        Op::PlaceReplacements(op) => ops::place_replacements::apply(context, &op, choices),
        Op::SwapBlocks(op) => ops::swap_blocks::apply(context, &op, choices),
        Op::SwapContents(op) => ops::swap_contents::apply(context, &op, choices),
        Op::RecordScrub(op) => ops::record_scrub::apply(context, &op),
        Op::ForgetGarbage(op) => ops::forget_garbage::apply(context, &op),
        Op::ExpireEden(op) => ops::expire_eden::apply(context, &op),
        Op::ForgetTransactions(op) => ops::forget_transactions::apply(context, &op),
        step => return Dispatched::Step(dispatch_step(context, &step)),
    };
    Dispatched::Client(answer)
}

fn dispatch_step<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &Op,
) -> Result<pb::WriteResult, TableError> {
    match op {
        Op::CreateDirectory(op) => once(context, op.transaction, Step::CreateDirectory, |context| {
            ops::create_directory::apply(context, op)
        }),
        Op::DiscardDirectory(op) => once(context, op.transaction, Step::DiscardDirectory, |context| {
            ops::create_directory::undo(context, op)
        }),
        Op::LockDirectory(op) => once(context, op.transaction, Step::LockDirectory, |context| {
            ops::lock_directory::apply(context, op)
        }),
        Op::UnlockDirectory(op) => once(context, op.transaction, Step::UnlockDirectory, |context| {
            ops::lock_directory::undo(context, op)
        }),
        Op::LockEdge(op) => {
            once(context, op.transaction, Step::LockEdge, |context| ops::lock_edge::apply(context, op))
        }
        Op::UnlockEdge(op) => {
            once(context, op.transaction, Step::UnlockEdge, |context| ops::lock_edge::undo(context, op))
        }
        Op::LinkEdge(op) => {
            once(context, op.transaction, Step::LinkEdge, |context| ops::link_edge::apply(context, op))
        }
        Op::UnlinkEdge(op) => {
            once(context, op.transaction, Step::UnlinkEdge, |context| ops::unlink_edge::apply(context, op))
        }
        Op::RemoveDirectory(op) => once(context, op.transaction, Step::RemoveDirectory, |context| {
            ops::remove_directory::apply(context, op)
        }),
        Op::SetOwner(op) => {
            once(context, op.transaction, Step::SetOwner, |context| ops::set_owner::apply(context, op))
        }
        op => dispatch_many(context, op),
    }
}

/// Steps of those that make several directories, or give two names each other's.
fn dispatch_many<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &Op,
) -> Result<pb::WriteResult, TableError> {
    match op {
        Op::CreateDirectories(op) => once(context, op.transaction, Step::CreateDirectories, |context| {
            ops::create_directories::apply(context, op)
        }),
        Op::DiscardDirectories(op) => once(context, op.transaction, Step::DiscardDirectories, |context| {
            ops::create_directories::undo(context, op)
        }),
        Op::ExchangeEdge(op) => once(context, op.transaction, Step::ExchangeEdge, |context| {
            ops::exchange_edge::apply(context, op)
        }),
        Op::SettleEdge(op) => {
            once(context, op.transaction, Step::SettleEdge, |context| ops::settle_edge::apply(context, op))
        }
        Op::SetOwners(op) => {
            once(context, op.transaction, Step::SetOwners, |context| ops::set_owners::apply(context, op))
        }
        op => dispatch_dead(context, op),
    }
}

/// Steps of those that bring back or purge what is dead.
fn dispatch_dead<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &Op,
) -> Result<pb::WriteResult, TableError> {
    match op {
        Op::ReviveDirectory(op) => once(context, op.transaction, Step::ReviveDirectory, |context| {
            ops::revive_directory::apply(context, op)
        }),
        Op::UndeleteEdge(op) => {
            once(context, op.transaction, Step::UndeleteEdge, |context| ops::undelete::step(context, op))
        }
        Op::LockDeadEdge(op) => once(context, op.transaction, Step::LockDeadEdge, |context| {
            ops::lock_dead_edge::apply(context, op)
        }),
        Op::FreeDeadEdge(op) => once(context, op.transaction, Step::FreeDeadEdge, |context| {
            ops::lock_dead_edge::free(context, op)
        }),
        Op::PurgeDeadEdge(op) => {
            once(context, op.transaction, Step::PurgeDeadEdge, |context| ops::purge::step(context, op))
        }
        Op::PurgeFile(op) => {
            once(context, op.transaction, Step::PurgeFile, |context| ops::purge_file::apply(context, op))
        }
        Op::PurgeDirectory(op) => once(context, op.transaction, Step::PurgeDirectory, |context| {
            ops::purge_directory::apply(context, op)
        }),
        _ => settle(context.time, Err(ShardError::Malformed.with("operation").into())),
    }
}

/// Runs a coordinator's step unless it has an outcome already, and remembers the outcome, refusals
/// included (SH-13): the coordinator decides by the first answer, so a repetition, or a duplicate that
/// comes late, must never do what the first one refused.
fn once<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    transaction: u64,
    step: Step,
    run: impl FnOnce(&mut Context<'_, '_, T>) -> Answer,
) -> Result<pb::WriteResult, TableError> {
    if transaction == 0 {
        return settle(context.time, Err(ShardError::Malformed.with("a step without a transaction").into()));
    }
    if let Some(outcome) = outcome(context, TransactionId(transaction), step)? {
        return Ok(outcome);
    }
    if transaction < context.meta()?.transactions_floor {
        let error = ShardError::StaleSession.with(format_args!("transaction {transaction} has ended"));
        return settle(context.time, Err(error.into()));
    }
    let answer = run(context);
    let outcome = settle(context.time, answer)?;
    remember(context, TransactionId(transaction), step, outcome.clone())?;
    Ok(outcome)
}

/// The remembered outcome of a step.
pub(crate) fn outcome<T: Table + ?Sized>(
    context: &Context<'_, '_, T>,
    transaction: TransactionId,
    step: Step,
) -> Result<Option<pb::WriteResult>, TableError> {
    let row: Option<pb::TransactionRow> =
        schema::get(&*context.tx, &schema::transaction_key(transaction, step))?;
    match row {
        None => Ok(None),
        Some(pb::TransactionRow { outcome: Some(outcome) }) => Ok(Some(outcome)),
        Some(_) => Err(TableError("a transaction row without an outcome".to_owned())),
    }
}

pub(crate) fn remember<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    transaction: TransactionId,
    step: Step,
    outcome: pb::WriteResult,
) -> Result<(), TableError> {
    let row = pb::TransactionRow { outcome: Some(outcome) };
    context.put(schema::transaction_key(transaction, step), &row)
}

/// Undoing a step that has not come yet forbids it: were it only late, it would run after its undo.
pub(crate) fn forbid<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    transaction: u64,
    step: Step,
) -> Result<(), TableError> {
    let error = ShardError::StaleSession.with("undone before it came");
    let refused = result(context.time, pb::write_result::Result::Error(error));
    remember(context, TransactionId(transaction), step, refused)
}
