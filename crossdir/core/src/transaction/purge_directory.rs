//! Purging a removed directory that has no entries any more, living or dead, with the dead edge that owns it.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. LockDirectory (it is removed and has no entries; nobody brings it back from here on) | target's | 3. |
//! | 2. PurgeDeadEdge parent/name → target (it died there, and owns it); this decides | parent's | |
//! | 3. when 2 was refused: UnlockDirectory | target's | |
//! | 3. else: PurgeDirectory | target's | |
//!
//! Locks: the edge exclusive, the parent shared, the target exclusive.
//!
//! As rmdir ([`super::rmdir`]), one life later. It is answered after 3: nothing of it is left then.

use std::collections::BTreeSet;

use eggs_proto::{ShardId, TransactionId, pb};
use pb::write_op::Op;

use super::purge_file::{Dead, purged};
use super::{Next, Outcome, Request, Steps, impossible, refused};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct PurgeDirectory {
    dead: Dead,
    state: State,
}

#[derive(Debug)]
enum State {
    Locking,
    PurgingEdge,
    Purging,
    Unlocking(pb::CrossdirReply),
}

impl PurgeDirectory {
    pub(super) fn new(transaction: TransactionId, op: pb::PurgeInode) -> Self {
        PurgeDirectory { dead: Dead { transaction, op }, state: State::Locking }
    }

    fn on_target(&self, op: Op) -> Next {
        Next::Step(Request::Write(self.dead.target().shard(), op))
    }
}

impl Steps for PurgeDirectory {
    fn kind(&self) -> &'static str {
        "purge directory"
    }

    fn locks(&self) -> LockSet {
        self.dead.locks().with(Resource::Directory(self.dead.target()), Mode::Exclusive)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        self.dead.shards()
    }

    fn first(&mut self) -> Request {
        let step = pb::LockDirectory {
            transaction: self.dead.transaction.0,
            directory: self.dead.op.target,
            owner: 0,
            removed: true,
        };
        Request::Write(self.dead.target().shard(), Op::LockDirectory(step))
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        let (transaction, directory) = (self.dead.transaction.0, self.dead.op.target);
        match (&self.state, outcome) {
            (State::Locking, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::PurgingEdge;
                Next::Step(self.dead.purge_edge())
            }
            (State::Locking, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::PurgingEdge, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::Purging;
                self.on_target(Op::PurgeDirectory(pb::PurgeDirectory { transaction, directory }))
            }
            (State::PurgingEdge, Outcome::Refused(error, message)) => {
                self.state = State::Unlocking(refused(error, message));
                self.on_target(Op::UnlockDirectory(pb::UnlockDirectory { transaction, directory }))
            }
            (State::Purging, Outcome::Done { .. } | Outcome::Linked { .. }) => Next::Finish(purged()),
            (State::Unlocking(answer), Outcome::Done { .. } | Outcome::Linked { .. }) => {
                Next::Finish(answer.clone())
            }
            (_, outcome) => Next::Finish(impossible(self.dead.transaction, self.step(), &outcome)),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Locking => "locking the directory",
            State::PurgingEdge => "purging the dead name",
            State::Purging => "purging the directory",
            State::Unlocking(_) => "unlocking the directory",
        }
    }
}
