//! Moving a directory to another parent.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. Stat, from the new parent up to the root: the moved directory is not among its ancestors | theirs | |
//! | 2. LockEdge old/name → target | old parent's | 4. |
//! | 3. LinkEdge new/name → target (never replaces anything); this decides | new parent's | |
//! | 4. when 3 was refused: UnlockEdge old/name | old parent's | |
//! | 4. else: SetOwner target → new parent | target's | |
//! | 5. UnlinkEdge old/name (not owned) | old parent's | |
//!
//! Locks: both edges exclusive, both parents and the moved directory shared (they are not removed
//! meanwhile), and the tree exclusive.
//!
//! Why the tree lock makes 1 true until 4: the owner of a directory changes by SetOwner, which only
//! a transaction of this kind does, and by its removal. An ancestor of the new parent has
//! a directory in it, so it cannot be removed; the new parent is locked. Files, mkdir and rmdir
//! need no tree lock, therefore.
//!
//! The move is made at the instant of 3, and answered before 5, as that of a file ([`super::move_file`]).
//!
//! 1 is the one step that no shard remembers. So that a repetition after a crash comes to the same
//! answer the tree stays locked until the answer is recorded (XD-8): no other move can have changed
//! the ancestors, and this one's own SetOwner does not (the target is not among them).

use std::collections::BTreeSet;

use eggs_proto::limits::DEPTH_MAX;
use eggs_proto::{CrossdirError, InodeId, ShardId, Time, TransactionId, pb};
use pb::write_op::Op;

use super::move_file::Edges;
use super::{Moved, Next, Outcome, Request, Steps, impossible, refusal, refused, reply};
use crate::locks::{LockSet, Mode, Resource};

#[derive(Debug)]
pub(super) struct MoveDirectory {
    edges: Edges,
    state: State,
}

#[derive(Debug)]
enum State {
    Checking {
        at: InodeId,
        depth: usize,
    },
    Locking,
    Linking,
    /// When the new name came.
    SettingOwner(Time),
    /// What to answer then.
    Unlinking(pb::CrossdirReply, Time),
    Unlocking(pb::CrossdirReply),
}

impl MoveDirectory {
    pub(super) fn new(transaction: TransactionId, op: pb::Move) -> Self {
        let at = InodeId(op.new_directory);
        let edges = Edges { transaction, op, replace: pb::Replace::Refuse };
        MoveDirectory { edges, state: State::Checking { at, depth: 0 } }
    }

    /// One directory higher, or the end of the check.
    fn climb(&mut self, at: InodeId, depth: usize, attributes: &pb::Attributes) -> Next {
        let Some(owner) = attributes.parent.map(InodeId) else {
            return Next::Finish(refusal(CrossdirError::NotDirectory, at));
        };
        if owner.is_null() {
            return Next::Finish(refusal(CrossdirError::NotFound, at));
        }
        if owner == self.edges.target() {
            return Next::Finish(refusal(CrossdirError::Loop, self.edges.target()));
        }
        if owner == at {
            self.state = State::Locking;
            return Next::Step(self.edges.lock());
        }
        if depth + 1 >= DEPTH_MAX {
            return Next::Finish(refusal(CrossdirError::TooDeep, self.edges.new_directory()));
        }
        self.state = State::Checking { at: owner, depth: depth + 1 };
        Next::Step(Request::Stat(owner))
    }

    fn set_owner(&self) -> Request {
        let step = pb::SetOwner {
            transaction: self.edges.transaction.0,
            directory: self.edges.op.target,
            owner: self.edges.op.new_directory,
        };
        Request::Write(self.edges.target().shard(), Op::SetOwner(step))
    }
}

impl Steps for MoveDirectory {
    fn kind(&self) -> &'static str {
        "move directory"
    }

    fn locks(&self) -> LockSet {
        self.edges
            .locks()
            .with(Resource::Directory(self.edges.target()), Mode::Shared)
            .with(Resource::Tree, Mode::Exclusive)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        let mut shards = self.edges.shards();
        shards.insert(self.edges.target().shard());
        shards
    }

    fn locked_until_recorded(&self) -> bool {
        true
    }

    fn first(&self) -> Request {
        Request::Stat(self.edges.new_directory())
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&self.state, outcome) {
            (&State::Checking { at, depth }, Outcome::Attributes(attributes)) => {
                self.climb(at, depth, &attributes)
            }
            (State::Checking { .. } | State::Locking, Outcome::Refused(error, message)) => {
                Next::Finish(refused(error, message))
            }
            (State::Locking, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::Linking;
                Next::Step(self.edges.link())
            }
            (State::Linking, Outcome::Linked { link, .. }) => {
                self.state = State::SettingOwner(Time(link.created_at));
                Next::Step(self.set_owner())
            }
            (State::Linking, Outcome::Refused(error, message)) => {
                self.state = State::Unlocking(refused(error, message));
                Next::Step(self.edges.unlock())
            }
            (&State::SettingOwner(moved_at), outcome) => {
                let answer = match outcome {
                    Outcome::Done { .. } | Outcome::Linked { .. } => {
                        reply(pb::crossdir_reply::Result::Move(pb::MoveReply { replaced: 0 }))
                    }
                    // Going on leaves one edge, not two; fsck finds the owner.
                    other => impossible(self.edges.transaction, self.step(), &other),
                };
                self.state = State::Unlinking(answer.clone(), moved_at);
                Next::AnswerThen(answer, self.edges.unlink(moved_at))
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
            State::Checking { .. } | State::Locking => Moved::NotYet,
            State::Unlocking(_) => Moved::Never,
            State::Linking => Moved::Perhaps,
            State::SettingOwner(at) | State::Unlinking(_, at) => Moved::At(at),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Checking { .. } => "checking for loops",
            State::Locking => "locking the old name",
            State::Linking => "linking the new name",
            State::SettingOwner(_) => "setting the owner",
            State::Unlinking(..) => "unlinking the old name",
            State::Unlocking(_) => "unlocking the old name",
        }
    }
}
