//! What the shards do with a step: once, and they remember the outcome.

use crate::Protocol;
use crate::dead::Death;
use crate::scenario::{EdgeId, Op, Transaction};
use crate::state::{Edge, State, Step, bit, has};

/// True: done; false: refused; `None`: not now, the edge is locked by another.
pub fn run(state: &mut State, protocol: &Protocol, transaction: Transaction, step: Step) -> Option<bool> {
    let steps = state.steps[transaction];
    if steps.known(step) {
        return Some(has(steps.done, step as usize));
    }
    let done = apply(state, protocol, transaction, step)?;
    let steps = &mut state.steps[transaction];
    *if done { &mut steps.done } else { &mut steps.refused } |= bit(step as usize);
    Some(done)
}

fn apply(state: &mut State, protocol: &Protocol, transaction: Transaction, step: Step) -> Option<bool> {
    let scenario = &protocol.scenario;
    let exists = |state: &State, edge: EdgeId| state.can_change(scenario.parent(edge));
    let locked = |edge: Edge| edge.locked_by.is_some_and(|by| usize::from(by) != transaction);
    match (scenario.ops[transaction], step) {
        (Op::Move { target, old, .. } | Op::Exchange { one: target, edge: old, .. }, Step::LockEdge) => {
            let edge = state.edges[usize::from(old)];
            if locked(edge) {
                return None;
            }
            if !exists(state, old) || edge.target != Some(target) {
                return Some(false);
            }
            state.edges[usize::from(old)].locked_by = Some(transaction as u8);
        }
        (Op::Move { target, new, .. }, Step::LinkEdge) => {
            let edge = state.edges[usize::from(new)];
            if locked(edge) {
                return None;
            }
            if !exists(state, new) || edge.target.is_some() {
                return Some(false);
            }
            state.edges[usize::from(new)].target = Some(target);
            state.make(transaction);
        }
        (Op::Exchange { one, other, other_edge, .. }, Step::LinkEdge) => {
            let edge = state.edges[usize::from(other_edge)];
            if locked(edge) {
                return None;
            }
            if !exists(state, other_edge) || edge.target != Some(other) {
                return Some(false);
            }
            state.edges[usize::from(other_edge)].target = Some(one);
            state.make(transaction);
        }
        (Op::Exchange { other: target, edge: new, .. }, Step::SetOtherOwner)
        | (
            Op::Move { target, new, .. } | Op::Exchange { one: target, other_edge: new, .. },
            Step::SetOwner,
        ) => {
            let owner = &mut state.owner[usize::from(target)];
            if owner.is_none() {
                return Some(false);
            }
            *owner = Some(scenario.parent(new));
        }
        (Op::Move { target, old: edge, .. } | Op::Rmdir { target, edge, .. }, Step::UnlinkEdge) => {
            let at = state.edges[usize::from(edge)];
            if locked(at) {
                return None;
            }
            if !exists(state, edge) || at.target != Some(target) {
                return Some(false);
            }
            state.edges[usize::from(edge)] = Edge::default();
            if let Op::Rmdir { death, .. } = scenario.ops[transaction] {
                state.deaths[usize::from(death)] = Death::Owned(None);
                state.make(transaction);
            }
        }
        (Op::Exchange { one, edge, other, .. }, Step::UnlinkEdge) => {
            let at = state.edges[usize::from(edge)];
            if at.locked_by != Some(transaction as u8) || at.target != Some(one) {
                return Some(false);
            }
            state.edges[usize::from(edge)] = Edge { target: Some(other), locked_by: None };
        }
        (Op::Move { old, .. } | Op::Exchange { edge: old, .. }, Step::UnlockEdge) => {
            let edge = &mut state.edges[usize::from(old)];
            if edge.locked_by == Some(transaction as u8) {
                edge.locked_by = None;
            }
        }
        (Op::Rmdir { target, edge, .. }, Step::RemoveDirectory) => {
            let parent = scenario.parent(edge);
            let mut edges = scenario.edges.iter().zip(&state.edges);
            let empty = !edges.any(|(name, edge)| name.parent == target && edge.target.is_some());
            if state.owner[usize::from(target)] != Some(parent) || !state.can_change(target) || !empty {
                return Some(false);
            }
            state.owner[usize::from(target)] = None;
        }
        (Op::Rmdir { target, edge, .. }, Step::RestoreDirectory) => {
            state.owner[usize::from(target)] = Some(scenario.parent(edge));
        }
        (Op::Undelete { .. } | Op::Purge { .. }, step) => {
            return Some(protocol.run_dead(state, transaction, step));
        }
        (op, step) => unreachable!("{op:?} has no {step:?}"),
    }
    Some(true)
}
