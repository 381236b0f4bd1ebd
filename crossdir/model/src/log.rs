//! What the coordinator's replicated machine does with a proposal, and tells the driver at once.

use crate::Protocol;
use crate::Weakness::{AnyDriverClears, AnyDriverFinishes, AnyDriverFinishesSteps, ClearTheFinished};
use crate::state::{Proposal, Stage, State};

impl Protocol {
    pub(crate) fn apply(&self, state: &mut State, proposal: Proposal) {
        state.proposals.retain(|&p| p != proposal);
        match proposal {
            Proposal::TakeOver { attempt } => {
                state.number += 1;
                self.on_taken_over(state, attempt);
            }
            Proposal::Cleared { transaction, .. } => {
                let row = &mut state.rows[usize::from(transaction)];
                if row.finished.is_none() || self.is(ClearTheFinished) {
                    row.cleared = true;
                    self.on_cleared(state, usize::from(transaction));
                    state.tell_lost(|state| self.on_cleared(state, usize::from(transaction)));
                }
            }
            // The first answer stays.
            Proposal::Finish { transaction, reply, .. } => {
                let row = &mut state.rows[usize::from(transaction)];
                let reply = *row.finished.get_or_insert(reply);
                self.on_finished(state, usize::from(transaction), reply);
                state.tell_lost(|state| self.on_finished(state, usize::from(transaction), reply));
            }
        }
    }

    /// What is of drivers replaced for ever is as good as lost.
    pub(crate) fn drop_what_cannot_count(&self, state: &mut State) {
        let number = state.number;
        state.proposals.retain(|&proposal| self.counts(number, proposal));
    }

    fn on_taken_over(&self, state: &mut State, attempt: u8) {
        match state.driver.stage {
            Stage::TakingOver { view } if attempt == state.driver.attempt => {
                state.driver.stage = Stage::Viewing { view };
            }
            Stage::Made { .. } => self.on_replaced(state),
            // Its view is still to be read, and has the number.
            Stage::TakingOver { .. } | Stage::Viewing { .. } => {}
        }
    }

    /// XD-8: what a driver says that has been replaced counts for nothing.
    fn counts(&self, number: u8, proposal: Proposal) -> bool {
        match proposal {
            Proposal::TakeOver { .. } => true,
            Proposal::Cleared { driver, .. } => driver == number || self.is(AnyDriverClears),
            Proposal::Finish { driver, reply, .. } => {
                driver == number
                    || self.is(AnyDriverFinishes)
                    || (self.is(AnyDriverFinishesSteps) && !reply.by_reading())
            }
        }
    }
}
