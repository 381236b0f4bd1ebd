//! Undeleting a file or symlink under another directory than the one it died in.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. LockDeadEdge old/name → target (it died there, and owns it) | old directory's | 3. |
//! | 2. LinkEdge new/name → target (never replaces anything); this decides | new directory's | |
//! | 3. FreeDeadEdge old/name (it owns the target no more; when 2 was refused: still) | old directory's | |
//!
//! Locks: both edges exclusive, both directories shared.
//!
//! From the instant of 2 the file is there, and the past stays as it was: no reader has to ask anybody. It is answered
//! after 3, so that nobody who was told of it finds the dead edge as it was. Within its directory the shard does it alone.

use std::collections::BTreeSet;

use eggs_proto::{InodeId, ShardId, TransactionId, pb};
use pb::write_op::Op;

use super::{Next, Outcome, Request, Steps, impossible, link_edge, refused, reply};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct UndeleteFile {
    edges: DeadAndNew,
    state: State,
}

#[derive(Debug)]
enum State {
    Locking,
    Linking,
    Freeing(pb::CrossdirReply),
}

impl UndeleteFile {
    pub(super) fn new(transaction: TransactionId, op: pb::UndeleteInode) -> Self {
        UndeleteFile { edges: DeadAndNew { transaction, op }, state: State::Locking }
    }
}

impl Steps for UndeleteFile {
    fn kind(&self) -> &'static str {
        "undelete file"
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
                self.state = State::Freeing(undeleted(link.created_at));
                Next::Step(self.edges.free(true))
            }
            (State::Linking, Outcome::Refused(error, message)) => {
                self.state = State::Freeing(refused(error, message));
                Next::Step(self.edges.free(false))
            }
            (State::Freeing(answer), Outcome::Done { .. } | Outcome::Linked { .. }) => {
                Next::Finish(answer.clone())
            }
            (_, outcome) => Next::Finish(impossible(self.edges.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Locking => "locking the dead name",
            State::Linking => "linking the new name",
            State::Freeing(_) => "freeing the dead name",
        }
    }
}

pub(super) fn undeleted(created_at: u64) -> pb::CrossdirReply {
    reply(pb::crossdir_reply::Result::UndeleteInode(pb::UndeleteInodeReply { created_at }))
}

/// The dead edge and the new one, and what is done to them.
#[derive(Debug)]
pub(super) struct DeadAndNew {
    pub transaction: TransactionId,
    pub op: pb::UndeleteInode,
}

impl DeadAndNew {
    pub(super) fn old_directory(&self) -> InodeId {
        InodeId(self.op.directory)
    }

    pub(super) fn new_directory(&self) -> InodeId {
        InodeId(self.op.new_directory)
    }

    pub(super) fn target(&self) -> InodeId {
        InodeId(self.op.target)
    }

    pub(super) fn locks(&self) -> LockSet {
        LockSet::default()
            .with(Resource::Edge(self.old_directory(), self.op.name.clone()), Mode::Exclusive)
            .with(Resource::Edge(self.new_directory(), self.op.new_name.clone()), Mode::Exclusive)
            .with(Resource::Directory(self.old_directory()), Mode::Shared)
            .with(Resource::Directory(self.new_directory()), Mode::Shared)
    }

    pub(super) fn shards(&self) -> BTreeSet<ShardId> {
        BTreeSet::from([self.old_directory().shard(), self.new_directory().shard()])
    }

    pub(super) fn lock(&self) -> Request {
        let step = pb::LockDeadEdge {
            transaction: self.transaction.0,
            directory: self.op.directory,
            name: self.op.name.clone(),
            died_at: self.op.died_at,
            target: self.op.target,
        };
        Request::Write(self.old_directory().shard(), Op::LockDeadEdge(step))
    }

    pub(super) fn link(&self) -> Request {
        let name = (self.new_directory(), &self.op.new_name);
        link_edge(self.transaction, name, self.target(), pb::Replace::Refuse)
    }

    pub(super) fn free(&self, lives: bool) -> Request {
        let step = pb::FreeDeadEdge {
            transaction: self.transaction.0,
            directory: self.op.directory,
            name: self.op.name.clone(),
            died_at: self.op.died_at,
            lives,
        };
        Request::Write(self.old_directory().shard(), Op::FreeDeadEdge(step))
    }

    /// Both edges are of one directory: one step for both.
    pub(super) fn undelete(&self) -> Request {
        let step = pb::UndeleteEdge {
            transaction: self.transaction.0,
            directory: self.op.directory,
            name: self.op.name.clone(),
            died_at: self.op.died_at,
            target: self.op.target,
            new_name: self.op.new_name.clone(),
        };
        Request::Write(self.old_directory().shard(), Op::UndeleteEdge(step))
    }
}
