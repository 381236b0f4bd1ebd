//! rmdir: an empty directory loses its owner, then its name.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. RemoveDirectory (empty, and owned by the parent; nothing can be put into it from here on) | target's | 3. |
//! | 2. UnlinkEdge parent/name → target (owned); this decides | parent's | |
//! | 3. only when 2 was refused: RestoreDirectory | target's | |
//!
//! Locks: the edge exclusive, the parent shared, the target exclusive. 3 is done before the refusal
//! is answered: the caller may use the directory, by the name it has by now, at once.

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
    Removing,
    Unlinking,
    Restoring(pb::CrossdirReply),
}

impl Rmdir {
    pub(super) fn new(transaction: TransactionId, op: pb::Rmdir) -> Self {
        Rmdir { transaction, op, state: State::Removing }
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

    fn restore(&self) -> Request {
        let step = pb::RestoreDirectory {
            transaction: self.transaction.0,
            directory: self.op.target,
            owner: self.op.parent,
        };
        Request::Write(self.target().shard(), Op::RestoreDirectory(step))
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
        let step = pb::RemoveDirectory {
            transaction: self.transaction.0,
            directory: self.op.target,
            owner: self.op.parent,
        };
        Request::Write(self.target().shard(), Op::RemoveDirectory(step))
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (State::Removing, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::Unlinking;
                Next::Step(self.unlink())
            }
            (State::Removing, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::Unlinking, Outcome::Done { time } | Outcome::Linked { time, .. }) => {
                let removed = pb::RmdirReply { died_at: time.0 };
                Next::Finish(reply(pb::crossdir_reply::Result::Rmdir(removed)))
            }
            (State::Unlinking, Outcome::Refused(error, message)) => {
                self.state = State::Restoring(refused(error, message));
                Next::Step(self.restore())
            }
            (State::Restoring(answer), Outcome::Done { .. } | Outcome::Linked { .. }) => {
                Next::Finish(answer.clone())
            }
            (_, outcome) => Next::Finish(impossible(self.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Removing => "removing the directory",
            State::Unlinking => "unlinking the name",
            State::Restoring(_) => "restoring the directory",
        }
    }
}
