//! What the coordinator's replicated machine does with a proposal, and tells the driver at once.

use crate::Protocol;
use crate::Weakness::{ClearTheFinished, LateRefusals, LateTakeOver, NoTakeOver, RefuseUncleared};
use crate::state::{Proposal, Reply, State};

impl Protocol {
    /// Whether applying it would change anything.
    pub(crate) fn counts(&self, state: &State, proposal: Proposal) -> bool {
        match proposal {
            // It may come twice: it stays on its way.
            Proposal::TakeOver { token } if self.is(LateTakeOver) => token != state.token,
            Proposal::TakeOver { token } => token > state.token,
            _ => true,
        }
    }

    pub(crate) fn apply(&self, state: &mut State, proposal: Proposal) {
        match proposal {
            Proposal::TakeOver { token } => {
                state.token = token;
                if token == state.driver.token {
                    state.driver.leads = true;
                }
                if !self.is(LateTakeOver) {
                    state.proposals.retain(|&p| p != proposal);
                }
            }
            Proposal::Cleared { transaction, ancestors, token } => {
                state.proposals.retain(|&p| p != proposal);
                let transaction = usize::from(transaction);
                let current = token == state.token || self.is(NoTakeOver);
                let row = &mut state.rows[transaction];
                if !current || (row.finished.is_some() && !self.is(ClearTheFinished)) {
                    return;
                }
                row.cleared = Some(ancestors);
                self.on_cleared(state, transaction, ancestors, token == state.driver.token);
            }
            Proposal::Finish { transaction, reply, token } => {
                state.proposals.retain(|&p| p != proposal);
                self.finish(state, usize::from(transaction), reply, token);
            }
        }
    }

    /// The first answer stays.
    fn finish(&self, state: &mut State, transaction: usize, reply: Reply, token: u8) {
        let row = &mut state.rows[transaction];
        if row.finished.is_none() {
            let stale = if self.is(RefuseUncleared) {
                row.cleared.is_some()
            } else {
                token != state.token && !self.is(LateRefusals) && !self.is(NoTakeOver)
            };
            if reply.by_reading() && stale {
                return;
            }
            row.finished = Some(reply);
        }
        let reply = row.finished.unwrap_or(reply);
        self.on_finished(state, transaction, reply);
    }
}
