//! What the driver does: queues on base locks, reads, gives leave, sends the steps, recovers.

use crate::Protocol;
use crate::Weakness::{
    AnswerBeforeRecorded, ClaimOneOfTwo, ClaimWhenRecorded, ClearUnchecked, ClearedKeepTheirPlace,
    DropClaims, ForgetWhatWasOver, IgnoreReplaced, LateView, OvertakeWaiting, RefuseUnchecked,
    RefusedKeepNoLocks, StepBeforeRecorded, ViewBeforeTakeOver,
};
use crate::scenario::{Op, ROOT, TRANSACTIONS_MAX, Transaction};
use crate::state::{Driver, Job, Lost, Phase, Proposal, Reply, Set, Stage, State, Step, bit, has};

impl Protocol {
    // ---- queues ----

    pub(crate) fn join(&self, state: &mut State, transaction: Transaction, cleared: bool) {
        state.driver.queue.push(transaction as u8);
        state.driver.jobs[transaction].phase = Phase::Queued { cleared };
    }

    /// Each queue is strictly first come first served, so a transaction has all its locks when nothing
    /// that conflicts with it came before.
    fn has_locks(&self, state: &State, transaction: Transaction) -> bool {
        let queue = &state.driver.queue;
        let before = queue.iter().map(|&t| usize::from(t)).take_while(|&t| t != transaction);
        !before.into_iter().any(|other| self.scenario.conflict(other, transaction))
    }

    /// Starts whatever has its locks.
    pub(crate) fn start_what_can(&self, state: &mut State) {
        for transaction in state.driver.queue.clone().into_iter().map(usize::from) {
            let Phase::Queued { cleared } = state.driver.jobs[transaction].phase else { continue };
            if !self.has_locks(state, transaction) {
                continue;
            }
            match self.scenario.ops[transaction] {
                Op::Rmdir { .. } => state.send(transaction, Step::RemoveDirectory),
                Op::Undelete { .. } | Op::Purge { .. } => {
                    state.send(transaction, self.first_step_of_undelete_or_purge(transaction));
                }
                Op::Move { .. } | Op::Exchange { .. } if cleared => state.send(transaction, Step::LockEdge),
                Op::Move { .. } | Op::Exchange { .. } => self.read_anew(state, transaction),
            }
        }
    }

    // ---- reading and leave ----

    fn read_anew(&self, state: &mut State, transaction: Transaction) {
        let mut parents = self.scenario.new_parents(transaction).into_iter();
        let (Some(at), then) = (parents.next(), parents.next()) else { return };
        state.driver.jobs[transaction].phase = Phase::Reading { at, read: 0, changed: 0, then };
    }

    /// What a move claims to change.
    fn targets(&self, transaction: Transaction) -> Set {
        let mut targets = self.scenario.targets(transaction);
        if self.is(ClaimOneOfTwo) {
            targets.truncate(1);
        }
        targets.into_iter().fold(0, |set, target| set | bit(target))
    }

    pub(crate) fn read(&self, state: &mut State, transaction: Transaction) {
        let Phase::Reading { at, read, changed, then } = state.driver.jobs[transaction].phase else { return };
        let is_exchange = matches!(self.scenario.ops[transaction], Op::Exchange { .. });
        let read = read | bit(at);
        let targets = self.scenario.targets(transaction);
        let ended = |read, refusal| Phase::Read { read, changed, refusal };
        state.driver.jobs[transaction].phase = match state.owner[usize::from(at)] {
            None => ended(read, Some(Reply::Missing)),
            Some(owner) if targets.contains(&owner) => ended(read, Some(Reply::Loop)),
            Some(owner) if owner == ROOT || (is_exchange && has(read, owner)) => {
                let read = read | bit(owner);
                match then.filter(|&next| !has(read, next)) {
                    Some(at) => Phase::Reading { at, read, changed, then: None },
                    None => ended(read, None),
                }
            }
            Some(owner) => Phase::Reading { at: owner, read, changed, then },
        };
    }

    /// Leave, a refusal, or waiting.
    pub(crate) fn decide(&self, state: &mut State, transaction: Transaction) {
        let Phase::Read { read, changed, refusal } = state.driver.jobs[transaction].phase else { return };
        let unchecked = refusal.is_some() && self.is(RefuseUnchecked);
        let behind = refusal.is_none() && self.waits_behind(state, transaction);
        if !unchecked && (behind || self.is_blocked(state, read)) {
            state.driver.jobs[transaction] = Job { phase: Phase::Waiting, waits: Some(read) };
        } else if read & changed != 0 && !unchecked && !self.is(ForgetWhatWasOver) {
            self.read_anew(state, transaction);
        } else if let Some(reply) = refusal {
            self.refuse(state, transaction, reply);
        } else {
            state.driver.jobs[transaction] = Job { phase: Phase::Clearing, waits: None };
            state.propose_own(|driver| Proposal::Cleared { transaction: transaction as u8, driver });
            if self.is(StepBeforeRecorded) {
                state.send(transaction, Step::LockEdge);
            }
        }
    }

    /// Decided to be clear, and not over.
    fn is_clear(&self, state: &State, transaction: Transaction) -> bool {
        self.is_move(transaction)
            && match state.driver.jobs[transaction].phase {
                Phase::Clearing => !self.is(ClaimWhenRecorded),
                Phase::Stepping(_) | Phase::Queued { cleared: true } => true,
                _ => false,
            }
    }

    fn is_blocked(&self, state: &State, ancestors: Set) -> bool {
        let changes = |other| self.is_clear(state, other) && ancestors & self.targets(other) != 0;
        !self.is(ClearUnchecked) && (0..state.begun).any(changes)
    }

    fn waits_behind(&self, state: &State, transaction: Transaction) -> bool {
        let targets = self.targets(transaction);
        let relies = |job: &Job| job.waits.is_some_and(|ancestors| ancestors & targets != 0);
        !self.is(OvertakeWaiting) && state.driver.jobs[..transaction].iter().any(relies)
    }

    /// It stops nobody from here on, but keeps its locks.
    fn refuse(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        self.check_refusal(state, transaction, reply);
        if self.is(AnswerBeforeRecorded) {
            state.answer(transaction, reply);
        }
        self.move_over(state, transaction, Phase::Refusing);
        state.propose_own(|driver| Proposal::Finish { transaction: transaction as u8, reply, driver });
        if self.is(RefusedKeepNoLocks) {
            self.release(state, transaction);
        }
    }

    /// What a refusal says is true at the instant it is decided, by a driver that can have it recorded.
    fn check_refusal(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        let targets = self.scenario.targets(transaction);
        let truth_above = |mut at| loop {
            match state.owner[usize::from(at)] {
                None => break Some(Reply::Missing),
                Some(owner) if targets.contains(&owner) => break Some(Reply::Loop),
                Some(owner) if owner == at => break None,
                Some(owner) => at = owner,
            }
        };
        let truth = self.scenario.new_parents(transaction).into_iter().find_map(truth_above);
        let newest = state.driver.stage == Stage::Made { number: state.number };
        if newest && truth != Some(reply) {
            state.must_not_be("a move was refused for what is not so");
        }
    }

    // ---- steps ----

    /// A shard's answer to the step the transaction is at.
    pub(crate) fn go_on(&self, state: &mut State, transaction: Transaction, step: Step, done: bool) {
        match self.scenario.ops[transaction] {
            Op::Undelete { .. } => return self.go_on_undelete(state, transaction, step, done),
            Op::Purge { .. } => return self.go_on_purge(state, transaction, step, done),
            Op::Move { .. } | Op::Rmdir { .. } | Op::Exchange { .. } => {}
        }
        let is_move = self.is_move(transaction);
        let is_exchange = matches!(self.scenario.ops[transaction], Op::Exchange { .. });
        match (step, done) {
            (Step::LockEdge, true) => state.send(transaction, Step::LinkEdge),
            (Step::LinkEdge, true) => state.send(transaction, Step::SetOwner),
            (Step::SetOwner, true) if is_exchange => state.send(transaction, Step::SetOtherOwner),
            (Step::SetOwner | Step::SetOtherOwner, true) => {
                state.answer(transaction, Reply::Done);
                state.send(transaction, Step::UnlinkEdge);
            }
            (Step::LinkEdge, false) => state.send(transaction, Step::UnlockEdge),
            (Step::RemoveDirectory, true) => state.send(transaction, Step::UnlinkEdge),
            (Step::UnlinkEdge, true) => self.ended(state, transaction, Reply::Done),
            (Step::UnlinkEdge, false) if !is_move => state.send(transaction, Step::RestoreDirectory),
            (Step::UnlockEdge | Step::RestoreDirectory, true)
            | (Step::LockEdge | Step::RemoveDirectory, false) => {
                self.ended(state, transaction, Reply::Refused);
            }
            _ => state.must_not_be("a step was refused that cannot be"),
        }
    }

    pub(crate) fn ended(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        state.answer(transaction, reply);
        state.propose_own(|driver| Proposal::Finish { transaction: transaction as u8, reply, driver });
        self.move_over(state, transaction, Phase::Over);
        self.release(state, transaction);
    }

    /// Who waits, and need not as far as it knows, reads again.
    fn move_over(&self, state: &mut State, transaction: Transaction, phase: Phase) {
        let ran = self.is_clear(state, transaction);
        let waited = state.driver.jobs[transaction].waits.is_some();
        state.driver.jobs[transaction] = Job { phase, waits: None };
        if ran {
            for job in &mut state.driver.jobs {
                if let Phase::Reading { changed, .. } | Phase::Read { changed, .. } = &mut job.phase {
                    *changed |= self.targets(transaction);
                }
            }
        }
        if ran || waited {
            let free = |&other: &Transaction| {
                let Job { phase: Phase::Waiting, waits: Some(ancestors) } = state.driver.jobs[other] else {
                    return false;
                };
                !self.is_blocked(state, ancestors) && !self.waits_behind(state, other)
            };
            for other in (0..state.begun).filter(free).collect::<Vec<_>>() {
                self.read_anew(state, other);
            }
        }
    }

    /// Its locks go to the next.
    fn release(&self, state: &mut State, transaction: Transaction) {
        state.driver.queue.retain(|&t| usize::from(t) != transaction);
        self.start_what_can(state);
    }

    // ---- what the log says ----

    pub(crate) fn on_cleared(&self, state: &mut State, transaction: Transaction) {
        if state.driver.jobs[transaction].phase == Phase::Clearing {
            state.send(transaction, Step::LockEdge);
        }
    }

    /// The end is durable: what was seen by reading is answered only now; the shards forget it all.
    pub(crate) fn on_finished(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        let phase = state.driver.jobs[transaction].phase;
        // Of another driver.
        if !matches!(phase, Phase::Over | Phase::Refusing) {
            return;
        }
        state.answer(transaction, reply);
        state.driver.jobs[transaction] = Job::NONE;
        self.forget(state, transaction);
        self.release(state, transaction);
    }

    /// At once, which is the worst; a late step is refused below the floor, or not that late (XD-10).
    fn forget(&self, state: &mut State, transaction: Transaction) {
        state.steps[transaction] = Default::default();
        state.forgotten |= bit(transaction);
    }

    /// Another driver has taken over after this one read its view.
    pub(crate) fn on_replaced(&self, state: &mut State) {
        if !self.is(IgnoreReplaced) {
            self.make_anew(state);
        }
    }

    // ---- recovery ----

    /// The driver is lost without knowing it.
    pub(crate) fn leave_behind(&self, state: &mut State) {
        let earlier = state.lost.take().map_or([0; TRANSACTIONS_MAX], |lost| lost.sent);
        let mut sent = [0; TRANSACTIONS_MAX];
        for ((sent, earlier), steps) in sent.iter_mut().zip(earlier).zip(&mut state.steps) {
            *sent = earlier | std::mem::take(&mut steps.sent);
        }
        state.lost = Some(Box::new(Lost { driver: state.driver.clone(), sent }));
        self.make_anew(state);
    }

    /// The driver is gone, or the attempt to make one; there is another attempt.
    pub(crate) fn make_anew(&self, state: &mut State) {
        if self.is(LateView) && matches!(state.driver.stage, Stage::Viewing { .. }) {
            state.dormant = true;
        }
        let attempt = state.driver.attempt + 1;
        let view = self.is(ViewBeforeTakeOver).then_some(state.rows);
        state.driver = Driver::new(attempt, Stage::TakingOver { view });
        state.propose(Proposal::TakeOver { attempt });
    }

    /// What was cleared first (XD-5).
    pub(crate) fn recover(&self, state: &mut State) {
        let Stage::Viewing { view } = state.driver.stage else { return };
        state.driver.stage = Stage::Made { number: state.number };
        let rows = view.unwrap_or(state.rows);
        let cleared = |t: Transaction| rows[t].cleared && !self.is(DropClaims);
        let mut order: Vec<Transaction> = (0..state.begun).filter(|&t| rows[t].finished.is_none()).collect();
        if !self.is(ClearedKeepTheirPlace) {
            order.sort_by_key(|&t| !cleared(t));
        }
        for transaction in order {
            self.join(state, transaction, cleared(transaction));
        }
        for (transaction, row) in rows.iter().enumerate() {
            // Its caller asks again.
            if let Some(reply) = row.finished {
                state.answer(transaction, reply);
                self.forget(state, transaction);
            }
        }
        self.start_what_can(state);
    }
}
