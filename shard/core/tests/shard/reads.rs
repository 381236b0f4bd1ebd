//! Listing and walking: pages, prefixes, instants, several shards.

use eggs_proto::pb::shard_reply::Result as Reply;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, ServiceError, ShardError, ShardId, Time, pb};

use crate::support::*;

fn names(entries: &[pb::Entry]) -> Vec<String> {
    entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect()
}

/// Lists page by page, as a client does.
fn all_pages(shard: &Shard, mut list: pb::List) -> Vec<pb::Entry> {
    let mut all = Vec::new();
    loop {
        let Reply::List(reply) = shard.read(Read::List(list.clone())) else { panic!("no listing") };
        assert!(reply.entries.len() <= list.limit as usize);
        all.extend(reply.entries);
        assert!(all.len() < 1000, "the pages go round");
        if !reply.more {
            return all;
        }
        let last = all.last().unwrap();
        list.after_name = last.name.clone();
        list.after_died_at = last.died_at;
    }
}

const NAMES: [&str; 8] = ["a", "a\x01", "a!", "aa", "ab", "b", "\u{7f}", "é"];

#[test]
fn listings_are_in_byte_order_and_paged() {
    let mut shard = Shard::default();
    for name in NAMES.iter().rev() {
        shard.put(ROOT, name, b"1");
    }
    let (before, _) = shard.one(Op::ForgetTransactions(Default::default()));
    for name in NAMES {
        shard.put(ROOT, name, b"2");
    }
    for limit in [1, 2, 3, 8, 100] {
        for at in [0, before.0, shard.now + 9999] {
            let list = pb::List { directory: ROOT, limit, at, ..Default::default() };
            assert_eq!(names(&all_pages(&shard, list.clone())), NAMES, "limit {limit} at {at}");
            let list = pb::List { prefix: "a".into(), ..list };
            assert_eq!(names(&all_pages(&shard, list)), ["a", "a\x01", "a!", "aa", "ab"]);
        }
        let dead = pb::List { directory: ROOT, dead: true, limit, ..Default::default() };
        assert_eq!(names(&all_pages(&shard, dead)), NAMES);
    }
    let after = pb::List { directory: ROOT, after_name: "aa".into(), ..Default::default() };
    assert_eq!(names(&shard.list(after.clone())), ["ab", "b", "\u{7f}", "é"]);
    assert!(shard.list(pb::List { prefix: "a".into(), after_name: "b".into(), ..after }).is_empty());
}

#[test]
fn versions_of_a_name_through_time() {
    let mut shard = Shard::default();
    let mut versions = Vec::new();
    for n in 0..5u8 {
        let (time, reply) = shard.one(put_small(ROOT, "f", &[n], pb::Replace::File));
        versions.push((time.0, link(reply.unwrap()).inode));
        let (gone, _) = shard.one(unlink(ROOT, "f"));
        versions.push((gone.0, 0));
    }
    for (index, &(time, inode)) in versions.iter().enumerate() {
        let earlier = if index == 0 { 0 } else { versions[index - 1].1 };
        for (at, expected) in [(time, inode), (time - 1, earlier), (time + 1, inode)] {
            let listed = shard.list(pb::List { directory: ROOT, at, ..Default::default() });
            assert_eq!(listed.first().map_or(0, |entry| entry.target), expected, "at {at}");
            let walk = pb::Walk { start: ROOT, components: vec!["f".into()], at, ..Default::default() };
            let reply = shard.walk(&walk).unwrap();
            assert_eq!(if reply.consumed == 1 { reply.inode } else { 0 }, expected, "at {at}");
        }
    }
    let dead = |since, until| {
        let list = pb::List { directory: ROOT, dead: true, since, until, ..Default::default() };
        shard.list(list).iter().map(|entry| entry.died_at).collect::<Vec<_>>()
    };
    assert_eq!(dead(0, 0).len(), 5);
    assert_eq!(dead(versions[3].0, versions[7].0), [versions[3].0, versions[5].0]);
    assert_eq!(dead(versions[9].0, 0), [versions[9].0]);
    assert!(dead(versions[9].0 + 1, 0).is_empty());
}

#[test]
fn listings_carry_attributes_of_local_inodes() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"12");
    let list = pb::List { directory: ROOT, want_attributes: true, ..Default::default() };
    assert_eq!(shard.list(list)[0].attributes, shard.stat(file));
}

#[test]
fn what_listings_refuse() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"");
    let code = |list: pb::List| match shard.read(Read::List(list)) {
        Reply::Error(error) => ShardError::from_code(error.code).unwrap(),
        other => panic!("{other:?}"),
    };
    let of = |directory| pb::List { directory, ..Default::default() };
    assert_eq!(code(of(file)), ShardError::NotDirectory);
    assert_eq!(code(of(ROOT + 5)), ShardError::NotFound);
    assert_eq!(code(of(0)), ShardError::Malformed);
    assert_eq!(code(pb::List { prefix: "a\0".into(), ..of(ROOT) }), ShardError::InvalidName);
    assert!(matches!(shard.read(Read::Walk(Default::default())), Reply::Error(_)));
}

#[test]
fn a_walk_goes_on_into_shards_led_here() {
    let (mut one, mut two) = (Shard::default(), Shard::new(2));
    let made =
        two.ok(Op::CreateDirectory(pb::CreateDirectory { transaction: 1, owner: ROOT, attributes: None }));
    let directory = link(made).inode;
    one.ok(Op::LinkEdge(pb::LinkEdge {
        transaction: 1,
        directory: ROOT,
        name: "d".into(),
        target: directory,
        replace: 0,
    }));
    let file = two.put(directory, "f", b"contents");
    let walk = pb::Walk {
        start: ROOT,
        components: vec!["d".into(), "f".into()],
        want_attributes: true,
        want_spans: true,
        ..Default::default()
    };
    let both = |shard: ShardId| match shard.0 {
        1 => Some(&one.table),
        2 => Some(&two.table),
        _ => None,
    };
    let reply = eggs_shard_core::walk(both, &walk, Time(0)).unwrap().unwrap();
    assert_eq!((reply.consumed, reply.inode, reply.directory), (2, file, directory));
    assert_eq!(reply.attributes, two.stat(file));
    assert_eq!((reply.spans.len(), reply.all_spans), (1, true));
    assert_eq!(reply.stopped, None);
    // Only the first shard is led here: the walk ends at the door of the other.
    let reply = one.walk(&walk).unwrap();
    assert_eq!((reply.consumed, reply.inode, reply.directory), (1, directory, ROOT));
    assert_eq!((reply.stopped, reply.attributes), (None, None));
    let error = one.walk(&pb::Walk { start: directory, ..walk }).unwrap_err();
    assert_eq!(error.code, ShardError::NotLeader.code());
    one.verify();
    two.verify();
}

#[test]
fn where_a_walk_stops() {
    let mut shard = Shard::default();
    let file = shard.put(ROOT, "f", b"");
    let walk = |start, components: &[&'static str]| {
        let components = components.iter().map(|&name| name.into()).collect();
        let reply = shard.walk(&pb::Walk { start, components, ..Default::default() }).unwrap();
        (reply.consumed, reply.inode, reply.stopped.map(|e| ShardError::from_code(e.code).unwrap()))
    };
    assert_eq!(walk(ROOT, &[]), (0, ROOT, None));
    assert_eq!(walk(ROOT, &["f"]), (1, file, None));
    assert_eq!(walk(ROOT, &["g"]), (0, ROOT, Some(ShardError::NotFound)));
    assert_eq!(walk(ROOT, &["f", "g"]), (1, file, Some(ShardError::NotDirectory)));
    assert_eq!(walk(ROOT, &[".."]), (0, ROOT, Some(ShardError::InvalidName)));
    assert_eq!(walk(ROOT + 7, &["f"]), (0, ROOT + 7, Some(ShardError::NotFound)));
    assert!(shard.walk(&pb::Walk::default()).is_err());
    let far = pb::Walk { start: ROOT, components: vec!["d".into(); 257], ..Default::default() };
    assert!(shard.walk(&far).is_err());
    assert_eq!(InodeId(file).shard(), ShardId(1));
}
