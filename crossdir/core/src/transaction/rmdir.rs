//! rmdir: an empty directory loses its name, then its owner.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. LockDirectory (empty, and owned by the parent; nothing can be put into it from here on) | target's | 3. |
//! | 2. UnlinkEdge parent/name → target (owned); this decides | parent's | |
//! | 3. when 2 was refused: UnlockDirectory | target's | |
//! | 3. else: RemoveDirectory | target's | |
//!
//! Locks: the edge exclusive, the parent shared, the target exclusive.
//!
//! The directory is there, and empty, until the instant of 2; after it nobody finds it by name, so it is answered before 3.
//! Whoever has found it earlier and would put something into it is told that it is locked, and asks again: by
//! then it is removed, or it is not. A refusal is answered after 3: the caller may use the directory at once.

use std::collections::BTreeSet;

use eggs_proto::{InodeId, ShardId, TransactionId, pb};
use pb::write_op::Op;

use super::{Next, Outcome, Request, Steps, impossible, refused, reply};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct Rmdir {
    transaction: TransactionId,
    op: pb::Rmdir,
    state: State,
}

#[derive(Debug)]
enum State {
    Locking,
    Unlinking,
    Removing(pb::CrossdirReply),
    Unlocking(pb::CrossdirReply),
}

impl Rmdir {
    pub(super) fn new(transaction: TransactionId, op: pb::Rmdir) -> Self {
        Rmdir { transaction, op, state: State::Locking }
    }

    fn parent(&self) -> InodeId {
        InodeId(self.op.parent)
    }

    fn target(&self) -> InodeId {
        InodeId(self.op.target)
    }

    fn unlink(&self) -> Request {
        let step = pb::UnlinkEdge {
            transaction: self.transaction.0,
            directory: self.op.parent,
            name: self.op.name.clone(),
            target: self.op.target,
            owned: true,
            died_at: 0,
        };
        Request::Write(self.parent().shard(), Op::UnlinkEdge(step))
    }

    fn unlock(&self) -> Request {
        let step = pb::UnlockDirectory { transaction: self.transaction.0, directory: self.op.target };
        Request::Write(self.target().shard(), Op::UnlockDirectory(step))
    }

    fn remove(&self) -> Request {
        let step = pb::RemoveDirectory { transaction: self.transaction.0, directory: self.op.target };
        Request::Write(self.target().shard(), Op::RemoveDirectory(step))
    }
}

impl Steps for Rmdir {
    fn kind(&self) -> &'static str {
        "rmdir"
    }

    fn locks(&self) -> LockSet {
        LockSet::default()
            .with(Resource::Edge(self.parent(), self.op.name.clone()), Mode::Exclusive)
            .with(Resource::Directory(self.parent()), Mode::Shared)
            .with(Resource::Directory(self.target()), Mode::Exclusive)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        BTreeSet::from([self.target().shard(), self.parent().shard()])
    }

    fn first(&mut self) -> Request {
        let step = pb::LockDirectory {
            transaction: self.transaction.0,
            directory: self.op.target,
            owner: self.op.parent,
            removed: false,
        };
        Request::Write(self.target().shard(), Op::LockDirectory(step))
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (State::Locking, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::Unlinking;
                Next::Step(self.unlink())
            }
            (State::Locking, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::Unlinking, Outcome::Done { time } | Outcome::Linked { time, .. }) => {
                let removed = pb::RmdirReply { died_at: time.0 };
                let answer = reply(pb::crossdir_reply::Result::Rmdir(removed));
                self.state = State::Removing(answer.clone());
                Next::AnswerThen(answer, self.remove())
            }
            (State::Unlinking, Outcome::Refused(error, message)) => {
                self.state = State::Unlocking(refused(error, message));
                Next::Step(self.unlock())
            }
            (
                State::Unlocking(answer) | State::Removing(answer),
                Outcome::Done { .. } | Outcome::Linked { .. },
            ) => Next::Finish(answer.clone()),
            (_, outcome) => Next::Finish(impossible(self.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Locking => "locking the directory",
            State::Unlinking => "unlinking the name",
            State::Removing(_) => "removing the directory",
            State::Unlocking(_) => "unlocking the directory",
        }
    }
}
