//! mkdir: a new directory on the shard chosen for it, under a name of its parent.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. CreateDirectory (owner: the parent; nobody can see it) | chosen | 3. |
//! | 2. LinkEdge parent/name → directory; this decides | parent's | |
//! | 3. only when 2 was refused: DiscardDirectory | chosen | |
//!
//! Locks: the edge exclusive, the parent shared. The refusal of 2 is answered before 3: the directory
//! that is left over has no name and an id nobody was told.

use std::collections::BTreeSet;

use eggs_proto::{InodeId, ShardId, TransactionId, pb};
use pb::write_op::Op;

use super::{Next, Outcome, Request, Steps, impossible, link_edge, refused, reply};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct Mkdir {
    transaction: TransactionId,
    op: pb::Mkdir,
    shard: ShardId,
    state: State,
}

#[derive(Debug)]
enum State {
    Creating,
    Linking(InodeId),
    Discarding(pb::CrossdirReply),
}

impl Mkdir {
    pub(super) fn new(transaction: TransactionId, op: pb::Mkdir, shard: ShardId) -> Self {
        Mkdir { transaction, op, shard, state: State::Creating }
    }

    fn parent(&self) -> InodeId {
        InodeId(self.op.parent)
    }

    fn link(&self, directory: InodeId) -> Request {
        let name = (self.parent(), &self.op.name);
        link_edge(self.transaction, name, directory, pb::Replace::Refuse)
    }

    fn discard(&self, directory: InodeId) -> Request {
        let step = pb::DiscardDirectory { transaction: self.transaction.0, directory: directory.0 };
        Request::Write(self.shard, Op::DiscardDirectory(step))
    }
}

impl Steps for Mkdir {
    fn kind(&self) -> &'static str {
        "mkdir"
    }

    fn locks(&self) -> LockSet {
        LockSet::default()
            .with(Resource::Edge(self.parent(), self.op.name.clone()), Mode::Exclusive)
            .with(Resource::Directory(self.parent()), Mode::Shared)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        BTreeSet::from([self.shard, self.parent().shard()])
    }

    fn first(&mut self) -> Request {
        let step = pb::CreateDirectory {
            transaction: self.transaction.0,
            owner: self.op.parent,
            attributes: self.op.attributes,
        };
        Request::Write(self.shard, Op::CreateDirectory(step))
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (State::Creating, Outcome::Linked { link, .. }) if InodeId(link.inode).is_directory() => {
                let directory = InodeId(link.inode);
                self.state = State::Linking(directory);
                Next::Step(self.link(directory))
            }
            (State::Creating, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::Linking(directory), Outcome::Linked { link, .. }) => {
                let made = pb::MkdirReply { inode: directory.0, created_at: link.created_at };
                Next::Finish(reply(pb::crossdir_reply::Result::Mkdir(made)))
            }
            (State::Linking(directory), Outcome::Refused(error, message)) => {
                let discard = self.discard(*directory);
                let answer = refused(error, message);
                self.state = State::Discarding(answer.clone());
                Next::AnswerThen(answer, discard)
            }
            // A directory that could not be discarded is invisible all the same.
            (State::Discarding(answer), _) => Next::Finish(answer.clone()),
            (_, outcome) => Next::Finish(impossible(self.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Creating => "creating the directory",
            State::Linking(_) => "linking the name",
            State::Discarding(_) => "discarding the directory",
        }
    }
}
