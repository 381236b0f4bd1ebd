//! Undelete and purge of a directory: their steps on the shards, and what the driver goes on with.

use crate::Protocol;
use crate::Weakness::{DeathStaysOwned, PurgeUnlocked};
use crate::scenario::{DeathId, Directory, EdgeId, Op, Transaction};
use crate::state::{Reply, State, Step, bit, has};

/// One death of one name, and whether the edge owns what died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Death {
    /// It has not died yet.
    #[default]
    ToCome,
    /// By whom it is locked.
    Owned(Option<u8>),
    /// What died was undeleted.
    Free,
    Purged,
}

impl Death {
    /// Whether whoever comes first may undelete or purge it.
    pub fn is_for_anybody(self) -> bool {
        self == Death::Owned(None)
    }

    fn is_for(self, transaction: Transaction) -> bool {
        matches!(self, Death::Owned(by) if by.is_none_or(|by| usize::from(by) == transaction))
    }
}

/// An undelete: what died where, and where it is to live.
#[derive(Debug, Clone, Copy)]
struct Undelete {
    target: Directory,
    death: DeathId,
    new: EdgeId,
}

impl Protocol {
    /// What a shard does with such a step; as in [`crate::shard`].
    pub(crate) fn run_dead(&self, state: &mut State, transaction: Transaction, step: Step) -> bool {
        match self.scenario.ops[transaction] {
            Op::Undelete { target, death, new } => {
                self.run_undelete(state, transaction, step, Undelete { target, death, new })
            }
            Op::Purge { target, death } => self.run_purge(state, transaction, step, (target, death)),
            op => unreachable!("{op:?} has no {step:?}"),
        }
    }

    fn run_undelete(&self, state: &mut State, transaction: Transaction, step: Step, op: Undelete) -> bool {
        let (at, death) = (usize::from(op.target), usize::from(op.death));
        let by = Some(transaction as u8);
        let parent = self.scenario.parent(op.new);
        let new = usize::from(op.new);
        match step {
            Step::ReviveDirectory => {
                if has(state.purged, at) || state.owner[at].is_some() || state.locked[at].is_some() {
                    return false;
                }
                (state.owner[at], state.locked[at]) = (Some(parent), by);
            }
            Step::LockDeadEdge => {
                if !state.deaths[death].is_for(transaction) {
                    return false;
                }
                state.deaths[death] = Death::Owned(by);
            }
            Step::UndeleteEdge | Step::LinkEdge => {
                let here = step == Step::UndeleteEdge;
                let edge = state.edges[new];
                let taken = edge.target.is_some() || edge.locked_by.is_some();
                if !state.can_change(parent) || taken || (here && !state.deaths[death].is_for(transaction)) {
                    return false;
                }
                state.edges[new].target = Some(op.target);
                state.make(transaction);
                if here {
                    self.disown(state, op.death);
                }
            }
            Step::FreeDeadEdge => {
                if state.deaths[death] == Death::Owned(by) {
                    state.deaths[death] = Death::Owned(None);
                    if has(state.made, transaction) {
                        self.disown(state, op.death);
                    }
                }
            }
            Step::UnlockDirectory => {
                if state.locked[at] == by {
                    state.locked[at] = None;
                }
            }
            Step::RemoveDirectory => {
                if state.locked[at] != by {
                    return false;
                }
                (state.owner[at], state.locked[at]) = (None, None);
            }
            step => unreachable!("undelete has no {step:?}"),
        }
        true
    }

    fn disown(&self, state: &mut State, death: DeathId) {
        let death = usize::from(death);
        if has(state.undeleted, death) {
            state.must_not_be("what died once was undeleted twice");
        }
        state.undeleted |= bit(death);
        if !self.is(DeathStaysOwned) {
            state.deaths[death] = Death::Free;
        }
    }

    fn run_purge(
        &self,
        state: &mut State,
        transaction: Transaction,
        step: Step,
        (target, death): (Directory, DeathId),
    ) -> bool {
        let (at, death) = (usize::from(target), usize::from(death));
        let by = Some(transaction as u8);
        match step {
            Step::LockDirectory => {
                let gone = has(state.purged, at) || state.owner[at].is_some() || state.locked[at].is_some();
                if gone || !self.is_without_entries(state, target) {
                    return false;
                }
                state.locked[at] = by;
            }
            Step::PurgeDeadEdge => {
                if !state.deaths[death].is_for(transaction) {
                    return false;
                }
                state.deaths[death] = Death::Purged;
                state.make(transaction);
            }
            Step::PurgeDirectory => {
                if !self.is(PurgeUnlocked) && (state.owner[at].is_some() || state.locked[at] != by) {
                    return false;
                }
                state.purged |= bit(at);
                (state.owner[at], state.locked[at]) = (None, None);
            }
            Step::UnlockDirectory => {
                if state.locked[at] == by {
                    state.locked[at] = None;
                }
            }
            step => unreachable!("purge has no {step:?}"),
        }
        true
    }

    /// Neither living nor dead ones.
    pub(crate) fn is_without_entries(&self, state: &State, directory: Directory) -> bool {
        let mut living = self.scenario.edges.iter().zip(&state.edges);
        let mut dead = self.scenario.deaths.iter().zip(&state.deaths);
        let is_in = |edge: EdgeId| self.scenario.parent(edge) == directory;
        !living.any(|(name, edge)| name.parent == directory && edge.target.is_some())
            && !dead.any(|(&(edge, _), death)| is_in(edge) && !matches!(death, Death::ToCome | Death::Purged))
    }

    pub(crate) fn first_step_of_undelete_or_purge(&self, transaction: Transaction) -> Step {
        match self.scenario.ops[transaction] {
            Op::Undelete { .. } => Step::ReviveDirectory,
            _ if self.is(PurgeUnlocked) => Step::PurgeDeadEdge,
            _ => Step::LockDirectory,
        }
    }

    /// A shard's answer; as [`Protocol::go_on`].
    pub(crate) fn go_on_undelete(&self, state: &mut State, transaction: Transaction, step: Step, done: bool) {
        let Op::Undelete { death, new, .. } = self.scenario.ops[transaction] else { return };
        let (old, _) = self.scenario.deaths[usize::from(death)];
        let died_in = self.scenario.parent(old);
        let lives = has(state.made, transaction);
        match (step, done) {
            (Step::ReviveDirectory, true) if died_in == self.scenario.parent(new) => {
                state.send(transaction, Step::UndeleteEdge);
            }
            (Step::ReviveDirectory, true) => state.send(transaction, Step::LockDeadEdge),
            (Step::LockDeadEdge, true) => state.send(transaction, Step::LinkEdge),
            (Step::LinkEdge, _) => state.send(transaction, Step::FreeDeadEdge),
            (Step::UndeleteEdge, true) => state.send(transaction, Step::UnlockDirectory),
            (Step::FreeDeadEdge, true) if lives => state.send(transaction, Step::UnlockDirectory),
            (Step::FreeDeadEdge, true) | (Step::UndeleteEdge | Step::LockDeadEdge, false) => {
                state.send(transaction, Step::RemoveDirectory);
            }
            (Step::UnlockDirectory, true) => self.ended(state, transaction, Reply::Done),
            (Step::RemoveDirectory, true) | (Step::ReviveDirectory, false) => {
                self.ended(state, transaction, Reply::Refused);
            }
            _ => state.must_not_be("a step was refused that cannot be"),
        }
    }

    /// A shard's answer; as [`Protocol::go_on`].
    pub(crate) fn go_on_purge(&self, state: &mut State, transaction: Transaction, step: Step, done: bool) {
        match (step, done) {
            (Step::LockDirectory, true) => state.send(transaction, Step::PurgeDeadEdge),
            (Step::PurgeDeadEdge, true) => state.send(transaction, Step::PurgeDirectory),
            (Step::PurgeDeadEdge, false) => state.send(transaction, Step::UnlockDirectory),
            (Step::PurgeDirectory, true) => self.ended(state, transaction, Reply::Done),
            (Step::UnlockDirectory, true) | (Step::LockDirectory, false) => {
                self.ended(state, transaction, Reply::Refused);
            }
            _ => state.must_not_be("a step was refused that cannot be"),
        }
    }

    // ---- what must be so ----

    /// SH-16: one edge owns a directory, living or dead; what was purged is nowhere.
    pub(crate) fn check_owned(
        &self,
        state: &State,
        directory: Directory,
        names: usize,
    ) -> Result<(), String> {
        let purged = has(state.purged, directory);
        let owned = self.deaths_of(state, directory).filter(|death| death.is_for_anybody()).count();
        if names + owned > 1 {
            return Err(format!(
                "SH-16: directory {directory} has {names} names and {owned} deaths that own it"
            ));
        }
        let here = purged && !self.is_without_entries(state, directory);
        let comes_back = purged && (names > 0 || state.owner[usize::from(directory)].is_some());
        if here || comes_back {
            return Err(format!("directory {directory} is purged, and is there, or something in it"));
        }
        Ok(())
    }

    pub(crate) fn check_dead_at_the_end(&self, state: &State) -> Result<(), String> {
        if state.locked.iter().any(Option::is_some)
            || state.deaths.iter().any(|death| matches!(death, Death::Owned(Some(_))))
        {
            return Err("a lock is left on a directory or a dead name".to_owned());
        }
        for directory in 1..self.scenario.parents.len() as Directory {
            let removed = state.owner[usize::from(directory)].is_none() && !has(state.purged, directory);
            let owned = self.deaths_of(state, directory).filter(|death| death.is_for_anybody()).count();
            if owned != usize::from(removed) {
                return Err(format!("SH-16: {owned} deaths own directory {directory}, removed: {removed}"));
            }
        }
        Ok(())
    }

    fn deaths_of<'a>(&'a self, state: &'a State, directory: Directory) -> impl Iterator<Item = Death> + 'a {
        let died = move |((_, target), _): &(&(EdgeId, Directory), &Death)| *target == directory;
        self.scenario.deaths.iter().zip(&state.deaths).filter(died).map(|(_, &death)| death)
    }
}
