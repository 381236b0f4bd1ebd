//! What must be so always, and in the end.

use crate::Protocol;
use crate::scenario::{Directory, ROOT};
use crate::state::{Phase, Reply, State, has};

impl Protocol {
    pub(crate) fn check_always(&self, state: &State) -> Result<(), String> {
        if let Some(wrong) = state.wrong {
            return Err(wrong.to_owned());
        }
        let directories = self.scenario.parents.len();
        for directory in 0..directories {
            let mut at = directory;
            for _ in 0..directories {
                at = state.owner[at].map_or(usize::from(ROOT), usize::from);
            }
            if at != usize::from(ROOT) {
                return Err(format!("directory {directory} is its own ancestor, or below one that is"));
            }
        }
        for (edge, name) in self.scenario.edges.iter().enumerate() {
            if state.edges[edge].target.is_some() && state.owner[usize::from(name.parent)].is_none() {
                return Err(format!("a name in directory {}, which is removed", name.parent));
            }
        }
        for directory in 1..directories {
            let names = self.names(state, directory, true);
            // Who is revived is locked until it has its name.
            let living = state.owner[directory].is_some() && state.locked[directory].is_none();
            if names > 1 || (living && names == 0) {
                return Err(format!("XD-12: directory {directory} has {names} names to be seen"));
            }
            self.check_owned(state, directory as Directory, names)?;
        }
        for transaction in 0..state.begun {
            let Some(reply) = state.rows[transaction].finished else { continue };
            if (reply == Reply::Done) != has(state.made, transaction) {
                return Err(format!("{transaction} is recorded as {reply:?}, which it is not"));
            }
            if state.answered[transaction].is_some_and(|told| told != reply) {
                return Err(format!("{transaction} is recorded as {reply:?}, its caller was told otherwise"));
            }
        }
        Ok(())
    }

    pub(crate) fn check_end(&self, state: &State) -> Result<(), String> {
        let ops = self.scenario.ops.len();
        if let Some(stuck) = (0..ops).find(|&t| t >= state.begun || state.rows[t].finished.is_none()) {
            return Err(format!("{stuck} waits for ever"));
        }
        if let Some(stuck) = (0..ops).find(|&t| state.driver.jobs[t].phase != Phase::None) {
            return Err(format!("{stuck} waits for ever, recorded as finished"));
        }
        if (0..ops).any(|t| state.answered[t] != state.rows[t].finished) {
            return Err("a caller was told nothing, or not what is recorded".to_owned());
        }
        if !state.driver.queue.is_empty() || state.edges.iter().any(|edge| edge.locked_by.is_some()) {
            return Err("a lock is left".to_owned());
        }
        for directory in 1..self.scenario.parents.len() {
            let owner = state.owner[directory];
            let mut names = self.scenario.edges.iter().zip(&state.edges);
            let agrees = names.any(|(name, edge)| {
                Some(name.parent) == owner && edge.target.map(usize::from) == Some(directory)
            });
            let names = self.names(state, directory, false);
            if names != usize::from(owner.is_some()) || agrees != owner.is_some() {
                return Err(format!("directory {directory} of {owner:?} has {names} names"));
            }
        }
        self.check_dead_at_the_end(state)
    }

    fn names(&self, state: &State, directory: usize, visible: bool) -> usize {
        let named = |&edge: &usize| {
            let there = state.edges[edge].target;
            let found = if visible { state.seen(&self.scenario, edge) } else { there };
            found.map(usize::from) == Some(directory)
        };
        (0..self.scenario.edges.len()).filter(named).count()
    }
}
