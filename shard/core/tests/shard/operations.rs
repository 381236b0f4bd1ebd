//! The clients' operations on names and attributes.

use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as Answer;
use eggs_proto::{InodeId, ServiceError, ShardError, limits, pb};

use crate::support::*;

#[test]
fn a_small_file_is_there_at_once() {
    let mut shard = Shard::default();
    let (time, answer) = shard.one(put_small(ROOT, "f", b"hello", pb::Replace::Refuse));
    let reply = link(answer.unwrap());
    assert_eq!((reply.replaced, reply.created_at), (0, time.0));
    let attributes = shard.stat(reply.inode).unwrap();
    let expected = pb::Attributes {
        inode: reply.inode,
        size: 5,
        mtime: time.0,
        atime: time.0,
        mode: 0o644,
        uid: 1,
        gid: 2,
        crc: Some(crc(b"hello")),
        created_at: time.0,
        ..Default::default()
    };
    assert_eq!(attributes, expected);
    assert_eq!(shard.stat(ROOT).unwrap().mtime, time.0);
    shard.verify();
}

#[test]
fn an_empty_file_touches_few_rows() {
    let mut shard = Shard::default();
    shard.put(ROOT, "first", b"");
    let before = shard.table.len();
    shard.put(ROOT, "f", b"");
    // L and F; D, M and the clock are rewritten.
    assert_eq!(shard.table.len(), before + 2);
}

#[test]
fn a_batch_may_write_one_name_twice() {
    let mut shard = Shard::default();
    let put = |bytes| put_small(ROOT, "f", bytes, pb::Replace::File);
    let results = shard.batch(vec![put(b"one"), put(b"two")]);
    let [one, two] = [0, 1].map(|i| link(answer(&results[i]).unwrap()));
    assert_eq!(results[1].time, results[0].time + 1);
    assert_eq!(two.replaced, one.inode);
    let dead = shard.list(pb::List { directory: ROOT, dead: true, ..Default::default() });
    assert_eq!(dead.len(), 1);
    assert_eq!(
        (dead[0].target, dead[0].created_at, dead[0].died_at),
        (one.inode, results[0].time, results[1].time)
    );
    assert!(dead[0].owned);
    shard.verify();
}

#[test]
fn what_a_put_refuses() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"1");
    let directory = shard.mkdir(1, ROOT, "d");
    let put = |directory, name: &str| put_small(directory, name, b"2", pb::Replace::File);
    assert_eq!(shard.refused(put_small(ROOT, "f", b"2", pb::Replace::Refuse)), ShardError::Exists);
    assert_eq!(shard.refused(put_small(ROOT, "d", b"2", pb::Replace::Refuse)), ShardError::Exists);
    assert_eq!(shard.refused(put(ROOT, "d")), ShardError::IsDirectory);
    assert_eq!(shard.refused(put(ROOT, "")), ShardError::InvalidName);
    assert_eq!(shard.refused(put(ROOT, "..")), ShardError::InvalidName);
    assert_eq!(shard.refused(put(ROOT, "a/b")), ShardError::InvalidName);
    assert_eq!(shard.refused(put(ROOT, &"x".repeat(256))), ShardError::NameTooLong);
    assert_eq!(shard.refused(put(directory + 1, "f")), ShardError::NotFound);
    assert_eq!(shard.refused(put(file, "f")), ShardError::NotDirectory);
    assert_eq!(shard.refused(put(0, "f")), ShardError::Malformed);
    assert_eq!(shard.refused(put(u64::MAX, "f")), ShardError::Malformed);
    let elsewhere = InodeId::new(eggs_proto::InodeType::Directory, eggs_proto::ShardId(2), 1).0;
    assert_eq!(shard.refused(put(elsewhere, "f")), ShardError::Malformed);
    let large = vec![0; limits::INLINE_BYTES_MAX as usize + 1];
    assert_eq!(shard.refused(put_small(ROOT, "g", &large, pb::Replace::File)), ShardError::TooLarge);
    shard.verify();
}

#[test]
fn a_symlink_keeps_its_target() {
    let mut shard = Shard::default();
    let symlink = |target: &'static [u8]| {
        Op::PutSmall(pb::PutSmall {
            directory: ROOT,
            name: "s".into(),
            bytes: target.into(),
            symlink: true,
            ..Default::default()
        })
    };
    let inode = link(shard.ok(symlink(b"../there"))).inode;
    assert!(InodeId(inode).is_symlink());
    let walk = pb::Walk {
        start: ROOT,
        components: vec!["s".into(), "more".into()],
        want_spans: true,
        ..Default::default()
    };
    let reply = shard.walk(&walk).unwrap();
    assert_eq!((reply.consumed, reply.inode), (1, inode));
    assert_eq!(reply.stopped.unwrap().code, ShardError::NotDirectory.code());
    assert_eq!(reply.spans[0].inline, &b"../there"[..]);
    assert_eq!(shard.refused(symlink(b"")), ShardError::Malformed);
    assert_eq!(shard.refused(symlink(b"a\0b")), ShardError::Malformed);
    assert_eq!(shard.refused(symlink(&[b'x'; limits::PATH_BYTES_MAX])), ShardError::NameTooLong);
    shard.verify();
}

#[test]
fn rename_moves_and_replaces() {
    let mut shard = Shard::default();
    let (a, b) = (shard.put(ROOT, "a", b"a"), shard.put(ROOT, "b", b"b"));
    assert_eq!(shard.refused(rename(ROOT, "a", "b", pb::Replace::Refuse)), ShardError::Exists);
    assert_eq!(shard.refused(rename(ROOT, "x", "y", pb::Replace::File)), ShardError::NotFound);
    let (time, reply) = shard.one(rename(ROOT, "a", "b", pb::Replace::File));
    let reply = link(reply.unwrap());
    assert_eq!((reply.inode, reply.replaced, reply.created_at), (a, b, time.0));
    let living = shard.list(pb::List { directory: ROOT, ..Default::default() });
    assert_eq!(living.iter().map(|e| (&e.name[..], e.target)).collect::<Vec<_>>(), [(&b"b"[..], a)]);
    let dead = shard.list(pb::List { directory: ROOT, dead: true, ..Default::default() });
    let dead: Vec<_> = dead.iter().map(|e| (&e.name[..], e.target, e.owned)).collect();
    assert_eq!(dead, [(&b"a"[..], a, false), (&b"b"[..], b, true)]);
    assert_eq!(shard.stat(ROOT).unwrap().mtime, time.0);
    // To itself: nothing happens.
    let reply = link(shard.ok(rename(ROOT, "b", "b", pb::Replace::Refuse)));
    assert_eq!((reply.inode, reply.replaced), (a, 0));
    shard.verify();
}

#[test]
fn rename_of_files_and_directories() {
    let mut shard = Shard::default();
    shard.mkdir(1, ROOT, "d1");
    shard.mkdir(2, ROOT, "d2");
    shard.put(ROOT, "f", b"");
    assert_eq!(shard.refused(rename(ROOT, "d1", "d2", pb::Replace::File)), ShardError::Exists);
    assert_eq!(shard.refused(rename(ROOT, "d1", "f", pb::Replace::File)), ShardError::NotDirectory);
    assert_eq!(shard.refused(rename(ROOT, "f", "d1", pb::Replace::File)), ShardError::IsDirectory);
    shard.ok(rename(ROOT, "d1", "d3", pb::Replace::File));
    shard.verify();
}

#[test]
fn unlink_moves_to_the_dead_map() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"1");
    shard.mkdir(1, ROOT, "d");
    let other = Op::Unlink(pb::Unlink { directory: ROOT, name: "f".into(), expected: file + 1 });
    assert_eq!(shard.refused(other), ShardError::Changed);
    assert_eq!(shard.refused(unlink(ROOT, "d")), ShardError::IsDirectory);
    assert_eq!(shard.refused(unlink(ROOT, "g")), ShardError::NotFound);
    let (time, answer) = shard.one(unlink(ROOT, "f"));
    assert_eq!(answer, Ok(Answer::Done(pb::Done {})));
    assert_eq!(shard.stat(ROOT).unwrap().mtime, time.0);
    assert_eq!(shard.refused(unlink(ROOT, "f")), ShardError::NotFound);
    // The file itself is still there, for the past.
    assert_eq!(shard.stat(file).unwrap().size, 1);
    shard.verify();
}

#[test]
fn attributes_change_what_is_given() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"1");
    let xattr = |name: &'static str, value: &'static str| pb::ExtendedAttribute {
        name: name.into(),
        value: value.into(),
    };
    for inode in [file, ROOT] {
        let before = shard.stat(inode).unwrap();
        shard.ok(Op::SetAttributes(pb::SetAttributes {
            inode,
            mode: Some(0o100_640),
            mtime: Some(u64::MAX),
            set_xattrs: vec![xattr("user.b", "2"), xattr("user.a", "1"), xattr("user.b", "3")],
            ..Default::default()
        }));
        let after = shard.stat(inode).unwrap();
        let expected = pb::Attributes {
            mode: 0o640,
            mtime: u64::MAX,
            xattrs: vec![xattr("user.a", "1"), xattr("user.b", "3")],
            ..before
        };
        assert_eq!(after, expected);
        let remove = |name: &'static str| {
            Op::SetAttributes(pb::SetAttributes {
                inode,
                mode: Some(0),
                remove_xattrs: vec![name.into()],
                ..Default::default()
            })
        };
        assert_eq!(shard.refused(remove("user.c")), ShardError::NoAttribute);
        shard.ok(remove("user.a"));
        assert_eq!(shard.stat(inode).unwrap().xattrs, [xattr("user.b", "3")]);
    }
    let huge = pb::ExtendedAttribute { name: "x".into(), value: vec![0; limits::XATTR_BYTES_MAX].into() };
    let set = |inode, xattr| {
        Op::SetAttributes(pb::SetAttributes { inode, set_xattrs: vec![xattr], ..Default::default() })
    };
    assert_eq!(shard.refused(set(file, huge)), ShardError::TooLarge);
    assert_eq!(shard.refused(set(file, xattr("", ""))), ShardError::InvalidName);
    assert_eq!(shard.refused(set(file + 1, xattr("a", ""))), ShardError::NotFound);
    shard.verify();
}

#[test]
fn policies_are_set_inherited_and_unset() {
    let mut shard = Shard::default();
    let directory = shard.mkdir(1, ROOT, "d");
    let stripe =
        |cell_size| pb::Policies { stripe: Some(pb::StripePolicy { cell_size }), ..Default::default() };
    let set = |directory, kind: pb::PolicyKind, value| {
        Op::SetPolicy(pb::SetPolicy { directory, kind: kind as i32, value })
    };
    shard.ok(set(ROOT, pb::PolicyKind::PolicyStripe, Some(stripe(4096))));
    let walk = pb::Walk { start: ROOT, components: vec!["d".into()], ..Default::default() };
    assert_eq!(shard.walk(&walk).unwrap().policies, Some(stripe(4096)));
    shard.ok(set(directory, pb::PolicyKind::PolicyStripe, Some(stripe(8192))));
    assert_eq!(shard.walk(&walk).unwrap().policies, Some(stripe(8192)));
    assert_eq!(shard.stat(directory).unwrap().policies, Some(stripe(8192)));
    shard.ok(set(directory, pb::PolicyKind::PolicyStripe, None));
    assert_eq!(shard.walk(&walk).unwrap().policies, Some(stripe(4096)));
    let refused = [
        set(ROOT, pb::PolicyKind::PolicyUnspecified, None),
        set(ROOT, pb::PolicyKind::PolicySpan, Some(stripe(4096))),
        set(ROOT, pb::PolicyKind::PolicyStripe, Some(stripe(1))),
        set(
            ROOT,
            pb::PolicyKind::PolicySpan,
            Some(pb::Policies { span: Some(Default::default()), ..Default::default() }),
        ),
    ];
    for op in refused {
        assert_eq!(shard.refused(op), ShardError::Malformed);
    }
    shard.verify();
}

#[test]
fn limits_of_a_request() {
    let mut shard = Shard::default();
    let put = put_small(ROOT, "f", b"", pb::Replace::File);
    let code = |result: Result<pb::ShardCommand, pb::Error>| result.unwrap_err().code;
    assert_eq!(code(shard.prepare(vec![], true)), ShardError::Malformed.code());
    assert_eq!(code(shard.prepare(vec![put; limits::BATCH_OPS_MAX + 1], true)), ShardError::Malformed.code());
    let lock = Op::LockEdge(pb::LockEdge { transaction: 1, ..Default::default() });
    assert_eq!(code(shard.prepare(vec![lock], false)), ShardError::Unauthorized.code());
}
