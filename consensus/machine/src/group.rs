//! What every group needs around its machine: exactly-once sessions and a clock that never goes
//! back, both rows of the group's own table, so that snapshots carry them.

use bytes::Bytes;
use eggs_proto::limits::SESSION_TTL;
use eggs_proto::{SessionId, Time, pb};
use prost::Message;

use crate::machine::{Machine, Outcome};
use crate::table::{RESERVED, Table, TableError, after, prefix_end};
use crate::tx::Tx;

const CLOCK: &[u8] = &[RESERVED, b'T'];
const SWEEP: &[u8] = &[RESERVED, b'W'];
const SESSIONS: &[u8] = &[RESERVED, b'C'];

/// Sessions looked at for age whenever a new one begins.
const SWEEP_ROWS: usize = 4;
/// Instants one command may use.
const INSTANTS_PER_COMMAND: u64 = 1 << 16;

/// What applying an entry came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied<E> {
    /// The command ran.
    Ran(Outcome<E>),
    /// The session's last command was this very one: its first answer.
    Repeated(Bytes),
    /// The session has gone on to a later sequence; the command did not run.
    Stale,
    /// The entry is not one; nothing ran.
    Malformed,
}

/// Applies one log entry (an encoded [`pb::LogEntry`]) of a group.
pub fn apply<M: Machine, T: Table + ?Sized>(
    machine: &M,
    tx: &mut Tx<'_, T>,
    entry: &[u8],
) -> Result<Applied<M::Effect>, TableError> {
    let Ok(entry) = pb::LogEntry::decode(entry) else { return Ok(Applied::Malformed) };
    let session = SessionId(entry.session);
    let known = if session.0 == 0 { None } else { read_session(tx, session)? };
    if let Some(row) = &known {
        if row.sequence == entry.sequence {
            return Ok(Applied::Repeated(row.reply.clone()));
        }
        if row.sequence > entry.sequence {
            return Ok(Applied::Stale);
        }
    }
    let time = clock(tx)?.next().max(Time(entry.time));
    tx.put(CLOCK, time.0.saturating_add(INSTANTS_PER_COMMAND - 1).to_be_bytes().to_vec())?;
    let outcome = machine.apply(tx, time, &entry.command)?;
    if session.0 != 0 {
        if known.is_none() {
            sweep(tx, time)?;
        }
        let row = pb::SessionRow { sequence: entry.sequence, time: time.0, reply: outcome.reply.clone() };
        tx.put(session_key(session), row.encode_to_vec())?;
    }
    Ok(Applied::Ran(outcome))
}

/// The first answer to (session, sequence), when it was the session's last command.
pub fn repeated<T: Table + ?Sized>(
    table: &T,
    session: SessionId,
    sequence: u64,
) -> Result<Option<Bytes>, TableError> {
    let row = read_session(table, session)?;
    Ok(row.filter(|row| row.sequence == sequence).map(|row| row.reply))
}

/// No command was applied later than this. A reader's "now" must not be before it.
pub fn clock<T: Table + ?Sized>(table: &T) -> Result<Time, TableError> {
    match table.get(CLOCK)? {
        None => Ok(Time::ZERO),
        Some(bytes) => <[u8; 8]>::try_from(&bytes[..])
            .map(|bytes| Time(u64::from_be_bytes(bytes)))
            .map_err(|_| TableError("the clock row is not 8 bytes".to_owned())),
    }
}

/// Forgets a few sessions unused for [`SESSION_TTL`], going round the table from call to call: each
/// new session pays for the removal of old ones, and a group at rest does nothing.
fn sweep<T: Table + ?Sized>(tx: &mut Tx<'_, T>, now: Time) -> Result<(), TableError> {
    let end = prefix_end(SESSIONS);
    let from = match tx.get(SWEEP)? {
        Some(last) => after(&last),
        None => SESSIONS.to_vec(),
    };
    let rows = tx.page(&from, &end, SWEEP_ROWS)?;
    for (key, value) in &rows {
        let row = decode_session(value)?;
        if now.since(Time(row.time)) > SESSION_TTL {
            tx.delete(key.clone())?;
        }
    }
    match rows.last() {
        Some((last, _)) if rows.len() == SWEEP_ROWS => tx.put(SWEEP, last.clone()),
        _ => tx.delete(SWEEP),
    }
}

fn session_key(session: SessionId) -> Vec<u8> {
    let mut key = SESSIONS.to_vec();
    key.extend_from_slice(&session.0.to_be_bytes());
    key
}

fn read_session<T: Table + ?Sized>(
    table: &T,
    session: SessionId,
) -> Result<Option<pb::SessionRow>, TableError> {
    table.get(&session_key(session))?.as_deref().map(decode_session).transpose()
}

fn decode_session(bytes: &[u8]) -> Result<pb::SessionRow, TableError> {
    pb::SessionRow::decode(bytes).map_err(|error| TableError(format!("session row: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::StateHash;
    use crate::memory::MemoryTable;

    /// Appends the command to its one row and answers the whole.
    struct Append;

    impl Machine for Append {
        type Effect = ();

        fn apply<T: Table + ?Sized>(
            &self,
            tx: &mut Tx<'_, T>,
            _time: Time,
            command: &[u8],
        ) -> Result<Outcome<()>, TableError> {
            let mut row = tx.get(b"row")?.unwrap_or_default().to_vec();
            row.extend_from_slice(command);
            tx.put(&b"row"[..], row.clone())?;
            Ok(Outcome { reply: row.into(), effects: Vec::new() })
        }
    }

    fn run(table: &mut MemoryTable, session: u64, sequence: u64, time: u64, command: &[u8]) -> Applied<()> {
        let entry = pb::LogEntry { time, session, sequence, command: command.to_vec().into() };
        let mut tx = Tx::new(&*table, StateHash::default());
        let applied = apply(&Append, &mut tx, &entry.encode_to_vec()).unwrap();
        let (batch, _) = tx.finish();
        table.apply(batch);
        applied
    }

    fn ran(reply: &'static [u8]) -> Applied<()> {
        Applied::Ran(Outcome { reply: Bytes::from_static(reply), effects: Vec::new() })
    }

    #[test]
    fn a_repeated_command_runs_once_and_answers_twice() {
        let mut table = MemoryTable::default();
        assert_eq!(run(&mut table, 7, 1, 10, b"a"), ran(b"a"));
        assert_eq!(run(&mut table, 7, 1, 11, b"a"), Applied::Repeated(Bytes::from_static(b"a")));
        assert_eq!(run(&mut table, 8, 1, 12, b"b"), ran(b"ab"));
        assert_eq!(run(&mut table, 7, 2, 13, b"c"), ran(b"abc"));
        assert_eq!(run(&mut table, 7, 1, 14, b"a"), Applied::Stale);
        assert_eq!(run(&mut table, 0, 0, 15, b"d"), ran(b"abcd"));
        assert_eq!(run(&mut table, 0, 0, 15, b"d"), ran(b"abcdd"));
        assert_eq!(repeated(&table, SessionId(8), 1).unwrap(), Some(Bytes::from_static(b"ab")));
        assert_eq!(repeated(&table, SessionId(8), 2).unwrap(), None);
    }

    #[test]
    fn the_clock_never_goes_back() {
        let mut table = MemoryTable::default();
        run(&mut table, 0, 0, 1_000_000, b"a");
        let first = clock(&table).unwrap();
        run(&mut table, 0, 0, 5, b"b");
        assert!(clock(&table).unwrap() > first);
    }

    #[test]
    fn old_sessions_go_when_new_ones_come() {
        let mut table = MemoryTable::default();
        for session in 1..=100 {
            run(&mut table, session, 1, session, b"");
        }
        let late = u64::try_from(SESSION_TTL.as_nanos()).unwrap() * 2;
        for session in 1001..=1040 {
            run(&mut table, session, 1, late + session, b"");
        }
        let left = table.page(SESSIONS, &prefix_end(SESSIONS), 1000).unwrap().len();
        assert!(left < 60, "{left} sessions are left of 40 live and 100 old ones");
    }
}
