//! The coordinator's steps: each once, each with its undo.

use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as Answer;
use eggs_proto::{InodeId, InodeType, ServiceError, ShardError, ShardId, Time, pb};

use crate::support::*;

fn lock(transaction: u64, name: &str, target: u64) -> Op {
    let name = name.to_owned().into();
    Op::LockEdge(pb::LockEdge { transaction, directory: ROOT, name, target })
}

fn unlock(transaction: u64, name: &str) -> Op {
    Op::UnlockEdge(pb::UnlockEdge { transaction, directory: ROOT, name: name.to_owned().into() })
}

fn link_edge(transaction: u64, directory: u64, name: &str, target: u64, replace: pb::Replace) -> Op {
    let (name, replace) = (name.to_owned().into(), replace as i32);
    Op::LinkEdge(pb::LinkEdge { transaction, directory, name, target, replace })
}

fn unlink_edge(transaction: u64, directory: u64, name: &str, target: u64, owned: bool) -> Op {
    let name = name.to_owned().into();
    Op::UnlinkEdge(pb::UnlinkEdge { transaction, directory, name, target, owned, died_at: 0 })
}

fn lock_directory(transaction: u64, directory: u64, owner: u64) -> Op {
    Op::LockDirectory(pb::LockDirectory { transaction, directory, owner, removed: false })
}

fn unlock_directory(transaction: u64, directory: u64) -> Op {
    Op::UnlockDirectory(pb::UnlockDirectory { transaction, directory })
}

fn remove_directory(transaction: u64, directory: u64) -> Op {
    Op::RemoveDirectory(pb::RemoveDirectory { transaction, directory })
}

fn create(transaction: u64, owner: u64) -> Op {
    Op::CreateDirectory(pb::CreateDirectory { transaction, owner, attributes: None })
}

fn forget(transactions: &[u64], floor: u64) -> Op {
    Op::ForgetTransactions(pb::ForgetTransactions { transactions: transactions.to_vec(), floor })
}

fn foreign(kind: InodeType) -> u64 {
    InodeId::new(kind, ShardId(9), 5).0
}

#[test]
fn a_repeated_step_gives_its_first_answer() {
    let mut shard = Shard::default();
    let first = shard.one(create(1, ROOT));
    let rows = shard.rows();
    assert_eq!(shard.one(create(1, ROOT)), first);
    assert_eq!(shard.rows(), rows);
    // A refusal, too, even when it would succeed by now.
    let refused = shard.one(lock(2, "f", 77));
    assert_eq!(refused.1, Err(ShardError::NotFound));
    let file = shard.put(ROOT, "f", b"");
    assert_eq!(shard.one(lock(2, "f", file)), refused);
    shard.ok(lock(3, "f", file));
    shard.verify();
}

#[test]
fn forgotten_steps_do_not_run_again() {
    let mut shard = Shard::default();
    let directory = shard.mkdir(5, ROOT, "d");
    shard.ok(forget(&[5], 0));
    assert!(!shard.table.iter().any(|(key, _)| key[0] == b'T'));
    // Transaction 6 and above may still come; 5 and below are over.
    shard.ok(forget(&[], 6));
    let rows = shard.rows();
    assert_eq!(shard.one(create(5, ROOT)).1, Err(ShardError::StaleSession));
    assert_eq!(
        shard.one(link_edge(4, ROOT, "e", directory, pb::Replace::Refuse)).1,
        Err(ShardError::StaleSession)
    );
    assert_eq!(shard.rows(), rows);
    // The floor never falls.
    shard.ok(forget(&[], 1));
    assert_eq!(shard.one(create(5, ROOT)).1, Err(ShardError::StaleSession));
    shard.ok(create(6, ROOT));
    assert_eq!(shard.one(create(0, ROOT)).1, Err(ShardError::Malformed));
    shard.verify();
}

#[test]
fn a_directory_is_made_and_discarded() {
    let mut shard = Shard::default();
    let (time, answer) = shard.one(create(1, ROOT));
    let directory = link(answer.unwrap()).inode;
    let attributes = shard.stat(directory).unwrap();
    assert_eq!((attributes.parent, attributes.created_at), (Some(ROOT), time.0));
    let discard = |transaction| Op::DiscardDirectory(pb::DiscardDirectory { transaction, directory });
    assert_eq!(shard.refused(discard(2)), ShardError::Changed);
    shard.ok(discard(1));
    assert_eq!(shard.stat(directory), None);
    assert_eq!(shard.refused(create(3, 0)), ShardError::Malformed);
    assert_eq!(shard.refused(create(4, foreign(InodeType::File))), ShardError::Malformed);
    shard.verify();
}

#[test]
fn a_discard_keeps_what_is_in_use() {
    let mut shard = Shard::default();
    let directory = link(shard.ok(create(1, ROOT))).inode;
    shard.put(directory, "f", b"");
    let discard = Op::DiscardDirectory(pb::DiscardDirectory { transaction: 1, directory });
    assert_eq!(shard.refused(discard), ShardError::NotEmpty);
}

#[test]
fn an_empty_directory_is_removed_and_takes_nothing_more() {
    let mut shard = Shard::default();
    let directory = shard.mkdir(1, ROOT, "d");
    shard.put(directory, "f", b"1");
    assert_eq!(shard.refused(lock_directory(2, directory, ROOT)), ShardError::NotEmpty);
    shard.ok(unlink(directory, "f"));
    assert_eq!(shard.refused(lock_directory(3, directory, directory)), ShardError::Changed);
    assert_eq!(shard.refused(lock_directory(4, ROOT, ROOT)), ShardError::IsRoot);
    let eden = eden(shard.ok(start(directory, None)));
    shard.ok(lock_directory(5, directory, ROOT));
    // Until its name is gone it is there, and empty; nobody knows whether it will be.
    assert_eq!(shard.stat(directory).unwrap().parent, Some(ROOT));
    assert_eq!(shard.list(pb::List { directory, ..Default::default() }), []);
    assert_eq!(shard.refused(put_small(directory, "g", b"", pb::Replace::File)), ShardError::Locked);
    assert_eq!(shard.refused(remove_directory(9, directory)), ShardError::Changed, "another's lock");
    shard.verify();
    shard.ok(unlink_edge(5, ROOT, "d", directory, true));
    shard.ok(remove_directory(5, directory));
    assert_eq!(shard.stat(directory).unwrap().parent, Some(0));
    let link_eden = Op::LinkEden(pb::LinkEden {
        file: eden.file,
        cookie: eden.cookie,
        directory,
        name: "g".into(),
        ..Default::default()
    });
    let entries = [
        link_eden,
        put_small(directory, "g", b"", pb::Replace::File),
        link_edge(6, directory, "g", foreign(InodeType::File), pb::Replace::Refuse),
        start(directory, None),
        lock_directory(7, directory, ROOT),
        Op::SetOwner(pb::SetOwner { transaction: 8, directory, owner: ROOT }),
    ];
    for op in entries {
        assert_eq!(shard.refused(op), ShardError::NotFound);
    }
    let (died, _) = shard.one(unlink_edge(5, ROOT, "d", directory, true));
    // What was in it can still be seen.
    let at = died.0 - 1;
    let walk = |at, name: &'static str| pb::Walk {
        start: ROOT,
        components: vec!["d".into(), name.into()],
        at,
        ..Default::default()
    };
    assert_eq!(shard.walk(&walk(at, "f")).unwrap().consumed, 1, "it was unlinked by then");
    let created = shard.list(pb::List { directory, dead: true, ..Default::default() })[0].created_at;
    assert_eq!(shard.walk(&walk(created, "f")).unwrap().consumed, 2);
    assert_eq!(shard.walk(&walk(0, "f")).unwrap().consumed, 0);
    shard.verify();
}

/// Whoever reads a name that a move has locked is told so, and what is known of the move decides; in the end the name
/// has died when the move says.
#[test]
fn a_locked_name_is_what_became_of_the_move() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"contents");
    let (locked, _) = shard.one(lock(7, "f", file));
    let walk = pb::Walk { start: ROOT, components: vec!["f".into()], ..Default::default() };
    let reply = shard.walk(&walk).unwrap();
    assert_eq!((reply.consumed, reply.locked_by, reply.stopped), (0, 7, None));
    assert_eq!(shard.list(pb::List { directory: ROOT, ..Default::default() })[0].locked_by, 7);
    let stayed = pb::Walk { not_moved: vec![7], ..walk.clone() };
    assert_eq!(shard.walk(&stayed).unwrap().inode, file);
    let gone = shard.walk(&pb::Walk { moved: vec![7], ..walk.clone() }).unwrap();
    assert_eq!(gone.stopped.unwrap().code, ShardError::NotFound.code());
    // It may be gone already: not even that it exists is said.
    let put = put_small(ROOT, "f", b"", pb::Replace::Refuse);
    assert_eq!(shard.refused(put), ShardError::Locked);
    let unlink = |died_at: u64| {
        let (transaction, directory, name) = (7, ROOT, "f".into());
        Op::UnlinkEdge(pb::UnlinkEdge { transaction, directory, name, target: file, owned: false, died_at })
    };
    shard.put(ROOT, "g", b"later");
    let moved_at = locked.0 + 1;
    shard.ok(unlink(moved_at));
    let dead = &shard.list(pb::List { directory: ROOT, dead: true, ..Default::default() })[0];
    assert_eq!((dead.died_at, dead.owned), (moved_at, false));
    for (at, there) in [(moved_at - 1, true), (moved_at, false)] {
        let reply = shard.walk(&pb::Walk { at, ..walk.clone() }).unwrap();
        assert_eq!((reply.consumed == 1, reply.locked_by), (there, 0), "{at}");
    }
}

#[test]
fn no_name_dies_before_it_was_or_in_times_to_come() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"");
    let created = shard.list(pb::List { directory: ROOT, ..Default::default() })[0].created_at;
    for (n, died_at) in [1, created, u64::MAX].into_iter().enumerate() {
        let transaction = 7 + n as u64;
        let (directory, name, target) = (ROOT, "f".into(), file);
        let op = pb::UnlinkEdge { transaction, directory, name, target, owned: false, died_at };
        assert_eq!(shard.refused(Op::UnlinkEdge(op)), ShardError::Malformed);
    }
}

#[test]
fn a_removal_is_undone() {
    let mut shard = Shard::default();
    let directory = shard.mkdir(1, ROOT, "d");
    shard.ok(lock_directory(2, directory, ROOT));
    shard.ok(unlock_directory(2, directory));
    assert_eq!(shard.stat(directory).unwrap().parent, Some(ROOT));
    shard.put(directory, "f", b"");
    // Undoing what was refused gives nothing back.
    shard.one(lock_directory(3, directory, ROOT)).1.unwrap_err();
    shard.ok(unlock_directory(3, directory));
    assert_eq!(shard.stat(directory).unwrap().parent, Some(ROOT));
    // Undone before it came: it must not come any more.
    shard.ok(unlink(directory, "f"));
    shard.ok(unlock_directory(4, directory));
    assert_eq!(shard.one(lock_directory(4, directory, ROOT)).1, Err(ShardError::StaleSession));
    shard.verify();
}

#[test]
fn a_locked_edge_waits_for_its_transaction() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"");
    shard.put(ROOT, "g", b"");
    assert_eq!(shard.refused(lock(1, "f", file + 9)), ShardError::Changed);
    shard.ok(lock(2, "f", file));
    shard.verify();
    let changes = [
        put_small(ROOT, "f", b"", pb::Replace::File),
        unlink(ROOT, "f"),
        rename(ROOT, "f", "h", pb::Replace::File),
        rename(ROOT, "g", "f", pb::Replace::File),
        lock(3, "f", file),
        unlink_edge(4, ROOT, "f", file, true),
        link_edge(5, ROOT, "f", foreign(InodeType::File), pb::Replace::File),
    ];
    for op in changes {
        assert_eq!(shard.refused(op), ShardError::Locked);
    }
    // Somebody else's unlock does nothing.
    shard.ok(unlock(6, "f"));
    assert_eq!(shard.refused(unlink(ROOT, "f")), ShardError::Locked);
    assert_eq!(shard.one(lock(6, "f", file)).1, Err(ShardError::StaleSession));
    shard.ok(unlock(2, "f"));
    shard.ok(unlink(ROOT, "f"));
    shard.ok(unlock(7, "never was"));
    shard.verify();
}

#[test]
fn a_file_moves_away_and_lives_on() {
    let mut shard = Shard::default();
    let directory = shard.mkdir(1, ROOT, "d");
    let file = shard.put(ROOT, "f", b"1");
    let old = shard.put(directory, "g", b"2");
    shard.ok(lock(2, "f", file));
    assert_eq!(link(shard.ok(link_edge(2, directory, "g", file, pb::Replace::File))).replaced, old);
    shard.ok(unlink_edge(2, ROOT, "f", file, false));
    let dead = shard.list(pb::List { directory: ROOT, dead: true, ..Default::default() });
    assert_eq!((dead[0].target, dead[0].owned), (file, false));
    let dead = shard.list(pb::List { directory, dead: true, ..Default::default() });
    assert_eq!((dead[0].target, dead[0].owned), (old, true));
    shard.ok(forget(&[1, 2], 3));
    shard.verify();
}

#[test]
fn what_a_link_refuses() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"");
    let directory = shard.mkdir(1, ROOT, "d");
    let (foreign_file, foreign_directory) = (foreign(InodeType::File), foreign(InodeType::Directory));
    let cases = [
        ("f", foreign_file, pb::Replace::Refuse, ShardError::Exists),
        ("f", file, pb::Replace::File, ShardError::Exists),
        ("f", foreign_directory, pb::Replace::File, ShardError::NotDirectory),
        ("d", foreign_file, pb::Replace::File, ShardError::IsDirectory),
        ("d", foreign_directory, pb::Replace::File, ShardError::Exists),
        ("n", 0, pb::Replace::File, ShardError::Malformed),
        ("n", ROOT, pb::Replace::File, ShardError::Malformed),
        ("n", u64::MAX, pb::Replace::File, ShardError::Malformed),
        ("n", file + 1, pb::Replace::File, ShardError::NotFound),
        ("n", directory + 1, pb::Replace::File, ShardError::NotFound),
        ("n/", foreign_file, pb::Replace::File, ShardError::InvalidName),
    ];
    for ((name, target, replace, error), transaction) in cases.into_iter().zip(10..) {
        assert_eq!(
            shard.refused(link_edge(transaction, ROOT, name, target, replace)),
            error,
            "{name} {target}"
        );
    }
    shard.ok(link_edge(30, ROOT, "n", foreign_file, pb::Replace::Refuse));
    assert_eq!(shard.refused(unlink_edge(31, ROOT, "n", file, true)), ShardError::Changed);
    shard.verify();
}

#[test]
fn an_owner_is_set() {
    let mut shard = Shard::default();
    let (a, b) = (shard.mkdir(1, ROOT, "a"), shard.mkdir(2, ROOT, "b"));
    let set = |transaction, directory, owner| Op::SetOwner(pb::SetOwner { transaction, directory, owner });
    shard.ok(set(3, a, b));
    assert_eq!(shard.stat(a).unwrap().parent, Some(b));
    assert_eq!(shard.refused(set(4, ROOT, a)), ShardError::IsRoot);
    assert_eq!(shard.refused(set(5, a, 0)), ShardError::Malformed);
    assert_eq!(shard.refused(set(6, a, a)), ShardError::Malformed);
}

#[test]
fn times_of_steps_are_their_own() {
    let mut shard = Shard::default();
    let results = shard.batch(vec![create(1, ROOT), create(2, ROOT), create(1, ROOT)]);
    assert_eq!(results[1].time, results[0].time + 1);
    assert_eq!(results[2], results[0]);
    assert!(Time(results[0].time) > Time::ZERO);
    assert!(matches!(results[0].result, Some(Answer::Link(_))));
}

/// Whoever reads a name that an exchange has locked is told so, and finds what the coordinator says it leads to; in the end
/// it leads there since the instant at which the other name was given away.
#[test]
fn a_locked_name_is_what_became_of_the_exchange() {
    let mut shard = Shard::default();
    let directory = shard.mkdir(1, ROOT, "d");
    let (file, other) = (shard.put(ROOT, "f", b"contents"), shard.put(directory, "g", b"more"));
    shard.ok(lock(7, "f", file));
    let exchange = |transaction, target, new_target| {
        let name = "g".into();
        Op::ExchangeEdge(pb::ExchangeEdge { transaction, directory, name, target, new_target })
    };
    assert_eq!(shard.refused(exchange(6, file, other)), ShardError::Changed);
    let (at, answer) = shard.one(exchange(7, other, file));
    let reply = link(answer.unwrap());
    assert_eq!((reply.inode, reply.replaced, reply.created_at), (file, other, at.0));
    let walk = pb::Walk { start: ROOT, components: vec!["f".into()], ..Default::default() };
    assert_eq!(shard.walk(&walk).unwrap().locked_by, 7);
    let known = |transaction, target| pb::Walk {
        exchanged: vec![pb::Exchanged { transaction, target, exchanged_at: at.0 }],
        ..walk.clone()
    };
    let found = shard.walk(&known(7, other)).unwrap();
    assert_eq!((found.inode, found.created_at, found.consumed, found.locked_by), (other, at.0, 1, 0));
    assert_eq!(shard.walk(&known(8, other)).unwrap().locked_by, 7, "of another one");
    assert!(shard.walk(&known(7, u64::MAX)).unwrap().stopped.is_some());
    let settle = |transaction, new_target, exchanged_at| {
        let (directory, name) = (ROOT, "f".into());
        let target = file;
        let step = pb::SettleEdge { transaction, directory, name, target, new_target, exchanged_at };
        Op::SettleEdge(step)
    };
    // Each under another number: what is refused once is refused for ever.
    assert_eq!(shard.refused(settle(8, other, at.0)), ShardError::Locked);
    shard.put(ROOT, "h", b"later");
    shard.ok(settle(7, other, at.0));
    let lives = |shard: &Shard, directory, name: &'static str, at| {
        let components = vec![name.into()];
        shard.walk(&pb::Walk { start: directory, components, at, ..Default::default() }).unwrap().inode
    };
    for (then, f, g) in [(at.0 - 1, file, other), (at.0, other, file), (0, other, file)] {
        assert_eq!((lives(&shard, ROOT, "f", then), lives(&shard, directory, "g", then)), (f, g), "{then}");
    }
    let dead = &shard.list(pb::List { directory: ROOT, dead: true, ..Default::default() })[0];
    assert_eq!((dead.target, dead.died_at, dead.owned), (file, at.0, false));
    shard.ok(forget(&[1, 6, 7, 8], 9));
    shard.verify();
}

#[test]
fn an_exchange_is_settled_only_where_it_holds_the_lock_and_never_in_times_to_come() {
    let mut shard = Shard::default();
    let (file, other) = (shard.put(ROOT, "f", b""), shard.put(ROOT, "g", b""));
    let created = shard.list(pb::List { directory: ROOT, ..Default::default() })[0].created_at;
    let settle = |transaction, exchanged_at| {
        let (directory, name, target, new_target) = (ROOT, "f".into(), file, other);
        Op::SettleEdge(pb::SettleEdge { transaction, directory, name, target, new_target, exchanged_at })
    };
    assert_eq!(shard.refused(settle(7, created + 1)), ShardError::Changed, "not locked");
    for (transaction, at) in [(8, created), (9, u64::MAX), (10, 0)] {
        shard.ok(lock(transaction, "f", file));
        assert_eq!(shard.refused(settle(transaction, at)), ShardError::Malformed);
        shard.ok(unlock(transaction, "f"));
    }
    shard.verify();
}

#[test]
fn owners_are_set_together_or_not_at_all() {
    let mut shard = Shard::default();
    let (a, b) = (shard.mkdir(1, ROOT, "a"), shard.mkdir(2, ROOT, "b"));
    let set = |transaction, owners: &[(u64, u64)]| {
        let owner = |&(directory, owner): &(u64, u64)| pb::DirectoryOwner { directory, owner };
        Op::SetOwners(pb::SetOwners { transaction, owners: owners.iter().map(owner).collect() })
    };
    let parents = |shard: &Shard| [a, b].map(|directory| shard.stat(directory).unwrap().parent.unwrap());
    assert_eq!(shard.refused(set(3, &[])), ShardError::Malformed);
    assert_eq!(shard.refused(set(4, &[(a, b), (ROOT, b)])), ShardError::IsRoot);
    assert_eq!(shard.refused(set(5, &[(a, b), (b, b)])), ShardError::Malformed);
    assert_eq!(parents(&shard), [ROOT, ROOT]);
    let far = foreign(InodeType::Directory);
    shard.ok(set(6, &[(a, far), (b, a)]));
    assert_eq!(parents(&shard), [far, a]);
}

#[test]
fn directories_are_made_in_each_other_and_discarded_whole() {
    let mut shard = Shard::default();
    let names = || vec!["x".into(), "y".into()];
    let create = |transaction, names: Vec<bytes::Bytes>| {
        let mode = |mode| Some(pb::NewAttributes { mode, ..Default::default() });
        let (on_the_way, attributes) = (mode(0o755), mode(0o700));
        let op = pb::CreateDirectories { transaction, owner: ROOT, names, on_the_way, attributes };
        Op::CreateDirectories(op)
    };
    let discard = |transaction, directory| {
        Op::DiscardDirectories(pb::DiscardDirectories { transaction, directory, names: names() })
    };
    let before = shard.rows();
    assert_eq!(shard.refused(create(1, vec!["x".into(), "..".into()])), ShardError::InvalidName);
    assert_eq!(shard.refused(create(2, vec!["x".into(); 256])), ShardError::Malformed);
    let first = link(shard.ok(create(3, names()))).inode;
    let entries = |directory| pb::List { directory, ..Default::default() };
    let x = shard.list(entries(first))[0].target;
    let y = shard.list(entries(x))[0].target;
    assert_eq!((x, y), (first + 1, first + 2), "their counters follow each other");
    let made = [(first, ROOT, 0o755), (x, first, 0o755), (y, x, 0o700)];
    for (directory, owner, mode) in made {
        let found = shard.stat(directory).unwrap();
        assert_eq!((found.parent, found.mode), (Some(owner), mode));
    }
    assert_eq!(shard.refused(discard(4, first)), ShardError::Changed, "another made them");
    shard.ok(discard(3, first));
    shard.ok(forget(&[1, 2, 3, 4], 5));
    let gone = shard.rows().into_iter().filter(|(key, _)| matches!(key[0], b'D' | b'L' | b'X'));
    let there = before.into_iter().filter(|(key, _)| matches!(key[0], b'D' | b'L' | b'X'));
    assert_eq!(gone.collect::<Vec<_>>(), there.collect::<Vec<_>>(), "as if they had never been");
    // Somebody has put something into the last of them.
    let first = link(shard.ok(create(6, names()))).inode;
    shard.put(first + 2, "f", b"");
    assert_eq!(shard.refused(discard(6, first)), ShardError::NotEmpty);
    shard.ok(link_edge(7, ROOT, "d", first, pb::Replace::Refuse));
    shard.ok(forget(&[6, 7], 8));
    shard.verify();
}
