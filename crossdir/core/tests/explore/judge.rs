//! What must hold: at every instant, when a call is answered, and at the end.

use eggs_crossdir_core::{Answer, CrossdirMachine, MoveState};
use eggs_proto::{InodeId, ServiceError, ShardId, TransactionId, pb};
use pb::crossdir_request::Op;
use prost::Message;

use super::world::model::Model;
use super::world::tables::{self, Group, Shards, check, edges};
use super::world::{code, made};
use crate::local;
use crate::state::State;

/// XD-12: a name of every moved inode, and not two, for who reads now. What is undeleted or purged has one name or none, and
/// a directory that has one is there.
pub fn instant(state: &State) {
    let edges = edges(&state.shards);
    for call in &state.calls {
        let (Op::UndeleteInode(pb::UndeleteInode { target, .. })
        | Op::PurgeInode(pb::PurgeInode { target, .. })) = &call.op
        else {
            continue;
        };
        let named = edges.values().filter(|edge| edge.target == *target).count();
        assert!(named <= 1, "SH-16: {} has {named} names", InodeId(*target));
        let inode = InodeId(*target);
        if named == 1 && inode.is_directory() {
            let owner = tables::owners(&state.shards).get(target).copied().unwrap_or(0);
            assert_ne!(owner, 0, "a name leads to {inode}, which is removed");
        }
        // fsck has nothing against what is in progress.
        for (&shard, group) in state.shards.iter() {
            let reply = eggs_shard_core::check(ShardId(shard), &group.table, &pb::Check::default()).unwrap();
            assert_eq!(reply.findings, [], "shard {shard}");
        }
        let dead = tables::dead(&state.shards);
        let is_free = |row: &&pb::DeadEdgeRow| row.target == *target && row.owned && row.transaction == 0;
        assert!(
            named == 0 || dead.values().find(is_free).is_none(),
            "SH-16: {inode} lives, and may be purged"
        );
    }
    for inode in state.calls.iter().flat_map(|call| moved(&call.op)) {
        let (mut sure, mut perhaps) = (0, 0);
        for edge in edges.values() {
            match sees(state, edge) {
                Sight::Is(target) => sure += usize::from(target == inode.0),
                Sight::Nothing => {}
                Sight::OneOf(targets) => perhaps += usize::from(targets.contains(&inode.0)),
            }
        }
        assert!(sure <= 1, "XD-12: {inode} has {sure} names");
        assert!(is_gone(state, inode) || sure + perhaps > 0, "XD-12: {inode} has no name");
    }
}

/// What a call gives other names.
fn moved(op: &Op) -> Vec<InodeId> {
    match op {
        Op::Move(op) => vec![InodeId(op.target)],
        Op::Exchange(op) => vec![InodeId(op.target), InodeId(op.other_target)],
        _ => Vec::new(),
    }
}

/// What a reader finds at an edge.
#[derive(Debug, PartialEq, Eq)]
enum Sight {
    Is(u64),
    Nothing,
    /// The reader waits for what it will be of these, or nothing.
    OneOf(Vec<u64>),
}

/// The readers' rule of ADR 0015.
fn sees(state: &State, edge: &pb::EdgeRow) -> Sight {
    if edge.transaction == 0 {
        return Sight::Is(edge.target);
    }
    let undecided = || {
        let transaction = TransactionId(edge.transaction);
        let call = state.calls.iter().find(|call| call.transaction == Some(transaction));
        let targets = moved(&call.expect("a call of the scenario").op);
        Sight::OneOf(targets.into_iter().map(|inode| inode.0).collect())
    };
    if state.is_down() {
        return undecided();
    }
    match state.driver().resolve(TransactionId(edge.transaction)) {
        MoveState::NotMade => Sight::Is(edge.target),
        MoveState::Made(_) => Sight::Nothing,
        MoveState::Exchanged(_, target) => Sight::Is(target.0),
        MoveState::Undecided => undecided(),
        MoveState::Over => panic!("locked by {}, which is over", edge.transaction),
    }
}

/// Replaced, or removed.
fn is_gone(state: &State, inode: InodeId) -> bool {
    lives(&state.shards, inode).iter().any(|life| life.owned)
}

/// How long an inode had a name.
#[derive(Debug)]
struct Life {
    from: u64,
    /// `u64::MAX`: still.
    to: u64,
    owned: bool,
}

fn lives(shards: &Shards, inode: InodeId) -> Vec<Life> {
    let mut lives = Vec::new();
    for edge in edges(shards).values().filter(|edge| edge.target == inode.0) {
        lives.push(Life { from: edge.created_at, to: u64::MAX, owned: false });
    }
    for group in shards.values() {
        for (key, value) in group.table.iter().filter(|(key, _)| key[0] == b'X') {
            let row = pb::DeadEdgeRow::decode(value.clone()).unwrap();
            if row.target == inode.0 {
                let to = u64::from_be_bytes(key[key.len() - 8..].try_into().unwrap());
                lives.push(Life { from: row.created_at, to, owned: row.owned });
            }
        }
    }
    lives.sort_by_key(|life| life.from);
    lives
}

/// XD-9: the caller meets what it is told.
pub fn answer(state: &State, n: usize, transaction: TransactionId, reply: &pb::CrossdirReply) {
    let edges = edges(&state.shards);
    let found = |directory: u64, name: &bytes::Bytes| edges.get(&(directory, name.clone()));
    let seen =
        |directory: u64, name: &bytes::Bytes| match found(directory, name).map(|edge| sees(state, edge)) {
            Some(Sight::Is(target)) => Some(target),
            Some(Sight::OneOf(_)) => found(directory, name).map(|edge| edge.target),
            Some(Sight::Nothing) | None => None,
        };
    let leads = |directory: u64, name: &bytes::Bytes, target: u64| {
        names_since(state, directory, name).any(|name| seen(directory, name) == Some(target))
    };
    let owns = |directory: u64, owner: u64| {
        if InodeId(directory).is_directory() {
            assert_eq!(tables::owners(&state.shards)[&directory], owner, "XD-9: the owner");
        }
    };
    if code(reply) != 0 {
        let locked = edges.values().any(|edge| edge.transaction == transaction.0);
        assert!(!locked, "XD-9: {transaction} is refused, its lock is left");
        let locked = tables::removing(&state.shards).contains(&transaction.0);
        assert!(!locked, "XD-9: {transaction} is refused, the directory is left locked");
        let locked = tables::dead(&state.shards).values().any(|row| row.transaction == transaction.0);
        assert!(!locked, "XD-9: {transaction} is refused, the dead name is left locked");
        return;
    }
    match (&state.calls[n].op, &reply.result) {
        (Op::Mkdir(op), Some(pb::crossdir_reply::Result::Mkdir(made))) => {
            assert!(leads(op.parent, &op.name, made.inode), "XD-9: the directory made");
        }
        (Op::Rmdir(op), _) => assert_eq!(seen(op.parent, &op.name), None, "XD-9: the directory removed"),
        (Op::Move(op), _) => {
            assert!(leads(op.new_directory, &op.new_name, op.target), "XD-9: the new name");
            // When a driver says so that was replaced, the other one may not know it yet: readers wait.
            let old = found(op.old_directory, &op.old_name).map(|edge| sees(state, edge));
            assert_ne!(old, Some(Sight::Is(op.target)), "XD-9: the old name");
            owns(op.target, op.new_directory);
        }
        (Op::MkdirPath(op), Some(pb::crossdir_reply::Result::MkdirPath(made))) => {
            let mut parent = op.parent;
            for (name, &inode) in op.names.iter().zip(&made.inodes) {
                assert!(leads(parent, name, inode), "XD-9: a directory made");
                owns(inode, parent);
                parent = inode;
            }
            assert_eq!(made.inodes.len(), op.names.len());
        }
        (Op::Exchange(op), _) => {
            assert!(leads(op.other_directory, &op.other_name, op.target), "XD-9: the other name");
            let one = |name| found(op.directory, name).map(|edge| sees(state, edge));
            let right = |name| match one(name) {
                Some(Sight::Is(target)) => target == op.other_target,
                // As above.
                Some(Sight::OneOf(targets)) => targets.contains(&op.other_target),
                Some(Sight::Nothing) | None => false,
            };
            let is_right = names_since(state, op.directory, &op.name).any(right);
            assert!(is_right, "XD-9: the name is {:?}", one(&op.name));
            owns(op.target, op.other_directory);
            owns(op.other_target, op.directory);
        }
        (Op::UndeleteInode(op), _) => {
            assert!(leads(op.new_directory, &op.new_name, op.target), "XD-9: the name undeleted");
            let locked = tables::removing(&state.shards).contains(&transaction.0);
            assert!(!locked, "XD-9: the directory undeleted is left locked");
            let dead = tables::dead(&state.shards);
            let death = dead.get(&(op.directory, op.name.clone(), op.died_at));
            assert!(death.is_none_or(|row| !row.owned), "XD-9: what lives is owned by its death");
        }
        (Op::PurgeInode(op), _) => {
            let dead = tables::dead(&state.shards);
            assert!(!dead.contains_key(&(op.directory, op.name.clone(), op.died_at)), "XD-9: the dead name");
            assert!(!tables::inodes(&state.shards).contains(&op.target), "XD-9: the inode purged");
        }
        other => panic!("{other:?}"),
    }
}

/// The name, and the one that a shard may have given what it leads to before who gave it that name was answered.
fn names_since<'a>(
    state: &'a State,
    directory: u64,
    name: &'a bytes::Bytes,
) -> impl Iterator<Item = &'a bytes::Bytes> {
    let renamed = state.calls.iter().filter_map(move |call| match &call.op {
        Op::Move(op) if (op.old_directory, &op.old_name) == (directory, name) => {
            local::write(&call.op).map(|_| &op.new_name)
        }
        _ => None,
    });
    std::iter::once(name).chain(renamed)
}

/// As [`answer`], of what a shard does alone.
pub fn local_answer(state: &State, n: usize, reply: &pb::CrossdirReply) {
    let (directory, old, new) = match &state.calls[n].op {
        Op::Move(op) => (op.new_directory, Some(&op.old_name), &op.new_name),
        Op::UndeleteInode(op) => (op.new_directory, None, &op.new_name),
        other => panic!("{other:?}"),
    };
    if code(reply) == 0 {
        let edges = edges(&state.shards);
        let found = |name: &bytes::Bytes| edges.get(&(directory, name.clone()));
        assert!(found(new).is_some_and(|edge| edge.transaction == 0), "the name given");
        assert!(old.is_none_or(|old| found(old).is_none()), "the name taken");
    }
}

/// XD-3, XD-10: what a shard is told to forget is finished.
pub fn forgetting(coordinator: &Group<CrossdirMachine>, op: &pb::WriteOp) {
    let Some(pb::write_op::Op::ForgetTransactions(forget)) = &op.op else { return };
    for pending in eggs_crossdir_core::unfinished(&coordinator.table).unwrap() {
        assert!(!forget.transactions.contains(&pending.transaction.0), "XD-3");
        assert!(forget.floor <= pending.transaction.0, "XD-10");
    }
}

/// XD-11: the namespace is whole, everybody was answered, and as if the calls had come one after the other.
pub fn end(state: &State, before: &Model) {
    check(&state.coordinator, &state.shards);
    for call in &state.calls {
        let answer = call.answer.clone().expect("XD-9: an answer");
        if local::write(&call.op).is_some() {
            continue;
        }
        let transaction = call.transaction.expect("begun");
        match eggs_crossdir_core::answer(&state.coordinator.table, call.session, 1).unwrap() {
            Answer::Done(of, recorded) => {
                assert_eq!((of, code(&recorded)), (transaction, code(&answer)), "XD-2");
            }
            other => panic!("XD-2: {other:?}"),
        }
    }
    for call in &state.calls {
        for inode in moved(&call.op) {
            let lives = lives(&state.shards, inode);
            let whole = lives.windows(2).all(|pair| pair[0].to == pair[1].from);
            assert!(whole, "XD-12: {inode} in the past: {lives:?}");
        }
    }
    let after = Model::of(&state.shards);
    let mut order: Vec<usize> = Vec::new();
    assert!(
        serial(state, before, &after, &mut order),
        "no order explains the answers {:?}\nand {after:?}",
        state.calls.iter().map(|call| &call.answer).collect::<Vec<_>>()
    );
}

/// Goes on from `order`, whose answers `model` gave.
fn serial(state: &State, model: &Model, after: &Model, order: &mut Vec<usize>) -> bool {
    if order.len() == state.calls.len() {
        return model == after;
    }
    for (n, call) in state.calls.iter().enumerate() {
        if order.contains(&n) || !call.after.iter().all(|earlier| order.contains(earlier)) {
            continue;
        }
        let answer = call.answer.as_ref().expect("an answer");
        let mut model = model.clone();
        let expected = model.apply(&call.op, made(answer)).err().map_or(0, ServiceError::code);
        if expected == code(answer) {
            order.push(n);
            if serial(state, &model, after, order) {
                return true;
            }
            order.pop();
        }
    }
    false
}
