//! The durable half of a world: the real machines with their tables, and what is to be seen in them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use eggs_crossdir_core::{CrossdirMachine, Received};
use eggs_machine::group::{self, Applied};
use eggs_machine::hash::StateHash;
use eggs_machine::{Machine, MemoryTable, Table, Tx};
use eggs_proto::{InodeId, ShardId, Time, pb};
use eggs_shard_core::{Cluster, ShardMachine};
use prost::Message;

/// One replicated group, without the replication.
#[derive(Debug, Clone)]
pub struct Group<M> {
    machine: M,
    pub table: MemoryTable,
}

pub type Shards = BTreeMap<u8, Group<ShardMachine>>;

impl<M: Machine> Group<M> {
    pub fn new(machine: M) -> Self {
        let mut table = MemoryTable::default();
        let mut tx = Tx::new(&table, StateHash::default());
        machine.genesis(&mut tx).unwrap();
        let (batch, _) = tx.finish();
        table.apply(batch);
        Group { machine, table }
    }

    pub fn apply(&mut self, now: u64, session: u64, sequence: u64, command: Vec<u8>) -> Applied<M::Effect> {
        let entry = pb::LogEntry { time: now, session, sequence, command: command.into() };
        let mut tx = Tx::new(&self.table, StateHash::default());
        let applied = group::apply(&self.machine, &mut tx, &entry.encode_to_vec()).unwrap();
        let (batch, _) = tx.finish();
        self.table.apply(batch);
        applied
    }

    /// No command was applied later than this.
    pub fn clock(&self) -> u64 {
        group::clock(&self.table).unwrap().0
    }
}

impl Group<ShardMachine> {
    /// One write, at once.
    pub fn write(&mut self, now: u64, op: pb::WriteOp, entropy: &mut dyn FnMut() -> u64) -> pb::WriteResult {
        let now = now.max(self.clock() + 1);
        let write = pb::Write { ops: vec![op] };
        let cluster = Cluster::from_map(&pb::ClusterMapReply::default());
        let shard = self.machine.shard;
        let command =
            eggs_shard_core::prepare(shard, &self.table, write, true, Time(now), entropy, &cluster).unwrap();
        let Applied::Ran(outcome) = self.apply(now, 0, 0, command.encode_to_vec()) else {
            panic!("no session, so it runs")
        };
        pb::WriteReply::decode(outcome.reply).unwrap().results.remove(0)
    }

    pub fn stat(&self, inode: InodeId, now: u64) -> Received<pb::StatReply> {
        let op = pb::shard_request::Op::Stat(pb::Stat { inode: inode.0 });
        match eggs_shard_core::read(self.machine.shard, &self.table, &op, Time(now)).unwrap() {
            pb::shard_reply::Result::Stat(reply) => Received::Answer(reply),
            pb::shard_reply::Result::Error(error) => Received::Refused(error),
            other => panic!("{other:?}"),
        }
    }
}

/// Every living edge of every shard: (directory, name) → target.
pub fn edges(shards: &Shards) -> BTreeMap<(u64, Bytes), pb::EdgeRow> {
    let mut edges = BTreeMap::new();
    for group in shards.values() {
        for (key, value) in group.table.iter().filter(|(key, _)| key[0] == b'L') {
            let directory = u64::from_be_bytes(key[1..9].try_into().unwrap());
            edges.insert((directory, key.slice(9..)), pb::EdgeRow::decode(value.clone()).unwrap());
        }
    }
    edges
}

/// Every dead edge of every shard: (directory, name, died_at) → row.
pub fn dead(shards: &Shards) -> BTreeMap<(u64, Bytes, u64), pb::DeadEdgeRow> {
    let mut dead = BTreeMap::new();
    for group in shards.values() {
        for (key, value) in group.table.iter().filter(|(key, _)| key[0] == b'X') {
            let directory = u64::from_be_bytes(key[1..9].try_into().unwrap());
            let name = key.slice(9..key.len() - 9);
            let died_at = u64::from_be_bytes(key[key.len() - 8..].try_into().unwrap());
            dead.insert((directory, name, died_at), pb::DeadEdgeRow::decode(value.clone()).unwrap());
        }
    }
    dead
}

/// Directories, living and removed, and published files.
pub fn inodes(shards: &Shards) -> BTreeSet<u64> {
    let mut inodes = BTreeSet::new();
    for group in shards.values() {
        for (key, _) in group.table.iter().filter(|(key, _)| matches!(key[0], b'D' | b'F')) {
            inodes.insert(u64::from_be_bytes(key[1..9].try_into().unwrap()));
        }
    }
    inodes
}

/// SH-16, when nothing is on its way: every inode is owned by one edge, living or dead, and every such edge leads to one.
fn check_owned(shards: &Shards) {
    let living = edges(shards).into_values().map(|edge| edge.target);
    let dead = dead(shards).into_iter().map(|((_, name, died_at), row)| {
        assert_eq!(row.transaction, 0, "{name:?}, dead at {died_at}, is locked for ever");
        row
    });
    let mut owning: Vec<u64> =
        living.chain(dead.filter(|row| row.owned).map(|row| row.target)).chain([InodeId::ROOT.0]).collect();
    owning.sort_unstable();
    let inodes: Vec<u64> = inodes(shards).into_iter().collect();
    assert_eq!(owning, inodes, "SH-16: the inodes that edges own, and those there are");
}

/// Owners of all directories; 0 of the removed ones.
pub fn owners(shards: &Shards) -> BTreeMap<u64, u64> {
    let mut owners = BTreeMap::new();
    for group in shards.values() {
        for (key, value) in group.table.iter().filter(|(key, _)| key[0] == b'D') {
            let directory = u64::from_be_bytes(key[1..9].try_into().unwrap());
            owners.insert(directory, pb::DirectoryRow::decode(value.clone()).unwrap().owner);
        }
    }
    owners
}

/// Transactions that have locked a directory to remove it.
pub fn removing(shards: &Shards) -> BTreeSet<u64> {
    let mut transactions = BTreeSet::new();
    for group in shards.values() {
        for (_, value) in group.table.iter().filter(|(key, _)| key[0] == b'D') {
            transactions.insert(pb::DirectoryRow::decode(value.clone()).unwrap().transaction);
        }
    }
    transactions.remove(&0);
    transactions
}

/// XD-11, from outside, when nothing is on its way: every living directory has one name, in its
/// owner, and leads to the root; nothing is locked; nothing is remembered; `check` finds nothing.
pub fn check(coordinator: &Group<CrossdirMachine>, shards: &Shards) {
    let (edges, owners) = (edges(shards), owners(shards));
    let mut names: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for ((directory, name), edge) in &edges {
        assert_eq!(edge.transaction, 0, "{name:?} is locked for ever");
        names.entry(edge.target).or_default().push(*directory);
    }
    for (&inode, directories) in &names {
        assert_eq!(directories.len(), 1, "{} has several names", InodeId(inode));
    }
    for (&directory, &owner) in owners.iter().filter(|&(&directory, _)| directory != InodeId::ROOT.0) {
        let named = names.get(&directory).map(|directories| directories[0]);
        let expected = (owner != 0).then_some(owner);
        assert_eq!(named, expected, "owner and name of {}", InodeId(directory));
        let mut at = directory;
        for _ in 0..=owners.len() {
            at = if at == 0 { 0 } else { owners[&at] };
        }
        assert!(at == 0 || at == InodeId::ROOT.0, "{} is in a loop", InodeId(directory));
    }
    assert_eq!(removing(shards), BTreeSet::new(), "directories are locked for ever");
    check_owned(shards);
    for (&shard, group) in shards {
        let remembered = group.table.iter().filter(|(key, _)| key[0] == b'T').count();
        assert_eq!(remembered, 0, "shard {shard} remembers transactions that are retired");
        let reply = eggs_shard_core::check(ShardId(shard), &group.table, &pb::Check::default()).unwrap();
        assert_eq!(reply.findings, [], "shard {shard}");
    }
    assert_eq!(coordinator.table.page(b"T", b"U", 10).unwrap(), [], "all are retired");
}
