//! The coordinator's rows.
//!
//! | key | value |
//! |---|---|
//! | `M` | [`pb::CrossdirMetaRow`] |
//! | `T` transaction (u64, big endian) | [`pb::CrossdirTransactionRow`]: begun, not yet retired |
//! | `S` session (u64, big endian) | [`pb::CrossdirSessionRow`]: the last transaction of the session |
//! | `W` | the session the sweep of old sessions stopped at (a key of `S`) |
//!
//! Transactions sort by id, which is the order they were begun in: that is the order a new driver
//! takes them up again (XD-5).

use bytes::Bytes;
use eggs_machine::table::scan;
use eggs_machine::{Table, TableError};
use eggs_proto::{SessionId, TransactionId, pb};
use prost::Message;

pub(crate) const META: &[u8] = b"M";
pub(crate) const TRANSACTIONS: &[u8] = b"T";
pub(crate) const TRANSACTIONS_END: &[u8] = b"U";
pub(crate) const SESSIONS: &[u8] = b"S";
pub(crate) const SESSIONS_END: &[u8] = b"T";
pub(crate) const SWEEP: &[u8] = b"W";

pub(crate) fn transaction_key(transaction: TransactionId) -> Vec<u8> {
    key(b'T', transaction.0)
}

pub(crate) fn session_key(session: SessionId) -> Vec<u8> {
    key(b'S', session.0)
}

fn key(tag: u8, id: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(9);
    key.push(tag);
    key.extend_from_slice(&id.to_be_bytes());
    key
}

/// The transaction a key of `T` names.
fn transaction_of(key: &[u8]) -> Result<TransactionId, TableError> {
    key.get(1..)
        .and_then(|id| id.try_into().ok())
        .map(|id| TransactionId(u64::from_be_bytes(id)))
        .ok_or_else(|| TableError("the key of a transaction row is not 9 bytes".to_owned()))
}

/// `next_transaction` is 1 at least.
pub(crate) fn meta<T: Table + ?Sized>(table: &T) -> Result<pb::CrossdirMetaRow, TableError> {
    let row = table.get(META)?.map(|bytes| decode(&bytes, "meta row")).transpose()?;
    let row: pb::CrossdirMetaRow = row.unwrap_or_default();
    Ok(pb::CrossdirMetaRow { next_transaction: row.next_transaction.max(1), ..row })
}

pub(crate) fn transaction<T: Table + ?Sized>(
    table: &T,
    id: TransactionId,
) -> Result<Option<pb::CrossdirTransactionRow>, TableError> {
    table.get(&transaction_key(id))?.map(|bytes| decode(&bytes, "transaction row")).transpose()
}

pub(crate) fn session<T: Table + ?Sized>(
    table: &T,
    session: SessionId,
) -> Result<Option<pb::CrossdirSessionRow>, TableError> {
    table.get(&session_key(session))?.map(|bytes| decode(&bytes, "session row")).transpose()
}

/// The unretired transactions in the order they were begun.
pub(crate) fn transactions<T: Table + ?Sized>(
    table: &T,
) -> Result<Vec<(TransactionId, pb::CrossdirTransactionRow)>, TableError> {
    let mut all = Vec::new();
    scan(table, TRANSACTIONS, TRANSACTIONS_END, |key, value| {
        all.push((transaction_of(key)?, decode(value, "transaction row")?));
        Ok(true)
    })?;
    Ok(all)
}

pub(crate) fn decode<R: Message + Default>(bytes: &Bytes, what: &str) -> Result<R, TableError> {
    R::decode(bytes.clone()).map_err(|error| TableError(format!("{what}: {error}")))
}
