//! What is dead: brought back, or purged for good.

use eggs_proto::pb::shard_reply::Result as Reply;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, InodeType, ShardError, ShardId, pb};

use crate::support::*;

/// The deaths of a name, oldest first.
fn deaths(shard: &Shard, directory: u64, name: &str) -> Vec<pb::Entry> {
    let dead = shard.list(pb::List { directory, dead: true, ..Default::default() });
    dead.into_iter().filter(|entry| entry.name == name.as_bytes()).collect()
}

fn undelete(directory: u64, entry: &pb::Entry, new_name: &str) -> Op {
    let (name, new_name) = (entry.name.clone(), new_name.to_owned().into());
    Op::Undelete(pb::Undelete { directory, name, died_at: entry.died_at, target: entry.target, new_name })
}

fn purge(directory: u64, entry: &pb::Entry) -> Op {
    let name = entry.name.clone();
    Op::Purge(pb::Purge { directory, name, died_at: entry.died_at, target: entry.target, owned: entry.owned })
}

fn names_at(shard: &Shard, at: u64) -> Vec<String> {
    let listed = shard.list(pb::List { directory: ROOT, at, ..Default::default() });
    listed.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect()
}

#[test]
fn a_file_comes_back_and_the_past_stays() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"1");
    let (died, _) = shard.one(unlink(ROOT, "f"));
    let death = deaths(&shard, ROOT, "f").remove(0);
    let (back, answer) = shard.one(undelete(ROOT, &death, ""));
    assert_eq!(link(answer.unwrap()), pb::LinkReply { inode: file, replaced: 0, created_at: back.0 });
    assert_eq!(names_at(&shard, died.0 - 1), ["f"]);
    assert_eq!(names_at(&shard, died.0), [""; 0]);
    assert_eq!(names_at(&shard, back.0 - 1), [""; 0]);
    assert_eq!(names_at(&shard, back.0), ["f"]);
    assert!(!deaths(&shard, ROOT, "f")[0].owned);
    assert_eq!(shard.refused(undelete(ROOT, &death, "g")), ShardError::NotOwned);
    // It dies again, and that death owns it.
    shard.ok(unlink(ROOT, "f"));
    let owned: Vec<bool> = deaths(&shard, ROOT, "f").iter().map(|entry| entry.owned).collect();
    assert_eq!(owned, [false, true]);
    assert_eq!(shard.refused(undelete(ROOT, &death, "g")), ShardError::NotOwned);
    shard.verify();
}

#[test]
fn what_cannot_be_undeleted() {
    let mut shard = Shard::default();
    shard.put(ROOT, "f", b"1");
    shard.put(ROOT, "f", b"2");
    let death = deaths(&shard, ROOT, "f").remove(0);
    assert_eq!(shard.refused(undelete(ROOT, &death, "")), ShardError::Exists);
    assert_eq!(shard.refused(undelete(ROOT, &death, "a/b")), ShardError::InvalidName);
    let mut other = death.clone();
    other.target += 1;
    assert_eq!(shard.refused(undelete(ROOT, &other, "g")), ShardError::Changed);
    let mut other = death.clone();
    other.died_at += 1;
    assert_eq!(shard.refused(undelete(ROOT, &other, "g")), ShardError::NotFound);
    shard.ok(rename(ROOT, "f", "g", pb::Replace::Refuse));
    let moved = deaths(&shard, ROOT, "f").remove(1);
    assert_eq!(shard.refused(undelete(ROOT, &moved, "h")), ShardError::NotOwned);
    // Nothing comes back into a removed directory.
    let directory = shard.mkdir(1, ROOT, "d");
    shard.put(directory, "x", b"x");
    shard.ok(unlink(directory, "x"));
    let below = deaths(&shard, directory, "x").remove(0);
    let (transaction, name) = (2, bytes::Bytes::from_static(b"d"));
    let lock = pb::LockDirectory { transaction, directory, owner: ROOT, removed: false };
    shard.ok(Op::LockDirectory(lock));
    assert_eq!(shard.refused(undelete(directory, &below, "")), ShardError::Locked);
    let (target, owned) = (directory, true);
    shard.ok(Op::UnlinkEdge(pb::UnlinkEdge {
        transaction,
        directory: ROOT,
        name,
        target,
        owned,
        died_at: 0,
    }));
    shard.ok(Op::RemoveDirectory(pb::RemoveDirectory { transaction, directory }));
    assert_eq!(shard.refused(undelete(directory, &below, "")), ShardError::NotFound);
    let dead = deaths(&shard, ROOT, "d").remove(0);
    assert_eq!(shard.refused(undelete(ROOT, &dead, "")), ShardError::IsDirectory);
    shard.verify();
}

#[test]
fn a_purged_file_leaves_its_blocks_to_the_eraser_and_nothing_else() {
    let mut shard = Shard::default();
    let placed = eden(shard.ok(start(ROOT, Some(blocks_span(0, 10, crc(&[7; 10]), 1, 1)))));
    let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&placed.blocks) });
    shard.ok(Op::LinkEden(pb::LinkEden {
        file: placed.file,
        cookie: placed.cookie,
        certify,
        directory: ROOT,
        name: "f".into(),
        replace: 0,
        size: 10,
        crc: crc(&[7; 10]),
    }));
    shard.ok(rename(ROOT, "f", "g", pb::Replace::Refuse));
    shard.ok(unlink(ROOT, "g"));
    let (moved, death) = (deaths(&shard, ROOT, "f").remove(0), deaths(&shard, ROOT, "g").remove(0));
    shard.ok(purge(ROOT, &death));
    shard.verify();
    assert_eq!(shard.stat(placed.file), None);
    let Reply::ListEden(eden) = shard.read(Read::ListEden(pb::ListEden::default())) else { panic!() };
    let [left] = &eden.files[..] else { panic!("{eden:?}") };
    assert_eq!((left.file, left.size, left.expired), (placed.file, 10, true));
    assert!(
        shard.table.iter().any(|(key, _)| key[0] == b'B'),
        "SH-8: its blocks are counted until they are erased"
    );
    // Nobody writes to it again, with whatever cookie.
    for cookie in [placed.cookie, 1] {
        let extend = pb::ExtendEden { file: placed.file, cookie, certify: None, span: None };
        assert!(matches!(shard.refused(Op::ExtendEden(extend)), ShardError::Expired | ShardError::NotWriter));
    }
    assert_eq!(shard.refused(purge(ROOT, &death)), ShardError::NotFound);
    assert_eq!(shard.refused(undelete(ROOT, &death, "h")), ShardError::NotFound);
    // The name it had before goes by itself.
    shard.ok(purge(ROOT, &moved));
    assert_eq!(deaths(&shard, ROOT, "f"), []);
    shard.verify();
}

#[test]
fn a_purged_file_without_blocks_is_gone() {
    let mut shard = Shard::default();
    let before = shard.rows().len();
    shard.put(ROOT, "f", b"inline");
    shard.ok(unlink(ROOT, "f"));
    let death = deaths(&shard, ROOT, "f").remove(0);
    shard.ok(purge(ROOT, &death));
    // The counters' row is new.
    assert_eq!(shard.rows().len(), before + 1, "{:?}", shard.rows());
    shard.verify();
}

#[test]
fn what_lives_is_never_purged() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"1");
    shard.ok(unlink(ROOT, "f"));
    let death = deaths(&shard, ROOT, "f").remove(0);
    shard.ok(undelete(ROOT, &death, "g"));
    // Who saw it before it came back meant to purge the file.
    assert_eq!(shard.refused(purge(ROOT, &death)), ShardError::NotOwned);
    // The dead edge goes, the file it led to stays.
    let death = deaths(&shard, ROOT, "f").remove(0);
    shard.ok(purge(ROOT, &death));
    assert!(shard.stat(file).is_some());
    let directory = shard.mkdir(1, ROOT, "d");
    let (transaction, removed) = (2, true);
    let lock = pb::LockDirectory { transaction, directory, owner: 0, removed };
    assert_eq!(shard.refused(Op::LockDirectory(lock)), ShardError::NotOwned);
    let purge = pb::PurgeDirectory { transaction, directory };
    assert_eq!(shard.refused(Op::PurgeDirectory(purge)), ShardError::Changed);
    let revive = pb::ReviveDirectory { transaction, directory, owner: ROOT };
    assert_eq!(shard.refused(Op::ReviveDirectory(revive)), ShardError::NotOwned);
    shard.verify();
}

#[test]
fn a_file_of_another_shard_comes_back_here_and_is_purged_by_the_coordinator() {
    let mut shard = Shard::default();
    let target = InodeId::new(InodeType::File, ShardId(9), 5).0;
    let (directory, name) = (ROOT, bytes::Bytes::from_static(b"f"));
    shard.ok(Op::LinkEdge(pb::LinkEdge {
        transaction: 1,
        directory,
        name: name.clone(),
        target,
        replace: 0,
    }));
    shard.ok(unlink(ROOT, "f"));
    let death = deaths(&shard, ROOT, "f").remove(0);
    assert_eq!(shard.refused(purge(ROOT, &death)), ShardError::Malformed);
    shard.ok(undelete(ROOT, &death, ""));
    shard.ok(unlink(ROOT, "f"));
    let death = deaths(&shard, ROOT, "f").remove(1);
    let died_at = death.died_at;
    let lock = pb::LockDeadEdge { transaction: 2, directory, name: name.clone(), died_at, target };
    shard.ok(Op::LockDeadEdge(lock));
    shard.verify();
    assert_eq!(shard.refused(undelete(ROOT, &death, "")), ShardError::Locked);
    let free = pb::FreeDeadEdge { transaction: 2, directory, name: name.clone(), died_at, lives: false };
    shard.ok(Op::FreeDeadEdge(free));
    let step = pb::PurgeDeadEdge { transaction: 3, directory, name, died_at, target };
    shard.ok(Op::PurgeDeadEdge(step.clone()));
    shard.ok(Op::PurgeDeadEdge(step));
    assert_eq!(shard.refused(undelete(ROOT, &death, "")), ShardError::NotFound);
    shard.verify();
}

#[test]
fn freeing_what_was_not_locked_yet_forbids_the_lock() {
    let mut shard = Shard::default();
    shard.put(ROOT, "f", b"1");
    shard.ok(unlink(ROOT, "f"));
    let death = deaths(&shard, ROOT, "f").remove(0);
    let (transaction, directory, name, died_at) = (5, ROOT, death.name.clone(), death.died_at);
    let free = pb::FreeDeadEdge { transaction, directory, name: name.clone(), died_at, lives: false };
    shard.ok(Op::FreeDeadEdge(free));
    let lock = pb::LockDeadEdge { transaction, directory, name, died_at, target: death.target };
    assert_eq!(shard.refused(Op::LockDeadEdge(lock)), ShardError::StaleSession);
    shard.ok(undelete(ROOT, &death, ""));
}
