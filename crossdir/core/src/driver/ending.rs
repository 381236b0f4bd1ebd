//! How a transaction ends: recorded as finished, forgotten by the shards, retired; all in batches, all
//! off the caller's path.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use eggs_proto::{ShardId, Time, TransactionId, pb};

use super::{
    Asked, Driver, Output, Phase, RECORD_BATCH, RECORD_DELAY, RECORD_TIMEOUT, STEP_TIMEOUT, Timer, backoff,
};
use crate::transaction::Outcome;

/// Transactions named in one `ForgetTransactions`.
pub const FORGET_BATCH: usize = 256;
/// How long the first for a shard waits for more: nobody waits for it, and over many shards only time fills a batch.
pub const FORGET_DELAY: Duration = Duration::from_millis(1000);
/// No message is later than this: a transaction finished for longer may be forgotten although an older
/// one is stuck (XD-10). The shell gives its requests deadlines far below. It is an assumption only
/// for what finished above a stuck transaction; below the floor the shards refuse whatever comes.
pub const LATE_MAX: Duration = Duration::from_secs(60);

/// A finished transaction.
#[derive(Debug)]
pub(super) struct Ended {
    kind: &'static str,
    started_at: Time,
    reply: pb::CrossdirReply,
    /// Those that may still remember it.
    shards: BTreeSet<ShardId>,
    told: bool,
    /// When the proposal to retire it was made.
    proposed_at: Option<Time>,
}

/// What each shard is yet to forget.
#[derive(Debug, Default)]
pub(super) struct Forgetting {
    shards: BTreeMap<ShardId, Batches>,
    /// Not told to the shards yet.
    held: BTreeSet<TransactionId>,
    /// When each was held, in that order; some have been told since.
    held_since: VecDeque<(Time, TransactionId)>,
    timer: Option<Time>,
}

#[derive(Debug, Default)]
struct Batches {
    waiting: BTreeSet<TransactionId>,
    /// One at a time.
    flight: Option<Flight>,
    timer: Option<Time>,
}

#[derive(Debug)]
struct Flight {
    tag: u64,
    transactions: Vec<TransactionId>,
    floor: TransactionId,
    attempts: u32,
    sent: bool,
}

impl Ended {
    pub(super) fn new(
        kind: &'static str,
        started_at: Time,
        shards: BTreeSet<ShardId>,
        reply: pb::CrossdirReply,
    ) -> Ended {
        Ended { kind, started_at, reply, shards, told: false, proposed_at: None }
    }

    pub(super) fn reply(&self) -> &pb::CrossdirReply {
        &self.reply
    }

    pub(super) fn info(&self, transaction: TransactionId) -> pb::TransactionInfo {
        let step = if self.shards.is_empty() {
            "retiring".to_owned()
        } else {
            let shards: Vec<String> = self.shards.iter().map(ToString::to_string).collect();
            format!("to be forgotten by shard {}", shards.join(", "))
        };
        pb::TransactionInfo {
            transaction: transaction.0,
            kind: self.kind.to_owned(),
            started_at: self.started_at.0,
            step,
            finished: true,
        }
    }
}

// ---- finish ----

impl Driver {
    pub(super) fn collect_finish(&mut self, now: Time, out: &mut Vec<Output>) {
        if self.to_finish.len() >= RECORD_BATCH {
            self.flush_finish(now, out);
        } else if self.finish_at.is_none() {
            let at = now.saturating_add(RECORD_DELAY);
            self.finish_at = Some(at);
            self.timers.insert((at, Timer::Finish));
        }
    }

    pub(super) fn flush_finish(&mut self, now: Time, out: &mut Vec<Output>) {
        if let Some(at) = self.finish_at.take() {
            self.timers.remove(&(at, Timer::Finish));
        }
        while !self.to_finish.is_empty() {
            let count = self.to_finish.len().min(RECORD_BATCH);
            let mut batch = Vec::with_capacity(count);
            for transaction in self.to_finish.drain(..count) {
                let Some(running) = self.running.get_mut(&transaction) else { continue };
                let again = now.saturating_add(RECORD_TIMEOUT);
                running.phase = Phase::Over { proposed_at: Some(now) };
                self.timers.insert((again, Timer::FinishProposal(transaction)));
                batch.push(pb::FinishedTransaction {
                    transaction: transaction.0,
                    reply: running.answer.as_ref().or(running.recorded_answer.as_ref()).cloned(),
                });
            }
            if !batch.is_empty() {
                let finish = pb::FinishTransactions { transactions: batch, driver: self.id };
                out.push(propose(pb::crossdir_command::Command::Finish(finish)));
            }
        }
    }

    /// The proposal was lost, if it is the last one made.
    pub(super) fn finish_again(
        &mut self,
        transaction: TransactionId,
        at: Time,
        now: Time,
        out: &mut Vec<Output>,
    ) {
        if let Some(running) = self.running.get_mut(&transaction)
            && let Phase::Over { proposed_at: Some(proposed_at) } = running.phase
            && proposed_at.saturating_add(RECORD_TIMEOUT) == at
        {
            running.phase = Phase::Over { proposed_at: None };
            self.to_finish.push_back(transaction);
            self.collect_finish(now, out);
        }
    }

    /// The machine has recorded the ends.
    pub(super) fn finished(&mut self, finished: &[TransactionId], now: Time, out: &mut Vec<Output>) {
        for &transaction in finished {
            // Of another driver, or told twice.
            let over = |running: &super::Running| matches!(running.phase, Phase::Over { .. });
            if !self.running.get(&transaction).is_some_and(over) {
                continue;
            }
            let Some(running) = self.running.remove(&transaction) else { continue };
            if let Phase::Over { proposed_at: Some(proposed_at) } = running.phase {
                let at = proposed_at.saturating_add(RECORD_TIMEOUT);
                self.timers.remove(&(at, Timer::FinishProposal(transaction)));
            }
            let kind = running.steps.kind();
            if let Some(reply) = &running.recorded_answer {
                out.push(Output::Answer { transaction, reply: reply.clone() });
                self.release(transaction, now, out);
            }
            let reply = running.answer.or(running.recorded_answer).unwrap_or_default();
            self.end(transaction, Ended::new(kind, running.started_at, running.shards, reply), now);
        }
        self.forget_what_is_safe(now, out);
    }

    pub(super) fn end(&mut self, transaction: TransactionId, ended: Ended, now: Time) {
        self.forgetting.held.insert(transaction);
        self.forgetting.held_since.push_back((now, transaction));
        self.ended.insert(transaction, ended);
    }

    // ---- forget ----

    /// Every transaction before this is finished.
    fn floor(&self) -> TransactionId {
        match self.running.first_key_value() {
            Some((&oldest, _)) => oldest,
            None => TransactionId(self.newest.0 + 1),
        }
    }

    /// XD-10: hands what cannot meet a late step of its own to the shards' queues.
    pub(super) fn forget_what_is_safe(&mut self, now: Time, out: &mut Vec<Output>) {
        let above = self.forgetting.held.split_off(&self.floor());
        let mut safe = std::mem::replace(&mut self.forgetting.held, above);
        while let Some(&(since, transaction)) = self.forgetting.held_since.front() {
            if self.forgetting.held.contains(&transaction) && now.since(since) <= LATE_MAX {
                break;
            }
            self.forgetting.held_since.pop_front();
            if self.forgetting.held.remove(&transaction) {
                safe.insert(transaction);
            }
        }
        for transaction in safe {
            self.tell(transaction, now, out);
        }
        if let Some(at) = self.forgetting.timer.take() {
            self.timers.remove(&(at, Timer::Forgettable));
        }
        if let Some(&(since, _)) = self.forgetting.held_since.front() {
            let at = since.saturating_add(LATE_MAX).next();
            self.forgetting.timer = Some(at);
            self.timers.insert((at, Timer::Forgettable));
        }
    }

    fn tell(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        let Some(ended) = self.ended.get_mut(&transaction) else { return };
        ended.told = true;
        let shards: Vec<ShardId> = ended.shards.iter().copied().collect();
        if shards.is_empty() {
            self.collect_retire(transaction, now, out);
        }
        for shard in shards {
            let batches = self.forgetting.shards.entry(shard).or_default();
            batches.waiting.insert(transaction);
            let full = batches.waiting.len() >= FORGET_BATCH;
            if batches.flight.is_some() {
                continue;
            }
            if full {
                self.send_forget(shard, now, out);
            } else if batches.timer.is_none() {
                self.set_forget_timer(shard, now.saturating_add(FORGET_DELAY));
            }
        }
    }

    fn set_forget_timer(&mut self, shard: ShardId, at: Time) {
        let Some(batches) = self.forgetting.shards.get_mut(&shard) else { return };
        if let Some(old) = batches.timer.replace(at) {
            self.timers.remove(&(old, Timer::Forget(shard)));
        }
        self.timers.insert((at, Timer::Forget(shard)));
    }

    /// The delay of a batch is over, the pause before a repetition, or the wait for an answer.
    pub(super) fn forget_timer(&mut self, shard: ShardId, now: Time, out: &mut Vec<Output>) {
        if let Some(batches) = self.forgetting.shards.get_mut(&shard) {
            batches.timer = None;
            self.send_forget(shard, now, out);
        }
    }

    fn send_forget(&mut self, shard: ShardId, now: Time, out: &mut Vec<Output>) {
        let floor = self.floor();
        let next_tag = self.next_tag;
        let Some(batches) = self.forgetting.shards.get_mut(&shard) else { return };
        let flight = match &mut batches.flight {
            Some(flight) => {
                flight.attempts = flight.attempts.saturating_add(1);
                flight.sent = true;
                flight
            }
            None => {
                let mut transactions = Vec::new();
                while transactions.len() < FORGET_BATCH
                    && let Some(transaction) = batches.waiting.pop_first()
                {
                    transactions.push(transaction);
                }
                if transactions.is_empty() {
                    return;
                }
                self.tags.insert(next_tag, Asked::Forgetting(shard));
                self.next_tag += 1;
                batches.flight.insert(Flight { tag: next_tag, transactions, floor, attempts: 1, sent: true })
            }
        };
        let forget = pb::ForgetTransactions {
            transactions: flight.transactions.iter().map(|transaction| transaction.0).collect(),
            floor: flight.floor.0,
        };
        let op = pb::WriteOp { op: Some(pb::write_op::Op::ForgetTransactions(forget)) };
        out.push(Output::SendWrite { shard, op, tag: flight.tag });
        self.set_forget_timer(shard, now.saturating_add(STEP_TIMEOUT));
    }

    /// Any refusal is tried again: only an acknowledgement counts (XD-4).
    pub(super) fn on_forgotten(
        &mut self,
        shard: ShardId,
        tag: u64,
        outcome: Result<Outcome, String>,
        now: Time,
        out: &mut Vec<Output>,
    ) {
        let Some(batches) = self.forgetting.shards.get_mut(&shard) else { return };
        let Some(flight) = batches.flight.as_mut().filter(|flight| flight.tag == tag) else { return };
        if !matches!(outcome, Ok(Outcome::Done { .. })) {
            if std::mem::take(&mut flight.sent) {
                let at = now.saturating_add(backoff(flight.attempts));
                self.set_forget_timer(shard, at);
            }
            return;
        }
        self.tags.remove(&tag);
        let transactions = std::mem::take(&mut flight.transactions);
        batches.flight = None;
        if let Some(at) = batches.timer.take() {
            self.timers.remove(&(at, Timer::Forget(shard)));
        }
        match batches.waiting.len() {
            0 => {
                self.forgetting.shards.remove(&shard);
            }
            FORGET_BATCH.. => self.send_forget(shard, now, out),
            _ => self.set_forget_timer(shard, now.saturating_add(FORGET_DELAY)),
        }
        for transaction in transactions {
            let Some(ended) = self.ended.get_mut(&transaction) else { continue };
            ended.shards.remove(&shard);
            if ended.shards.is_empty() {
                self.collect_retire(transaction, now, out);
            }
        }
    }

    // ---- retire ----

    fn collect_retire(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        self.to_retire.push_back(transaction);
        if self.to_retire.len() >= RECORD_BATCH {
            self.flush_retire(now, out);
        } else if self.retire_at.is_none() {
            let at = now.saturating_add(FORGET_DELAY);
            self.retire_at = Some(at);
            self.timers.insert((at, Timer::Retire));
        }
    }

    pub(super) fn flush_retire(&mut self, now: Time, out: &mut Vec<Output>) {
        if let Some(at) = self.retire_at.take() {
            self.timers.remove(&(at, Timer::Retire));
        }
        while !self.to_retire.is_empty() {
            let count = self.to_retire.len().min(RECORD_BATCH);
            let mut batch = Vec::with_capacity(count);
            for transaction in self.to_retire.drain(..count) {
                let Some(ended) = self.ended.get_mut(&transaction) else { continue };
                debug_assert!(ended.told && ended.shards.is_empty(), "XD-4");
                ended.proposed_at = Some(now);
                let again = now.saturating_add(RECORD_TIMEOUT);
                self.timers.insert((again, Timer::RetireProposal(transaction)));
                batch.push(transaction.0);
            }
            if !batch.is_empty() {
                let retire = pb::RetireTransactions { transactions: batch };
                out.push(propose(pb::crossdir_command::Command::Retire(retire)));
            }
        }
    }

    pub(super) fn retire_again(
        &mut self,
        transaction: TransactionId,
        at: Time,
        now: Time,
        out: &mut Vec<Output>,
    ) {
        if let Some(ended) = self.ended.get_mut(&transaction)
            && ended.proposed_at.is_some_and(|made| made.saturating_add(RECORD_TIMEOUT) == at)
        {
            ended.proposed_at = None;
            self.collect_retire(transaction, now, out);
        }
    }

    pub(super) fn retired(&mut self, retired: &[TransactionId]) {
        for transaction in retired {
            debug_assert!(!self.running.contains_key(transaction), "XD-4");
            if let Some(Ended { proposed_at: Some(made), .. }) = self.ended.remove(transaction) {
                let at = made.saturating_add(RECORD_TIMEOUT);
                self.timers.remove(&(at, Timer::RetireProposal(*transaction)));
            }
        }
    }
}

fn propose(command: pb::crossdir_command::Command) -> Output {
    Output::Propose(pb::CrossdirCommand { command: Some(command) })
}
