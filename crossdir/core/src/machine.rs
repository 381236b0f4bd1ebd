//! What is kept of the transactions, replicated: intents, answers, and who asked.
//!
//! The machine knows nothing of locks and steps; a [`Driver`](crate::Driver) carries a transaction
//! through and can be made again from these rows at any time.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::limits::SESSION_TTL;
use eggs_proto::{CrossdirError, ServiceError, SessionId, Time, TransactionId, pb};
use prost::Message;

use crate::schema;

/// The coordinator's replicated state machine. Its reply to a `BeginTransaction` is an encoded
/// [`pb::TransactionAccepted`], to a `TakeOver` too; to the others, nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct CrossdirMachine;

/// What the driver has to be told, in the order the entries were applied.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Carry this one through.
    Begun { transaction: TransactionId, begin: pb::BeginTransaction, started_at: Time },
    /// Their answers are durable: the shards may forget them.
    Finished(Vec<TransactionId>),
    /// They are gone.
    Retired(Vec<TransactionId>),
    /// There is another driver, with this number.
    TakenOver(u64),
    /// These moves of directories may go on.
    Cleared(Vec<TransactionId>),
}

/// What is known of a call.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// No such call was accepted (or it is too long ago).
    Unknown,
    /// The session has gone on to a later call.
    Stale,
    /// Accepted, and being carried through.
    InProgress(TransactionId),
    Done(TransactionId, pb::CrossdirReply),
}

/// Sessions looked at for age whenever a new one begins.
const SWEEP_ROWS: usize = 4;

impl Machine for CrossdirMachine {
    type Effect = Effect;

    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        time: Time,
        command: &[u8],
    ) -> Result<Outcome<Effect>, TableError> {
        use pb::crossdir_command::Command;
        let command = pb::CrossdirCommand::decode(command).ok().and_then(|command| command.command);
        match command {
            Some(Command::Begin(begin)) if begin.op.is_some() => begin_transaction(tx, time, begin),
            Some(Command::Finish(finish)) => finish_transactions(tx, finish),
            Some(Command::Retire(retire)) => retire_transactions(tx, retire),
            Some(Command::TakeOver(pb::TakeOver {})) => take_over(tx),
            Some(Command::Clear(clear)) => clear_moves(tx, clear),
            _ => Ok(refused(CrossdirError::Malformed)),
        }
    }
}

fn begin_transaction<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    time: Time,
    begin: pb::BeginTransaction,
) -> Result<Outcome<Effect>, TableError> {
    let session = SessionId(begin.session);
    let known = if session.0 == 0 { None } else { schema::session(tx, session)? };
    if let Some(row) = &known {
        if row.sequence == begin.sequence {
            return Ok(accepted(TransactionId(row.transaction), Vec::new()));
        }
        if row.sequence > begin.sequence {
            return Ok(refused(CrossdirError::StaleSession));
        }
    }
    let mut meta = schema::meta(tx)?;
    let transaction = TransactionId(meta.next_transaction);
    meta.next_transaction += 1;
    tx.put(schema::META, meta.encode_to_vec())?;
    let row = pb::CrossdirTransactionRow {
        begin: begin.encode_to_vec().into(),
        started_at: time.0,
        session: begin.session,
        sequence: begin.sequence,
        reply: None,
        cleared: false,
    };
    tx.put(schema::transaction_key(transaction), row.encode_to_vec())?;
    if session.0 != 0 {
        if known.is_none() {
            sweep(tx, time)?;
        }
        let row = pb::CrossdirSessionRow {
            transaction: transaction.0,
            sequence: begin.sequence,
            time: time.0,
            reply: None,
        };
        tx.put(schema::session_key(session), row.encode_to_vec())?;
    }
    Ok(accepted(transaction, vec![Effect::Begun { transaction, begin, started_at: time }]))
}

fn take_over<T: Table + ?Sized>(tx: &mut Tx<'_, T>) -> Result<Outcome<Effect>, TableError> {
    let mut meta = schema::meta(tx)?;
    meta.driver += 1;
    tx.put(schema::META, meta.encode_to_vec())?;
    let reply = pb::TransactionAccepted { driver: meta.driver, ..pb::TransactionAccepted::default() };
    Ok(Outcome { reply: reply.encode_to_vec().into(), effects: vec![Effect::TakenOver(meta.driver)] })
}

fn clear_moves<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    clear: pb::ClearMoves,
) -> Result<Outcome<Effect>, TableError> {
    let mut cleared = Vec::with_capacity(clear.transactions.len());
    if schema::meta(tx)?.driver != clear.driver {
        return Ok(nothing());
    }
    for transaction in clear.transactions.into_iter().map(TransactionId) {
        let Some(mut row) = schema::transaction(tx, transaction)? else { continue };
        if row.reply.is_none() {
            row.cleared = true;
            tx.put(schema::transaction_key(transaction), row.encode_to_vec())?;
            cleared.push(transaction);
        }
    }
    Ok(Outcome { reply: Bytes::new(), effects: vec![Effect::Cleared(cleared)] })
}

/// XD-8: what a driver says that has been replaced.
fn nothing() -> Outcome<Effect> {
    Outcome { reply: Bytes::new(), effects: Vec::new() }
}

/// The first answer stays (XD-2): a later, different one would be a bug of the driver.
fn finish_transactions<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    finish: pb::FinishTransactions,
) -> Result<Outcome<Effect>, TableError> {
    if schema::meta(tx)?.driver != finish.driver {
        return Ok(nothing());
    }
    let mut finished = Vec::with_capacity(finish.transactions.len());
    for pb::FinishedTransaction { transaction, reply } in finish.transactions {
        let transaction = TransactionId(transaction);
        let Some(mut row) = schema::transaction(tx, transaction)? else { continue };
        if row.reply.is_none() {
            row.reply = Some(reply.unwrap_or_default());
            tx.put(schema::transaction_key(transaction), row.encode_to_vec())?;
        }
        finished.push(transaction);
    }
    Ok(Outcome { reply: Bytes::new(), effects: vec![Effect::Finished(finished)] })
}

/// An unfinished transaction is never retired (XD-4); one already gone counts as retired.
fn retire_transactions<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    retire: pb::RetireTransactions,
) -> Result<Outcome<Effect>, TableError> {
    let mut retired = Vec::with_capacity(retire.transactions.len());
    for transaction in retire.transactions.into_iter().map(TransactionId) {
        if let Some(row) = schema::transaction(tx, transaction)? {
            let Some(reply) = row.reply else { continue };
            tx.delete(schema::transaction_key(transaction))?;
            keep_for_session(tx, SessionId(row.session), transaction, reply)?;
        }
        retired.push(transaction);
    }
    Ok(Outcome { reply: Bytes::new(), effects: vec![Effect::Retired(retired)] })
}

/// Only the answer stays, and only for a session that has not gone on (XD-2).
fn keep_for_session<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    session: SessionId,
    transaction: TransactionId,
    reply: pb::CrossdirReply,
) -> Result<(), TableError> {
    if session.0 == 0 {
        return Ok(());
    }
    match schema::session(tx, session)? {
        Some(mut row) if row.transaction == transaction.0 => {
            row.reply = Some(reply);
            tx.put(schema::session_key(session), row.encode_to_vec())
        }
        _ => Ok(()),
    }
}

/// Forgets a few sessions unused for [`SESSION_TTL`], going round the table from call to call. One
/// whose transaction is not retired stays.
fn sweep<T: Table + ?Sized>(tx: &mut Tx<'_, T>, now: Time) -> Result<(), TableError> {
    let from = match tx.get(schema::SWEEP)? {
        Some(last) => eggs_machine::table::after(&last),
        None => schema::SESSIONS.to_vec(),
    };
    let rows = tx.page(&from, schema::SESSIONS_END, SWEEP_ROWS)?;
    for (key, value) in &rows {
        let row: pb::CrossdirSessionRow = schema::decode(value, "session row")?;
        if row.reply.is_some() && now.since(Time(row.time)) > SESSION_TTL {
            tx.delete(key.clone())?;
        }
    }
    match rows.last() {
        Some((last, _)) if rows.len() == SWEEP_ROWS => tx.put(schema::SWEEP, last.clone()),
        _ => tx.delete(schema::SWEEP),
    }
}

fn accepted(transaction: TransactionId, effects: Vec<Effect>) -> Outcome<Effect> {
    let reply = pb::TransactionAccepted { transaction: transaction.0, ..pb::TransactionAccepted::default() };
    Outcome { reply: reply.encode_to_vec().into(), effects }
}

fn refused(error: CrossdirError) -> Outcome<Effect> {
    let reply = pb::TransactionAccepted { error: Some(error.bare()), ..pb::TransactionAccepted::default() };
    Outcome { reply: reply.encode_to_vec().into(), effects: Vec::new() }
}

/// What is known of the call `sequence` of `session`.
///
/// # Errors
/// When the table fails.
pub fn answer<T: Table + ?Sized>(view: &T, session: SessionId, sequence: u64) -> Result<Answer, TableError> {
    let row = if session.0 == 0 { None } else { schema::session(view, session)? };
    let Some(row) = row else { return Ok(Answer::Unknown) };
    let transaction = TransactionId(row.transaction);
    if row.sequence != sequence {
        return Ok(if row.sequence > sequence { Answer::Stale } else { Answer::Unknown });
    }
    let reply = match row.reply {
        Some(reply) => Some(reply),
        None => schema::transaction(view, transaction)?.and_then(|row| row.reply),
    };
    Ok(reply.map_or(Answer::InProgress(transaction), |reply| Answer::Done(transaction, reply)))
}

/// The recorded answer of a transaction; `None` when it is unfinished or gone.
///
/// # Errors
/// When the table fails.
pub fn reply_of<T: Table + ?Sized>(
    view: &T,
    transaction: TransactionId,
) -> Result<Option<pb::CrossdirReply>, TableError> {
    Ok(schema::transaction(view, transaction)?.and_then(|row| row.reply))
}

/// A transaction that is not over, as its row has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pending {
    pub transaction: TransactionId,
    pub begin: pb::BeginTransaction,
    pub started_at: Time,
    /// A move of a directory that may go on.
    pub cleared: bool,
}

/// Begun and without an answer, in the order they were begun.
///
/// # Errors
/// When the table fails or holds what is no row.
pub fn unfinished<T: Table + ?Sized>(view: &T) -> Result<Vec<Pending>, TableError> {
    Ok(pending(view)?.into_iter().filter(|(_, reply)| reply.is_none()).map(|(pending, _)| pending).collect())
}

/// Answered, but the shards may still remember them.
///
/// # Errors
/// When the table fails or holds what is no row.
pub fn finished_not_retired<T: Table + ?Sized>(
    view: &T,
) -> Result<BTreeMap<TransactionId, (Pending, pb::CrossdirReply)>, TableError> {
    let all = pending(view)?.into_iter();
    Ok(all.filter_map(|(row, reply)| reply.map(|reply| (row.transaction, (row, reply)))).collect())
}

fn pending<T: Table + ?Sized>(view: &T) -> Result<Vec<(Pending, Option<pb::CrossdirReply>)>, TableError> {
    let rows = schema::transactions(view)?;
    rows.into_iter()
        .map(|(transaction, row)| {
            let begin = schema::decode(&row.begin, "intent of a transaction")?;
            let (started_at, cleared) = (Time(row.started_at), row.cleared);
            Ok((Pending { transaction, begin, started_at, cleared }, row.reply))
        })
        .collect()
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
