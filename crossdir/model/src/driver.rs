//! What the driver does: queues on base locks, reads, gives leave, sends the steps, recovers.

use crate::Protocol;
use crate::Weakness::{
    AdoptNothing, AnswerBeforeRecorded, ClearWithoutClaims, ClearedKeepTheirPlace, DropClaims, EmptyClaims,
    FinishDoesNotStop, ForgetWhatWasOver, HalfClaims, NoTakeOver, OvertakeWaiting, RefuseUnchecked,
    StepBeforeRecorded,
};
use crate::scenario::{Op, Transaction};
use crate::state::{Driver, Job, Phase, Proposal, Reply, Set, State, Step, bit, has};

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
                Op::Move { .. } if cleared => state.send(transaction, Step::LockEdge),
                Op::Move { .. } => self.read_anew(state, transaction),
            }
        }
    }

    // ---- reading and leave ----

    fn read_anew(&self, state: &mut State, transaction: Transaction) {
        let Some(at) = self.scenario.new_parent(transaction) else { return };
        state.driver.jobs[transaction].phase = Phase::Reading { at, read: 0, over: 0 };
    }

    pub(crate) fn read(&self, state: &mut State, transaction: Transaction) {
        let Phase::Reading { at, read, over } = state.driver.jobs[transaction].phase else { return };
        let read = read | bit(at);
        let target = self.scenario.target(transaction);
        let ended = |read, refusal| Phase::Read { read, over, refusal };
        state.driver.jobs[transaction].phase = match state.owner[usize::from(at)] {
            None => ended(read, Some(Reply::Missing)),
            Some(owner) if owner == target => ended(read | bit(owner), Some(Reply::Loop)),
            Some(owner) if owner == at => ended(read, None),
            Some(owner) => Phase::Reading { at: owner, read, over },
        };
    }

    /// Leave, a refusal, or waiting.
    pub(crate) fn decide(&self, state: &mut State, transaction: Transaction) {
        let Phase::Read { read, over, refusal } = state.driver.jobs[transaction].phase else { return };
        let job = &mut state.driver.jobs[transaction];
        job.ancestors = Some(read);
        let unchecked = refusal.is_some() && self.is(RefuseUnchecked);
        let blockers = if unchecked { 0 } else { self.blockers(state, transaction, read) };
        let changed = (0..state.begun).any(|m| has(over, m) && has(read, self.scenario.target(m)));
        if blockers != 0 {
            state.driver.jobs[transaction].phase = Phase::Waiting { blockers };
        } else if changed && !unchecked && !self.is(ForgetWhatWasOver) {
            self.read_anew(state, transaction);
        } else if let Some(reply) = refusal {
            self.refuse(state, transaction, reply);
        } else {
            let token = state.driver.token;
            state.driver.jobs[transaction].phase = Phase::Clearing;
            state.propose(Proposal::Cleared { transaction: transaction as u8, ancestors: read, token });
            if self.is(StepBeforeRecorded) {
                state.send(transaction, Step::LockEdge);
            }
        }
    }

    fn blockers(&self, state: &State, transaction: Transaction, read: Set) -> Set {
        let target = self.scenario.target(transaction);
        let mut blockers = 0;
        for other in (0..state.begun).filter(|&other| other != transaction) {
            let job = state.driver.jobs[other];
            let (true, Some(ancestors)) = (self.is_move(other), job.ancestors) else { continue };
            let stops = (job.claims() && !self.is(ClearWithoutClaims))
                || (job.waits() && other < transaction && !self.is(OvertakeWaiting));
            let into = has(read, self.scenario.target(other));
            let onto = has(ancestors, target) && !self.is(HalfClaims);
            if stops && (into || onto) {
                blockers |= bit(other);
            }
        }
        blockers
    }

    fn refuse(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        state.driver.jobs[transaction].phase = Phase::Refusing;
        self.check_refusal(state, transaction, reply);
        if self.is(AnswerBeforeRecorded) {
            state.answer(transaction, reply);
        }
        let token = state.driver.token;
        state.propose(Proposal::Finish { transaction: transaction as u8, reply, token });
    }

    /// What a refusal says is true at the instant it is decided.
    fn check_refusal(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        let Some(mut at) = self.scenario.new_parent(transaction) else { return };
        let truth = loop {
            match state.owner[usize::from(at)] {
                None => break Some(Reply::Missing),
                Some(owner) if owner == self.scenario.target(transaction) => break Some(Reply::Loop),
                Some(owner) if owner == at => break None,
                Some(owner) => at = owner,
            }
        };
        if truth != Some(reply) {
            state.must_not_be("a move was refused for what is not so");
        }
    }

    // ---- steps ----

    /// A shard's answer to the step the transaction is at.
    pub(crate) fn go_on(&self, state: &mut State, transaction: Transaction, step: Step, done: bool) {
        let is_move = self.is_move(transaction);
        match (step, done) {
            (Step::LockEdge, true) => state.send(transaction, Step::LinkEdge),
            (Step::LinkEdge, true) => state.send(transaction, Step::SetOwner),
            (Step::SetOwner, true) => {
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

    fn ended(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        state.answer(transaction, reply);
        let token = state.driver.token;
        state.propose(Proposal::Finish { transaction: transaction as u8, reply, token });
        self.over(state, transaction, Phase::Over);
    }

    /// Its locks and its claim go; who waited for it reads again.
    fn over(&self, state: &mut State, transaction: Transaction, phase: Phase) {
        state.driver.queue.retain(|&t| usize::from(t) != transaction);
        state.driver.jobs[transaction] = Job { phase, ancestors: None };
        for other in 0..state.begun {
            match &mut state.driver.jobs[other].phase {
                Phase::Reading { over, .. } | Phase::Read { over, .. } if self.is_move(transaction) => {
                    *over |= bit(transaction);
                }
                &mut Phase::Waiting { blockers } if has(blockers, transaction) => {
                    self.read_anew(state, other);
                }
                _ => {}
            }
        }
        self.start_what_can(state);
    }

    // ---- what the log says ----

    /// `ours`: by this driver.
    pub(crate) fn on_cleared(&self, state: &mut State, transaction: Transaction, ancestors: Set, ours: bool) {
        let job = &mut state.driver.jobs[transaction];
        match job.phase {
            Phase::Clearing if ours => state.send(transaction, Step::LockEdge),
            Phase::Stepping(_) | Phase::Over | Phase::None | Phase::Queued { cleared: true } => {}
            _ if !ours && self.is(AdoptNothing) => {}
            _ => {
                *job = Job { phase: Phase::Queued { cleared: true }, ancestors: Some(ancestors) };
                self.start_what_can(state);
            }
        }
    }

    /// The end is durable: what was seen by reading is answered only now; the shards forget it all.
    pub(crate) fn on_finished(&self, state: &mut State, transaction: Transaction, reply: Reply) {
        let phase = state.driver.jobs[transaction].phase;
        let running = !matches!(phase, Phase::Refusing | Phase::Over | Phase::None);
        if running && self.is(FinishDoesNotStop) {
            return;
        }
        state.answer(transaction, reply);
        self.over(state, transaction, Phase::None);
        self.forget(state, transaction);
    }

    /// At once, which is the worst; a late step is refused below the floor, or not that late (XD-10).
    fn forget(&self, state: &mut State, transaction: Transaction) {
        state.steps[transaction] = Default::default();
    }

    // ---- recovery ----

    /// The driver is gone; another one is made from the rows.
    pub(crate) fn recover(&self, state: &mut State) {
        let token = state.driver.token + 1;
        let leads = self.is(NoTakeOver);
        state.driver = Driver { token, leads, queue: Vec::new(), jobs: [Job::NONE; crate::TRANSACTIONS_MAX] };
        if !leads {
            state.propose(Proposal::TakeOver { token });
        }
        let unfinished = |t: &Transaction| state.rows[*t].finished.is_none();
        let mut order: Vec<Transaction> = (0..state.begun).filter(unfinished).collect();
        if !self.is(ClearedKeepTheirPlace) && !self.is(DropClaims) {
            order.sort_by_key(|&t| state.rows[t].cleared.is_none());
        }
        for transaction in order {
            let claim = state.rows[transaction].cleared.filter(|_| !self.is(DropClaims));
            let claim = claim.map(|claim| if self.is(EmptyClaims) { 0 } else { claim });
            self.join(state, transaction, claim.is_some());
            state.driver.jobs[transaction].ancestors = claim;
        }
        for transaction in 0..state.begun {
            if state.rows[transaction].finished.is_some() {
                self.forget(state, transaction);
            }
        }
        self.start_what_can(state);
    }
}
