//! The tree and the operations on it, chosen so that many of them are in each other's way.

use std::rc::Rc;

use eggs_proto::{InodeId, ShardId, pb};
use pb::Replace::{File, Refuse};
use pb::crossdir_request::Op;

use super::world::{exchange, mkdir, mkdir_path, put_small, rename, rmdir, tables};
use crate::state::{Action, Bounds, State};

const ROOT: u64 = InodeId::ROOT.0;

/// `/a` `/a/b` `/c` directories, `/f` `/c/g` files: inodes by those names.
#[derive(Debug, Default)]
pub struct Places {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub f: u64,
    pub g: u64,
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
        let shard =
            Rc::make_mut(&mut state.shards).get_mut(&InodeId(directory).shard().0).expect("a shard of three");
        let clock = shard.clock();
        shard.write(clock, put_small(directory, name), &mut || 0);
    }
    state.rehash();
    let edges = tables::edges(&state.shards);
    places.f = edges[&(ROOT, bytes::Bytes::from_static(b"f"))].target;
    places.g = edges[&(places.c, bytes::Bytes::from_static(b"g"))].target;
    Tree { places, planted: state }
}

fn make(state: &mut State, parent: u64, name: &[u8], shard: ShardId) -> u64 {
    state.call(mkdir(parent, name), shard);
    state.act(Action::Begin(state.calls.len() - 1));
    while let Some(&action) = state.actions().first() {
        state.act(action);
    }
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
            other => panic!("{other:?}"),
        }
    }

    /// What it removes or moves.
    fn targets(&self) -> Vec<u64> {
        match &self.op {
            Op::Rmdir(op) => vec![op.target],
            Op::Move(op) => vec![op.target],
            Op::Exchange(op) => vec![op.target, op.other_target],
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
pub const TRIPLES: [[&str; 3]; 12] = [
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
pub const FEW: [[&str; 2]; 5] = [
    ["mkdir /a/b/x", "rmdir /a/b"],
    ["rmdir /a/b", "/c/g to /a/b/g"],
    ["/c/g to /a/g", "/f over /a/g"],
    ["rmdir /c", "mkdir -p /c/b/y"],
    ["/c/g over /f", "/c/g with /f"],
];

/// Pairs for two drivers at once.
pub const LIVING_ON: [[&str; 2]; 3] =
    [["rmdir /a/b", "/c/g to /a/b/g"], ["/a to /c/a", "/c to /a/c"], ["/c/g to /a/g", "/c/g with /f"]];

/// Those of `operations` with these names.
pub fn named<'a>(operations: &'a [Operation], names: &[&str]) -> Vec<&'a Operation> {
    let find = |name: &&str| operations.iter().find(|operation| operation.name == *name);
    names.iter().map(|name| find(name).expect("an operation of the list")).collect()
}

pub fn operations(places: &Places) -> Vec<Operation> {
    let &Places { a, b, c, f, g } = places;
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
    ];
    table.into_iter().map(|(name, op, shard)| Operation { name, op, shard: ShardId(shard) }).collect()
}

/// No part of the pairs: alone with another it is mostly refused.
pub fn below_itself(places: &Places) -> Operation {
    let op = rename((ROOT, b"a"), places.a, (places.b, b"a"), Refuse);
    Operation { name: "/a to /a/b/a", op, shard: ShardId(0) }
}
