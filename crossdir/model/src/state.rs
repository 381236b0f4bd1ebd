//! Everything there is at one instant: shards, messages, the coordinator's log, its driver.

use crate::dead::Death;
use crate::scenario::{
    DEATHS_MAX, DIRECTORIES_MAX, Directory, EDGES_MAX, Op, Scenario, TRANSACTIONS_MAX, Transaction,
};

/// Directories, or transactions: bit n is number n.
pub type Set = u16;

pub fn bit(n: impl Into<usize>) -> Set {
    1 << n.into()
}

pub fn has(set: Set, n: impl Into<usize>) -> bool {
    set & bit(n) != 0
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// None: removed.
    pub owner: [Option<Directory>; DIRECTORIES_MAX],
    pub edges: [Edge; EDGES_MAX],
    /// By whom a directory is locked that was revived, or is purged.
    pub locked: [Option<u8>; DIRECTORIES_MAX],
    pub deaths: [Death; DEATHS_MAX],
    /// Directories that are gone for good.
    pub purged: Set,
    pub steps: [Steps; TRANSACTIONS_MAX],
    pub rows: [Row; TRANSACTIONS_MAX],
    /// Transactions begun.
    pub begun: usize,
    /// How often a driver has taken over: the newest one's number.
    pub number: u8,
    /// On their way to the log, in order, none twice.
    pub proposals: Vec<Proposal>,
    pub driver: Driver,
    pub lost: Option<Box<Lost>>,
    /// Transactions the shards have forgotten: no step of them runs any more.
    pub forgotten: Set,
    /// Without [`LateView`](crate::Weakness::LateView) never: a lost attempt to take over may still read its view.
    pub dormant: bool,
    pub crashes: u8,
    /// Not of the protocol: what callers were told, and what was seen that must not be.
    pub answered: [Option<Reply>; TRANSACTIONS_MAX],
    pub made: Set,
    /// Deaths that were undone.
    pub undeleted: Set,
    pub wrong: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Edge {
    pub target: Option<Directory>,
    pub locked_by: Option<u8>,
}

/// A step of a transaction on a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    LockEdge,
    LinkEdge,
    SetOwner,
    UnlinkEdge,
    UnlockEdge,
    RemoveDirectory,
    RestoreDirectory,
    SetOtherOwner,
    ReviveDirectory,
    LockDeadEdge,
    UndeleteEdge,
    FreeDeadEdge,
    LockDirectory,
    UnlockDirectory,
    PurgeDeadEdge,
    PurgeDirectory,
}

pub const STEPS: [Step; 16] = [
    Step::LockEdge,
    Step::LinkEdge,
    Step::SetOwner,
    Step::UnlinkEdge,
    Step::UnlockEdge,
    Step::RemoveDirectory,
    Step::RestoreDirectory,
    Step::SetOtherOwner,
    Step::ReviveDirectory,
    Step::LockDeadEdge,
    Step::UndeleteEdge,
    Step::FreeDeadEdge,
    Step::LockDirectory,
    Step::UnlockDirectory,
    Step::PurgeDeadEdge,
    Step::PurgeDirectory,
];

/// Of one transaction; sets of [`Step`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Steps {
    /// On their way to the shards.
    pub sent: Set,
    /// Remembered by the shards.
    pub done: Set,
    pub refused: Set,
}

impl Steps {
    pub fn known(&self, step: Step) -> bool {
        has(self.done | self.refused, step as usize)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reply {
    Done,
    /// A shard refused a step, and remembers it.
    Refused,
    /// Seen by reading, which no shard remembers: the target is among the new parent's ancestors.
    Loop,
    /// Seen by reading: an ancestor is removed.
    Missing,
}

impl Reply {
    pub fn by_reading(self) -> bool {
        matches!(self, Reply::Loop | Reply::Missing)
    }
}

/// What the coordinator's log says of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Row {
    pub cleared: bool,
    pub finished: Option<Reply>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proposal {
    TakeOver { attempt: u8 },
    Cleared { transaction: u8, driver: u8 },
    Finish { transaction: u8, reply: Reply, driver: u8 },
}

/// The volatile half, or an attempt to make one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Driver {
    /// Which TakeOver is its own.
    pub attempt: u8,
    pub stage: Stage,
    /// Those that have, or wait for, their base locks, in the order they asked.
    pub queue: Vec<u8>,
    pub jobs: [Job; TRANSACTIONS_MAX],
}

/// A driver that goes on beside the one there is, with what it sent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lost {
    pub driver: Driver,
    pub sent: [Set; TRANSACTIONS_MAX],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// `view`: the rows as read too early, with [`ViewBeforeTakeOver`](crate::Weakness::ViewBeforeTakeOver).
    TakingOver { view: Option<[Row; TRANSACTIONS_MAX]> },
    /// Its TakeOver is applied; its view is to be read.
    Viewing { view: Option<[Row; TRANSACTIONS_MAX]> },
    /// With what the view had for a number.
    Made { number: u8 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Job {
    pub phase: Phase,
    /// The ancestors of the new parent as last read, of a move that had to wait.
    pub waits: Option<Set>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Not begun, or over and recorded.
    None,
    /// For its base locks.
    Queued {
        cleared: bool,
    },
    /// The owner of `at` is asked for next. `changed`: the targets of clear moves that became over meanwhile.
    Reading {
        at: Directory,
        read: Set,
        changed: Set,
        /// Of an exchange: the new parent to go on from.
        then: Option<Directory>,
    },
    /// `refusal`: what the reading came to, when not to the root.
    Read {
        read: Set,
        changed: Set,
        refusal: Option<Reply>,
    },
    /// For other moves.
    Waiting,
    /// Its clearance is proposed.
    Clearing,
    /// What it saw by reading is proposed as its end.
    Refusing,
    Stepping(Step),
    /// Its end is proposed.
    Over,
}

impl Job {
    pub const NONE: Job = Job { phase: Phase::None, waits: None };
}

impl Driver {
    pub fn new(attempt: u8, stage: Stage) -> Driver {
        Driver { attempt, stage, queue: Vec::new(), jobs: [Job::NONE; TRANSACTIONS_MAX] }
    }
}

impl State {
    pub fn first(scenario: &Scenario) -> State {
        let mut owner = [None; DIRECTORIES_MAX];
        for (directory, &parent) in scenario.parents.iter().enumerate() {
            owner[directory] = Some(parent);
        }
        let mut edges = [Edge::default(); EDGES_MAX];
        for (edge, &target) in scenario.living.iter().enumerate() {
            edges[edge].target = target;
        }
        let mut deaths = [Death::default(); DEATHS_MAX];
        for (death, &directory) in deaths.iter_mut().zip(&scenario.removed) {
            owner[usize::from(directory)] = None;
            *death = Death::Owned(None);
        }
        State {
            owner,
            edges,
            locked: Default::default(),
            deaths,
            purged: 0,
            steps: Default::default(),
            rows: Default::default(),
            begun: 0,
            number: 1,
            proposals: Vec::new(),
            // The first driver is made before anything is begun.
            driver: Driver::new(1, Stage::Made { number: 1 }),
            lost: None,
            forgotten: 0,
            dormant: false,
            crashes: 0,
            answered: [None; TRANSACTIONS_MAX],
            made: 0,
            undeleted: 0,
            wrong: None,
        }
    }

    pub fn propose(&mut self, proposal: Proposal) {
        if let Err(at) = self.proposals.binary_search(&proposal) {
            self.proposals.insert(at, proposal);
        }
    }

    /// With the lost driver in the place of the one there is.
    pub fn as_lost(&mut self, act: impl FnOnce(&mut State)) {
        let Some(mut lost) = self.lost.take() else { return };
        self.exchange(&mut lost);
        act(self);
        self.exchange(&mut lost);
        self.lost = Some(lost);
    }

    fn exchange(&mut self, lost: &mut Lost) {
        std::mem::swap(&mut self.driver, &mut lost.driver);
        for (steps, sent) in self.steps.iter_mut().zip(&mut lost.sent) {
            std::mem::swap(&mut steps.sent, sent);
        }
    }

    /// What the log says reaches the lost driver too, until the log says that there is another.
    pub fn tell_lost(&mut self, act: impl FnOnce(&mut State)) {
        let number = self.number;
        if self.lost.as_ref().is_some_and(|lost| lost.driver.stage == Stage::Made { number }) {
            self.as_lost(act);
        }
    }

    /// With the driver's number.
    pub fn propose_own(&mut self, proposal: impl FnOnce(u8) -> Proposal) {
        if let Stage::Made { number } = self.driver.stage {
            self.propose(proposal(number));
        }
    }

    pub fn send(&mut self, transaction: Transaction, step: Step) {
        self.driver.jobs[transaction].phase = Phase::Stepping(step);
        self.steps[transaction].sent |= bit(step as usize);
    }

    /// The step that decides is done.
    pub fn make(&mut self, transaction: Transaction) {
        self.made |= bit(transaction);
    }

    /// It is there, and nobody has locked it.
    pub fn can_change(&self, directory: Directory) -> bool {
        self.owner[usize::from(directory)].is_some() && self.locked[usize::from(directory)].is_none()
    }

    pub fn must_not_be(&mut self, wrong: &'static str) {
        self.wrong.get_or_insert(wrong);
    }

    /// XD-9: a caller is told one thing, however often.
    pub fn answer(&mut self, transaction: Transaction, reply: Reply) {
        match self.answered[transaction] {
            None => self.answered[transaction] = Some(reply),
            Some(told) if told == reply => {}
            Some(_) => self.must_not_be("a caller was told two things"),
        }
    }

    /// What who reads sees at an edge: a move by which its target has two living names for a while shows one of them only,
    /// an exchange what the name will lead to (XD-12).
    pub fn seen(&self, scenario: &Scenario, edge: usize) -> Option<Directory> {
        let Edge { target, locked_by } = self.edges[edge];
        let made = |by: &usize| has(self.steps[*by].done, Step::LinkEdge as usize);
        match locked_by.map(usize::from).filter(made).map(|by| scenario.ops[by]) {
            Some(Op::Move { .. }) => None,
            Some(Op::Exchange { other, .. }) => Some(other),
            Some(Op::Rmdir { .. } | Op::Undelete { .. } | Op::Purge { .. }) | None => target,
        }
    }
}
