//! The clients' history cut into registers, one per edge and per mode of an inode, each given to [`linear`].
//!
//! A write of an edge is what the edge led to afterwards: which inode an unanswered call made is read from the
//! rows (an inode carries the number of its call), when it did so is not looked at. Reads are those of now: walks,
//! lists, and refusals that say what was in the way.

use std::collections::BTreeMap;

use eggs_proto::InodeId;

use super::edges::Change;
use super::linear::{Act, Operation, Verdict, search};
use crate::client::workload::MODE_BITS;
use crate::history::{Claim, Edge, Expect, History, Outcome};

/// How much was searched.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Searched {
    pub registers: usize,
    pub operations: usize,
    /// Registers whose search was given up.
    pub too_large: usize,
}

pub(crate) fn check(
    history: &History,
    changes: &BTreeMap<Edge, Vec<Change>>,
    wrong: &mut Vec<String>,
) -> Searched {
    let mut searched = Searched::default();
    for (edge, operations) in edges(history, changes) {
        let verdict = search(&operations, None, &|expect: &Expect, value| expect.holds(value));
        searched.take(&format!("{edge:?}"), operations.len(), verdict, wrong);
    }
    for (inode, operations) in modes(history) {
        let first = if inode.is_directory() { 0o755 } else { 0o644 };
        let verdict = search(&operations, first, &|seen: &u32, value| *seen == value);
        searched.take(&format!("the mode of {inode}"), operations.len(), verdict, wrong);
    }
    searched
}

impl Searched {
    fn take(&mut self, what: &str, operations: usize, verdict: Verdict, wrong: &mut Vec<String>) {
        self.registers += 1;
        self.operations += operations;
        match verdict {
            Verdict::Linearizable => {}
            Verdict::TooLarge => self.too_large += 1,
            Verdict::Not { ordered, stuck } => {
                let last = ordered.iter().rev().take(3).rev().collect::<Vec<_>>();
                let stuck = stuck.iter().take(5).collect::<Vec<_>>();
                wrong
                    .push(format!("{what} is not linearizable: after {last:?} none of {stuck:?} can follow"));
            }
        }
    }
}

type EdgeOperations = Vec<Operation<Option<InodeId>, Expect>>;

fn edges(history: &History, changes: &BTreeMap<Edge, Vec<Change>>) -> BTreeMap<Edge, EdgeOperations> {
    let mut all: BTreeMap<Edge, EdgeOperations> = BTreeMap::new();
    for (edge, changes) in changes {
        let of = all.entry(edge.clone()).or_default();
        for change in changes {
            // What nobody did is told elsewhere.
            let Some(by) = change.by.map(|n| &history.operations[n]) else { continue };
            of.push(Operation {
                invoked: by.invoked,
                returned: by.returned,
                act: Act::Write(change.after),
                certain: true,
                name: format!("{} ({}) to {:?}", by.id, by.what, change.after),
            });
        }
    }
    for operation in history.operations.iter().filter(|operation| operation.outcome != Outcome::Unknown) {
        for claim in &operation.claims {
            let Claim::Saw { edge, expect, at } = claim else { continue };
            // What was seen of the past is no read of now.
            if at.is_some_and(|at| at <= operation.seen || at > operation.heard) {
                continue;
            }
            all.entry(edge.clone()).or_default().push(Operation {
                invoked: operation.invoked,
                returned: operation.returned,
                act: Act::Read(*expect),
                certain: true,
                name: format!("{} ({}) saw {expect:?}", operation.id, operation.what),
            });
        }
    }
    all
}

fn modes(history: &History) -> BTreeMap<InodeId, Vec<Operation<u32, u32>>> {
    let mut all: BTreeMap<InodeId, Vec<Operation<u32, u32>>> = BTreeMap::new();
    for operation in history.operations.iter().filter(|operation| operation.outcome != Outcome::Refused) {
        for claim in &operation.claims {
            let (inode, act) = match claim {
                Claim::Set { inode } => (*inode, Act::Write(operation.id & MODE_BITS)),
                Claim::Mode { inode, mode } => (*inode, Act::Read(mode & MODE_BITS)),
                _ => continue,
            };
            all.entry(inode).or_default().push(Operation {
                invoked: operation.invoked,
                returned: operation.returned,
                act,
                certain: operation.outcome == Outcome::Acknowledged,
                name: format!("{} ({}) {act:?}", operation.id, operation.what),
            });
        }
    }
    all
}
