//! Calls that one shard answers without the coordinator: a file or directory gets another name where it is, a file comes back
//! where it died.
//!
//! They are written as what the coordinator would be asked for, with one directory in both places: so they are judged and
//! put in order as the others are.

use eggs_proto::{CrossdirError, InodeId, ServiceError, ShardError, ShardId, pb};
use pb::crossdir_request::Op;
use pb::{crossdir_reply, write_op, write_result};

/// What its shard is asked for; `None`: it is for the coordinator.
pub fn write(op: &Op) -> Option<(ShardId, pb::WriteOp)> {
    let (directory, op) = match op {
        Op::Move(op) if op.old_directory == op.new_directory => {
            let rename = pb::Rename {
                directory: op.old_directory,
                old_name: op.old_name.clone(),
                new_name: op.new_name.clone(),
                replace: op.replace,
            };
            (op.old_directory, write_op::Op::Rename(rename))
        }
        Op::UndeleteInode(op) if op.directory == op.new_directory && !InodeId(op.target).is_directory() => {
            let undelete = pb::Undelete {
                directory: op.directory,
                name: op.name.clone(),
                died_at: op.died_at,
                target: op.target,
                new_name: op.new_name.clone(),
            };
            (op.directory, write_op::Op::Undelete(undelete))
        }
        _ => return None,
    };
    Some((InodeId(directory).shard(), pb::WriteOp { op: Some(op) }))
}

/// What the coordinator would have said.
pub fn answer(result: &pb::WriteResult) -> pb::CrossdirReply {
    let result = match &result.result {
        Some(write_result::Result::Link(link)) => {
            crossdir_reply::Result::Move(pb::MoveReply { replaced: link.replaced })
        }
        Some(write_result::Result::Error(error)) => crossdir_reply::Result::Error(refusal(error)),
        other => panic!("{other:?}"),
    };
    pb::CrossdirReply { header: None, result: Some(result) }
}

fn refusal(error: &pb::Error) -> pb::Error {
    let refusal = match ShardError::from_code(error.code) {
        Some(ShardError::NotFound) => CrossdirError::NotFound,
        Some(ShardError::Exists) => CrossdirError::Exists,
        Some(ShardError::NotOwned) => CrossdirError::NotOwned,
        Some(ShardError::IsDirectory) => CrossdirError::IsDirectory,
        other => panic!("{other:?}: {error:?}"),
    };
    refusal.with(&error.message)
}
