//! Purging a dead edge that owns a file or symlink of another shard, with the file.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. PurgeDeadEdge directory/name → target (it died there, and owns it); this decides | directory's | |
//! | 2. PurgeFile: its blocks may be erased | target's | |
//!
//! Locks: the edge exclusive, the directory shared.
//!
//! After 1 nobody finds the file any more, living or dead, and nobody can bring it back; that 2 comes is recorded. Within one
//! shard the shard does it alone.

use std::collections::BTreeSet;

use eggs_proto::{InodeId, ShardId, TransactionId, pb};
use pb::write_op::Op;

use super::{Next, Outcome, Request, Steps, impossible, refused, reply};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct PurgeFile {
    dead: Dead,
    state: State,
}

#[derive(Debug)]
enum State {
    PurgingEdge,
    PurgingFile,
}

impl PurgeFile {
    pub(super) fn new(transaction: TransactionId, op: pb::PurgeInode) -> Self {
        PurgeFile { dead: Dead { transaction, op }, state: State::PurgingEdge }
    }
}

impl Steps for PurgeFile {
    fn kind(&self) -> &'static str {
        "purge file"
    }

    fn locks(&self) -> LockSet {
        self.dead.locks()
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        self.dead.shards()
    }

    fn first(&mut self) -> Request {
        self.dead.purge_edge()
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (State::PurgingEdge, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::PurgingFile;
                let step = pb::PurgeFile { transaction: self.dead.transaction.0, file: self.dead.op.target };
                Next::Step(Request::Write(self.dead.target().shard(), Op::PurgeFile(step)))
            }
            (State::PurgingEdge, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::PurgingFile, Outcome::Done { .. } | Outcome::Linked { .. }) => Next::Finish(purged()),
            (_, outcome) => Next::Finish(impossible(self.dead.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::PurgingEdge => "purging the dead name",
            State::PurgingFile => "purging the file",
        }
    }
}

pub(super) fn purged() -> pb::CrossdirReply {
    reply(pb::crossdir_reply::Result::PurgeInode(pb::PurgeInodeReply {}))
}

/// The dead edge and what it owns.
#[derive(Debug)]
pub(super) struct Dead {
    pub transaction: TransactionId,
    pub op: pb::PurgeInode,
}

impl Dead {
    pub(super) fn directory(&self) -> InodeId {
        InodeId(self.op.directory)
    }

    pub(super) fn target(&self) -> InodeId {
        InodeId(self.op.target)
    }

    pub(super) fn locks(&self) -> LockSet {
        LockSet::default()
            .with(Resource::Edge(self.directory(), self.op.name.clone()), Mode::Exclusive)
            .with(Resource::Directory(self.directory()), Mode::Shared)
    }

    pub(super) fn shards(&self) -> BTreeSet<ShardId> {
        BTreeSet::from([self.directory().shard(), self.target().shard()])
    }

    pub(super) fn purge_edge(&self) -> Request {
        let step = pb::PurgeDeadEdge {
            transaction: self.transaction.0,
            directory: self.op.directory,
            name: self.op.name.clone(),
            died_at: self.op.died_at,
            target: self.op.target,
        };
        Request::Write(self.directory().shard(), Op::PurgeDeadEdge(step))
    }
}
