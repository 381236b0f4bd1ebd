//! Whether a history of one register is linearizable: a search, as Wing and Gong's (1993) with the memory of Lowe
//! (2017), which Porcupine made known.
//!
//! It knows only who asked and was told what between when and when, and looks for one order of all operations
//! that fits: each takes effect at one moment between its call and its answer. What was never answered may take
//! effect at any time after its call, or not at all. Two things keep it small: each edge and each mode is a
//! register of its own (linearizability is local, Herlihy and Wing 1990), and a read that fits the value as it is
//! is taken at once, since taking it changes nothing.

use std::collections::BTreeSet;
use std::fmt::Debug;

/// Situations one search may look at; beyond them it gives up and says so.
const SITUATIONS_MAX: usize = 200_000;

/// What an operation did to the register, or saw of it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Act<V, S> {
    Write(V),
    Read(S),
}

/// One operation on one register.
#[derive(Debug, Clone)]
pub(crate) struct Operation<V, S> {
    pub invoked: u64,
    /// `None`: never.
    pub returned: Option<u64>,
    pub act: Act<V, S>,
    /// Known to have happened.
    pub certain: bool,
    /// For the report.
    pub name: String,
}

/// What a search came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Linearizable,
    /// No order fits; the most that could be put in order, and what could not follow.
    Not {
        ordered: Vec<String>,
        stuck: Vec<String>,
    },
    TooLarge,
}

struct Search<'a, V, S> {
    operations: &'a [Operation<V, S>],
    fits: &'a dyn Fn(&S, V) -> bool,
    seen: BTreeSet<(Vec<u64>, V)>,
    order: Vec<usize>,
    best: Vec<usize>,
}

/// Searches for an order of all operations that are certain, beginning with the value `first`.
pub(crate) fn search<V: Copy + Ord + Debug, S>(
    operations: &[Operation<V, S>],
    first: V,
    fits: &dyn Fn(&S, V) -> bool,
) -> Verdict {
    let done = vec![0u64; operations.len().div_ceil(64)];
    let mut search = Search { operations, fits, seen: BTreeSet::new(), order: Vec::new(), best: Vec::new() };
    match search.go(done, first) {
        Some(true) => Verdict::Linearizable,
        None => Verdict::TooLarge,
        Some(false) => {
            let left = (0..operations.len()).filter(|n| !search.best.contains(n) && operations[*n].certain);
            let name = |n: usize| operations[n].name.clone();
            Verdict::Not {
                stuck: left.map(name).collect(),
                ordered: search.best.iter().copied().map(name).collect(),
            }
        }
    }
}

impl<V: Copy + Ord + Debug, S> Search<'_, V, S> {
    /// `None`: too many situations.
    fn go(&mut self, mut done: Vec<u64>, value: V) -> Option<bool> {
        let depth = self.order.len();
        self.take_reads(&mut done, value);
        if self.order.len() > self.best.len() {
            self.best.clone_from(&self.order);
        }
        let is_left = |n: usize, done: &[u64]| done[n / 64] >> (n % 64) & 1 == 0;
        let left: Vec<usize> = (0..self.operations.len()).filter(|&n| is_left(n, &done)).collect();
        if left.iter().all(|&n| !self.operations[n].certain) {
            return Some(true);
        }
        if self.seen.len() >= SITUATIONS_MAX {
            return None;
        }
        if self.seen.insert((done.clone(), value)) {
            let first_answer = self.first_answer(&left);
            for &n in &left {
                let operation = &self.operations[n];
                let Act::Write(written) = operation.act else { continue };
                if operation.invoked > first_answer {
                    continue;
                }
                let mut then = done.clone();
                then[n / 64] |= 1 << (n % 64);
                self.order.push(n);
                if self.go(then, written)? {
                    return Some(true);
                }
                self.order.pop();
            }
        }
        self.order.truncate(depth);
        Some(false)
    }

    /// When the first of those that are left was answered: none that was called later comes before it.
    fn first_answer(&self, left: &[usize]) -> u64 {
        left.iter().filter_map(|&n| self.operations[n].returned).min().unwrap_or(u64::MAX)
    }

    fn take_reads(&mut self, done: &mut [u64], value: V) {
        loop {
            let left: Vec<usize> =
                (0..self.operations.len()).filter(|&n| done[n / 64] >> (n % 64) & 1 == 0).collect();
            let first_answer = self.first_answer(&left);
            let before = self.order.len();
            for n in left {
                let operation = &self.operations[n];
                if let Act::Read(seen) = &operation.act
                    && operation.invoked <= first_answer
                    && (self.fits)(seen, value)
                {
                    done[n / 64] |= 1 << (n % 64);
                    self.order.push(n);
                }
            }
            if self.order.len() == before {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(invoked: u64, returned: u64, value: u8) -> Operation<u8, u8> {
        let act = Act::Write(value);
        Operation { invoked, returned: Some(returned), act, certain: true, name: format!("write {value}") }
    }

    fn read(invoked: u64, returned: u64, value: u8) -> Operation<u8, u8> {
        let act = Act::Read(value);
        Operation { invoked, returned: Some(returned), act, certain: true, name: format!("read {value}") }
    }

    fn is_linearizable(operations: &[Operation<u8, u8>]) -> bool {
        search(operations, 0, &|seen, value| *seen == value) == Verdict::Linearizable
    }

    #[test]
    fn what_follows_sees_what_was() {
        assert!(is_linearizable(&[write(0, 1, 1), read(2, 3, 1)]));
        assert!(!is_linearizable(&[write(0, 1, 1), read(2, 3, 0)]));
        assert!(!is_linearizable(&[read(0, 1, 1), write(2, 3, 1)]));
    }

    #[test]
    fn what_overlaps_has_either_order() {
        assert!(is_linearizable(&[write(0, 10, 1), write(0, 10, 2), read(11, 12, 1)]));
        assert!(is_linearizable(&[write(0, 10, 1), write(0, 10, 2), read(11, 12, 2)]));
        assert!(is_linearizable(&[write(0, 10, 1), read(1, 2, 0), read(3, 4, 1)]));
        // But one order for all readers.
        assert!(!is_linearizable(&[write(0, 10, 1), read(1, 2, 1), read(3, 4, 0)]));
        let both = [write(0, 10, 1), write(0, 10, 2), read(11, 12, 1), read(13, 14, 2)];
        assert!(!is_linearizable(&both));
    }

    #[test]
    fn what_was_never_answered_may_have_been_or_not() {
        let lost = Operation { returned: None, certain: false, ..write(0, 0, 1) };
        assert!(is_linearizable(&[lost.clone(), read(1, 2, 0), read(3, 4, 1), read(5, 6, 1)]));
        assert!(is_linearizable(&[lost.clone(), read(1, 2, 0)]));
        assert!(!is_linearizable(&[lost, read(1, 2, 1), read(3, 4, 0)]));
    }

    #[test]
    fn long_histories_are_no_trouble() {
        let mut all = Vec::new();
        for n in 0..60u64 {
            all.push(write(n * 10, n * 10 + 25, (n % 250) as u8));
            all.push(read(n * 10 + 26, n * 10 + 29, (n % 250) as u8));
        }
        let verdict = search(&all, 0, &|seen, value| *seen == value);
        assert!(verdict != Verdict::TooLarge);
    }
}
