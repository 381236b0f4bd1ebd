//! The driver alone, its inputs made by hand: order of outputs, repetition, batches, bounds.

use bytes::Bytes;
use eggs_machine::hash::StateHash;
use eggs_machine::{Machine, MemoryTable, Tx};
use eggs_proto::InodeType;
use pb::crossdir_command::Command;
use pb::write_op::Op;
use prost::Message;

use super::ending::{FORGET_DELAY, LATE_MAX};
use super::*;
use crate::machine::CrossdirMachine;

const START: Time = Time(1_000_000_000_000);
const PARENT: InodeId = InodeId::ROOT;
const CHOSEN: ShardId = ShardId(9);

fn directory(shard: u8, counter: u64) -> InodeId {
    InodeId::new(InodeType::Directory, ShardId(shard), counter)
}

/// A driver, the machine's table, and the time.
struct Rig {
    driver: Driver,
    table: MemoryTable,
    now: Time,
}

impl Rig {
    fn new() -> Rig {
        let table = MemoryTable::default();
        let (driver, _) = Driver::recover(&table, START).unwrap();
        let mut rig = Rig { driver, table, now: START };
        rig.recover();
        rig
    }

    fn step(&mut self, input: Input) -> Vec<Output> {
        self.driver.step(input, self.now)
    }

    fn log(&mut self, command: Command) -> Vec<Output> {
        let mut tx = Tx::new(&self.table, StateHash::default());
        let command = pb::CrossdirCommand { command: Some(command) }.encode_to_vec();
        let outcome = CrossdirMachine.apply(&mut tx, self.now, &command).unwrap();
        let (batch, _) = tx.finish();
        self.table.apply(batch);
        outcome.effects.into_iter().flat_map(|effect| self.step(Input::Effect(effect))).collect()
    }

    fn begin(&mut self, op: pb::begin_transaction::Op) -> Vec<Output> {
        let shard = u32::from(CHOSEN.0);
        self.log(Command::Begin(pb::BeginTransaction { op: Some(op), shard, session: 0, sequence: 0 }))
    }

    fn answer(&mut self, tag: u64, result: pb::write_result::Result) -> Vec<Output> {
        let received = Received::Answer(pb::WriteResult { result: Some(result), time: 77 });
        self.step(Input::Write { tag, received })
    }

    fn refuse(&mut self, tag: u64, error: ShardError) -> Vec<Output> {
        self.answer(tag, pb::write_result::Result::Error(error.bare()))
    }

    /// On to the next deadline.
    fn tick(&mut self) -> Vec<Output> {
        self.now = self.driver.next_deadline().expect("something is due").max(self.now);
        self.step(Input::Tick)
    }

    fn recover(&mut self) -> Vec<Output> {
        self.now = self.now.next();
        self.log(Driver::take_over().command.unwrap());
        let (driver, outputs) = Driver::recover(&self.table, self.now).unwrap();
        self.driver = driver;
        outputs
    }
}

fn mkdir(name: &'static [u8]) -> pb::begin_transaction::Op {
    let name = Bytes::from_static(name);
    pb::begin_transaction::Op::Mkdir(pb::Mkdir { parent: PARENT.0, name, attributes: None })
}

fn move_directory(target: InodeId) -> pb::begin_transaction::Op {
    pb::begin_transaction::Op::Move(pb::Move {
        old_directory: PARENT.0,
        old_name: Bytes::copy_from_slice(format!("old{}", target.0).as_bytes()),
        target: target.0,
        new_directory: directory(2, 1).0,
        new_name: Bytes::copy_from_slice(format!("new{}", target.0).as_bytes()),
        replace: 0,
    })
}

fn link(inode: InodeId) -> pb::write_result::Result {
    pb::write_result::Result::Link(pb::LinkReply { inode: inode.0, replaced: 0, created_at: 55 })
}

fn done() -> pb::write_result::Result {
    pb::write_result::Result::Done(pb::Done {})
}

/// The one write among the outputs.
fn write(outputs: &[Output]) -> (ShardId, &Op, u64) {
    let writes: Vec<_> = outputs
        .iter()
        .filter_map(|output| match output {
            Output::SendWrite { shard, op, tag } => Some((*shard, op.op.as_ref().unwrap(), *tag)),
            _ => None,
        })
        .collect();
    assert_eq!(writes.len(), 1, "{outputs:?}");
    writes[0]
}

fn error_of(outputs: &[Output]) -> Option<CrossdirError> {
    outputs.iter().find_map(|output| match output {
        Output::Answer { reply, .. } => match reply.result.as_ref()? {
            pb::crossdir_reply::Result::Error(error) => CrossdirError::from_code(error.code),
            _ => None,
        },
        _ => None,
    })
}

fn proposal(outputs: &[Output]) -> Command {
    let proposals: Vec<_> = outputs
        .iter()
        .filter_map(|output| match output {
            Output::Propose(command) => command.command.clone(),
            _ => None,
        })
        .collect();
    assert_eq!(proposals.len(), 1, "{outputs:?}");
    proposals.into_iter().next().unwrap()
}

#[test]
fn mkdir_from_beginning_to_end() {
    let mut rig = Rig::new();
    let out = rig.begin(mkdir(b"n"));
    let (shard, op, tag) = write(&out);
    assert_eq!(shard, CHOSEN);
    assert!(matches!(op, Op::CreateDirectory(op) if op.transaction == 1 && op.owner == PARENT.0));
    let made = directory(CHOSEN.0, 4);
    let out = rig.answer(tag, link(made));
    let (shard, op, tag) = write(&out);
    assert_eq!(shard, PARENT.shard());
    assert!(matches!(op, Op::LinkEdge(op) if op.target == made.0 && op.name == b"n"[..]));
    let out = rig.answer(tag, link(made));
    let reply = pb::MkdirReply { inode: made.0, created_at: 55 };
    let reply = pb::CrossdirReply { header: None, result: Some(pb::crossdir_reply::Result::Mkdir(reply)) };
    assert_eq!(out, [Output::Answer { transaction: TransactionId(1), reply: reply.clone() }]);
    assert_eq!(rig.driver.reply(TransactionId(1)), Some(&reply));
    // The end: recorded, forgotten, retired.
    let finish = proposal(&rig.tick());
    assert!(matches!(&finish, Command::Finish(finish) if finish.transactions[0].reply == Some(reply)));
    assert_eq!(rig.log(finish), [], "XD-3: only now may the shards forget, and they can wait");
    let out = rig.tick();
    let tags: Vec<u64> = out
        .iter()
        .map(|output| match output {
            Output::SendWrite { op, tag, .. } => {
                let expected = pb::ForgetTransactions { transactions: vec![1], floor: 2 };
                assert_eq!(op.op, Some(Op::ForgetTransactions(expected)));
                *tag
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(tags.len(), 2);
    assert_eq!(rig.answer(tags[0], done()), []);
    rig.refuse(tags[1], ShardError::Internal);
    let again = rig.tick();
    assert_eq!(write(&again).2, tags[1], "XD-4: it has not acknowledged");
    assert_eq!(rig.answer(tags[1], done()), []);
    let retire = proposal(&rig.tick());
    assert_eq!(retire, Command::Retire(pb::RetireTransactions { transactions: vec![1] }));
    assert_eq!(rig.log(retire), []);
    assert!(rig.driver.is_idle() && rig.driver.locks.is_empty() && rig.driver.tags.is_empty());
    assert_eq!(rig.driver.next_deadline(), None, "an idle driver costs nothing");
}

#[test]
fn a_refused_mkdir_is_answered_before_it_is_cleaned_up() {
    let mut rig = Rig::new();
    let tag = write(&rig.begin(mkdir(b"n"))).2;
    let made = directory(CHOSEN.0, 4);
    let tag = write(&rig.answer(tag, link(made))).2;
    let out = rig.refuse(tag, ShardError::Exists);
    assert_eq!(error_of(&out), Some(CrossdirError::Exists));
    let (shard, op, tag) = write(&out);
    assert_eq!(shard, CHOSEN);
    assert!(matches!(op, Op::DiscardDirectory(op) if op.directory == made.0));
    assert_eq!(rig.answer(tag, done()), [], "XD-9: once");
    proposal(&rig.tick());
}

#[test]
fn what_is_uncertain_is_repeated_with_growing_pauses() {
    let mut rig = Rig::new();
    let out = rig.begin(mkdir(b"n"));
    let (_, op, tag) = write(&out);
    let troubles = [
        Received::Lost("connection reset".to_owned()),
        Received::Refused(ShardError::NotLeader.bare()),
        Received::Refused(ShardError::Internal.bare()),
        Received::Answer(pb::WriteResult {
            result: Some(pb::write_result::Result::Error(ShardError::StaleSession.bare())),
            time: 1,
        }),
        Received::Answer(pb::WriteResult::default()),
    ];
    let mut pause = BACKOFF_MIN;
    for trouble in troubles {
        assert_eq!(rig.step(Input::Write { tag, received: trouble.clone() }), [], "{trouble:?}");
        assert_eq!(rig.step(Input::Write { tag, received: trouble.clone() }), [], "doubled");
        assert_eq!(rig.driver.next_deadline(), Some(rig.now.saturating_add(pause)), "{trouble:?}");
        let again = rig.tick();
        let (shard, same_op, same_tag) = write(&again);
        assert_eq!((shard, same_op, same_tag), (CHOSEN, op, tag), "the same step");
        pause *= 2;
    }
    for _ in 0..40 {
        rig.step(Input::Write { tag, received: Received::Lost(String::new()) });
        assert!(rig.driver.next_deadline().unwrap().since(rig.now) <= BACKOFF_MAX);
        rig.tick();
    }
    // No answer at all.
    assert_eq!(rig.driver.next_deadline(), Some(rig.now.saturating_add(STEP_TIMEOUT)));
    assert_eq!(write(&rig.tick()).2, tag);
    assert!(rig.driver.list(1)[0].step.contains("no answer"), "{:?}", rig.driver.list(1));
    // An answer to an early attempt is as good as any, also while waiting for the next.
    rig.step(Input::Write { tag, received: Received::Lost(String::new()) });
    let out = rig.answer(tag, link(directory(CHOSEN.0, 4)));
    let next = write(&out).2;
    assert_eq!(rig.answer(tag, link(directory(CHOSEN.0, 5))), [], "a late double of an earlier step");
    assert_eq!(rig.refuse(tag, ShardError::Exists), []);
    assert_ne!(next, tag);
}

#[test]
fn a_locked_edge_is_an_answer_for_the_caller_to_ask_again() {
    let mut rig = Rig::new();
    let tag = write(&rig.begin(move_file())).2;
    let out = rig.refuse(tag, ShardError::Locked);
    assert_eq!(error_of(&out), Some(CrossdirError::Busy));
}

fn move_file() -> pb::begin_transaction::Op {
    let target = InodeId::new(InodeType::File, ShardId(1), 1).0;
    match move_directory(directory(3, 1)) {
        pb::begin_transaction::Op::Move(op) => pb::begin_transaction::Op::Move(pb::Move { target, ..op }),
        other => other,
    }
}

#[test]
fn a_refused_move_unlocks_the_old_name_before_it_is_answered() {
    let mut rig = Rig::new();
    let tag = write(&rig.begin(move_file())).2;
    let tag = write(&rig.answer(tag, done())).2;
    let out = rig.refuse(tag, ShardError::NotFound);
    assert_eq!(out.len(), 1, "XD-9: the caller would meet the lock");
    let (_, op, tag) = write(&out);
    assert!(matches!(op, Op::UnlockEdge(_)), "{op:?}");
    let out = rig.answer(tag, done());
    assert_eq!(error_of(&out), Some(CrossdirError::NotFound));
}

/// Through the check and the steps of a directory move; the outputs of its last answer.
/// Answers the reads of a move to `directory(2, 1)`, whose ancestors are these and then the root.
fn read(rig: &mut Rig, out: Vec<Output>, ancestors: &[InodeId]) -> Vec<Output> {
    let mut out = out;
    let mut above = ancestors[1..].iter().copied().chain([PARENT]);
    for &ancestor in ancestors {
        let Some(&Output::SendStat { inode, tag }) = out.last() else { panic!("{out:?}") };
        assert_eq!(inode, ancestor);
        let attributes = pb::Attributes { parent: above.next().map(|inode| inode.0), ..Default::default() };
        let received = Received::Answer(pb::StatReply { attributes: Some(attributes) });
        out = rig.step(Input::Stat { tag, received });
    }
    out
}

/// A move that has read its ancestors, to its end.
fn carry_through(rig: &mut Rig, out: &[Output], target: InodeId) -> Vec<Output> {
    let mut tag = write(&rig.log(proposal(out))).2;
    let mut out = Vec::new();
    let mut answers = Vec::new();
    for result in [done(), link(target), done(), done()] {
        out = rig.answer(tag, result);
        answers.push(out.iter().any(|output| matches!(output, Output::Answer { .. })));
        let next = out.iter().find_map(|output| match output {
            Output::SendWrite { tag, .. } => Some(*tag),
            _ => None,
        });
        tag = next.unwrap_or(tag);
    }
    assert_eq!(answers, [false, false, true, false], "before the old name is unlinked");
    out
}

#[test]
fn what_has_become_of_a_move_is_known() {
    let mut rig = Rig::new();
    let tag = write(&rig.begin(move_file())).2;
    let state = |rig: &Rig| rig.driver.resolve(TransactionId(1));
    assert_eq!(state(&rig), MoveState::NotMade);
    assert_eq!(rig.driver.resolve(TransactionId(2)), MoveState::Over);
    rig.answer(tag, done());
    assert_eq!(state(&rig), MoveState::Undecided, "the deciding step is on its way");
    // Another driver does not know how far this one came.
    let out = rig.recover();
    assert_eq!(state(&rig), MoveState::Undecided);
    let tag = write(&rig.answer(write(&out).2, done())).2;
    assert_eq!(state(&rig), MoveState::Undecided);
    let target = InodeId::new(InodeType::File, ShardId(1), 1);
    let out = rig.answer(tag, link(target));
    assert!(matches!(out[..], [Output::Answer { .. }, Output::SendWrite { .. }]), "{out:?}");
    let MoveState::Made(moved_at) = state(&rig) else { panic!("{:?}", state(&rig)) };
    let (_, op, tag) = write(&out[1..]);
    assert!(matches!(op, Op::UnlinkEdge(op) if op.died_at == moved_at.0), "{op:?}");
    let finish = proposal(&{
        rig.answer(tag, done());
        rig.tick()
    });
    rig.log(finish);
    assert_eq!(state(&rig), MoveState::Over);
}

const TO: u64 = 1;

#[test]
fn moves_that_are_not_in_each_others_way_run_at_once() {
    let mut rig = Rig::new();
    let (first, second) = (directory(3, 1), directory(4, 1));
    let one = rig.begin(move_directory(first));
    let other = rig.begin(move_directory(second));
    let one = read(&mut rig, one, &[directory(2, TO), directory(5, 5)]);
    let other = read(&mut rig, other, &[directory(2, TO), directory(5, 5)]);
    carry_through(&mut rig, &other, second);
    carry_through(&mut rig, &one, first);
}

#[test]
fn a_move_waits_for_one_of_its_ancestors_and_reads_again() {
    let mut rig = Rig::new();
    let (first, second, third) = (directory(3, 1), directory(4, 1), directory(6, 1));
    let one = rig.begin(move_directory(first));
    let other = rig.begin(move_directory(second));
    let late = rig.begin(move_directory(third));
    let one = read(&mut rig, one, &[directory(2, TO)]);
    // The first is about to go elsewhere; and it would be a loop, if it stayed so.
    assert_eq!(read(&mut rig, other, &[directory(2, TO), first, third]), []);
    assert!(rig.driver.list(9)[1].step.contains("waiting for moves"), "{:?}", rig.driver.list(9));
    assert_eq!(read(&mut rig, late, &[directory(2, TO)]), [], "it would change what the second relies on");
    let tag = write(&rig.log(proposal(&one))).2;
    // The first ends by a refusal, and the second reads anew.
    let out = rig.refuse(tag, ShardError::NotFound);
    assert!(matches!(out[..], [Output::Answer { .. }, Output::SendStat { .. }]), "{out:?}");
    let out = read(&mut rig, out, &[directory(2, TO)]);
    let out = carry_through(&mut rig, &out, second);
    let out = read(&mut rig, out, &[directory(2, TO)]);
    carry_through(&mut rig, &out, third);
    assert_eq!(rig.driver.moves.waiting(), 0);
}

#[test]
fn what_changed_while_it_was_read_is_read_again() {
    let mut rig = Rig::new();
    let (first, second) = (directory(3, 1), directory(4, 1));
    let one = rig.begin(move_directory(first));
    let other = rig.begin(move_directory(second));
    let one = read(&mut rig, one, &[directory(2, TO)]);
    carry_through(&mut rig, &one, first);
    let again = read(&mut rig, other, &[directory(2, TO), first]);
    assert!(matches!(again[..], [Output::SendStat { .. }]), "{again:?}");
    let out = read(&mut rig, again, &[directory(2, TO), first]);
    carry_through(&mut rig, &out, second);
}

#[test]
fn a_loop_is_answered_once_it_is_recorded() {
    let mut rig = Rig::new();
    let target = directory(3, 1);
    let out = rig.begin(move_directory(target));
    let attributes = pb::Attributes { parent: Some(target.0), ..Default::default() };
    let Some(&Output::SendStat { tag, .. }) = out.last() else { panic!("{out:?}") };
    let received = Received::Answer(pb::StatReply { attributes: Some(attributes) });
    assert_eq!(rig.step(Input::Stat { tag, received }), []);
    assert_eq!(rig.driver.reply(TransactionId(1)), None);
    let finish = proposal(&rig.tick());
    let out = rig.log(finish);
    assert_eq!(error_of(&out), Some(CrossdirError::Loop), "XD-8");
    assert!(rig.driver.reply(TransactionId(1)).is_some());
}

#[test]
fn what_was_cleared_goes_on_without_reading_and_before_what_was_not() {
    let mut rig = Rig::new();
    let (first, second) = (directory(3, 1), directory(4, 1));
    let one = rig.begin(move_directory(first));
    let other = rig.begin(move_directory(second));
    let other = read(&mut rig, other, &[directory(2, TO)]);
    let late = proposal(&read(&mut rig, one, &[directory(2, TO)]));
    rig.log(proposal(&other));
    let out = rig.recover();
    assert!(matches!(&out[..], [Output::SendWrite { .. }, Output::SendStat { .. }]), "XD-5: {out:?}");
    let (_, op, _) = write(&out[..1]);
    assert!(matches!(op, Op::LockEdge(op) if op.transaction == 2), "{op:?}");
    assert_eq!(rig.driver.resolve(TransactionId(2)), MoveState::Undecided);
    assert_eq!(rig.driver.resolve(TransactionId(1)), MoveState::NotMade, "no shard has heard of it");
    assert_eq!(rig.log(late), [], "XD-8: an earlier driver's");
    let answer = pb::FinishedTransaction { transaction: 1, reply: Some(pb::CrossdirReply::default()) };
    let late = pb::FinishTransactions { transactions: vec![answer], driver: rig.driver.id - 1 };
    assert_eq!(rig.log(Command::Finish(late)), [], "XD-8: so is this");
    assert_eq!(crate::unfinished(&rig.table).unwrap().len(), 2);
    assert!(matches!(rig.log(Driver::take_over().command.unwrap())[..], [Output::Replaced]));
}

#[test]
fn clearances_that_are_lost_are_proposed_again() {
    let mut rig = Rig::new();
    let out = rig.begin(move_directory(directory(3, 1)));
    let out = read(&mut rig, out, &[directory(2, TO)]);
    let first = proposal(&out);
    rig.now = rig.now.saturating_add(RECORD_TIMEOUT);
    let second = proposal(&rig.step(Input::Tick));
    assert_eq!(first, second);
    assert_eq!(rig.log(first).len(), 1);
    assert_eq!(rig.log(second), [], "both came through after all");
}

#[test]
fn lost_proposals_are_made_again() {
    let mut rig = Rig::new();
    let tag = write(&rig.begin(mkdir(b"n"))).2;
    rig.refuse(tag, ShardError::NotFound);
    let first = proposal(&rig.tick());
    rig.now = rig.now.saturating_add(RECORD_TIMEOUT);
    assert_eq!(rig.step(Input::Tick), []);
    let second = proposal(&rig.tick());
    assert_eq!(first, second);
    rig.log(first);
    assert_eq!(rig.log(second), [], "both came through after all");
    let out = rig.tick();
    assert_eq!(out.len(), 2, "each shard is told once: {out:?}");
}

#[test]
fn a_new_driver_takes_up_what_is_unfinished_in_order_and_ignores_old_news() {
    let mut rig = Rig::new();
    let effect = Effect::Begun {
        transaction: TransactionId(1),
        begin: pb::BeginTransaction { op: Some(mkdir(b"n")), ..Default::default() },
        started_at: START,
    };
    let old = write(&rig.begin(mkdir(b"n"))).2;
    assert_eq!(rig.begin(mkdir(b"n")), []);
    rig.begin(mkdir(b"m"));
    let out = rig.recover();
    let transactions: Vec<u64> = out
        .iter()
        .map(|output| match output {
            Output::SendWrite { op: pb::WriteOp { op: Some(Op::CreateDirectory(op)) }, .. } => op.transaction,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(transactions, [1, 3], "XD-5: 2 waits for 1");
    assert_eq!(rig.step(Input::Effect(effect)), [], "it came with the view");
    assert_eq!(rig.answer(old, done()), [], "an answer to the driver before");
    assert_eq!(rig.driver.unfinished(), 3);
}

#[test]
fn ends_wait_for_a_batch_and_a_batch_does_not_wait_when_full() {
    let mut rig = Rig::new();
    let mut tags = Vec::new();
    for n in 0..=RECORD_BATCH {
        let name = Bytes::copy_from_slice(format!("n{n}").as_bytes());
        let op = pb::Mkdir { parent: PARENT.0, name, attributes: None };
        tags.push(write(&rig.begin(pb::begin_transaction::Op::Mkdir(op))).2);
    }
    let mut proposals = Vec::new();
    for tag in tags {
        let out = rig.refuse(tag, ShardError::NotFound);
        proposals.extend(out.into_iter().filter(|output| matches!(output, Output::Propose(_))));
    }
    let Command::Finish(finish) = proposal(&proposals) else { panic!("{proposals:?}") };
    assert_eq!(finish.transactions.len(), RECORD_BATCH);
    assert_eq!(rig.driver.next_deadline(), Some(rig.now.saturating_add(RECORD_DELAY)));
}

#[test]
fn what_finished_above_a_stuck_transaction_is_forgotten_when_nothing_of_it_can_be_late() {
    let mut rig = Rig::new();
    rig.begin(mkdir(b"stuck"));
    let tag = write(&rig.begin(mkdir(b"n"))).2;
    rig.refuse(tag, ShardError::NotFound);
    let finish = proposal(&rig.tick());
    rig.log(finish);
    let finished_at = rig.now;
    let mut forgets = 0;
    while forgets == 0 {
        let out = rig.tick();
        forgets = out
            .iter()
            .filter(|output| match output {
                Output::SendWrite { op: pb::WriteOp { op: Some(Op::ForgetTransactions(op)) }, .. } => {
                    assert_eq!((&op.transactions[..], op.floor), (&[2][..], 1));
                    true
                }
                _ => false,
            })
            .count();
    }
    assert!(rig.now.since(finished_at) > LATE_MAX, "XD-10");
    assert!(rig.now.since(finished_at) < LATE_MAX + FORGET_DELAY * 2);
}

#[test]
fn a_full_queue_is_busy_and_others_are_not() {
    let mut rig = Rig::new();
    let begin = |op| pb::BeginTransaction { op: Some(op), ..Default::default() };
    for _ in 0..=QUEUE_MAX {
        rig.driver.admit(&begin(mkdir(b"n"))).unwrap();
        rig.begin(mkdir(b"n"));
    }
    let refused = rig.driver.admit(&begin(mkdir(b"n"))).unwrap_err();
    assert_eq!(refused.code, CrossdirError::Busy.code());
    rig.driver.admit(&begin(mkdir(b"m"))).unwrap();
    assert_eq!(rig.driver.list(10).len(), 10, "a list is bounded");
}

#[test]
fn every_refusal_of_a_shard_is_repeated_or_means_something_to_the_caller() {
    for &error in ShardError::ALL {
        let mut rig = Rig::new();
        let tag = write(&rig.begin(mkdir(b"n"))).2;
        let out = rig.refuse(tag, error);
        assert_eq!(out.is_empty(), waits(error), "{error:?}: {out:?}");
    }
}
