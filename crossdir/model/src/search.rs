//! Breadth first through every state a model can come to; the shortest trace to the first bad one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::{Debug, Write as _};
use std::hash::Hash;

/// What is searched.
pub trait Model {
    type State: Clone + Eq + Hash + Debug;
    type Action: Copy + Debug;

    fn first(&self) -> Self::State;
    /// Everything that may happen next.
    fn actions(&self, state: &Self::State) -> Vec<Self::Action>;
    fn after(&self, state: &Self::State, action: Self::Action) -> Self::State;
    /// # Errors
    /// What must never be.
    fn always(&self, state: &Self::State) -> Result<(), String>;
    /// A state after which nothing need happen any more (what only may, such as a crash, does not count).
    fn is_end(&self, actions: &[Self::Action]) -> bool;
    /// # Errors
    /// What must not be so in the end.
    fn at_the_end(&self, state: &Self::State) -> Result<(), String>;
}

/// What a search came to.
#[derive(Debug, Clone)]
pub struct Found {
    pub states: usize,
    /// The longest of all shortest ways.
    pub depth: usize,
    pub ends: usize,
    /// What is wrong, and how it came about.
    pub counterexample: Option<String>,
}

/// Every state, or those up to the first bad one.
///
/// With `always` true of all, `at_the_end` of all ends, and no way that leads back to where it came from, every run
/// ends well: no deadlock, no endless waiting, without an assumption of fairness.
///
/// # Panics
/// Beyond `states_max` states: the scope is too large to be searched.
pub fn search<M: Model>(model: &M, states_max: usize) -> Found {
    let first = model.first();
    let mut search = Search { parents: vec![None], edges: Vec::new(), ends: 0 };
    let mut known = HashMap::from([(first.clone(), 0usize)]);
    let mut level = vec![(0usize, first)];
    let mut depth = 0;
    while !level.is_empty() {
        let mut next = Vec::new();
        for (at, state) in level {
            let actions = model.actions(&state);
            let end = model.is_end(&actions);
            search.ends += usize::from(end);
            let end = if end { model.at_the_end(&state) } else { Ok(()) };
            if let Err(wrong) = model.always(&state).and(end) {
                return search.found(depth, Some(trace(model, &search.parents, at, &wrong)));
            }
            for action in actions {
                let after = model.after(&state, action);
                let to = search.parents.len();
                match known.entry(after) {
                    Entry::Occupied(entry) => search.edges.push((at as u32, *entry.get() as u32)),
                    Entry::Vacant(entry) => {
                        next.push((to, entry.key().clone()));
                        entry.insert(to);
                        search.edges.push((at as u32, to as u32));
                        search.parents.push(Some((at, action)));
                    }
                }
            }
        }
        assert!(search.parents.len() <= states_max, "more than {states_max} states");
        level = next;
        depth += 1;
    }
    let circle = search.circle().map(|at| trace(model, &search.parents, at, "a run that never ends"));
    search.found(depth, circle)
}

#[derive(Debug)]
struct Search<A> {
    /// How each state was come to first.
    parents: Vec<Option<(usize, A)>>,
    edges: Vec<(u32, u32)>,
    ends: usize,
}

impl<A> Search<A> {
    fn found(&self, depth: usize, counterexample: Option<String>) -> Found {
        Found { states: self.parents.len(), depth, ends: self.ends, counterexample }
    }

    /// A state that can be come to from a circle: taking away, again and again, all that nothing leads to leaves it.
    fn circle(&self) -> Option<usize> {
        let mut coming = vec![0u32; self.parents.len()];
        let mut starts = vec![0u32; self.parents.len() + 1];
        for &(from, to) in &self.edges {
            coming[to as usize] += 1;
            starts[from as usize + 1] += 1;
        }
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        // States are numbered level by level, and their edges pushed in that order.
        debug_assert!(self.edges.is_sorted_by_key(|&(from, _)| from));
        let mut free: Vec<usize> = (0..coming.len()).filter(|&at| coming[at] == 0).collect();
        while let Some(at) = free.pop() {
            for &(_, to) in &self.edges[starts[at] as usize..starts[at + 1] as usize] {
                coming[to as usize] -= 1;
                if coming[to as usize] == 0 {
                    free.push(to as usize);
                }
            }
        }
        coming.iter().position(|&left| left > 0)
    }
}

fn trace<M: Model>(model: &M, parents: &[Option<(usize, M::Action)>], mut at: usize, wrong: &str) -> String {
    let mut actions = Vec::new();
    while let Some((parent, action)) = parents[at] {
        actions.push(action);
        at = parent;
    }
    let mut state = model.first();
    let mut text = format!("{wrong}\n");
    for action in actions.into_iter().rev() {
        state = model.after(&state, action);
        let _ = writeln!(text, "  {action:?}");
    }
    let _ = writeln!(text, "  {state:?}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From 0 up to 9 by ones or twos; `back`: and from 7 to 3.
    struct Steps {
        bad: u8,
        back: bool,
    }

    impl Model for Steps {
        type State = u8;
        type Action = u8;

        fn first(&self) -> u8 {
            0
        }

        fn actions(&self, &state: &u8) -> Vec<u8> {
            let mut actions: Vec<u8> = [1, 2].into_iter().filter(|step| state + step <= 9).collect();
            if self.back && state == 7 {
                actions.push(252);
            }
            actions
        }

        fn after(&self, state: &u8, action: u8) -> u8 {
            state.wrapping_add(action)
        }

        fn always(&self, &state: &u8) -> Result<(), String> {
            if state == self.bad { Err("bad".to_owned()) } else { Ok(()) }
        }

        fn is_end(&self, actions: &[u8]) -> bool {
            actions.is_empty()
        }

        fn at_the_end(&self, &state: &u8) -> Result<(), String> {
            if state == 9 { Ok(()) } else { Err("stuck".to_owned()) }
        }
    }

    #[test]
    fn all_is_seen_the_shortest_way_is_told_and_circles_are_found() {
        let all = search(&Steps { bad: 20, back: false }, 100);
        assert_eq!((all.states, all.ends, all.counterexample), (10, 1, None));
        let bad = search(&Steps { bad: 5, back: false }, 100).counterexample.unwrap();
        assert_eq!(bad.lines().count(), 5, "{bad}");
        let circle = search(&Steps { bad: 20, back: true }, 100).counterexample.unwrap();
        assert!(circle.contains("never ends"), "{circle}");
    }
}
