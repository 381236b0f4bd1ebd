//! Exchanging what two names in different directories lead to: files, symlinks and directories in any mix.
//!
//! | step | shard | undo |
//! |---|---|---|
//! | 1. of directories: Stat, from each new parent up to the root: neither is among their ancestors | theirs | |
//! | 2. LockEdge name → target (it is there, and stays) | directory's | 4. |
//! | 3. ExchangeEdge other name: other target → target; this decides | other directory's | |
//! | 4. when 3 was refused: UnlockEdge name | directory's | |
//! | 4. else, of directories: SetOwners | theirs | |
//! | 5. SettleEdge name: target → other target, as of the instant of 3 | directory's | |
//!
//! Locks: both edges exclusive, both directories and the directories exchanged shared.
//!
//! The exchange is made at the instant of 3: 5 records it as that of the locked name's change, and whoever meets it locked
//! asks the coordinator, so each inode has one name, and each name leads to one of them, at any instant. It is answered
//! before 5, as a move ([`super::move_file`]); a refused one after the name is unlocked.
//!
//! An exchange of a directory is cleared between 1 and 2, as a move of one ([`super::move_directory`]): it is two of them
//! at once ([`crate::moves`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use eggs_proto::limits::DEPTH_MAX;
use eggs_proto::{CrossdirError, InodeId, ShardId, Time, TransactionId, pb};
use pb::write_op::Op;

use super::{Moved, Next, Outcome, Request, Steps, impossible, refusal, refused, reply};
use crate::locks::{LockSet, Mode, Resource};
use crate::moves::Claim;

#[derive(Debug)]
pub(super) struct Exchange {
    transaction: TransactionId,
    op: pb::ExchangeAcross,
    state: State,
}

#[derive(Debug)]
enum State {
    Checking(Check),
    Locking,
    Exchanging,
    /// Since when; and what is to be asked after that.
    SettingOwners(Time, VecDeque<Request>),
    /// What to answer.
    Settling(pb::CrossdirReply, Time),
    Unlocking(pb::CrossdirReply),
}

/// Reading ancestors.
#[derive(Debug, Default)]
struct Check {
    read: Vec<InodeId>,
    /// Is being read.
    at: InodeId,
    /// How far above the new parent that is.
    height: usize,
    /// The new parent to go on from.
    then: Option<InodeId>,
}

impl Exchange {
    pub(super) fn new(transaction: TransactionId, op: pb::ExchangeAcross) -> Self {
        Exchange { transaction, op, state: State::Locking }
    }

    fn directory(&self) -> InodeId {
        InodeId(self.op.directory)
    }

    fn other_directory(&self) -> InodeId {
        InodeId(self.op.other_directory)
    }

    /// Directories, and where they go.
    fn moved_directories(&self) -> impl Iterator<Item = (InodeId, InodeId)> {
        let both = [
            (InodeId(self.op.target), self.other_directory()),
            (InodeId(self.op.other_target), self.directory()),
        ];
        both.into_iter().filter(|(target, _)| target.is_directory())
    }

    fn claim(&self, ancestors: Vec<InodeId>) -> Claim {
        Claim { targets: self.owned(), ancestors }
    }

    /// One directory higher, or to the other new parent, or the end of the check.
    fn climb(&mut self, mut check: Check, owner: Option<InodeId>) -> Next {
        let (at, root) = (check.at, InodeId::ROOT);
        check.read.push(at);
        let refuse = |error: CrossdirError, what: InodeId| Some(refusal(error, what));
        let refusal = match owner {
            None => refuse(CrossdirError::NotDirectory, at),
            Some(owner) if owner.is_null() => refuse(CrossdirError::NotFound, at),
            Some(owner) if self.owned().contains(&owner) => refuse(CrossdirError::Loop, owner),
            Some(_) if check.height >= DEPTH_MAX => refuse(CrossdirError::TooDeep, at),
            // The way from there is read already. Were it not so any more by now, it would be read again.
            Some(owner) if check.read.contains(&owner) => None,
            Some(owner) if owner == root => {
                check.read.push(root);
                None
            }
            Some(owner) => {
                let height = check.height + 1;
                return self.look_at(Check { at: owner, height, ..check });
            }
        };
        match check.then.take() {
            Some(next) if refusal.is_none() && !check.read.contains(&next) => {
                self.look_at(Check { at: next, height: 0, ..check })
            }
            _ => Next::Clear(self.claim(check.read), refusal),
        }
    }

    fn look_at(&mut self, check: Check) -> Next {
        let at = check.at;
        self.state = State::Checking(check);
        Next::Step(Request::Stat(at))
    }

    fn lock(&self) -> Request {
        let step = pb::LockEdge {
            transaction: self.transaction.0,
            directory: self.op.directory,
            name: self.op.name.clone(),
            target: self.op.target,
        };
        Request::Write(self.directory().shard(), Op::LockEdge(step))
    }

    fn unlock(&self) -> Request {
        let step = pb::UnlockEdge {
            transaction: self.transaction.0,
            directory: self.op.directory,
            name: self.op.name.clone(),
        };
        Request::Write(self.directory().shard(), Op::UnlockEdge(step))
    }

    fn exchange(&self) -> Request {
        let step = pb::ExchangeEdge {
            transaction: self.transaction.0,
            directory: self.op.other_directory,
            name: self.op.other_name.clone(),
            target: self.op.other_target,
            new_target: self.op.target,
        };
        Request::Write(self.other_directory().shard(), Op::ExchangeEdge(step))
    }

    /// One step for each shard: it would take a second one for the first.
    fn set_owners(&self) -> VecDeque<Request> {
        let mut shards: BTreeMap<ShardId, Vec<pb::DirectoryOwner>> = BTreeMap::new();
        for (directory, owner) in self.moved_directories() {
            let owners = shards.entry(directory.shard()).or_default();
            owners.push(pb::DirectoryOwner { directory: directory.0, owner: owner.0 });
        }
        let request = |(shard, owners)| {
            Request::Write(shard, Op::SetOwners(pb::SetOwners { transaction: self.transaction.0, owners }))
        };
        shards.into_iter().map(request).collect()
    }

    fn settle(&self, exchanged_at: Time) -> Request {
        let step = pb::SettleEdge {
            transaction: self.transaction.0,
            directory: self.op.directory,
            name: self.op.name.clone(),
            target: self.op.target,
            new_target: self.op.other_target,
            exchanged_at: exchanged_at.0,
        };
        Request::Write(self.directory().shard(), Op::SettleEdge(step))
    }

    /// Owners that are left to be set, then the answer and the locked name.
    fn go_on(&mut self, at: Time, mut owners: VecDeque<Request>) -> Next {
        if let Some(next) = owners.pop_front() {
            self.state = State::SettingOwners(at, owners);
            return Next::Step(next);
        }
        let exchanged = pb::ExchangeReply { exchanged_at: at.0 };
        self.answer_then_settle(reply(pb::crossdir_reply::Result::Exchange(exchanged)), at)
    }

    fn answer_then_settle(&mut self, answer: pb::CrossdirReply, at: Time) -> Next {
        self.state = State::Settling(answer.clone(), at);
        Next::AnswerThen(answer, self.settle(at))
    }
}

impl Steps for Exchange {
    fn kind(&self) -> &'static str {
        "exchange"
    }

    fn locks(&self) -> LockSet {
        let locks = LockSet::default()
            .with(Resource::Edge(self.directory(), self.op.name.clone()), Mode::Exclusive)
            .with(Resource::Edge(self.other_directory(), self.op.other_name.clone()), Mode::Exclusive)
            .with(Resource::Directory(self.directory()), Mode::Shared)
            .with(Resource::Directory(self.other_directory()), Mode::Shared);
        let shared = |locks: LockSet, directory| locks.with(Resource::Directory(directory), Mode::Shared);
        self.owned().into_iter().fold(locks, shared)
    }

    fn shards(&self) -> BTreeSet<ShardId> {
        let edges = [self.directory().shard(), self.other_directory().shard()];
        edges.into_iter().chain(self.owned().into_iter().map(InodeId::shard)).collect()
    }

    fn first(&mut self) -> Request {
        let mut parents = self.moved_directories().map(|(_, parent)| parent);
        let (first, then) = (parents.next(), parents.next());
        drop(parents);
        match first {
            Some(at) => {
                self.state = State::Checking(Check { at, then, ..Check::default() });
                Request::Stat(at)
            }
            None => {
                self.state = State::Locking;
                self.lock()
            }
        }
    }

    fn clear(&mut self) -> Option<Request> {
        self.state = State::Locking;
        Some(self.lock())
    }

    fn owned(&self) -> Vec<InodeId> {
        self.moved_directories().map(|(directory, _)| directory).collect()
    }

    fn next(&mut self, outcome: Outcome) -> Next {
        match (&mut self.state, outcome) {
            (State::Checking(check), Outcome::Attributes(attributes)) => {
                let check = std::mem::take(check);
                self.climb(check, attributes.parent.map(InodeId))
            }
            (State::Checking(check), Outcome::Refused(error, message)) => {
                let mut check = std::mem::take(check);
                check.read.push(check.at);
                Next::Clear(self.claim(check.read), Some(refused(error, message)))
            }
            (State::Locking, Outcome::Refused(error, message)) => Next::Finish(refused(error, message)),
            (State::Locking, Outcome::Done { .. } | Outcome::Linked { .. }) => {
                self.state = State::Exchanging;
                Next::Step(self.exchange())
            }
            (State::Exchanging, Outcome::Linked { link, .. }) => {
                let owners = self.set_owners();
                self.go_on(Time(link.created_at), owners)
            }
            (State::Exchanging, Outcome::Refused(error, message)) => {
                self.state = State::Unlocking(refused(error, message));
                Next::Step(self.unlock())
            }
            (State::SettingOwners(at, rest), Outcome::Done { .. } | Outcome::Linked { .. }) => {
                let (at, rest) = (*at, std::mem::take(rest));
                self.go_on(at, rest)
            }
            // Going on leaves each name with one inode; fsck finds the owner.
            (&mut State::SettingOwners(at, _), outcome) => {
                let answer = impossible(self.transaction, self.step(), &outcome);
                self.answer_then_settle(answer, at)
            }
            (
                State::Settling(answer, _) | State::Unlocking(answer),
                Outcome::Done { .. } | Outcome::Linked { .. },
            ) => Next::Finish(answer.clone()),
            (_, outcome) => Next::Finish(impossible(self.transaction, self.step(), &outcome)),
        }
    }

    fn moved(&self) -> Moved {
        match self.state {
            State::Checking(_) | State::Locking => Moved::NotYet,
            State::Unlocking(_) => Moved::Never,
            State::Exchanging => Moved::Perhaps,
            State::SettingOwners(at, _) | State::Settling(_, at) => {
                Moved::Exchanged(at, InodeId(self.op.other_target))
            }
        }
    }

    fn step(&self) -> &'static str {
        match self.state {
            State::Checking(_) => "checking for loops",
            State::Locking => "locking the name",
            State::Exchanging => "exchanging the other name",
            State::SettingOwners(..) => "setting the owners",
            State::Settling(..) => "exchanging the name",
            State::Unlocking(_) => "unlocking the name",
        }
    }
}
