//! mkdir of several directories, each in the one before (`mkdir -p`): who sees one of them sees all.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. CreateDirectories (all of them, on one shard; nobody can see them) | chosen | 3. |
//! | 2. LinkEdge parent/first name → the first; this decides, for all | parent's | |
//! | 3. only when 2 was refused: DiscardDirectories | chosen | |
//!
//! Locks: the edge of the first exclusive, the parent shared. The refusal of 2 is answered before 3, as that of a
//! mkdir ([`super::mkdir`]): what is left over has no name.
//!
//! However many there are it costs what a mkdir costs. They share a shard: a path of them is walked on one host, and what is
//! made in them later goes round the shards as ever.

use std::collections::BTreeSet;

use eggs_proto::{InodeId, ShardId, TransactionId, pb};
use pb::write_op::Op;

use super::{Next, Outcome, Request, Steps, impossible, link_edge, refused, reply};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct MkdirPath {
    transaction: TransactionId,
    op: pb::MkdirPath,
    shard: ShardId,
    state: State,
}

#[derive(Debug)]
enum State {
    Creating,
    /// The first.
    Linking(InodeId),
    Discarding(pb::CrossdirReply),
}

impl MkdirPath {
    pub(super) fn new(transaction: TransactionId, op: pb::MkdirPath, shard: ShardId) -> Self {
        MkdirPath { transaction, op, shard, state: State::Creating }
    }

    fn parent(&self) -> InodeId {
        InodeId(self.op.parent)
    }

    fn name(&self) -> bytes::Bytes {
        self.op.names.first().cloned().unwrap_or_default()
    }

    /// Of those below the first.
    fn names(&self) -> Vec<bytes::Bytes> {
        self.op.names.iter().skip(1).cloned().collect()
    }

    fn link(&self, first: InodeId) -> Request {
        let name = (self.parent(), &self.name());
        link_edge(self.transaction, name, first, pb::Replace::Refuse)
    }

    fn discard(&self, first: InodeId) -> Request {
        let step = pb::DiscardDirectories {
            transaction: self.transaction.0,
            directory: first.0,
            names: self.names(),
        };
        Request::Write(self.shard, Op::DiscardDirectories(step))
    }
}

impl Steps for MkdirPath {
    fn kind(&self) -> &'static str {
        "mkdir path"
    }

    fn locks(&self) -> LockSet {
        LockSet::default()
            .with(Resource::Edge(self.parent(), self.name()), Mode::Exclusive)
            .with(Resource::Directory(self.parent()), Mode::Shared)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        BTreeSet::from([self.shard, self.parent().shard()])
    }

    fn first(&mut self) -> Request {
        let step = pb::CreateDirectories {
            transaction: self.transaction.0,
            owner: self.op.parent,
            names: self.names(),
            on_the_way: self.op.on_the_way,
            attributes: self.op.attributes,
        };
        Request::Write(self.shard, Op::CreateDirectories(step))
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (State::Creating, Outcome::Linked { link, .. }) if InodeId(link.inode).is_directory() => {
                let first = InodeId(link.inode);
                self.state = State::Linking(first);
                Next::Step(self.link(first))
            }
            (State::Creating, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::Linking(first), Outcome::Linked { link, .. }) => {
                let inodes = (0..self.op.names.len() as u64).map(|n| first.0 + n).collect();
                let made = pb::MkdirPathReply { inodes, created_at: link.created_at };
                Next::Finish(reply(pb::crossdir_reply::Result::MkdirPath(made)))
            }
            (State::Linking(first), Outcome::Refused(error, message)) => {
                let discard = self.discard(*first);
                let answer = refused(error, message);
                self.state = State::Discarding(answer.clone());
                Next::AnswerThen(answer, discard)
            }
            // What could not be discarded is invisible all the same.
            (State::Discarding(answer), _) => Next::Finish(answer.clone()),
            (_, outcome) => Next::Finish(impossible(self.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Creating => "creating the directories",
            State::Linking(_) => "linking the name",
            State::Discarding(_) => "discarding the directories",
        }
    }
}
