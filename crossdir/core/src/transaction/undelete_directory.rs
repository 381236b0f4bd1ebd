//! Undeleting a removed directory: it comes back empty, with its dead entries.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. ReviveDirectory (owner: the new parent; locked, nobody can see it) | target's | 4. |
//! | 2. into the directory it died in: UndeleteEdge old/name → new/name; this decides | old parent's | |
//! | 2. else: LockDeadEdge old/name → target (it died there, and owns it) | old parent's | 3. |
//! | 2b. LinkEdge new/name → target (never replaces anything); this decides | new parent's | |
//! | 3. after LockDeadEdge: FreeDeadEdge old/name (it owns the target no more; when 2b was refused: still) | old parent's | |
//! | 4. UnlockDirectory; when it was refused: RemoveDirectory | target's | |
//!
//! Locks: both edges exclusive, both parents shared, the target exclusive.
//!
//! The directory is invisible until its one edge is there, and complete then; who puts something into it before 4 waits. It
//! is answered after 4: the caller finds it unlocked, or removed as it was. It makes no loop: a removed directory has
//! nothing living in it, so no new parent is below it.

use std::collections::BTreeSet;

use eggs_proto::{ShardId, TransactionId, pb};
use pb::write_op::Op;

use super::undelete_file::{DeadAndNew, undeleted};
use super::{Next, Outcome, Request, Steps, impossible, refused};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct UndeleteDirectory {
    edges: DeadAndNew,
    state: State,
}

#[derive(Debug)]
enum State {
    Reviving,
    Undeleting,
    LockingDead,
    Linking,
    /// What to answer, and whether it lives.
    Freeing(pb::CrossdirReply, bool),
    Unlocking(pb::CrossdirReply),
    Removing(pb::CrossdirReply),
}

impl UndeleteDirectory {
    pub(super) fn new(transaction: TransactionId, op: pb::UndeleteInode) -> Self {
        UndeleteDirectory { edges: DeadAndNew { transaction, op }, state: State::Reviving }
    }

    fn unlock(&mut self, answer: pb::CrossdirReply) -> Next {
        let step =
            pb::UnlockDirectory { transaction: self.edges.transaction.0, directory: self.edges.op.target };
        self.state = State::Unlocking(answer);
        Next::Step(Request::Write(self.edges.target().shard(), Op::UnlockDirectory(step)))
    }

    fn remove(&mut self, answer: pb::CrossdirReply) -> Next {
        let step =
            pb::RemoveDirectory { transaction: self.edges.transaction.0, directory: self.edges.op.target };
        self.state = State::Removing(answer);
        Next::Step(Request::Write(self.edges.target().shard(), Op::RemoveDirectory(step)))
    }
}

impl Steps for UndeleteDirectory {
    fn kind(&self) -> &'static str {
        "undelete directory"
    }

    fn locks(&self) -> LockSet {
        self.edges.locks().with(Resource::Directory(self.edges.target()), Mode::Exclusive)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        let mut shards = self.edges.shards();
        shards.insert(self.edges.target().shard());
        shards
    }

    fn first(&mut self) -> Request {
        let step = pb::ReviveDirectory {
            transaction: self.edges.transaction.0,
            directory: self.edges.op.target,
            owner: self.edges.op.new_directory,
        };
        Request::Write(self.edges.target().shard(), Op::ReviveDirectory(step))
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (State::Reviving, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                let (state, request) = if self.edges.old_directory() == self.edges.new_directory() {
                    (State::Undeleting, self.edges.undelete())
                } else {
                    (State::LockingDead, self.edges.lock())
                };
                self.state = state;
                Next::Step(request)
            }
            (State::Reviving, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::Undeleting, Outcome::Linked { link, .. }) => self.unlock(undeleted(link.created_at)),
            (State::Undeleting | State::LockingDead, Outcome::Refused(error, message)) => {
                self.remove(refused(error, message))
            }
            (State::LockingDead, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::Linking;
                Next::Step(self.edges.link())
            }
            (State::Linking, Outcome::Linked { link, .. }) => {
                self.state = State::Freeing(undeleted(link.created_at), true);
                Next::Step(self.edges.free(true))
            }
            (State::Linking, Outcome::Refused(error, message)) => {
                self.state = State::Freeing(refused(error, message), false);
                Next::Step(self.edges.free(false))
            }
            (State::Freeing(answer, lives), Outcome::Done { .. } | Outcome::Linked { .. }) => {
                let (answer, lives) = (answer.clone(), *lives);
                if lives { self.unlock(answer) } else { self.remove(answer) }
            }
            (
                State::Unlocking(answer) | State::Removing(answer),
                Outcome::Done { .. } | Outcome::Linked { .. },
            ) => Next::Finish(answer.clone()),
            (_, outcome) => Next::Finish(impossible(self.edges.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Reviving => "reviving the directory",
            State::Undeleting => "undeleting the name",
            State::LockingDead => "locking the dead name",
            State::Linking => "linking the new name",
            State::Freeing(..) => "freeing the dead name",
            State::Unlocking(_) => "unlocking the directory",
            State::Removing(_) => "removing the directory again",
        }
    }
}
