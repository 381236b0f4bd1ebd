//! Carries transactions through: locks, steps, repetition, answers, and the batched end.
//!
//! Volatile and deterministic: `step(input, now) -> outputs`. Its shell
//! 1. logs [`Driver::take_over`] when its host comes to lead the coordinator's group, then makes it with
//!    [`Driver::recover`], and drops it when it leads no more;
//! 2. feeds it the machine's effects in the order they were applied (those applied before the view it
//!    was made from do no harm), the shards' answers by tag, and [`Input::Tick`] at
//!    [`Driver::next_deadline`];
//! 3. performs its outputs. Each may be lost: it is asked for again after a while.

mod clearing;
mod ending;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use eggs_machine::{Table, TableError};
use eggs_proto::{CrossdirError, InodeId, ServiceError, ShardError, ShardId, Time, TransactionId, pb};

use self::ending::{Ended, Forgetting};
use crate::locks::Locks;
use crate::machine::{self, Effect, Pending};
use crate::moves::Moves;
use crate::transaction::{Moved, Next, Outcome, Request, Steps, steps_of, waits};

/// Transactions waiting for one lock; more are told Busy, so that one stuck directory does not
/// fill the coordinator.
pub const QUEUE_MAX: usize = 1024;
/// Moves of directories waiting for others; each that ends looks at all of them.
pub const WAITING_MOVES_MAX: usize = 128;
/// Unfinished transactions in all.
pub const RUNNING_MAX: usize = 16_384;
/// Finished transactions the shards have not forgotten yet: a minute of a fast stream while one
/// stuck transaction holds up the floor.
pub const ENDED_MAX: usize = 262_144;
/// Ends in one log entry.
pub const RECORD_BATCH: usize = 128;
/// How long the first end of a batch waits for more.
pub const RECORD_DELAY: Duration = Duration::from_millis(5);
/// A proposal not applied by then is made again.
pub const RECORD_TIMEOUT: Duration = Duration::from_secs(2);
/// A step not answered by then is sent again.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// First pause before a step is repeated; it doubles …
pub const BACKOFF_MIN: Duration = Duration::from_millis(5);
/// … up to this.
pub const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// What came back for a request, by its tag.
#[derive(Debug, Clone, PartialEq)]
pub enum Received<R> {
    /// The shard's machine answered (a refusal in a write result is such an answer).
    Answer(R),
    /// The shard's host refused the request as a whole: nothing is known of the step.
    Refused(pb::Error),
    /// No answer: not connected, deadline passed.
    Lost(String),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The machine applied an entry.
    Effect(Effect),
    /// Answers [`Output::SendWrite`]; the result of its one operation.
    Write { tag: u64, received: Received<pb::WriteResult> },
    /// Answers [`Output::SendStat`]; there a refusal may be an answer (NotFound).
    Stat { tag: u64, received: Received<pb::StatReply> },
    /// Time has passed.
    Tick,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// One operation for a shard; several to one shard may share a request.
    SendWrite {
        shard: ShardId,
        op: pb::WriteOp,
        tag: u64,
    },
    SendStat {
        inode: InodeId,
        tag: u64,
    },
    /// Log it, without a session.
    Propose(pb::CrossdirCommand),
    /// To whoever waits for it; once per transaction and driver.
    Answer {
        transaction: TransactionId,
        reply: pb::CrossdirReply,
    },
    /// Another driver has taken over: this one is to be dropped, and one made anew if this host still leads.
    Replaced,
}

/// What has become of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveState {
    /// Nothing is locked by it any more, or ever was.
    Over,
    NotMade,
    /// Both names changed at this instant.
    Made(Time),
    /// It is at the step that decides, or may have been.
    Undecided,
    /// At this instant the name came to lead to this inode.
    Exchanged(Time, InodeId),
}

impl MoveState {
    /// `None`: not certain yet.
    pub fn reply(self) -> Option<pb::ResolveMoveReply> {
        let (outcome, moved_at, target) = match self {
            MoveState::Over => (pb::MoveOutcome::MoveOver, 0, 0),
            MoveState::NotMade => (pb::MoveOutcome::MoveNotMade, 0, 0),
            MoveState::Made(at) => (pb::MoveOutcome::MoveMade, at.0, 0),
            MoveState::Exchanged(at, target) => (pb::MoveOutcome::MoveExchanged, at.0, target.0),
            MoveState::Undecided => return None,
        };
        Some(pb::ResolveMoveReply { outcome: outcome.into(), moved_at, target })
    }
}

/// The volatile half of the coordinator.
#[derive(Debug)]
pub struct Driver {
    /// Its number.
    id: u64,
    locks: Locks,
    moves: Moves,
    /// Moves that may go on once that is recorded.
    to_clear: Vec<TransactionId>,
    /// Unfinished.
    running: BTreeMap<TransactionId, Running>,
    /// The newest transaction seen.
    newest: TransactionId,
    /// Who waits for the answer to a request.
    tags: BTreeMap<u64, Asked>,
    next_tag: u64,
    timers: BTreeSet<(Time, Timer)>,
    /// Over, but not recorded as finished yet.
    to_finish: VecDeque<TransactionId>,
    finish_at: Option<Time>,
    /// Finished, not retired.
    ended: BTreeMap<TransactionId, Ended>,
    forgetting: Forgetting,
    to_retire: VecDeque<TransactionId>,
    retire_at: Option<Time>,
}

#[derive(Debug)]
struct Running {
    steps: Box<dyn Steps + Send>,
    started_at: Time,
    shards: BTreeSet<ShardId>,
    answer: Option<pb::CrossdirReply>,
    /// To be answered once it is recorded.
    recorded_answer: Option<pb::CrossdirReply>,
    /// A move of a directory that may go on.
    cleared: bool,
    phase: Phase,
    /// Begun by an earlier driver, which may have come to the shards.
    recovered: bool,
}

#[derive(Debug)]
enum Phase {
    /// For its locks.
    Queued,
    Asking(Asking),
    /// For moves that are in its way.
    InTheWay,
    /// That it may go on is to be recorded; since the proposal was made, if it was.
    Clearing {
        proposed_at: Option<Time>,
    },
    /// Over; waits to be recorded since the proposal was made, if it was.
    Over {
        proposed_at: Option<Time>,
    },
}

/// A request on its way, or waiting to be sent again.
#[derive(Debug)]
struct Asking {
    request: Request,
    tag: u64,
    attempts: u32,
    /// Sent, not known to have failed.
    sent: bool,
    timer: Time,
    /// Why the last attempt failed.
    trouble: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Transaction(TransactionId),
    Forgetting(ShardId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Step(TransactionId),
    ClearProposal(TransactionId),
    Finish,
    FinishProposal(TransactionId),
    Forgettable,
    Forget(ShardId),
    Retire,
    RetireProposal(TransactionId),
}

/// The pause before attempt `attempts + 1`.
fn backoff(attempts: u32) -> Duration {
    BACKOFF_MIN.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(BACKOFF_MAX)
}

impl Driver {
    /// What is to be logged, without a session, before a driver is made: from then on nothing an earlier driver has decided
    /// is recorded any more (XD-8). The answer to it says the driver's number; one that comes to another
    /// ([`Driver::number`]) is not to be used: somebody has taken over since.
    pub fn take_over() -> pb::CrossdirCommand {
        pb::CrossdirCommand { command: Some(pb::crossdir_command::Command::TakeOver(pb::TakeOver {})) }
    }

    /// A driver for what `view` says is not over, and the requests it begins with. `now` must be later
    /// than any instant an earlier driver of this host was made at (tags begin there, so that answers
    /// to an earlier driver are not taken for answers to this one).
    ///
    /// # Errors
    /// When the table fails or holds what is no row.
    pub fn recover<T: Table + ?Sized>(view: &T, now: Time) -> Result<(Driver, Vec<Output>), TableError> {
        let meta = crate::schema::meta(view)?;
        let mut driver = Driver {
            id: meta.driver,
            locks: Locks::default(),
            moves: Moves::default(),
            to_clear: Vec::new(),
            running: BTreeMap::new(),
            newest: TransactionId(meta.next_transaction - 1),
            tags: BTreeMap::new(),
            next_tag: now.0,
            timers: BTreeSet::new(),
            to_finish: VecDeque::new(),
            finish_at: None,
            ended: BTreeMap::new(),
            forgetting: Forgetting::default(),
            to_retire: VecDeque::new(),
            retire_at: None,
        };
        let mut out = Vec::new();
        let mut unfinished = machine::unfinished(view)?;
        unfinished.sort_by_key(|pending| (!pending.cleared, pending.transaction));
        for pending in unfinished {
            driver.begin(pending, true, now, &mut out);
        }
        driver.propose_clear(now, &mut out);
        for (transaction, (pending, reply)) in machine::finished_not_retired(view)? {
            let steps = steps_of(transaction, &pending.begin);
            let shards = steps.as_ref().map(|steps| steps.shards()).unwrap_or_default();
            let kind = steps.map_or("unknown", |steps| steps.kind());
            driver.end(transaction, Ended::new(kind, pending.started_at, shards, reply), now);
        }
        driver.forget_what_is_safe(now, &mut out);
        Ok((driver, out))
    }

    /// Whether one more like `begin` may be logged; asked before it is.
    ///
    /// # Errors
    /// Busy: too many wait for the same, or are on their way in all.
    pub fn admit(&self, begin: &pb::BeginTransaction) -> Result<(), pb::Error> {
        if self.running.len() >= RUNNING_MAX || self.ended.len() >= ENDED_MAX {
            return Err(CrossdirError::Busy.with("too many directory operations are on their way"));
        }
        let steps = steps_of(TransactionId(0), begin).ok_or_else(|| CrossdirError::Malformed.bare())?;
        let crowded = !steps.owned().is_empty() && self.moves.waiting() >= WAITING_MOVES_MAX;
        if crowded || self.locks.longest_queue(&steps.locks()) >= QUEUE_MAX {
            return Err(CrossdirError::Busy.with("too many operations wait for the same directory"));
        }
        Ok(())
    }

    pub fn step(&mut self, input: Input, now: Time) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Effect(Effect::Begun { transaction, begin, started_at }) => {
                // Older ones came with the view this driver was made from.
                if transaction > self.newest {
                    self.newest = transaction;
                    self.begin(
                        Pending { transaction, begin, started_at, cleared: false },
                        false,
                        now,
                        &mut out,
                    );
                }
            }
            Input::Effect(Effect::Finished(finished)) => self.finished(&finished, now, &mut out),
            Input::Effect(Effect::Retired(retired)) => self.retired(&retired),
            Input::Effect(Effect::Cleared(cleared)) => self.cleared(&cleared, now, &mut out),
            Input::Effect(Effect::TakenOver(driver)) if driver > self.id => out.push(Output::Replaced),
            Input::Effect(Effect::TakenOver(_)) => {}
            Input::Write { tag, received } => self.on_write(tag, received, now, &mut out),
            Input::Stat { tag, received } => self.on_stat(tag, received, now, &mut out),
            Input::Tick => {}
        }
        self.run_timers(now, &mut out);
        self.propose_clear(now, &mut out);
        out
    }

    pub fn number(&self) -> u64 {
        self.id
    }

    /// When [`Input::Tick`] is due.
    pub fn next_deadline(&self) -> Option<Time> {
        self.timers.first().map(|&(at, _)| at)
    }

    /// The answer to a transaction, when it is certain; kept until it is retired.
    pub fn reply(&self, transaction: TransactionId) -> Option<&pb::CrossdirReply> {
        match self.running.get(&transaction) {
            Some(running) => running.answer.as_ref(),
            None => self.ended.get(&transaction).map(Ended::reply),
        }
    }

    /// Not finished yet: its answer is still to come, or to be recorded.
    pub fn is_running(&self, transaction: TransactionId) -> bool {
        self.running.contains_key(&transaction)
    }

    /// What has become of a move, for one who has found an edge locked by it; right as of a moment at which the caller knows
    /// that this is the only driver.
    pub fn resolve(&self, transaction: TransactionId) -> MoveState {
        let Some(running) = self.running.get(&transaction) else { return MoveState::Over };
        let over = matches!(running.phase, Phase::Over { .. });
        match running.steps.moved() {
            Moved::At(at) => MoveState::Made(at),
            Moved::Exchanged(at, target) => MoveState::Exchanged(at, target),
            Moved::Perhaps => MoveState::Undecided,
            Moved::NotYet | Moved::Never if over => MoveState::Over,
            Moved::NotYet if running.recovered => MoveState::Undecided,
            Moved::NotYet | Moved::Never => MoveState::NotMade,
        }
    }

    /// Transactions not finished.
    pub fn unfinished(&self) -> usize {
        self.running.len()
    }

    /// Nothing is left to do: everything is retired.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.ended.is_empty()
    }

    /// At most `limit` transactions, oldest first, unfinished ones before those that wait to be forgotten.
    pub fn list(&self, limit: usize) -> Vec<pb::TransactionInfo> {
        let running = self.running.iter().map(|(&transaction, running)| pb::TransactionInfo {
            transaction: transaction.0,
            kind: running.steps.kind().to_owned(),
            started_at: running.started_at.0,
            step: running.describe(),
            finished: false,
        });
        let ended = self.ended.iter().map(|(&transaction, ended)| ended.info(transaction));
        running.chain(ended).take(limit).collect()
    }

    // ---- beginning and steps ----

    fn begin(&mut self, pending: Pending, recovered: bool, now: Time, out: &mut Vec<Output>) {
        let Pending { transaction, begin, started_at, cleared } = pending;
        let Some(steps) = steps_of(transaction, &begin) else { return };
        let (locks, shards) = (steps.locks(), steps.shards());
        let owned = steps.owned();
        let running = Running {
            steps,
            started_at,
            shards,
            answer: None,
            recorded_answer: None,
            cleared,
            phase: Phase::Queued,
            // Nothing of a move comes to the shards before it is cleared.
            recovered: recovered && (owned.is_empty() || cleared),
        };
        if cleared && !owned.is_empty() {
            self.moves.restore(transaction, owned);
        }
        self.running.insert(transaction, running);
        if self.locks.acquire(transaction, locks) {
            self.start(transaction, now, out);
        }
    }

    fn start(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        debug_assert!(self.locks.holds(transaction), "XD-6");
        let Some(running) = self.running.get_mut(&transaction) else { return };
        match running.cleared.then(|| running.steps.clear()).flatten() {
            Some(request) => self.ask(transaction, request, now, out),
            None => self.begin_steps(transaction, now, out),
        }
    }

    fn begin_steps(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        let Some(running) = self.running.get_mut(&transaction) else { return };
        if !running.steps.owned().is_empty() {
            self.moves.read(transaction);
        }
        let request = running.steps.first();
        self.ask(transaction, request, now, out);
    }

    fn ask(&mut self, transaction: TransactionId, request: Request, now: Time, out: &mut Vec<Output>) {
        let tag = self.tag(Asked::Transaction(transaction));
        let timer = now.saturating_add(STEP_TIMEOUT);
        out.push(send(&request, tag));
        self.timers.insert((timer, Timer::Step(transaction)));
        if let Some(running) = self.running.get_mut(&transaction) {
            let trouble = String::new();
            running.phase = Phase::Asking(Asking { request, tag, attempts: 1, sent: true, timer, trouble });
        }
    }

    fn tag(&mut self, asked: Asked) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.tags.insert(tag, asked);
        tag
    }

    fn on_write(&mut self, tag: u64, received: Received<pb::WriteResult>, now: Time, out: &mut Vec<Output>) {
        let Some(&asked) = self.tags.get(&tag) else { return };
        let outcome = match received {
            Received::Answer(result) => write_outcome(result),
            Received::Refused(error) => Err(error.message),
            Received::Lost(trouble) => Err(trouble),
        };
        match asked {
            Asked::Transaction(transaction) => self.on_outcome(transaction, tag, outcome, now, out),
            Asked::Forgetting(shard) => self.on_forgotten(shard, tag, outcome, now, out),
        }
    }

    fn on_stat(&mut self, tag: u64, received: Received<pb::StatReply>, now: Time, out: &mut Vec<Output>) {
        let Some(&Asked::Transaction(transaction)) = self.tags.get(&tag) else { return };
        let outcome = match received {
            Received::Answer(pb::StatReply { attributes: Some(attributes) }) => {
                Ok(Outcome::Attributes(attributes))
            }
            Received::Answer(_) => Err("a reply without attributes".to_owned()),
            Received::Refused(error) => match ShardError::from_code(error.code) {
                Some(code @ (ShardError::NotFound | ShardError::NotDirectory)) => {
                    Ok(Outcome::Refused(code, error.message))
                }
                _ => Err(error.message),
            },
            Received::Lost(trouble) => Err(trouble),
        };
        self.on_outcome(transaction, tag, outcome, now, out);
    }

    /// `outcome` `Err`: nothing is known of the step, because of that.
    fn on_outcome(
        &mut self,
        transaction: TransactionId,
        tag: u64,
        outcome: Result<Outcome, String>,
        now: Time,
        out: &mut Vec<Output>,
    ) {
        let Some(running) = self.running.get_mut(&transaction) else { return };
        let Phase::Asking(asking) = &mut running.phase else { return };
        // A late answer to an earlier step has another tag; to an earlier attempt, the same.
        if asking.tag != tag {
            return;
        }
        match outcome {
            Ok(outcome) => {
                self.timers.remove(&(asking.timer, Timer::Step(transaction)));
                self.tags.remove(&tag);
                let next = running.steps.next(outcome);
                self.go_on(transaction, next, now, out);
            }
            Err(trouble) if asking.sent => {
                asking.sent = false;
                asking.trouble = trouble;
                self.timers.remove(&(asking.timer, Timer::Step(transaction)));
                asking.timer = now.saturating_add(backoff(asking.attempts));
                self.timers.insert((asking.timer, Timer::Step(transaction)));
            }
            // An earlier attempt; the next one is due already.
            Err(_) => {}
        }
    }

    fn go_on(&mut self, transaction: TransactionId, next: Next, now: Time, out: &mut Vec<Output>) {
        match next {
            Next::Step(request) => self.ask(transaction, request, now, out),
            Next::AnswerThen(reply, request) => {
                self.answer(transaction, reply, out);
                self.ask(transaction, request, now, out);
            }
            Next::Finish(reply) => {
                self.answer(transaction, reply, out);
                self.over(transaction, now, out);
            }
            Next::Clear(claim, reply) => self.clear(transaction, claim, reply, now, out),
        }
    }

    /// XD-9: once.
    fn answer(&mut self, transaction: TransactionId, reply: pb::CrossdirReply, out: &mut Vec<Output>) {
        if let Some(running) = self.running.get_mut(&transaction)
            && running.answer.is_none()
        {
            running.answer = Some(reply.clone());
            out.push(Output::Answer { transaction, reply });
        }
    }

    /// All steps are done: its end is to be recorded, and its locks go to the next.
    fn over(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        let Some(running) = self.running.get_mut(&transaction) else { return };
        running.phase = Phase::Over { proposed_at: None };
        self.to_finish.push_back(transaction);
        self.collect_finish(now, out);
        self.release(transaction, now, out);
    }

    fn release(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        self.move_over(transaction, now, out);
        for next in self.locks.release(transaction) {
            self.start(next, now, out);
        }
    }

    // ---- timers ----

    fn run_timers(&mut self, now: Time, out: &mut Vec<Output>) {
        while let Some(&(at, timer)) = self.timers.first() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Step(transaction) => self.ask_again(transaction, now, out),
                Timer::ClearProposal(transaction) => self.clear_again(transaction, at),
                Timer::Finish => self.flush_finish(now, out),
                Timer::FinishProposal(transaction) => self.finish_again(transaction, at, now, out),
                Timer::Forgettable => self.forget_what_is_safe(now, out),
                Timer::Forget(shard) => self.forget_timer(shard, now, out),
                Timer::Retire => self.flush_retire(now, out),
                Timer::RetireProposal(transaction) => self.retire_again(transaction, at, now, out),
            }
        }
    }

    /// Same tag: the shard's first answer to the step is the answer to all attempts (XD-1).
    fn ask_again(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        let Some(running) = self.running.get_mut(&transaction) else { return };
        let Phase::Asking(asking) = &mut running.phase else { return };
        if asking.sent {
            asking.trouble = "no answer".to_owned();
        }
        asking.sent = true;
        asking.attempts = asking.attempts.saturating_add(1);
        asking.timer = now.saturating_add(STEP_TIMEOUT);
        self.timers.insert((asking.timer, Timer::Step(transaction)));
        out.push(send(&asking.request, asking.tag));
    }
}

impl Running {
    fn describe(&self) -> String {
        match &self.phase {
            Phase::Queued => "waiting for another operation on the same directory".to_owned(),
            Phase::InTheWay => "waiting for moves of directories above or below".to_owned(),
            Phase::Clearing { .. } => "recording that it may go on".to_owned(),
            Phase::Over { .. } => "recording the end".to_owned(),
            Phase::Asking(asking) => {
                let shard = match &asking.request {
                    Request::Write(shard, _) => *shard,
                    Request::Stat(inode) => inode.shard(),
                };
                let step = self.steps.step();
                if asking.trouble.is_empty() {
                    format!("{step} (shard {shard})")
                } else {
                    format!("{step} (shard {shard}, attempt {}: {})", asking.attempts, asking.trouble)
                }
            }
        }
    }
}

fn send(request: &Request, tag: u64) -> Output {
    match request {
        Request::Write(shard, op) => {
            Output::SendWrite { shard: *shard, op: pb::WriteOp { op: Some(op.clone()) }, tag }
        }
        Request::Stat(inode) => Output::SendStat { inode: *inode, tag },
    }
}

/// `Err`: no outcome, ask again.
fn write_outcome(result: pb::WriteResult) -> Result<Outcome, String> {
    use pb::write_result::Result as Wire;
    let time = Time(result.time);
    match result.result {
        Some(Wire::Done(_)) => Ok(Outcome::Done { time }),
        Some(Wire::Link(link)) => Ok(Outcome::Linked { link, time }),
        Some(Wire::Error(error)) => match ShardError::from_code(error.code) {
            Some(code) if waits(code) => Err(error.message),
            Some(code) => Ok(Outcome::Refused(code, error.message)),
            None => Ok(Outcome::Refused(
                ShardError::Internal,
                format!("error {} of the shard: {}", error.code, error.message),
            )),
        },
        Some(Wire::Eden(_)) | None => Err("a reply of another kind".to_owned()),
    }
}

#[cfg(test)]
mod tests;
