//! Moving a file or symlink to another directory.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. LockEdge old/name → target (it is there, and stays) | old directory's | 3. |
//! | 2. LinkEdge new/name → target; this decides | new directory's | |
//! | 3. when 2 was refused: UnlockEdge old/name | old directory's | |
//! | 3. else: UnlinkEdge old/name (not owned: the file lives on) | old directory's | |
//!
//! Locks: both edges exclusive, both directories shared.
//!
//! The move is made at the instant of 2: 3 records it as that of the old name's death, and whoever meets the old name
//! locked asks the coordinator, so nobody sees the file twice, or nowhere, at any instant. That is why a move that
//! is made is answered before 3. A refused one is answered after: the caller finds the old name unlocked.

use std::collections::BTreeSet;

use eggs_proto::{InodeId, ShardId, Time, TransactionId, pb};
use pb::write_op::Op;

use super::{Moved, Next, Outcome, Request, Steps, impossible, link_edge, refused, reply};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct MoveFile {
    edges: Edges,
    state: State,
}

#[derive(Debug)]
enum State {
    Locking,
    Linking,
    /// What to answer, and when the new name came.
    Unlinking(pb::CrossdirReply, Time),
    Unlocking(pb::CrossdirReply),
}

impl MoveFile {
    pub(super) fn new(transaction: TransactionId, op: pb::Move) -> Self {
        let replace = op.replace();
        MoveFile { edges: Edges { transaction, op, replace }, state: State::Locking }
    }
}

impl Steps for MoveFile {
    fn kind(&self) -> &'static str {
        "move file"
    }

    fn locks(&self) -> LockSet {
        self.edges.locks()
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        self.edges.shards()
    }

    fn first(&mut self) -> Request {
        self.edges.lock()
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (State::Locking, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::Linking;
                Next::Step(self.edges.link())
            }
            (State::Locking, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::Linking, Outcome::Linked { link, .. }) => {
                let moved = pb::MoveReply { replaced: link.replaced };
                let answer = reply(pb::crossdir_reply::Result::Move(moved));
                let moved_at = Time(link.created_at);
                self.state = State::Unlinking(answer.clone(), moved_at);
                Next::AnswerThen(answer, self.edges.unlink(moved_at))
            }
            (State::Linking, Outcome::Refused(error, message)) => {
                self.state = State::Unlocking(refused(error, message));
                Next::Step(self.edges.unlock())
            }
            (
                State::Unlinking(answer, _) | State::Unlocking(answer),
                Outcome::Done { .. } | Outcome::Linked { .. },
            ) => Next::Finish(answer.clone()),
            (_, outcome) => Next::Finish(impossible(self.edges.transaction, self.step(), &outcome)),
        }
    }

    fn moved(&self) -> Moved {
        match self.state {
            State::Locking => Moved::NotYet,
            State::Unlocking(_) => Moved::Never,
            State::Linking => Moved::Perhaps,
            State::Unlinking(_, at) => Moved::At(at),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Locking => "locking the old name",
            State::Linking => "linking the new name",
            State::Unlinking(..) => "unlinking the old name",
            State::Unlocking(_) => "unlocking the old name",
        }
    }
}

/// The two edges of a move, and what is done to them.
#[derive(Debug)]
pub(super) struct Edges {
    pub transaction: TransactionId,
    pub op: pb::Move,
    pub replace: pb::Replace,
}

impl Edges {
    pub(super) fn old_directory(&self) -> InodeId {
        InodeId(self.op.old_directory)
    }

    pub(super) fn new_directory(&self) -> InodeId {
        InodeId(self.op.new_directory)
    }

    pub(super) fn target(&self) -> InodeId {
        InodeId(self.op.target)
    }

    pub(super) fn locks(&self) -> LockSet {
        LockSet::default()
            .with(Resource::Edge(self.old_directory(), self.op.old_name.clone()), Mode::Exclusive)
            .with(Resource::Edge(self.new_directory(), self.op.new_name.clone()), Mode::Exclusive)
            .with(Resource::Directory(self.old_directory()), Mode::Shared)
            .with(Resource::Directory(self.new_directory()), Mode::Shared)
    }

    pub(super) fn shards(&self) -> BTreeSet<ShardId> {
        BTreeSet::from([self.old_directory().shard(), self.new_directory().shard()])
    }

    pub(super) fn lock(&self) -> Request {
        let step = pb::LockEdge {
            transaction: self.transaction.0,
            directory: self.op.old_directory,
            name: self.op.old_name.clone(),
            target: self.op.target,
        };
        Request::Write(self.old_directory().shard(), Op::LockEdge(step))
    }

    pub(super) fn unlock(&self) -> Request {
        let step = pb::UnlockEdge {
            transaction: self.transaction.0,
            directory: self.op.old_directory,
            name: self.op.old_name.clone(),
        };
        Request::Write(self.old_directory().shard(), Op::UnlockEdge(step))
    }

    pub(super) fn link(&self) -> Request {
        let name = (self.new_directory(), &self.op.new_name);
        link_edge(self.transaction, name, self.target(), self.replace)
    }

    /// The old name dies at the instant the new one came.
    pub(super) fn unlink(&self, moved_at: Time) -> Request {
        let step = pb::UnlinkEdge {
            transaction: self.transaction.0,
            directory: self.op.old_directory,
            name: self.op.old_name.clone(),
            target: self.op.target,
            owned: false,
            died_at: moved_at.0,
        };
        Request::Write(self.old_directory().shard(), Op::UnlinkEdge(step))
    }
}
