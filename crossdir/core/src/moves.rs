//! Which moves of directories may run at once (XD-8).
//!
//! A move gives its target another owner, and must make no loop: its target must not be among the ancestors of its new
//! directory. It reads these one by one, while others run, and is *clear* to go on when what it has read is so: no other
//! move that is clear and not over has one of the ancestors for its target, and none was over since the reading began.
//! Nor has one the same target: the new name is free once it is linked, its shard may rename it alone, and who finds the
//! directory there must not give it an owner before the first has.
//! An exchange of two directories is one move with two targets and two new directories: neither target must be among the
//! ancestors of either.
//!
//! Why that is enough. Suppose there were a loop, and take of the moves that made a part of it the one that was cleared
//! last. The ancestors it had read led to the root and did not have its target, or targets, among them. So on the way from
//! its new directory round to a target of its there is a first one of these ancestors that got another owner later, by
//! another of those moves. That one was not cleared later; so it was clear and not over then, and had an ancestor for its
//! target. (Each target has one clear move at a time, so owners are set in the order in which moves are cleared.)
//!
//! Whoever waits keeps its place: a later move that would change what it relies on waits behind it. Waiting is for clear
//! moves and for earlier ones only, so it ends.

use std::collections::{BTreeMap, BTreeSet};

use eggs_proto::{InodeId, TransactionId};

/// What a move changes, and what it relies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    /// One, or the two of an exchange.
    pub(crate) targets: Vec<InodeId>,
    /// The new directory, its owner, and so on; up to the root, or to where reading ended. Of an exchange: of both.
    pub(crate) ancestors: Vec<InodeId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// What was read is so.
    Clear,
    /// [`Moves::over`] of another says when to read again.
    Wait,
    /// It may have changed while it was read.
    ReadAgain,
}

#[derive(Debug, Default)]
pub(crate) struct Moves {
    /// Clear and not over, and their targets.
    clear: BTreeMap<TransactionId, Vec<InodeId>>,
    /// As they last read it.
    waiting: BTreeMap<TransactionId, Claim>,
    /// Those that read, and what got another owner meanwhile.
    reading: BTreeMap<TransactionId, BTreeSet<InodeId>>,
}

impl Moves {
    /// Begins to read its ancestors.
    pub(crate) fn read(&mut self, transaction: TransactionId) {
        self.reading.insert(transaction, BTreeSet::new());
    }

    /// It was clear for an earlier driver, and may have begun.
    pub(crate) fn restore(&mut self, transaction: TransactionId, targets: Vec<InodeId>) {
        self.clear.insert(transaction, targets);
    }

    /// The ancestors are read, and the move would go on; it counts as clear from here on.
    pub(crate) fn go_on(&mut self, transaction: TransactionId, claim: Claim) -> Leave {
        let behind = self.waits_behind(transaction, &claim.targets);
        let targets = claim.targets.clone();
        let leave = self.settle(transaction, claim, behind);
        if leave == Leave::Clear {
            self.waiting.remove(&transaction);
            self.clear.insert(transaction, targets);
        }
        leave
    }

    /// What is read so far says that the move cannot be: clear to say so.
    pub(crate) fn refuse(&mut self, transaction: TransactionId, claim: Claim) -> Leave {
        self.settle(transaction, claim, false)
    }

    fn settle(&mut self, transaction: TransactionId, claim: Claim, behind: bool) -> Leave {
        let changed = self.reading.remove(&transaction).unwrap_or_default();
        if behind || self.is_blocked(&claim) {
            self.waiting.insert(transaction, claim);
            return Leave::Wait;
        }
        if claim.ancestors.iter().any(|ancestor| changed.contains(ancestor)) {
            // It keeps its place: what it has read is not changed by later ones for ever.
            self.waiting.insert(transaction, claim);
            self.read(transaction);
            return Leave::ReadAgain;
        }
        Leave::Clear
    }

    fn is_blocked(&self, claim: &Claim) -> bool {
        let changes = |target| claim.ancestors.contains(target) || claim.targets.contains(target);
        self.clear.values().flatten().any(changes)
    }

    fn waits_behind(&self, transaction: TransactionId, targets: &[InodeId]) -> bool {
        let relies = |earlier: &Claim| targets.iter().any(|target| earlier.ancestors.contains(target));
        self.waiting.range(..transaction).any(|(_, earlier)| relies(earlier))
    }

    /// It holds nobody up any more. Answers who has to read again, in the order they came: they are reading now.
    pub(crate) fn over(&mut self, transaction: TransactionId) -> Vec<TransactionId> {
        self.reading.remove(&transaction);
        let waited = self.waiting.remove(&transaction).is_some();
        let ran = self.clear.remove(&transaction);
        for changed in self.reading.values_mut() {
            changed.extend(ran.iter().flatten());
        }
        if !waited && ran.is_none() {
            return Vec::new();
        }
        let free = |(&id, waiting): (&TransactionId, &Claim)| {
            let free = !self.reading.contains_key(&id)
                && !self.is_blocked(waiting)
                && !self.waits_behind(id, &waiting.targets);
            free.then_some(id)
        };
        let free: Vec<TransactionId> = self.waiting.iter().filter_map(free).collect();
        for &id in &free {
            self.read(id);
        }
        free
    }

    /// Waiting for others.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}
