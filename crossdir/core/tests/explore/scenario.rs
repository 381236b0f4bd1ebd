//! The tree and the operations on it, chosen so that many of them are in each other's way.

use std::rc::Rc;

use eggs_proto::{InodeId, ShardId, pb};
use pb::Replace::{File, Refuse};
use pb::crossdir_request::Op;

use super::world::{exchange, mkdir, mkdir_path, purge, put_small, rename, rmdir, tables, undelete, unlink};
use crate::state::{Action, Bounds, State};

const ROOT: u64 = InodeId::ROOT.0;

/// `/a` `/a/b` `/c` directories, `/f` `/c/g` files: inodes by those names. Dead are the directories `/d` and `/e`, in which
/// a file died, and `/c/k`, a file of the root's shard.
#[derive(Debug, Default)]
pub struct Places {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub f: u64,
    pub g: u64,
    pub d: Dead,
    pub e: Dead,
    pub k: Dead,
}

/// What died, and when.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dead {
    pub inode: u64,
    pub died_at: u64,
}

pub struct Tree {
    pub places: Places,
    planted: State,
}

pub struct Operation {
    pub name: &'static str,
    op: Op,
    shard: ShardId,
}

/// The root is on shard 1, `/a` on 2, `/a/b` on 1, `/c` on 3.
pub fn plant() -> Tree {
    let mut state = State::new((1..=3).map(ShardId));
    let mut places = Places::default();
    places.a = make(&mut state, ROOT, b"a", ShardId(2));
    places.b = make(&mut state, places.a, b"b", InodeId::ROOT.shard());
    places.c = make(&mut state, ROOT, b"c", ShardId(3));
    for (directory, name) in [(ROOT, b"f"), (places.c, b"g")] {
        write(&mut state, directory, put_small(directory, name));
    }
    die(&mut state, &mut places);
    let edges = tables::edges(&state.shards);
    places.f = edges[&(ROOT, bytes::Bytes::from_static(b"f"))].target;
    places.g = edges[&(places.c, bytes::Bytes::from_static(b"g"))].target;
    Tree { places, planted: state }
}

/// The root is on shard 1, `/d` on 3, `/e` on 2.
fn die(state: &mut State, places: &mut Places) {
    places.d.inode = make(state, ROOT, b"d", ShardId(3));
    places.e.inode = make(state, ROOT, b"e", ShardId(2));
    for (directory, name) in [(places.e.inode, b"x"), (ROOT, b"k")] {
        write(state, directory, put_small(directory, name));
    }
    write(state, places.e.inode, unlink(places.e.inode, b"x"));
    places.k.inode = tables::edges(&state.shards)[&(ROOT, bytes::Bytes::from_static(b"k"))].target;
    state.rehash();
    run(state, rename((ROOT, b"k"), places.k.inode, (places.c, b"k"), Refuse), ShardId(0));
    for (name, inode) in [(b"d", places.d.inode), (b"e", places.e.inode)] {
        run(state, rmdir(ROOT, name, inode), ShardId(0));
    }
    write(state, places.c, unlink(places.c, b"k"));
    state.rehash();
    for ((_, _, died_at), row) in tables::dead(&state.shards).into_iter().filter(|(_, row)| row.owned) {
        for dead in [&mut places.d, &mut places.e, &mut places.k] {
            if dead.inode == row.target {
                dead.died_at = died_at;
            }
        }
    }
}

fn write(state: &mut State, directory: u64, op: pb::WriteOp) {
    let shards = Rc::make_mut(&mut state.shards);
    let shard = shards.get_mut(&InodeId(directory).shard().0).expect("a shard of three");
    let clock = shard.clock();
    shard.write(clock, op, &mut || 0);
}

fn run(state: &mut State, op: Op, shard: ShardId) {
    state.call(op, shard);
    state.act(Action::Begin(state.calls.len() - 1));
    while let Some(&action) = state.actions().first() {
        state.act(action);
    }
}

fn make(state: &mut State, parent: u64, name: &[u8], shard: ShardId) -> u64 {
    run(state, mkdir(parent, name), shard);
    tables::edges(&state.shards)[&(parent, bytes::Bytes::copy_from_slice(name))].target
}

impl Operation {
    /// The names it changes.
    fn names(&self) -> Vec<(u64, &[u8])> {
        match &self.op {
            Op::Mkdir(op) => vec![(op.parent, &op.name)],
            Op::Rmdir(op) => vec![(op.parent, &op.name)],
            Op::Move(op) => vec![(op.old_directory, &op.old_name), (op.new_directory, &op.new_name)],
            Op::MkdirPath(op) => vec![(op.parent, &op.names[0])],
            Op::Exchange(op) => vec![(op.directory, &op.name), (op.other_directory, &op.other_name)],
            Op::UndeleteInode(op) => {
                vec![(op.directory, &op.name), (op.new_directory, &op.new_name)]
            }
            Op::PurgeInode(op) => vec![(op.directory, &op.name)],
            other => panic!("{other:?}"),
        }
    }

    /// What it removes or moves.
    fn targets(&self) -> Vec<u64> {
        match &self.op {
            Op::Rmdir(op) => vec![op.target],
            Op::Move(op) => vec![op.target],
            Op::Exchange(op) => vec![op.target, op.other_target],
            Op::UndeleteInode(op) => vec![op.target],
            Op::PurgeInode(op) => vec![op.target],
            _ => Vec::new(),
        }
    }

    pub fn moves_directory(&self) -> bool {
        let moves = !matches!(&self.op, Op::Rmdir(_));
        moves && self.targets().iter().any(|&target| InodeId(target).is_directory())
    }

    fn is_in_the_way_of(&self, other: &Operation) -> bool {
        let theirs = other.names();
        self.names().iter().any(|name| theirs.contains(name))
            || theirs.iter().any(|(directory, _)| self.targets().contains(directory))
    }

    /// They change the same name, or one of them moves or removes a directory the other changes.
    pub fn meets(&self, other: &Operation) -> bool {
        self.is_in_the_way_of(other) || other.is_in_the_way_of(self)
    }
}

impl Tree {
    pub fn state(&self, operations: &[&Operation], bounds: Bounds) -> State {
        let mut state = self.planted.clone();
        state.calls.clear();
        state.sent.clear();
        state.left = bounds;
        for operation in operations {
            state.call(operation.op.clone(), operation.shard);
        }
        state
    }
}

/// More than two that are in each other's way.
pub const TRIPLES: [[&str; 3]; 15] = [
    ["undelete /d", "mkdir /d/x", "purge /d"],
    ["undelete /d as /a/b/d", "undelete /d", "rmdir /a/b"],
    ["undelete /c/k as /a/g", "purge /c/k", "/c/g to /a/g"],
    ["/a to /c/a", "/c to /a/b/c", "/a/b to /b"],
    ["/a to /c/a", "/c to /a/c", "/a/b to /b"],
    ["/a/b to /c/b", "/c to /a/c", "rmdir /a"],
    ["/a/b to /c/b", "/a/b to /b", "rmdir /a/b"],
    ["/c/g to /a/g", "/f over /a/g", "rmdir /c"],
    ["/c/g over /f", "/f to /c/g", "/f over /a/b"],
    ["/c/g to /a/b/g", "rmdir /a/b", "rmdir /c"],
    ["mkdir /c/b", "/a/b to /c/b", "rmdir /a/b"],
    ["mkdir -p /c/b/y", "/a/b to /c/b", "rmdir /c"],
    ["/a/b with /c", "/a to /c/a", "rmdir /a/b"],
    ["/a with /c/g", "/c to /a/c", "/c/g over /f"],
    ["/c/g with /f", "/f to /c/g", "/c/g to /a/g"],
];

/// What a move finds of its ancestors depends on when it looks.
pub const TURNS: [[&str; 3]; 2] =
    [["/a/b to /c/b", "/c/b to /b", "/c to /a/b/c"], ["/a to /a/b/a", "/a/b to /b", "rmdir /a"]];

/// Pairs of which few are enough to see.
pub const FEW: [[&str; 2]; 8] = [
    ["mkdir /a/b/x", "rmdir /a/b"],
    ["rmdir /a/b", "/c/g to /a/b/g"],
    ["/c/g to /a/g", "/f over /a/g"],
    ["rmdir /c", "mkdir -p /c/b/y"],
    ["/c/g over /f", "/c/g with /f"],
    ["undelete /d", "purge /d"],
    ["undelete /d as /a/b/d", "rmdir /a/b"],
    ["undelete /c/k as /a/g", "purge /c/k"],
];

/// Pairs for two drivers at once.
pub const LIVING_ON: [[&str; 2]; 5] = [
    ["rmdir /a/b", "/c/g to /a/b/g"],
    ["/a to /c/a", "/c to /a/c"],
    ["/c/g to /a/g", "/c/g with /f"],
    ["undelete /d as /a/b/d", "rmdir /a/b"],
    ["undelete /d", "purge /d"],
];

/// Those of `operations` with these names.
pub fn named<'a>(operations: &'a [Operation], names: &[&str]) -> Vec<&'a Operation> {
    let find = |name: &&str| operations.iter().find(|operation| operation.name == *name);
    names.iter().map(|name| find(name).expect("an operation of the list")).collect()
}

pub fn operations(places: &Places) -> Vec<Operation> {
    let &Places { a, b, c, f, g, d, e, k } = places;
    let table = [
        ("mkdir /a/b/x", mkdir(b, b"x"), 2),
        ("mkdir /c/b", mkdir(c, b"b"), 3),
        ("mkdir /a/c", mkdir(a, b"c"), 1),
        ("rmdir /a/b", rmdir(a, b"b", b), 0),
        ("rmdir /a/b as /a/n", rmdir(a, b"n", b), 0),
        ("rmdir /a", rmdir(ROOT, b"a", a), 0),
        ("rmdir /c", rmdir(ROOT, b"c", c), 0),
        ("/c/g to /a/g", rename((c, b"g"), g, (a, b"g"), Refuse), 0),
        ("/c/g to /a/b/g", rename((c, b"g"), g, (b, b"g"), Refuse), 0),
        ("/c/g over /f", rename((c, b"g"), g, (ROOT, b"f"), File), 0),
        ("/f to /c/g", rename((ROOT, b"f"), f, (c, b"g"), Refuse), 0),
        ("/f over /a/g", rename((ROOT, b"f"), f, (a, b"g"), File), 0),
        ("/f over /a/b", rename((ROOT, b"f"), f, (a, b"b"), File), 0),
        ("/a to /c/a", rename((ROOT, b"a"), a, (c, b"a"), Refuse), 0),
        ("/c to /a/c", rename((ROOT, b"c"), c, (a, b"c"), Refuse), 0),
        ("/c to /a/b/c", rename((ROOT, b"c"), c, (b, b"c"), Refuse), 0),
        ("/a/b to /c/b", rename((a, b"b"), b, (c, b"b"), Refuse), 0),
        ("/c/b to /b", rename((c, b"b"), b, (ROOT, b"b"), Refuse), 0),
        ("/a/b to /b", rename((a, b"b"), b, (ROOT, b"b"), Refuse), 0),
        ("mkdir -p /c/b/y", mkdir_path(c, &[b"b", b"y"]), 3),
        ("/c/g with /f", exchange((c, b"g"), g, (ROOT, b"f"), f), 0),
        ("/a/b with /c", exchange((a, b"b"), b, (ROOT, b"c"), c), 0),
        ("/a with /c/g", exchange((ROOT, b"a"), a, (c, b"g"), g), 0),
        ("undelete /d", undelete((ROOT, b"d", d.died_at), d.inode, (ROOT, b"d")), 0),
        ("undelete /d as /a/b/d", undelete((ROOT, b"d", d.died_at), d.inode, (b, b"d")), 0),
        ("undelete /d as /c/g", undelete((ROOT, b"d", d.died_at), d.inode, (c, b"g")), 0),
        ("purge /d", purge((ROOT, b"d", d.died_at), d.inode), 0),
        ("purge /e", purge((ROOT, b"e", e.died_at), e.inode), 0),
        ("mkdir /d/x", mkdir(d.inode, b"x"), 1),
        ("undelete /c/k as /a/g", undelete((c, b"k", k.died_at), k.inode, (a, b"g")), 0),
        ("purge /c/k", purge((c, b"k", k.died_at), k.inode), 0),
        // The shards do these alone.
        ("/a/b to /a/n", rename((a, b"b"), b, (a, b"n"), Refuse), 0),
        ("/a to /d", rename((ROOT, b"a"), a, (ROOT, b"d"), Refuse), 0),
        ("/c/g to /c/b", rename((c, b"g"), g, (c, b"b"), Refuse), 0),
        ("undelete /c/k", undelete((c, b"k", k.died_at), k.inode, (c, b"k")), 0),
    ];
    table.into_iter().map(|(name, op, shard)| Operation { name, op, shard: ShardId(shard) }).collect()
}

/// No part of the pairs: alone with another it is mostly refused.
pub fn below_itself(places: &Places) -> Operation {
    let op = rename((ROOT, b"a"), places.a, (places.b, b"a"), Refuse);
    Operation { name: "/a to /a/b/a", op, shard: ShardId(0) }
}
