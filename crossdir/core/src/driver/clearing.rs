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
            None => self.moves.go_on(transaction, claim.clone()),
            Some(_) => self.moves.refuse(transaction, &claim),
        };
        match (leave, reply) {
            (Leave::Clear, None) => {
                running.ancestors = claim.ancestors;
                running.phase = Phase::Clearing { proposed_at: None };
                self.to_clear.push(transaction);
            }
            // No shard remembers why: were it told now, it could end otherwise after a crash.
            (Leave::Clear, Some(reply)) => {
                running.recorded_answer = Some(reply);
                self.over(transaction, now, out);
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
        let mut moves = Vec::with_capacity(self.to_clear.len());
        for transaction in std::mem::take(&mut self.to_clear) {
            let Some(running) = self.running.get_mut(&transaction) else { continue };
            running.phase = Phase::Clearing { proposed_at: Some(now) };
            let ancestors = running.ancestors.iter().map(|inode| inode.0).collect();
            moves.push(pb::ClearedMove { transaction: transaction.0, ancestors });
            let again = now.saturating_add(RECORD_TIMEOUT);
            self.timers.insert((again, Timer::ClearProposal(transaction)));
        }
        if !moves.is_empty() {
            let clear = pb::ClearMoves { driver: self.id, moves };
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
            self.timers.remove(&(at, Timer::ClearProposal(transaction)));
            self.ask(transaction, request, now, out);
        }
    }

    /// An earlier driver had recorded it.
    pub(super) fn restore_clear(&mut self, transaction: TransactionId, running: &Running) {
        if let Some(target) = running.steps.owned() {
            self.moves.restore(transaction, Claim { target, ancestors: running.ancestors.clone() });
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
