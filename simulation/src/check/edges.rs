//! Whether the clients' history is that of one tree.
//!
//! The shards keep every version of every edge with its instants (the dead map), so the order in which
//! things happened to an edge need not be searched for, as Wing and Gong's checker does: it is given,
//! and only has to be held against what the clients were told. For every edge:
//!
//! 1. **Everything told is there.** Each acknowledged birth and death is in the versions, at exactly the
//!    instant of its reply.
//! 2. **Nothing else is there.** Each birth and death is of one operation, acknowledged or unknown, that can
//!    have brought it about (a new inode carries its operation's number); each operation did it once, and
//!    one that has two effects had both or none. Refused operations have none.
//! 3. **Real time.** Of two operations one of which had returned before the other was invoked, the first
//!    comes first; and instants are later than all its client had seen before.
//! 4. **What was seen was so.** A reply with an instant was right at that instant; one without at some
//!    moment between what had returned before it was invoked and what was invoked after it returned, and
//!    readers one after the other do not see the edge go back.
//!
//! Together with 3, 1 and 2 make the writes to each edge linearizable with the instants as witness, and
//! 4 the reads.

use std::collections::BTreeMap;

use eggs_proto::{InodeId, Time};

use super::facts::{Facts, Version};
use crate::client::workload::MODE_BITS;
use crate::history::{Claim, Death, Edge, Expect, History, Operation, Outcome};

/// Something that happened to an edge, and the operation it is put down to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    pub at: Time,
    /// Index of the operation; `None` while nobody is known to have done it.
    pub by: Option<usize>,
    /// What it led to afterwards.
    pub after: Option<InodeId>,
}

struct Checker<'a> {
    history: &'a History,
    facts: &'a Facts,
    births: BTreeMap<(&'a Edge, Time), Option<usize>>,
    deaths: BTreeMap<(&'a Edge, Time), Option<usize>>,
    /// How many effects each operation had.
    effects: Vec<usize>,
    wrong: &'a mut Vec<String>,
}

/// What happened to every edge, in the order of the instants.
pub(crate) fn check(
    history: &History,
    facts: &Facts,
    wrong: &mut Vec<String>,
) -> BTreeMap<Edge, Vec<Change>> {
    let mut checker = Checker {
        history,
        facts,
        births: BTreeMap::new(),
        deaths: BTreeMap::new(),
        effects: vec![0; history.operations.len()],
        wrong,
    };
    checker.collect();
    checker.told();
    checker.attribute();
    checker.pairs();
    checker.makers();
    let changes = checker.changes();
    for (edge, changes) in &changes {
        real_time(history, edge, changes, checker.wrong);
    }
    seen(history, facts, &changes, checker.wrong);
    changes
}

fn describe(operation: &Operation) -> String {
    format!("operation {} of client {} ({})", operation.id, operation.client, operation.what)
}

impl<'a> Checker<'a> {
    fn collect(&mut self) {
        for (edge, versions) in &self.facts.versions {
            for version in versions {
                self.births.insert((edge, version.created_at), None);
                if let Some((died_at, _)) = version.died {
                    self.deaths.insert((edge, died_at), None);
                }
            }
        }
    }

    fn version(&self, edge: &Edge, is: impl Fn(&Version) -> bool) -> Option<&'a Version> {
        self.facts.versions.get(edge)?.iter().find(|version| is(version))
    }

    /// 1: acknowledged effects with an instant.
    fn told(&mut self) {
        for (n, operation) in self.history.operations.iter().enumerate() {
            if operation.outcome != Outcome::Acknowledged {
                continue;
            }
            for claim in &operation.claims {
                let (edge, at) = match claim {
                    Claim::Born { edge, at: Some(at), .. } | Claim::Died { edge, at: Some(at), .. } => {
                        (edge, *at)
                    }
                    _ => continue,
                };
                if at <= operation.seen || at > operation.heard {
                    self.wrong.push(format!(
                        "{}: at {at:?}, not after {:?} and up to {:?}",
                        describe(operation),
                        operation.seen,
                        operation.heard
                    ));
                }
                let (found, taken) = match claim {
                    Claim::Born { target, .. } => {
                        let is = |v: &Version| v.created_at == at && target.is_none_or(|t| t == v.target);
                        (self.version(edge, is).is_some(), self.births.get_mut(&(edge, at)))
                    }
                    Claim::Died { target, owned, .. } => {
                        let is = |v: &Version| {
                            v.died == Some((at, *owned)) && target.is_none_or(|t| t == v.target)
                        };
                        (self.version(edge, is).is_some(), self.deaths.get_mut(&(edge, at)))
                    }
                    _ => continue,
                };
                match taken {
                    Some(by) if found && by.is_none() => {
                        *by = Some(n);
                        self.effects[n] += 1;
                    }
                    Some(Some(other)) if found => {
                        let other = describe(&self.history.operations[*other]);
                        self.wrong
                            .push(format!("{} and {other} have one effect at {at:?}", describe(operation)));
                    }
                    _ => self.wrong.push(format!(
                        "{} was acknowledged, but {claim:?} is not so: {:?}",
                        describe(operation),
                        self.facts.versions.get(edge)
                    )),
                }
            }
        }
    }

    /// 2: effects nobody was told the instant of.
    fn attribute(&mut self) {
        let births: Vec<(&Edge, Time)> =
            self.births.iter().filter(|(_, by)| by.is_none()).map(|(&key, _)| key).collect();
        for (edge, at) in births {
            let Some(version) = self.version(edge, |v| v.created_at == at) else { continue };
            let by = self.maker_of_birth(edge, version);
            self.put_down(edge, at, by, true);
        }
        let deaths: Vec<(&Edge, Time)> =
            self.deaths.iter().filter(|(_, by)| by.is_none()).map(|(&key, _)| key).collect();
        for (edge, at) in deaths {
            let Some(version) = self.version(edge, |v| v.died.is_some_and(|(died, _)| died == at)) else {
                continue;
            };
            // What took its name replaced it, or was exchanged with it.
            if let Some(&by) = self.births.get(&(edge, at)) {
                if version.died.is_some_and(|(_, owned)| !owned) {
                    match by.filter(|&n| self.gives_away(n, edge)) {
                        Some(n) => self.put_down(edge, at, Some(n), false),
                        None => self.wrong.push(format!(
                            "{edge:?} was replaced at {at:?}, but its inode is not owned there"
                        )),
                    }
                }
                continue;
            }
            let by = self.maker_of_death(edge, version);
            self.put_down(edge, at, by, false);
        }
    }

    fn put_down(&mut self, edge: &'a Edge, at: Time, by: Option<usize>, birth: bool) {
        match by {
            Some(n) => {
                self.effects[n] += 1;
                let table = if birth { &mut self.births } else { &mut self.deaths };
                table.insert((edge, at), Some(n));
            }
            None => {
                let what = if birth { "was born" } else { "died" };
                let versions = self.facts.versions.get(edge);
                self.wrong.push(format!("{edge:?} {what} at {at:?}, and nobody did it: {versions:?}"));
            }
        }
    }

    /// Operations that may have had an effect at an instant, those with the earliest deadline first.
    fn candidates(&self, at: Time) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.history.operations.len())
            .filter(|&n| {
                let operation = &self.history.operations[n];
                operation.outcome != Outcome::Refused && operation.seen < at && at <= operation.heard
            })
            .collect();
        all.sort_by_key(|&n| self.history.operations[n].heard);
        all
    }

    /// An operation does one thing of a kind to an edge.
    fn taken(&self, n: usize, edge: &Edge, birth: bool) -> bool {
        let table = if birth { &self.births } else { &self.deaths };
        let of_edge = table.range((edge, Time::ZERO)..=(edge, Time::MAX));
        of_edge.into_iter().any(|(_, by)| *by == Some(n))
    }

    /// An exchange: what the edge led to lives on elsewhere.
    fn gives_away(&self, n: usize, edge: &Edge) -> bool {
        let gives =
            |claim: &Claim| matches!(claim, Claim::Died { edge: died, owned: false, .. } if died == edge);
        self.history.operations[n].claims.iter().any(gives)
    }

    /// Made by one request with the directory it is in.
    fn was_made_with(&self, operation: &Operation, edge: &Edge, version: &Version) -> bool {
        let made = |inode| self.facts.uid(inode) == Some(operation.id);
        operation.below > 0 && made(edge.directory) && made(version.target)
    }

    fn maker_of_birth(&self, edge: &Edge, version: &Version) -> Option<usize> {
        let made_by = self.facts.uid(version.target);
        // Nothing but an exchange takes a name from what lives on elsewhere, and an exchange does nothing else.
        let exchanged = self.version(edge, |v| v.died == Some((version.created_at, false))).is_some();
        self.candidates(version.created_at).into_iter().find(|&n| {
            let operation = &self.history.operations[n];
            if exchanged != self.gives_away(n, edge) {
                return false;
            }
            let fits = |claim: &Claim| match claim {
                Claim::Born { edge: born, target, at: None } if born == edge => match target {
                    Some(target) => *target == version.target && self.left(operation, version),
                    None => {
                        // A rename or an exchange: what had another of its names until then.
                        let comes_from = |claim: &Claim| match claim {
                            Claim::Died { edge: old, owned: false, .. } => self
                                .version(old, |v| v.died == Some((version.created_at, false)))
                                .is_some_and(|old| old.target == version.target),
                            _ => false,
                        };
                        match operation.claims.first() {
                            Some(Claim::Died { .. }) => operation.claims.iter().any(comes_from),
                            _ => made_by == Some(operation.id),
                        }
                    }
                },
                _ => false,
            };
            let fits = operation.claims.iter().any(fits) || self.was_made_with(operation, edge, version);
            fits && !self.taken(n, edge, true)
        })
    }

    /// Whether a moved inode left its old name after it got the new one, with nobody known to have taken it.
    fn left(&self, operation: &Operation, new: &Version) -> bool {
        operation.claims.iter().all(|claim| match claim {
            Claim::Died { edge, target: Some(target), at: None, owned } => {
                let versions = self.facts.versions.get(edge).map_or(&[][..], Vec::as_slice);
                versions.iter().any(|old| match old.died {
                    Some((died, died_owned)) => {
                        old.target == *target
                            && died_owned == *owned
                            && (new.created_at..=operation.heard).contains(&died)
                            && self.deaths.get(&(edge, died)) == Some(&None)
                    }
                    None => false,
                })
            }
            _ => true,
        })
    }

    fn maker_of_death(&self, edge: &Edge, version: &Version) -> Option<usize> {
        let (died_at, died_owned) = version.died?;
        self.candidates(died_at).into_iter().find(|&n| {
            let operation = &self.history.operations[n];
            // Births come first: who has two effects must have had the other.
            if operation.claims.len() > 1 && self.effects[n] == 0 {
                return false;
            }
            let fits = |claim: &Claim| match claim {
                Claim::Died { edge: died, target, at: None, owned } => {
                    died == edge && *owned == died_owned && target.is_none_or(|t| t == version.target)
                }
                _ => false,
            };
            operation.claims.iter().any(fits) && !self.taken(n, edge, false)
        })
    }

    /// 2: both effects or none; all of what was acknowledged.
    fn pairs(&mut self) {
        for (n, operation) in self.history.operations.iter().enumerate() {
            let is_effect = |claim: &&Claim| matches!(claim, Claim::Born { .. } | Claim::Died { .. });
            let claimed = operation.claims.iter().filter(is_effect).count() + operation.below;
            let had = self.effects[n];
            let right = match operation.outcome {
                Outcome::Acknowledged => had == claimed,
                Outcome::Unknown => had == 0 || had == claimed,
                Outcome::Refused => had == 0,
            };
            if !right {
                let outcome = operation.outcome;
                let (seen, heard) = (operation.seen, operation.heard);
                self.wrong.push(format!(
                    "{} ({outcome:?}): {had} of {claimed} effects; after {seen:?}, up to {heard:?}",
                    describe(operation)
                ));
            }
        }
    }

    /// 2: an operation makes one inode, or as many as it says, if it was not refused.
    fn makers(&mut self) {
        let mut made: BTreeMap<u32, Vec<InodeId>> = BTreeMap::new();
        let directories = self.facts.directories.iter().map(|(&inode, &(_, uid))| (inode, uid));
        for (inode, uid) in directories.chain(self.facts.files.iter().map(|(&inode, file)| (inode, file.uid)))
        {
            made.entry(uid).or_default().push(inode);
        }
        // Nobody may know who made what was purged.
        let (mut missing, purged) = (0, &self.facts.purged);
        for (&inode, maker) in purged {
            match maker {
                Some(uid) => made.entry(*uid).or_default().push(inode),
                None => missing += 1,
            }
        }
        for (uid, inodes) in made {
            let Some(operation) = self.history.get(uid) else { continue };
            let all = 1 + operation.below;
            let right = inodes.len() <= all && inodes.len() + missing >= all;
            if !right || operation.outcome == Outcome::Refused {
                let outcome = operation.outcome;
                self.wrong.push(format!("{} ({outcome:?}) made {inodes:?}", describe(operation)));
            }
        }
    }

    fn changes(&self) -> BTreeMap<Edge, Vec<Change>> {
        let mut all: BTreeMap<Edge, Vec<Change>> = BTreeMap::new();
        for (&(edge, at), &by) in &self.births {
            let after = self.version(edge, |v| v.created_at == at).map(|v| v.target);
            all.entry(edge.clone()).or_default().push(Change { at, by, after });
        }
        for (&(edge, at), &by) in &self.deaths {
            if !self.births.contains_key(&(edge, at)) {
                all.entry(edge.clone()).or_default().push(Change { at, by, after: None });
            }
        }
        for changes in all.values_mut() {
            changes.sort_by_key(|change| change.at);
        }
        all
    }
}

/// 3: the order of the instants is not against the order of the calls.
fn real_time(history: &History, edge: &Edge, changes: &[Change], wrong: &mut Vec<String>) {
    let by = |change: &Change| change.by.map(|n| &history.operations[n]);
    for (n, later) in changes.iter().enumerate() {
        let Some(later) = by(later) else { continue };
        for earlier in &changes[..n] {
            let Some(earlier) = by(earlier) else { continue };
            if later.returned.is_some_and(|returned| returned < earlier.invoked) {
                wrong.push(format!(
                    "{edge:?}: {} had returned before {} was invoked, but comes after it",
                    describe(later),
                    describe(earlier)
                ));
            }
        }
    }
}

/// Between which changes an operation can have looked: `first..=last` of 0 (before all) to `changes.len()`.
fn window(history: &History, changes: &[Change], operation: &Operation) -> (usize, usize) {
    let by = |change: &Change| change.by.map(|n| &history.operations[n]);
    let before =
        |c: &Change| by(c).is_some_and(|o| o.returned.is_some_and(|returned| returned < operation.invoked));
    let after =
        |c: &Change| by(c).is_some_and(|o| operation.returned.is_some_and(|returned| returned < o.invoked));
    let first = changes.iter().rposition(before).map_or(0, |at| at + 1);
    let last = changes.iter().position(after).unwrap_or(changes.len());
    (first, last)
}

fn state(changes: &[Change], position: usize) -> Option<InodeId> {
    position.checked_sub(1).and_then(|at| changes[at].after)
}

/// 4.
fn seen(history: &History, facts: &Facts, changes: &BTreeMap<Edge, Vec<Change>>, wrong: &mut Vec<String>) {
    // Readers in the order they were invoked: (edge) → when it returned, how far it had seen.
    let mut readers: BTreeMap<&Edge, Vec<(u64, usize)>> = BTreeMap::new();
    for operation in &history.operations {
        if operation.outcome == Outcome::Unknown {
            continue;
        }
        let sight = Sight { history, facts, changes, operation };
        for claim in &operation.claims {
            if let Claim::Saw { edge, expect, at: None } = claim {
                let all = changes.get(edge).map_or(&[][..], Vec::as_slice);
                let (first, last) = window(history, all, operation);
                let known = readers.entry(edge).or_default();
                let others = known.iter().filter(|(returned, _)| *returned < operation.invoked);
                let first = others.map(|(_, position)| *position).max().unwrap_or(0).max(first);
                let position = (first..=last).find(|&position| expect.holds(state(all, position)));
                match position {
                    Some(position) => known.push((operation.returned.unwrap_or(u64::MAX), position)),
                    None => wrong.push(format!(
                        "{}: {expect:?} was never so at {edge:?} meanwhile ({first}..={last} of {all:?})",
                        describe(operation)
                    )),
                }
            } else if !sight.holds(claim) {
                wrong.push(format!("{}: {claim:?} was never so", describe(operation)));
            }
        }
    }
}

struct Sight<'a> {
    history: &'a History,
    facts: &'a Facts,
    changes: &'a BTreeMap<Edge, Vec<Change>>,
    operation: &'a Operation,
}

impl Sight<'_> {
    fn holds(&self, claim: &Claim) -> bool {
        match claim {
            // Checked elsewhere.
            Claim::Born { .. } | Claim::Died { .. } | Claim::Set { .. } => true,
            Claim::Mode { inode, mode } => self.mode(*inode, *mode),
            // The past is not promised of what was purged.
            Claim::Saw { edge, expect, at: Some(at) } if self.facts.is_purged_at(edge, *at) => {
                expect.holds(self.facts.at(edge, *at)) || expect.holds(None)
            }
            Claim::Saw { edge, expect, at: Some(at) } => expect.holds(self.facts.at(edge, *at)),
            Claim::Saw { edge, expect, at: None } => self.meanwhile(edge, *expect),
            Claim::Version(death) => self.version(death).is_some_and(|version| {
                (version.target, version.created_at) == (death.target, death.created_at)
                    // It owns its target until that is undeleted.
                    && (version.undeleted || version.died == Some((death.died_at, death.owned)))
            }),
            // That it is not there is seen by who reads the rows.
            Claim::Purged { .. } => true,
            Claim::PurgedInode(inode) => self.facts.purged.contains_key(inode),
            Claim::NoDeath(death) => self.version(death).is_some_and(|version| version.purged),
            Claim::NotOwned(death) => self
                .version(death)
                .is_some_and(|version| version.undeleted || version.died.is_some_and(|(_, owned)| !owned)),
            Claim::HadDead(directory) => {
                let mut edges = self.facts.versions.keys();
                edges.any(|edge| edge.directory == *directory)
            }
            Claim::Gone(directory) => self.gone(*directory),
            Claim::NotEmpty(directory) => {
                let mut edges = self.changes.keys().filter(|edge| edge.directory == *directory);
                edges.any(|edge| self.meanwhile(edge, Expect::Present))
            }
            Claim::AnyOf(claims) => claims.iter().any(|claim| self.holds(claim)),
        }
    }

    fn version(&self, death: &Death) -> Option<&Version> {
        let versions = self.facts.versions.get(&death.edge)?;
        versions.iter().find(|version| version.died.is_some_and(|(at, _)| at == death.died_at))
    }

    fn meanwhile(&self, edge: &Edge, expect: Expect) -> bool {
        let all = self.changes.get(edge).map_or(&[][..], Vec::as_slice);
        let (first, last) = window(self.history, all, self.operation);
        (first..=last).any(|position| expect.holds(state(all, position)))
    }

    /// Whether the mode can have been so: set by somebody (or made so), and not certainly set anew since.
    fn mode(&self, inode: InodeId, mode: u32) -> bool {
        let sets = |other: &&Operation| {
            other.outcome != Outcome::Refused
                && matches!(other.claims[..], [Claim::Set { inode: set }] if set == inode)
        };
        let setters: Vec<&Operation> = self.history.operations.iter().filter(sets).collect();
        // From when on it was overwritten for sure, when `since` is when it had been set for sure.
        let overwritten = |since: Option<u64>| {
            setters.iter().any(|other| {
                let follows = since.is_none_or(|since| since < other.invoked);
                follows && other.returned.is_some_and(|returned| returned < self.operation.invoked)
            })
        };
        let invoked =
            |other: &Operation| self.operation.returned.is_none_or(|returned| other.invoked < returned);
        let by_setter = setters.iter().any(|other| {
            let kept = other.returned.is_none_or(|returned| !overwritten(Some(returned)));
            other.id & MODE_BITS == mode && invoked(other) && kept
        });
        let first = if inode.is_directory() { 0o755 } else { 0o644 };
        by_setter || (mode == first && !overwritten(None))
    }

    /// Removed, or just then being removed: what is undone later was gone for a while.
    fn gone(&self, directory: InodeId) -> bool {
        self.history.operations.iter().any(|other| {
            let begun = self.operation.returned.is_none_or(|returned| other.invoked < returned);
            let undone_before = other.outcome == Outcome::Refused
                && other.returned.is_some_and(|returned| returned < self.operation.invoked);
            other.removes == Some(directory) && begun && !undone_before
        })
    }
}
