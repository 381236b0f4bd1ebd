//! Which moves of directories may run at once (XD-8).
//!
//! A move changes who owns its target, and relies on who the ancestors of its new directory are: its target must not be
//! among them. So two moves are in each other's way when the target of one is among the ancestors of the other. A move
//! reads its ancestors one by one while others run; it is *clear* to go on when what it has read is still so and no move
//! that is clear, and not over, is in its way. Until it is over, later ones that would be in its way wait; so what it has
//! read stays so, and no two moves can make a loop together.
//!
//! Whoever waits keeps its place: a later move that is in the way of one that waits, waits behind it. Waiting is for
//! clear moves and for earlier ones only, so it ends.

use std::collections::{BTreeMap, BTreeSet};

use eggs_proto::{InodeId, TransactionId};

/// What a move changes, and what it relies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) target: InodeId,
    /// The new directory, its owner, and so on; up to the root, or to where reading ended.
    pub(crate) ancestors: Vec<InodeId>,
}

impl Claim {
    fn relies_on(&self, other: &Claim) -> bool {
        self.ancestors.contains(&other.target)
    }

    fn is_in_the_way_of(&self, other: &Claim) -> bool {
        self.relies_on(other) || other.relies_on(self)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// What was read is so, and stays so until [`Moves::over`].
    Clear,
    /// [`Moves::over`] of another says when to read again.
    Wait,
    /// It may have changed while it was read.
    ReadAgain,
}

#[derive(Debug, Default)]
pub(crate) struct Moves {
    clear: BTreeMap<TransactionId, Claim>,
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
    pub(crate) fn restore(&mut self, transaction: TransactionId, claim: Claim) {
        self.clear.insert(transaction, claim);
    }

    /// The ancestors are read, and the move would go on.
    pub(crate) fn go_on(&mut self, transaction: TransactionId, claim: Claim) -> Leave {
        let blocked = self.clear.values().any(|other| claim.is_in_the_way_of(other));
        let leave = self.settle(transaction, &claim, blocked || self.waits_behind(transaction, &claim));
        if leave == Leave::Clear {
            self.waiting.remove(&transaction);
            self.clear.insert(transaction, claim);
        }
        leave
    }

    /// What is read so far says that the move cannot be: clear to say so. It holds nobody up from here on.
    pub(crate) fn refuse(&mut self, transaction: TransactionId, claim: &Claim) -> Leave {
        let blocked = self.clear.values().any(|other| claim.relies_on(other));
        self.settle(transaction, claim, blocked)
    }

    fn settle(&mut self, transaction: TransactionId, claim: &Claim, blocked: bool) -> Leave {
        let changed = self.reading.remove(&transaction).unwrap_or_default();
        if blocked {
            self.waiting.insert(transaction, claim.clone());
            return Leave::Wait;
        }
        if claim.ancestors.iter().any(|ancestor| changed.contains(ancestor)) {
            self.read(transaction);
            return Leave::ReadAgain;
        }
        Leave::Clear
    }

    fn waits_behind(&self, transaction: TransactionId, claim: &Claim) -> bool {
        self.waiting.range(..transaction).any(|(_, earlier)| claim.is_in_the_way_of(earlier))
    }

    /// It holds nobody up any more. Answers who has to read again, in the order they came: they are reading now.
    pub(crate) fn over(&mut self, transaction: TransactionId) -> Vec<TransactionId> {
        self.reading.remove(&transaction);
        let waited = self.waiting.remove(&transaction);
        let ran = self.clear.remove(&transaction);
        if let Some(ran) = &ran {
            for changed in self.reading.values_mut() {
                changed.insert(ran.target);
            }
        }
        if ran.is_none() && waited.is_none() {
            return Vec::new();
        }
        let free = |(&id, waiting): (&TransactionId, &Claim)| {
            let free = !self.reading.contains_key(&id)
                && !self.clear.values().any(|other| waiting.is_in_the_way_of(other))
                && !self.waits_behind(id, waiting);
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
