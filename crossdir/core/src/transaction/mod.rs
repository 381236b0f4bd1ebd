//! What the transactions have in common: a step's request and outcome, and what comes next.
//!
//! One file per kind of transaction, steps and undo at its top. Each is a small state machine without
//! volatile decisions: its outcome depends only on what the shards answer, and they answer a repeated
//! step as they did the first time (XD-1). Retrying is not its business: it sees outcomes only.

mod exchange;
mod mkdir;
mod mkdir_path;
mod move_directory;
mod move_file;
mod purge_directory;
mod purge_file;
mod rmdir;
mod undelete_directory;
mod undelete_file;

use std::collections::BTreeSet;
use std::fmt::Debug;

use bytes::Bytes;
use eggs_proto::{CrossdirError, InodeId, ServiceError, ShardError, ShardId, Time, TransactionId, pb};
use pb::write_op::Op;

use crate::locks::LockSet;
use crate::moves::Claim;

/// One message to one shard.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Request {
    Write(ShardId, Op),
    Stat(InodeId),
}

/// What a step came to; nothing uncertain and nothing that a retry would change.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Done { time: Time },
    Linked { link: pb::LinkReply, time: Time },
    Attributes(pb::Attributes),
    Refused(ShardError, String),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Next {
    Step(Request),
    /// The answer is certain, and nothing the caller could meet is left; the step cleans up.
    AnswerThen(pb::CrossdirReply, Request),
    Finish(pb::CrossdirReply),
    /// A move of a directory has read the ancestors of where it goes (XD-8): it asks whether it may go on, or, with a
    /// reply, whether it may end with that.
    Clear(Claim, Option<pb::CrossdirReply>),
}

/// What has become of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moved {
    /// It has not come to the step that decides.
    NotYet,
    /// It was refused, or is no move.
    Never,
    /// It is being decided.
    Perhaps,
    /// Both names changed at this instant.
    At(Time),
    /// At this instant the name that is locked came to lead to this inode.
    Exchanged(Time, InodeId),
}

/// A transaction on its way.
pub(crate) trait Steps: Debug {
    fn kind(&self) -> &'static str;
    fn locks(&self) -> LockSet;
    /// Every shard that may come to remember it.
    fn shards(&self) -> BTreeSet<ShardId>;
    /// What it begins with when it has its locks, and again when what it has read may not be so any more.
    fn first(&mut self) -> Request;
    /// What a move of a directory goes on with once it is clear; `None`: it is no such move.
    fn clear(&mut self) -> Option<Request> {
        None
    }
    /// The directories that are to have another owner: then it is to be cleared.
    fn owned(&self) -> Vec<InodeId> {
        Vec::new()
    }
    /// The outcome of the last request.
    fn next(&mut self, outcome: Outcome) -> Next;
    /// Whether the old name of a move is still what there is to see.
    fn moved(&self) -> Moved {
        Moved::Never
    }
    /// For people: the step it is at.
    fn step(&self) -> &'static str;
}

/// `None`: the intent holds no operation (this build does not know it).
pub(crate) fn steps_of(
    transaction: TransactionId,
    begin: &pb::BeginTransaction,
) -> Option<Box<dyn Steps + Send>> {
    use pb::begin_transaction::Op as Intent;
    match begin.op.clone()? {
        Intent::Mkdir(op) => Some(Box::new(mkdir::Mkdir::new(transaction, op, ShardId(begin.shard as u8)))),
        Intent::Rmdir(op) => Some(Box::new(rmdir::Rmdir::new(transaction, op))),
        Intent::Move(op) if InodeId(op.target).is_directory() => {
            Some(Box::new(move_directory::MoveDirectory::new(transaction, op)))
        }
        Intent::Move(op) => Some(Box::new(move_file::MoveFile::new(transaction, op))),
        Intent::MkdirPath(op) => {
            Some(Box::new(mkdir_path::MkdirPath::new(transaction, op, ShardId(begin.shard as u8))))
        }
        Intent::Exchange(op) => Some(Box::new(exchange::Exchange::new(transaction, op))),
        Intent::UndeleteInode(op) if InodeId(op.target).is_directory() => {
            Some(Box::new(undelete_directory::UndeleteDirectory::new(transaction, op)))
        }
        Intent::UndeleteInode(op) => Some(Box::new(undelete_file::UndeleteFile::new(transaction, op))),
        Intent::PurgeInode(op) if InodeId(op.target).is_directory() => {
            Some(Box::new(purge_directory::PurgeDirectory::new(transaction, op)))
        }
        Intent::PurgeInode(op) => Some(Box::new(purge_file::PurgeFile::new(transaction, op))),
    }
}

/// The name leads to the target from now on.
fn link_edge(
    transaction: TransactionId,
    (directory, name): (InodeId, &Bytes),
    target: InodeId,
    replace: pb::Replace,
) -> Request {
    let step = pb::LinkEdge {
        transaction: transaction.0,
        directory: directory.0,
        name: name.clone(),
        target: target.0,
        replace: replace.into(),
    };
    Request::Write(directory.shard(), Op::LinkEdge(step))
}

fn reply(result: pb::crossdir_reply::Result) -> pb::CrossdirReply {
    pb::CrossdirReply { header: None, result: Some(result) }
}

fn refused(error: ShardError, message: String) -> pb::CrossdirReply {
    reply(pb::crossdir_reply::Result::Error(pb::Error { message, ..crossdir_error(error).bare() }))
}

fn refusal(error: CrossdirError, what: impl std::fmt::Display) -> pb::CrossdirReply {
    reply(pb::crossdir_reply::Result::Error(error.with(what)))
}

/// A step that cannot be refused was: a bug, or a damaged shard. It is said, never passed over.
fn impossible(transaction: TransactionId, step: &str, outcome: &Outcome) -> pb::CrossdirReply {
    let what = match outcome {
        Outcome::Refused(_, message) => message.as_str(),
        _ => "a reply of another kind",
    };
    refusal(CrossdirError::Internal, format!("transaction {}, {step}: {what}", transaction.0))
}

/// What the caller is told of a shard's refusal.
fn crossdir_error(error: ShardError) -> CrossdirError {
    match error {
        ShardError::Malformed => CrossdirError::Malformed,
        ShardError::NotFound => CrossdirError::NotFound,
        ShardError::Exists => CrossdirError::Exists,
        ShardError::NotDirectory => CrossdirError::NotDirectory,
        ShardError::IsDirectory => CrossdirError::IsDirectory,
        ShardError::NotEmpty => CrossdirError::NotEmpty,
        ShardError::InvalidName => CrossdirError::InvalidName,
        ShardError::NameTooLong => CrossdirError::NameTooLong,
        ShardError::Changed => CrossdirError::Changed,
        ShardError::IsRoot => CrossdirError::IsRoot,
        ShardError::NoSpace => CrossdirError::NoSpace,
        ShardError::NotOwned => CrossdirError::NotOwned,
        // Of a transaction this coordinator does not know of; a newer call may find it gone.
        ShardError::Locked => CrossdirError::Busy,
        // Retried, so never an outcome (`waits`).
        ShardError::NotLeader
        | ShardError::Busy
        | ShardError::ClockAhead
        | ShardError::StaleSession
        | ShardError::UnsupportedVersion
        | ShardError::WrongCluster
        | ShardError::Unauthorized
        | ShardError::NoBlockServices
        // Of other operations.
        | ShardError::Internal
        | ShardError::TooLarge
        | ShardError::NoAttribute
        | ShardError::NotWriter
        | ShardError::Expired
        | ShardError::BadSpan
        | ShardError::BadProof => CrossdirError::Internal,
    }
}

/// The refusal says that the step did not run *now*: it is repeated until it has an outcome.
///
/// Beside what the protocol calls retryable these are answers to this sender, not to the step: a
/// clock too far ahead, another version, a wrong secret. StaleSession goes to a driver that has been
/// replaced without knowing it (its transactions are finished and forgotten); it must not conclude
/// anything from that. Locked is an outcome: the shard remembers it like any other refusal (XD-1), and
/// repeating the step would give it for ever.
pub(crate) fn waits(error: ShardError) -> bool {
    error != ShardError::Locked && error.retry() != eggs_proto::Retry::Never
        || matches!(
            error,
            ShardError::ClockAhead
                | ShardError::StaleSession
                | ShardError::UnsupportedVersion
                | ShardError::WrongCluster
                | ShardError::Unauthorized
        )
}
