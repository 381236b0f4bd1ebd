//! Moves of directories: from what they have read of their ancestors to the record that lets them go on (XD-8).

use eggs_proto::{Time, TransactionId, pb};

use super::{Driver, Output, Phase, RECORD_TIMEOUT, Running, Timer};
use crate::moves::{Claim, Leave};

impl Driver {
    /// A move has read its ancestors; with a reply: as far as is needed to know that it cannot be.
    pub(super) fn clear(
        &mut self,
        transaction: TransactionId,
        claim: Claim,
        reply: Option<pb::CrossdirReply>,
        now: Time,
        out: &mut Vec<Output>,
    ) {
        let Some(running) = self.running.get_mut(&transaction) else { return };
        let leave = match &reply {
            None => self.moves.go_on(transaction, claim),
            Some(_) => self.moves.refuse(transaction, claim),
        };
        match (leave, reply) {
            (Leave::Clear, None) => {
                running.phase = Phase::Clearing { proposed_at: None };
                self.to_clear.push(transaction);
            }
            // No shard remembers why: were it told or its locks given away now, it could end otherwise after a crash.
            (Leave::Clear, Some(reply)) => {
                running.recorded_answer = Some(reply);
                running.phase = Phase::Over { proposed_at: None };
                self.move_over(transaction, now, out);
                self.to_finish.push_back(transaction);
                self.collect_finish(now, out);
            }
            (Leave::Wait, _) => running.phase = Phase::InTheWay,
            (Leave::ReadAgain, _) => {
                let request = running.steps.first();
                self.ask(transaction, request, now, out);
            }
        }
    }

    /// One record for all that became clear in a step.
    pub(super) fn propose_clear(&mut self, now: Time, out: &mut Vec<Output>) {
        let mut transactions = Vec::with_capacity(self.to_clear.len());
        for transaction in std::mem::take(&mut self.to_clear) {
            let Some(running) = self.running.get_mut(&transaction) else { continue };
            running.phase = Phase::Clearing { proposed_at: Some(now) };
            transactions.push(transaction.0);
            let again = now.saturating_add(RECORD_TIMEOUT);
            self.timers.insert((again, Timer::ClearProposal(transaction)));
        }
        if !transactions.is_empty() {
            let clear = pb::ClearMoves { driver: self.id, transactions };
            let command = Some(pb::crossdir_command::Command::Clear(clear));
            out.push(Output::Propose(pb::CrossdirCommand { command }));
        }
    }

    /// The proposal was lost, if it is the last one made.
    pub(super) fn clear_again(&mut self, transaction: TransactionId, at: Time) {
        if let Some(running) = self.running.get_mut(&transaction)
            && running.clear_timer() == Some(at)
        {
            running.phase = Phase::Clearing { proposed_at: None };
            self.to_clear.push(transaction);
        }
    }

    /// The machine has recorded that they may go on.
    pub(super) fn cleared(&mut self, cleared: &[TransactionId], now: Time, out: &mut Vec<Output>) {
        for &transaction in cleared {
            let Some(running) = self.running.get_mut(&transaction) else { continue };
            // Told twice, when it goes on already.
            let Some(at) = running.clear_timer() else { continue };
            let Some(request) = running.steps.clear() else { continue };
            running.cleared = true;
            self.timers.remove(&(at, Timer::ClearProposal(transaction)));
            self.ask(transaction, request, now, out);
        }
    }

    /// What waited for this move reads again.
    pub(super) fn move_over(&mut self, transaction: TransactionId, now: Time, out: &mut Vec<Output>) {
        for waiting in self.moves.over(transaction) {
            let Some(running) = self.running.get_mut(&waiting) else { continue };
            let request = running.steps.first();
            self.ask(waiting, request, now, out);
        }
    }
}

impl Running {
    /// When the proposal counts as lost.
    fn clear_timer(&self) -> Option<Time> {
        match self.phase {
            Phase::Clearing { proposed_at: Some(proposed_at) } => {
                Some(proposed_at.saturating_add(RECORD_TIMEOUT))
            }
            _ => None,
        }
    }
}
