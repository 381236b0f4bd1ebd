//! Depth first over all that can happen, every state once.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::world::code;
use super::world::model::Model;
use crate::judge;
use crate::state::{Action, State};

/// Longer runs do not end.
const DEPTH_MAX: usize = 2000;

/// What was explored.
#[derive(Debug, Default)]
pub struct Explored {
    pub states: u64,
    pub transitions: u64,
    /// Of those, where everything was over.
    pub ends: u64,
    /// The answers seen there, by code.
    pub codes: BTreeMap<u32, u64>,
}

impl Explored {
    pub fn add(&mut self, other: &Explored) {
        self.states += other.states;
        self.transitions += other.transitions;
        self.ends += other.ends;
        for (code, count) in &other.codes {
            *self.codes.entry(*code).or_default() += count;
        }
    }
}

/// The way to the state looked at; printed when something does not hold there.
#[derive(Debug, Default)]
struct Way {
    calls: String,
    steps: Vec<(Action, Rc<str>)>,
}

impl Drop for Way {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}, the way there:", self.calls);
            for (n, (action, what)) in self.steps.iter().enumerate() {
                eprintln!("{n:3} {action:?} {what}");
            }
        }
    }
}

/// All runs from `state`.
pub fn explore(names: &[&str], state: State) -> Explored {
    let before = Model::of(&state.shards);
    let way = Way { calls: names.join(" | "), steps: Vec::new() };
    let mut search = Search { before, seen: BTreeSet::new(), way, explored: Explored::default() };
    search.visit(state);
    search.explored
}

struct Search {
    before: Model,
    seen: BTreeSet<u64>,
    way: Way,
    explored: Explored,
}

impl Search {
    fn visit(&mut self, state: State) {
        if !self.seen.insert(state.hash()) {
            return;
        }
        self.explored.states += 1;
        assert!(self.way.steps.len() < DEPTH_MAX, "it does not end");
        judge::instant(&state);
        if state.is_over() {
            judge::end(&state, &self.before);
            self.explored.ends += 1;
            for answer in state.calls.iter().filter_map(|call| call.answer.as_ref()) {
                *self.explored.codes.entry(code(answer)).or_default() += 1;
            }
            let mut state = state;
            state.come_too_late();
            return;
        }
        let actions = state.actions();
        let last = actions.len().checked_sub(1).expect("nothing can happen, and it is not over");
        let mut state = Some(state);
        for (n, &action) in actions.iter().enumerate() {
            // A copy of a driver is dear: the last of its ways takes the state itself.
            let next = if n == last { state.take() } else { state.clone() };
            let mut next = next.expect("taken at last");
            self.way.steps.push((action, next.describe(action)));
            self.explored.transitions += 1;
            next.act(action);
            self.visit(next);
            self.way.steps.pop();
        }
    }
}
