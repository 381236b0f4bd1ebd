//! From a request to a command: what is checked, and what is chosen, before anything is logged.

use bytes::Bytes;
use eggs_machine::Table;
use eggs_proto::limits::{MKDIR_NAMES_MAX, PATH_BYTES_MAX};
use eggs_proto::names::{self, NameError};
use eggs_proto::{CrossdirError, InodeId, ServiceError, SessionId, ShardId, Time, pb};
use pb::begin_transaction::Op as Intent;
use pb::crossdir_request::Op;

use crate::machine::{self, Answer};

/// The command that begins the transaction asked for.
///
/// `alive` are the shards that can take a new directory; the `counter`th of them, going round, gets
/// it (the caller counts up by one from call to call).
///
/// # Errors
/// What the caller is answered; nothing is to be logged. A request that was accepted before is not an
/// error: it gives a command, and the machine answers with the transaction it became.
pub fn prepare<T: Table + ?Sized>(
    view: &T,
    op: &Op,
    session: SessionId,
    sequence: u64,
    _now: Time,
    alive: &[ShardId],
    counter: u64,
) -> Result<pb::CrossdirCommand, pb::Error> {
    let (op, shard) = match op {
        Op::Mkdir(mkdir) => {
            check_mkdir(mkdir)?;
            (Intent::Mkdir(mkdir.clone()), choose(alive, counter)?)
        }
        Op::Rmdir(rmdir) => {
            check_rmdir(rmdir)?;
            (Intent::Rmdir(rmdir.clone()), ShardId(0))
        }
        Op::Move(entry) => {
            check_move(entry)?;
            (Intent::Move(entry.clone()), ShardId(0))
        }
        Op::MkdirPath(mkdir) => {
            check_mkdir_path(mkdir)?;
            (Intent::MkdirPath(mkdir.clone()), choose(alive, counter)?)
        }
        Op::Exchange(exchange) => {
            check_exchange(exchange)?;
            (Intent::Exchange(exchange.clone()), ShardId(0))
        }
        Op::UndeleteInode(undelete) => {
            check_undelete(undelete)?;
            (Intent::UndeleteInode(undelete.clone()), ShardId(0))
        }
        Op::PurgeInode(purge) => {
            check_purge(purge)?;
            (Intent::PurgeInode(purge.clone()), ShardId(0))
        }
        Op::ListTransactions(_) | Op::ResolveMove(_) => {
            return Err(CrossdirError::Malformed.with("not an operation"));
        }
    };
    match machine::answer(view, session, sequence) {
        Ok(Answer::Stale) => return Err(CrossdirError::StaleSession.bare()),
        Ok(_) => {}
        Err(error) => return Err(CrossdirError::Internal.with(error)),
    }
    let begin =
        pb::BeginTransaction { op: Some(op), shard: u32::from(shard.0), session: session.0, sequence };
    Ok(pb::CrossdirCommand { command: Some(pb::crossdir_command::Command::Begin(begin)) })
}

fn choose(alive: &[ShardId], counter: u64) -> Result<ShardId, pb::Error> {
    let count = alive.len() as u64;
    let at = counter.checked_rem(count).and_then(|at| alive.get(usize::try_from(at).ok()?));
    at.copied().ok_or_else(|| CrossdirError::Busy.with("no shard is alive to take a directory"))
}

fn check_mkdir(op: &pb::Mkdir) -> Result<(), pb::Error> {
    check_directory(op.parent, "parent")?;
    check_name(&op.name)
}

fn check_mkdir_path(op: &pb::MkdirPath) -> Result<(), pb::Error> {
    check_directory(op.parent, "parent")?;
    if op.names.is_empty() {
        return Err(CrossdirError::Malformed.with("no directory to make"));
    }
    if op.names.len() > MKDIR_NAMES_MAX {
        let count = op.names.len();
        let what = format_args!("{count} directories to make at once, at most {MKDIR_NAMES_MAX}");
        return Err(CrossdirError::TooDeep.with(what));
    }
    // What is begun is kept in memory, so many of them have to fit.
    if op.names.iter().map(|name| name.len() + 1).sum::<usize>() > PATH_BYTES_MAX {
        return Err(
            CrossdirError::NameTooLong.with(format_args!("a path of more than {PATH_BYTES_MAX} bytes"))
        );
    }
    op.names.iter().try_for_each(check_name)
}

fn check_exchange(op: &pb::ExchangeAcross) -> Result<(), pb::Error> {
    check_directory(op.directory, "directory")?;
    check_directory(op.other_directory, "other directory")?;
    check_name(&op.name)?;
    check_name(&op.other_name)?;
    for target in [InodeId(op.target), InodeId(op.other_target)] {
        if target.is_null() || target.kind().is_none() {
            return Err(CrossdirError::Malformed.with(format_args!("target {target}")));
        }
        if target == InodeId::ROOT {
            return Err(CrossdirError::IsRoot.bare());
        }
    }
    // The shard does that alone, faster.
    if op.directory == op.other_directory {
        return Err(CrossdirError::Malformed.with("both names are in one directory"));
    }
    if op.target == op.other_target {
        return Err(CrossdirError::Malformed.with("both names are of one inode"));
    }
    if op.target == op.other_directory || op.other_target == op.directory {
        let above = if op.target == op.other_directory { op.target } else { op.other_target };
        return Err(CrossdirError::Loop.with(InodeId(above)));
    }
    if op.target == op.directory || op.other_target == op.other_directory {
        return Err(CrossdirError::Malformed.with("a directory is not its own parent"));
    }
    Ok(())
}

fn check_rmdir(op: &pb::Rmdir) -> Result<(), pb::Error> {
    check_directory(op.parent, "parent")?;
    check_name(&op.name)?;
    if InodeId(op.target) == InodeId::ROOT {
        return Err(CrossdirError::IsRoot.bare());
    }
    check_directory(op.target, "target")?;
    if op.target == op.parent {
        return Err(CrossdirError::Malformed.with("a directory is not its own parent"));
    }
    Ok(())
}

fn check_move(op: &pb::Move) -> Result<(), pb::Error> {
    check_directory(op.old_directory, "old directory")?;
    check_directory(op.new_directory, "new directory")?;
    check_name(&op.old_name)?;
    check_name(&op.new_name)?;
    if pb::Replace::try_from(op.replace).is_err() {
        return Err(CrossdirError::Malformed.with("replace"));
    }
    let target = InodeId(op.target);
    if target.is_null() || target.kind().is_none() {
        return Err(CrossdirError::Malformed.with(format_args!("target {target}")));
    }
    if target == InodeId::ROOT {
        return Err(CrossdirError::IsRoot.bare());
    }
    // The shard does that alone, faster.
    if op.old_directory == op.new_directory {
        return Err(CrossdirError::Malformed.with("both names are in one directory"));
    }
    if op.target == op.new_directory {
        return Err(CrossdirError::Loop.with(target));
    }
    if op.target == op.old_directory {
        return Err(CrossdirError::Malformed.with("a directory is not its own parent"));
    }
    Ok(())
}

fn check_undelete(op: &pb::UndeleteInode) -> Result<(), pb::Error> {
    check_dead(op.directory, &op.name, op.died_at, op.target)?;
    check_directory(op.new_directory, "new directory")?;
    check_name(&op.new_name)?;
    if op.target == op.new_directory {
        return Err(CrossdirError::Loop.with(InodeId(op.target)));
    }
    // The shard does that alone, faster.
    if op.directory == op.new_directory && !InodeId(op.target).is_directory() {
        return Err(CrossdirError::Malformed.with("both names are in one directory"));
    }
    Ok(())
}

fn check_purge(op: &pb::PurgeInode) -> Result<(), pb::Error> {
    check_dead(op.directory, &op.name, op.died_at, op.target)?;
    let (directory, target) = (InodeId(op.directory), InodeId(op.target));
    // The shard does that alone, faster.
    if !target.is_directory() && directory.shard() == target.shard() {
        return Err(CrossdirError::Malformed.with("the file is of its directory's shard"));
    }
    Ok(())
}

/// A dead edge and what it leads to.
fn check_dead(directory: u64, name: &Bytes, died_at: u64, target: u64) -> Result<(), pb::Error> {
    check_directory(directory, "directory")?;
    check_name(name)?;
    let inode = InodeId(target);
    if inode.is_null() || inode.kind().is_none() {
        return Err(CrossdirError::Malformed.with(format_args!("target {inode}")));
    }
    if inode == InodeId::ROOT {
        return Err(CrossdirError::IsRoot.bare());
    }
    if target == directory {
        return Err(CrossdirError::Malformed.with("a directory is not its own parent"));
    }
    if died_at == 0 {
        return Err(CrossdirError::Malformed.with("no death"));
    }
    Ok(())
}

fn check_directory(id: u64, what: &str) -> Result<(), pb::Error> {
    let id = InodeId(id);
    if id.is_null() || id.kind().is_none() {
        Err(CrossdirError::Malformed.with(format_args!("{what} {id}")))
    } else if !id.is_directory() {
        Err(CrossdirError::NotDirectory.with(format_args!("{what} {id}")))
    } else {
        Ok(())
    }
}

fn check_name(name: &Bytes) -> Result<(), pb::Error> {
    names::validate(name).map_err(|error| {
        let code = match error {
            NameError::TooLong => CrossdirError::NameTooLong,
            NameError::Empty | NameError::Dots | NameError::Separator => CrossdirError::InvalidName,
        };
        pb::Error { message: error.to_string(), ..code.bare() }
    })
}

#[cfg(test)]
mod tests {
    use eggs_machine::MemoryTable;
    use eggs_proto::InodeType;

    use super::*;

    const ROOT: u64 = InodeId::ROOT.0;

    fn dir(n: u64) -> u64 {
        InodeId::new(InodeType::Directory, ShardId(9), n).0
    }

    fn file(n: u64) -> u64 {
        InodeId::new(InodeType::File, ShardId(9), n).0
    }

    fn name(name: &'static [u8]) -> Bytes {
        Bytes::from_static(name)
    }

    fn run(op: Op) -> Result<pb::CrossdirCommand, u32> {
        let alive = [ShardId(3), ShardId(5)];
        prepare(&MemoryTable::default(), &op, SessionId(1), 1, Time(1), &alive, 7).map_err(|error| error.code)
    }

    fn mkdir(parent: u64, name: &'static [u8]) -> Op {
        Op::Mkdir(pb::Mkdir { parent, name: Bytes::from_static(name), attributes: None })
    }

    fn mkdir_path(parent: u64, names: Vec<Bytes>) -> Op {
        Op::MkdirPath(pb::MkdirPath { parent, names, ..pb::MkdirPath::default() })
    }

    fn exchange(directory: u64, target: u64, other_directory: u64, other_target: u64) -> Op {
        let (name, other_name) = (name(b"a"), name(b"b"));
        let op = pb::ExchangeAcross { directory, name, target, other_directory, other_name, other_target };
        Op::Exchange(op)
    }

    fn rmdir(parent: u64, target: u64) -> Op {
        Op::Rmdir(pb::Rmdir { parent, name: name(b"n"), target })
    }

    fn moved(old: u64, target: u64, new: u64) -> pb::Move {
        pb::Move {
            old_directory: old,
            old_name: name(b"a"),
            target,
            new_directory: new,
            new_name: name(b"b"),
            replace: 0,
        }
    }

    fn undelete(directory: u64, target: u64, new_directory: u64, died_at: u64) -> Op {
        let (name, new_name) = (name(b"a"), name(b"b"));
        Op::UndeleteInode(pb::UndeleteInode { directory, name, died_at, target, new_directory, new_name })
    }

    fn purge(directory: u64, target: u64, died_at: u64) -> Op {
        Op::PurgeInode(pb::PurgeInode { directory, name: name(b"a"), died_at, target })
    }

    #[test]
    fn requests_that_make_no_sense_are_refused_before_they_are_logged() {
        let cases = [
            (mkdir(0, b"n"), CrossdirError::Malformed),
            (mkdir(u64::MAX, b"n"), CrossdirError::Malformed),
            (mkdir(file(1), b"n"), CrossdirError::NotDirectory),
            (mkdir(ROOT, b""), CrossdirError::InvalidName),
            (mkdir(ROOT, b".."), CrossdirError::InvalidName),
            (mkdir(ROOT, &[b'x'; 256]), CrossdirError::NameTooLong),
            (rmdir(ROOT, ROOT), CrossdirError::IsRoot),
            (rmdir(ROOT, file(1)), CrossdirError::NotDirectory),
            (rmdir(ROOT, 0), CrossdirError::Malformed),
            (rmdir(dir(1), dir(1)), CrossdirError::Malformed),
            (Op::Move(moved(ROOT, dir(1), ROOT)), CrossdirError::Malformed),
            (Op::Move(moved(ROOT, dir(1), dir(1))), CrossdirError::Loop),
            (Op::Move(moved(dir(1), dir(1), dir(2))), CrossdirError::Malformed),
            (Op::Move(moved(dir(1), ROOT, dir(2))), CrossdirError::IsRoot),
            (Op::Move(moved(dir(1), 0, dir(2))), CrossdirError::Malformed),
            (Op::Move(moved(dir(1), dir(3), file(2))), CrossdirError::NotDirectory),
            (Op::Move(pb::Move { replace: 9, ..moved(dir(1), file(3), dir(2)) }), CrossdirError::Malformed),
            (mkdir_path(ROOT, vec![]), CrossdirError::Malformed),
            (mkdir_path(file(1), vec![name(b"n")]), CrossdirError::NotDirectory),
            (mkdir_path(ROOT, vec![name(b"n"), name(b".")]), CrossdirError::InvalidName),
            (mkdir_path(ROOT, vec![name(b"n"); MKDIR_NAMES_MAX + 1]), CrossdirError::TooDeep),
            (mkdir_path(ROOT, vec![name(&[b'n'; 255]); 17]), CrossdirError::NameTooLong),
            (exchange(dir(1), file(3), dir(1), file(4)), CrossdirError::Malformed),
            (exchange(dir(1), file(3), dir(2), file(3)), CrossdirError::Malformed),
            (exchange(dir(1), dir(2), dir(2), file(3)), CrossdirError::Loop),
            (exchange(dir(1), file(3), dir(2), dir(1)), CrossdirError::Loop),
            (exchange(dir(1), dir(1), dir(2), file(3)), CrossdirError::Malformed),
            (exchange(dir(1), file(3), dir(2), dir(2)), CrossdirError::Malformed),
            (exchange(dir(1), file(3), dir(2), ROOT), CrossdirError::IsRoot),
            (exchange(dir(1), 0, dir(2), file(3)), CrossdirError::Malformed),
            (exchange(file(1), file(3), dir(2), file(4)), CrossdirError::NotDirectory),
            (Op::ListTransactions(pb::ListTransactions {}), CrossdirError::Malformed),
            (undelete(ROOT, dir(1), ROOT, 0), CrossdirError::Malformed),
            (undelete(ROOT, ROOT, dir(1), 1), CrossdirError::IsRoot),
            (undelete(ROOT, dir(1), dir(1), 1), CrossdirError::Loop),
            (undelete(dir(1), dir(1), ROOT, 1), CrossdirError::Malformed),
            (undelete(ROOT, file(1), ROOT, 1), CrossdirError::Malformed),
            (undelete(file(2), file(1), ROOT, 1), CrossdirError::NotDirectory),
            (undelete(ROOT, 0, dir(1), 1), CrossdirError::Malformed),
            (purge(ROOT, ROOT, 1), CrossdirError::IsRoot),
            (purge(dir(1), file(1), 1), CrossdirError::Malformed),
            (purge(ROOT, file(1), 0), CrossdirError::Malformed),
        ];
        for (op, error) in cases {
            assert_eq!(run(op.clone()), Err(error.code()), "{op:?}");
        }
        run(Op::Move(moved(dir(1), file(3), dir(2)))).unwrap();
        run(rmdir(ROOT, dir(1))).unwrap();
        run(mkdir_path(ROOT, vec![name(b"n"); MKDIR_NAMES_MAX])).unwrap();
        run(exchange(dir(1), dir(3), dir(2), file(4))).unwrap();
        run(undelete(ROOT, dir(1), ROOT, 1)).unwrap();
        run(undelete(ROOT, file(1), dir(1), 1)).unwrap();
        run(purge(ROOT, file(1), 1)).unwrap();
        run(purge(dir(2), dir(1), 1)).unwrap();
    }

    #[test]
    fn new_directories_go_round_the_shards_that_are_alive() {
        let table = MemoryTable::default();
        let chosen = |alive: &[ShardId], counter| {
            let command = prepare(&table, &mkdir(ROOT, b"n"), SessionId(1), 1, Time(1), alive, counter)?;
            match command.command {
                Some(pb::crossdir_command::Command::Begin(begin)) => Ok::<u32, pb::Error>(begin.shard),
                other => panic!("{other:?}"),
            }
        };
        let alive = [ShardId(3), ShardId(5), ShardId(255)];
        let shards: Vec<u32> = (0..4).map(|counter| chosen(&alive, counter).unwrap()).collect();
        assert_eq!(shards, [3, 5, 255, 3]);
        assert_eq!(chosen(&[], 0).unwrap_err().code, CrossdirError::Busy.code());
    }
}
