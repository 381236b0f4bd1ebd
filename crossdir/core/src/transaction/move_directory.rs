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
//! meanwhile).
//!
//! Between 1 and 2 the move is cleared ([`crate::moves`], XD-8): together with those that are cleared beside it, before and
//! after, it makes no loop. The owner of a directory
//! changes by SetOwner, which only transactions of this kind do, and by its removal or undeletion: an ancestor of the new
//! parent has a directory in it, so it cannot be removed, nor can it be undeleted; the new parent is locked. Files, mkdir,
//! rmdir, undelete and purge need no clearance, therefore.
//!
//! 1 is the one step that no shard remembers. So the clearance is recorded before 2: a repetition after a crash does not
//! read again, it goes on with what was found. What 1 refuses is answered once it is recorded.
//!
//! The move is made at the instant of 3, and answered before 5, as that of a file ([`super::move_file`]).

use std::collections::BTreeSet;

use eggs_proto::limits::DEPTH_MAX;
use eggs_proto::{CrossdirError, InodeId, ShardId, Time, TransactionId, pb};
use pb::write_op::Op;

use super::move_file::Edges;
use super::{Moved, Next, Outcome, Request, Steps, impossible, refusal, refused, reply};
use crate::locks::{LockSet, Mode, Resource};
use crate::moves::Claim;

#[derive(Debug)]
pub(super) struct MoveDirectory {
    edges: Edges,
    state: State,
}

#[derive(Debug)]
enum State {
    /// These are read already, the next is being read.
    Checking(Vec<InodeId>, InodeId),
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
        MoveDirectory { edges, state: State::Checking(Vec::new(), at) }
    }

    /// One directory higher, or the end of the check.
    fn climb(&mut self, mut read: Vec<InodeId>, at: InodeId, owner: Option<InodeId>) -> Next {
        read.push(at);
        let (target, root) = (self.edges.target(), InodeId::ROOT);
        let end = |ancestors, reply| Next::Clear(Claim { targets: vec![target], ancestors }, reply);
        let refused = |read, error: CrossdirError, what| end(read, Some(refusal(error, what)));
        match owner {
            None => refused(read, CrossdirError::NotDirectory, at),
            Some(owner) if owner.is_null() => refused(read, CrossdirError::NotFound, at),
            Some(owner) if owner == target => refused(read, CrossdirError::Loop, target),
            _ if read.len() >= DEPTH_MAX => refused(read, CrossdirError::TooDeep, self.edges.new_directory()),
            Some(owner) if owner == root || at == root => {
                if at != root {
                    read.push(root);
                }
                end(read, None)
            }
            Some(owner) => {
                self.state = State::Checking(read, owner);
                Next::Step(Request::Stat(owner))
            }
        }
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
        self.edges.locks().with(Resource::Directory(self.edges.target()), Mode::Shared)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        let mut shards = self.edges.shards();
        shards.insert(self.edges.target().shard());
        shards
    }

    fn first(&mut self) -> Request {
        let at = self.edges.new_directory();
        self.state = State::Checking(Vec::new(), at);
        Request::Stat(at)
    }

    fn clear(&mut self) -> Option<Request> {
        self.state = State::Locking;
        Some(self.edges.lock())
    }

    fn owned(&self) -> Vec<InodeId> {
        vec![self.edges.target()]
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&mut self.state, outcome) {
            (State::Checking(read, at), Outcome::Attributes(attributes)) => {
                let (read, at) = (std::mem::take(read), *at);
                self.climb(read, at, attributes.parent.map(InodeId))
            }
            (State::Checking(read, at), Outcome::Refused(error, message)) => {
                let mut ancestors = std::mem::take(read);
                ancestors.push(*at);
                let claim = Claim { targets: vec![self.edges.target()], ancestors };
                Next::Clear(claim, Some(refused(error, message)))
            }
            (State::Locking, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
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
            (&mut State::SettingOwner(moved_at), outcome) => {
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
            State::Checking(..) | State::Locking => Moved::NotYet,
            State::Unlocking(_) => Moved::Never,
            State::Linking => Moved::Perhaps,
            State::SettingOwner(at) | State::Unlinking(_, at) => Moved::At(at),
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Checking(..) => "checking for loops",
            State::Locking => "locking the old name",
            State::Linking => "linking the new name",
            State::SettingOwner(_) => "setting the owner",
            State::Unlinking(..) => "unlinking the old name",
            State::Unlocking(_) => "unlocking the old name",
        }
    }
}
