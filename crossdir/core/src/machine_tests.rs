//! Rows (golden bytes), repeated calls, and the order in which a transaction may end.

use std::time::Duration;

use eggs_machine::hash::StateHash;
use eggs_machine::{MemoryTable, Tx};
use pb::crossdir_command::Command;
use proptest::prelude::*;

use super::*;

fn apply(table: &mut MemoryTable, time: u64, command: Command) -> Outcome<Effect> {
    let command = pb::CrossdirCommand { command: Some(command) };
    apply_bytes(table, time, &command.encode_to_vec())
}

fn apply_bytes(table: &mut MemoryTable, time: u64, command: &[u8]) -> Outcome<Effect> {
    let mut tx = Tx::new(&*table, StateHash::default());
    let outcome = CrossdirMachine.apply(&mut tx, Time(time), command).unwrap();
    let (batch, _) = tx.finish();
    table.apply(batch);
    outcome
}

fn begin(session: u64, sequence: u64) -> Command {
    let op = pb::Mkdir { parent: 7, name: Bytes::from_static(b"n"), attributes: None };
    let op = pb::begin_transaction::Op::Mkdir(op);
    Command::Begin(pb::BeginTransaction { op: Some(op), shard: 3, session, sequence })
}

fn begun(table: &mut MemoryTable, time: u64, session: u64, sequence: u64) -> Result<u64, u32> {
    let reply = apply(table, time, begin(session, sequence)).reply;
    let accepted = pb::TransactionAccepted::decode(reply).unwrap();
    accepted.error.map_or(Ok(accepted.transaction), |error| Err(error.code))
}

fn made(inode: u64) -> pb::CrossdirReply {
    let made = pb::MkdirReply { inode, created_at: 9 };
    pb::CrossdirReply { header: None, result: Some(pb::crossdir_reply::Result::Mkdir(made)) }
}

fn finish(transaction: u64, inode: u64) -> Command {
    let one = pb::FinishedTransaction { transaction, reply: Some(made(inode)) };
    Command::Finish(pb::FinishTransactions { transactions: vec![one], driver: 0 })
}

fn retire(transactions: Vec<u64>) -> Command {
    Command::Retire(pb::RetireTransactions { transactions })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_rows() {
    let mut table = MemoryTable::default();
    apply(&mut table, 1, begin(0xaa, 1));
    apply(&mut table, 2, finish(1, 5));
    apply(&mut table, 3, retire(vec![1]));
    apply(&mut table, 4, begin(0xbb, 2));
    let rows: Vec<String> = table.iter().map(|(key, value)| format!("{} {}", hex(key), hex(value))).collect();
    assert_eq!(
        rows,
        [
            // M, the next transaction
            "4d 0803",
            // S, session → transaction, sequence, time, reply
            concat!(
                "5300000000000000aa 0901000000000000001001190100000000000000",
                "22141a12090500000000000000110900000000000000",
            ),
            "5300000000000000bb 0902000000000000001002190400000000000000",
            // T, transaction → intent, started at, session, sequence
            concat!(
                "540000000000000002 0a1b0a0c09070000000000000012016e200329bb000000000000003002",
                "11040000000000000019bb000000000000002002",
            ),
        ]
    );
}

#[test]
fn a_repeated_call_gets_the_same_transaction() {
    let mut table = MemoryTable::default();
    assert_eq!(begun(&mut table, 1, 5, 1), Ok(1));
    assert_eq!(begun(&mut table, 2, 5, 1), Ok(1), "XD-2");
    assert_eq!(unfinished(&table).unwrap().len(), 1);
    assert_eq!(begun(&mut table, 3, 6, 1), Ok(2));
    assert_eq!(begun(&mut table, 4, 5, 3), Ok(3));
    assert_eq!(begun(&mut table, 5, 5, 2), Err(CrossdirError::StaleSession.code()));
    // Without a session every call is a new one.
    assert_eq!((begun(&mut table, 6, 0, 0), begun(&mut table, 7, 0, 0)), (Ok(4), Ok(5)));
    let order: Vec<u64> = unfinished(&table).unwrap().iter().map(|pending| pending.transaction.0).collect();
    assert_eq!(order, [1, 2, 3, 4, 5], "XD-5");
    assert_eq!(unfinished(&table).unwrap()[1].started_at, Time(3));
}

#[test]
fn an_answer_is_kept_until_its_session_goes_on() {
    let mut table = MemoryTable::default();
    let session = SessionId(5);
    assert_eq!(answer(&table, session, 1).unwrap(), Answer::Unknown);
    begun(&mut table, 1, 5, 1).unwrap();
    assert_eq!(answer(&table, session, 1).unwrap(), Answer::InProgress(TransactionId(1)));
    apply(&mut table, 2, finish(1, 77));
    assert_eq!(answer(&table, session, 1).unwrap(), Answer::Done(TransactionId(1), made(77)));
    assert_eq!(finished_not_retired(&table).unwrap().len(), 1);
    apply(&mut table, 3, retire(vec![1]));
    assert!(pending(&table).unwrap().is_empty());
    assert_eq!(answer(&table, session, 1).unwrap(), Answer::Done(TransactionId(1), made(77)), "XD-2");
    assert_eq!(begun(&mut table, 4, 5, 1), Ok(1), "XD-2");
    begun(&mut table, 5, 5, 2).unwrap();
    assert_eq!(answer(&table, session, 1).unwrap(), Answer::Stale);
    assert_eq!(answer(&table, session, 3).unwrap(), Answer::Unknown);
}

#[test]
fn a_session_that_went_on_before_its_transaction_ended_gets_only_its_last_answer() {
    let mut table = MemoryTable::default();
    begun(&mut table, 1, 5, 1).unwrap();
    begun(&mut table, 2, 5, 2).unwrap();
    apply(&mut table, 3, finish(1, 11));
    apply(&mut table, 4, retire(vec![1]));
    assert_eq!(answer(&table, SessionId(5), 2).unwrap(), Answer::InProgress(TransactionId(2)));
    apply(&mut table, 5, finish(2, 22));
    assert_eq!(answer(&table, SessionId(5), 2).unwrap(), Answer::Done(TransactionId(2), made(22)));
}

#[test]
fn the_end_comes_in_order_and_once() {
    let mut table = MemoryTable::default();
    begun(&mut table, 1, 5, 1).unwrap();
    let outcome = apply(&mut table, 2, retire(vec![1]));
    assert_eq!(outcome.effects, [Effect::Retired(vec![])], "XD-4");
    assert_eq!(unfinished(&table).unwrap().len(), 1, "XD-4");
    let outcome = apply(&mut table, 3, finish(1, 5));
    assert_eq!(outcome.effects, [Effect::Finished(vec![TransactionId(1)])]);
    // Proposed twice: said twice, so that a driver that waits for it hears it.
    let before = table.clone();
    let outcome = apply(&mut table, 4, finish(1, 6));
    assert_eq!(outcome.effects, [Effect::Finished(vec![TransactionId(1)])]);
    assert_eq!(table, before, "XD-2: the first answer stays");
    for _ in 0..2 {
        let outcome = apply(&mut table, 5, retire(vec![1]));
        assert_eq!(outcome.effects, [Effect::Retired(vec![TransactionId(1)])]);
    }
    assert_eq!(apply(&mut table, 6, finish(1, 5)).effects, [Effect::Finished(vec![])]);
}

#[test]
fn old_sessions_go_when_new_ones_come() {
    let mut table = MemoryTable::default();
    for session in 1..=100 {
        let transaction = begun(&mut table, session, session, 1).unwrap();
        // One of them never ends.
        if session != 50 {
            apply(&mut table, session, finish(transaction, 1));
            apply(&mut table, session, retire(vec![transaction]));
        }
    }
    let late = Time(200).saturating_add(SESSION_TTL).saturating_add(Duration::from_secs(1)).0;
    for session in 1001..=1040 {
        begun(&mut table, late, session, 1).unwrap();
    }
    let left = table.page(schema::SESSIONS, schema::SESSIONS_END, 1000).unwrap().len();
    assert!(left < 60, "{left} sessions are left of 41 live and 99 old ones");
    assert_eq!(answer(&table, SessionId(50), 1).unwrap(), Answer::InProgress(TransactionId(50)));
}

proptest! {
    #[test]
    fn no_bytes_stop_the_machine(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let mut table = MemoryTable::default();
        apply_bytes(&mut table, 1, &bytes);
    }
}
