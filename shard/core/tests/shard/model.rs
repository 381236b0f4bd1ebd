//! The namespace of a shard against a map: random operations, then every instant that ever was.

use std::collections::BTreeMap;

use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as Answer;
use eggs_proto::{InodeId, ShardError, pb};
use proptest::prelude::*;

use crate::support::*;

const NAMES: [&str; 5] = ["a", "a\x01", "a!", "ab", "b"];

/// Indexes are taken modulo what there is.
#[derive(Debug, Clone)]
enum Do {
    Put {
        directory: usize,
        name: usize,
        bytes: Vec<u8>,
        replace: bool,
    },
    PutTwice {
        directory: usize,
        name: usize,
    },
    Write {
        directory: usize,
        name: usize,
        replace: bool,
        spans: Vec<u8>,
    },
    Rename {
        directory: usize,
        old: usize,
        new: usize,
        replace: bool,
    },
    Exchange {
        directory: usize,
        one: usize,
        other: usize,
    },
    Unlink {
        directory: usize,
        name: usize,
    },
    Mkdir {
        directory: usize,
        name: usize,
    },
    Rmdir {
        directory: usize,
        name: usize,
    },
    Move {
        from: usize,
        old: usize,
        to: usize,
        new: usize,
        replace: bool,
    },
    /// The `death`th death in a directory is undone, under a name of that directory or of another.
    Undelete {
        directory: usize,
        death: usize,
        to: usize,
        name: usize,
    },
    Purge {
        directory: usize,
        death: usize,
    },
    Forget,
}

fn todo() -> impl Strategy<Value = Do> {
    let (d, n) = (|| 0usize..6, || 0..NAMES.len());
    prop_oneof![
        4 => (d(), n(), prop::collection::vec(any::<u8>(), 0..4), any::<bool>())
            .prop_map(|(directory, name, bytes, replace)| Do::Put { directory, name, bytes, replace }),
        1 => (d(), n()).prop_map(|(directory, name)| Do::PutTwice { directory, name }),
        2 => (d(), n(), any::<bool>(), prop::collection::vec(0u8..3, 0..4))
            .prop_map(|(directory, name, replace, spans)| Do::Write { directory, name, replace, spans }),
        3 => (d(), n(), n(), any::<bool>())
            .prop_map(|(directory, old, new, replace)| Do::Rename { directory, old, new, replace }),
        2 => (d(), n(), n()).prop_map(|(directory, one, other)| Do::Exchange { directory, one, other }),
        3 => (d(), n()).prop_map(|(directory, name)| Do::Unlink { directory, name }),
        3 => (d(), n()).prop_map(|(directory, name)| Do::Mkdir { directory, name }),
        2 => (d(), n()).prop_map(|(directory, name)| Do::Rmdir { directory, name }),
        3 => (d(), n(), d(), n(), any::<bool>())
            .prop_map(|(from, old, to, new, replace)| Do::Move { from, old, to, new, replace }),
        3 => (d(), 0usize..16, d(), n())
            .prop_map(|(directory, death, to, name)| Do::Undelete { directory, death, to, name }),
        2 => (d(), 0usize..16).prop_map(|(directory, death)| Do::Purge { directory, death }),
        1 => Just(Do::Forget),
    ]
}

type Living = BTreeMap<&'static str, u64>;
/// died_at, name → target, owned
type Dead = BTreeMap<(&'static str, u64), (u64, bool)>;

#[derive(Debug, Clone, Default)]
struct Directory {
    living: Living,
    dead: Dead,
    mtime: u64,
    removed: bool,
}

/// What the namespace should be. It knows no rows, only maps.
#[derive(Debug, Clone, Default)]
struct Model {
    directories: BTreeMap<u64, Directory>,
    contents: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    /// Whether `target` may take the name, as rename(2) has it.
    fn replaceable(
        &self,
        directory: u64,
        name: &str,
        target_is_directory: bool,
        replace: bool,
    ) -> Result<(), ShardError> {
        let Some(&old) = self.directories[&directory].living.get(name) else { return Ok(()) };
        match (replace, target_is_directory, InodeId(old).is_directory()) {
            (false, ..) | (true, true, true) => Err(ShardError::Exists),
            (true, false, true) => Err(ShardError::IsDirectory),
            (true, true, false) => Err(ShardError::NotDirectory),
            (true, false, false) => Ok(()),
        }
    }

    fn alive(&self, directory: u64) -> Result<(), ShardError> {
        if self.directories[&directory].removed { Err(ShardError::NotFound) } else { Ok(()) }
    }

    fn living(&self, directory: u64, name: &str) -> Result<u64, ShardError> {
        self.alive(directory)?;
        self.directories[&directory].living.get(name).copied().ok_or(ShardError::NotFound)
    }

    fn link(&mut self, directory: u64, name: &'static str, target: u64, time: u64) {
        let directory = self.directories.get_mut(&directory).unwrap();
        if let Some(old) = directory.living.insert(name, target) {
            directory.dead.insert((name, time), (old, true));
        }
        directory.mtime = time;
    }

    fn unlink(&mut self, directory: u64, name: &'static str, time: u64, owned: bool) {
        let directory = self.directories.get_mut(&directory).unwrap();
        let old = directory.living.remove(name).unwrap();
        directory.dead.insert((name, time), (old, owned));
        directory.mtime = time;
    }
}

/// Name, died_at, target, owned.
type Death = (&'static str, u64, u64, bool);

struct World {
    shard: Shard,
    model: Model,
    transaction: u64,
    /// The living maps after each instant at which something happened.
    history: Vec<(u64, BTreeMap<u64, Living>)>,
}

impl World {
    fn new() -> World {
        let mut model = Model::default();
        model.directories.insert(ROOT, Directory::default());
        World { shard: Shard::default(), model, transaction: 0, history: Vec::new() }
    }

    fn directory(&self, index: usize) -> u64 {
        let all: Vec<u64> = self.model.directories.keys().copied().collect();
        all[index % all.len()]
    }

    fn record(&mut self, time: u64) {
        let maps = self.model.directories.iter().map(|(&id, directory)| (id, directory.living.clone()));
        self.history.push((time, maps.collect()));
    }

    /// A file appears under a name.
    fn appears(&mut self, op: Op, directory: u64, name: &'static str, bytes: Vec<u8>, replace: bool) {
        let alive = self.model.alive(directory);
        let expected = alive.and_then(|()| self.model.replaceable(directory, name, false, replace));
        let (time, answer) = self.shard.one(op);
        assert_eq!(answer.clone().map(|_| ()), expected);
        if let Ok(answer) = answer {
            let reply = link(answer);
            assert_eq!(
                reply.replaced,
                self.model.directories[&directory].living.get(name).copied().unwrap_or(0)
            );
            self.model.contents.insert(reply.inode, bytes);
            self.model.link(directory, name, reply.inode, time.0);
            self.record(time.0);
        }
    }

    fn step(&mut self, todo: Do) {
        match todo {
            Do::Put { directory, name, bytes, replace } => {
                let (directory, name) = (self.directory(directory), NAMES[name]);
                let op = put_small(directory, name, &bytes, choice(replace));
                self.appears(op, directory, name, bytes, replace);
            }
            Do::PutTwice { directory, name } => self.put_twice(self.directory(directory), NAMES[name]),
            Do::Write { directory, name, replace, spans } => {
                self.write(self.directory(directory), NAMES[name], replace, &spans);
            }
            Do::Rename { directory, old, new, replace } => {
                self.rename(self.directory(directory), NAMES[old], NAMES[new], replace);
            }
            Do::Exchange { directory, one, other } => {
                self.exchange(self.directory(directory), NAMES[one], NAMES[other]);
            }
            Do::Unlink { directory, name } => self.unlink(self.directory(directory), NAMES[name]),
            Do::Mkdir { directory, name } => self.mkdir(self.directory(directory), NAMES[name]),
            Do::Rmdir { directory, name } => self.rmdir(self.directory(directory), NAMES[name]),
            Do::Move { from, old, to, new, replace } => {
                let (from, to) = (self.directory(from), self.directory(to));
                self.move_edge((from, NAMES[old]), (to, NAMES[new]), replace);
            }
            Do::Undelete { directory, death, to, name } => {
                let (from, to) = (self.directory(directory), self.directory(to));
                if let Some(death) = self.death(from, death) {
                    self.undelete(from, death, to, NAMES[name]);
                }
            }
            Do::Purge { directory, death } => {
                let directory = self.directory(directory);
                if let Some(death) = self.death(directory, death) {
                    self.purge(directory, death);
                }
            }
            Do::Forget => {
                let transactions = (1..=self.transaction).collect();
                let floor = self.transaction + 1;
                self.shard.ok(Op::ForgetTransactions(pb::ForgetTransactions { transactions, floor }));
            }
        }
    }

    fn exchange(&mut self, directory: u64, one: &'static str, other: &'static str) {
        let both = self.model.living(directory, one);
        let both = both.and_then(|first| Ok((first, self.model.living(directory, other)?)));
        let (name, other_name) = (one.into(), other.into());
        let (time, answer) = self.shard.one(Op::Exchange(pb::Exchange { directory, name, other_name }));
        let (first, second) = match both {
            Ok(both) => both,
            Err(error) => return assert_eq!(answer.map(|_| ()), Err(error)),
        };
        let reply = link(answer.unwrap());
        if one == other {
            return assert_eq!((reply.inode, reply.replaced), (first, 0));
        }
        assert_eq!((reply.inode, reply.replaced, reply.created_at), (second, first, time.0));
        for (name, target) in [(one, second), (other, first)] {
            self.model.unlink(directory, name, time.0, false);
            self.model.link(directory, name, target, time.0);
        }
        self.record(time.0);
    }

    fn put_twice(&mut self, directory: u64, name: &'static str) {
        let put = |bytes| put_small(directory, name, bytes, pb::Replace::File);
        let possible = self.model.living(directory, name).is_ok_and(|old| !InodeId(old).is_directory());
        let results = self.shard.batch(vec![put(b"1"), put(b"22")]);
        for (result, bytes) in results.iter().zip([&b"1"[..], b"22"]) {
            let Ok(reply) = answer(result) else {
                assert!(!possible);
                continue;
            };
            let inode = link(reply).inode;
            self.model.contents.insert(inode, bytes.to_vec());
            self.model.link(directory, name, inode, result.time);
            self.record(result.time);
        }
    }

    /// The long way, span by span.
    fn write(&mut self, directory: u64, name: &'static str, replace: bool, spans: &[u8]) {
        let (_, started) = self.shard.one(start(directory, None));
        let Ok(file) = started.map(eden) else {
            assert_eq!(self.model.alive(directory), Err(ShardError::NotFound));
            return;
        };
        let mut bytes = Vec::new();
        let mut certify = None;
        for kind in spans {
            let (offset, size) = (bytes.len() as u64, 3 + u32::from(*kind));
            let new = match kind {
                0 => vec![0; size as usize],
                kind => vec![*kind; size as usize],
            };
            let span = match kind {
                0 => zeros_span(offset, size),
                1 => inline_span(offset, &new),
                _ => blocks_span(offset, size, crc(&new), 1, 2),
            };
            bytes.extend_from_slice(&new);
            let op = pb::ExtendEden {
                file: file.file,
                cookie: file.cookie,
                certify: certify.take(),
                span: Some(span),
            };
            let placed = eden(self.shard.ok(Op::ExtendEden(op))).blocks;
            certify = Some(pb::CertifySpan { offset, proofs: Shard::proofs(&placed) });
        }
        let op = Op::LinkEden(pb::LinkEden {
            file: file.file,
            cookie: file.cookie,
            certify,
            directory,
            name: name.into(),
            replace: choice(replace) as i32,
            size: bytes.len() as u64,
            crc: crc(&bytes),
        });
        self.appears(op, directory, name, bytes, replace);
    }

    fn rename(&mut self, directory: u64, old: &'static str, new: &'static str, replace: bool) {
        let expected = self.model.living(directory, old).and_then(|target| {
            if old != new {
                self.model.replaceable(directory, new, InodeId(target).is_directory(), replace)?;
            }
            Ok(target)
        });
        let (time, answer) = self.shard.one(rename(directory, old, new, choice(replace)));
        assert_eq!(answer.clone().map(|answer| link(answer).inode), expected);
        if let Ok(target) = expected
            && old != new
        {
            self.model.unlink(directory, old, time.0, false);
            self.model.link(directory, new, target, time.0);
            self.record(time.0);
        }
    }

    fn unlink(&mut self, directory: u64, name: &'static str) {
        let expected = self.model.living(directory, name).and_then(|target| {
            if InodeId(target).is_directory() { Err(ShardError::IsDirectory) } else { Ok(()) }
        });
        let (time, answer) = self.shard.one(unlink(directory, name));
        assert_eq!(answer.map(|_| ()), expected);
        if expected.is_ok() {
            self.model.unlink(directory, name, time.0, true);
            self.record(time.0);
        }
    }

    /// The coordinator's mkdir: make, link, or discard.
    fn mkdir(&mut self, parent: u64, name: &'static str) {
        self.transaction += 1;
        let transaction = self.transaction;
        let make = pb::CreateDirectory { transaction, owner: parent, attributes: None };
        let made = link(self.shard.ok(Op::CreateDirectory(make))).inode;
        let expected =
            self.model.alive(parent).and_then(|()| self.model.replaceable(parent, name, true, false));
        let (time, answer) = self.link_edge(parent, name, made, false);
        assert_eq!(answer.map(|_| ()), expected);
        match expected {
            Ok(()) => {
                self.model.directories.insert(made, Directory { mtime: time, ..Default::default() });
                let mtime = self.shard.stat(made).unwrap().mtime;
                self.model.directories.get_mut(&made).unwrap().mtime = mtime;
                self.model.link(parent, name, made, time);
                self.record(time);
            }
            Err(_) => {
                let discard = pb::DiscardDirectory { transaction, directory: made };
                self.shard.ok(Op::DiscardDirectory(discard));
            }
        }
    }

    fn link_edge(
        &mut self,
        directory: u64,
        name: &str,
        target: u64,
        replace: bool,
    ) -> (u64, Result<Answer, ShardError>) {
        let op = Op::LinkEdge(pb::LinkEdge {
            transaction: self.transaction,
            directory,
            name: name.to_owned().into(),
            target,
            replace: choice(replace) as i32,
        });
        let first = self.shard.one(op.clone());
        // A duplicate changes nothing and hears the same.
        assert_eq!(self.shard.one(op), first);
        (first.0.0, first.1)
    }

    fn unlink_edge(&mut self, directory: u64, name: &'static str, target: u64, owned: bool) {
        let op = Op::UnlinkEdge(pb::UnlinkEdge {
            transaction: self.transaction,
            directory,
            name: name.into(),
            target,
            owned,
            died_at: 0,
        });
        let (time, answer) = self.shard.one(op.clone());
        answer.unwrap();
        assert_eq!(self.shard.one(op).0, time);
        self.model.unlink(directory, name, time.0, owned);
        self.record(time.0);
    }

    fn rmdir(&mut self, parent: u64, name: &'static str) {
        let Ok(target) = self.model.living(parent, name) else { return };
        if !InodeId(target).is_directory() {
            return;
        }
        self.transaction += 1;
        let transaction = self.transaction;
        let remove = pb::LockDirectory { transaction, directory: target, owner: parent, removed: false };
        let (_, answer) = self.shard.one(Op::LockDirectory(remove));
        if !self.model.directories[&target].living.is_empty() {
            assert_eq!(answer, Err(ShardError::NotEmpty));
            return;
        }
        answer.unwrap();
        self.model.directories.get_mut(&target).unwrap().removed = true;
        self.unlink_edge(parent, name, target, true);
        self.shard.ok(Op::RemoveDirectory(pb::RemoveDirectory { transaction, directory: target }));
    }

    /// Lock, link, set the owner, unlink; unlock when the new name is refused. Nobody checks for loops
    /// here: a directory is only moved to the root.
    fn move_edge(&mut self, old: (u64, &'static str), new: (u64, &'static str), replace: bool) {
        let Ok(target) = self.model.living(old.0, old.1) else { return };
        let is_directory = InodeId(target).is_directory();
        if old.0 == new.0 || (is_directory && new.0 != ROOT) {
            return;
        }
        self.transaction += 1;
        let transaction = self.transaction;
        self.shard.ok(Op::LockEdge(pb::LockEdge {
            transaction,
            directory: old.0,
            name: old.1.into(),
            target,
        }));
        assert_eq!(self.shard.refused(rename(old.0, old.1, "b!", pb::Replace::File)), ShardError::Locked);
        let expected = self
            .model
            .alive(new.0)
            .and_then(|()| self.model.replaceable(new.0, new.1, is_directory, replace));
        let (time, answer) = self.link_edge(new.0, new.1, target, replace);
        assert_eq!(answer.map(|_| ()), expected);
        if expected.is_err() {
            let unlock = pb::UnlockEdge { transaction, directory: old.0, name: old.1.into() };
            self.shard.ok(Op::UnlockEdge(unlock));
            return;
        }
        self.model.link(new.0, new.1, target, time);
        self.record(time);
        if is_directory {
            let set = pb::SetOwner { transaction, directory: target, owner: new.0 };
            self.shard.ok(Op::SetOwner(set));
        }
        self.unlink_edge(old.0, old.1, target, false);
    }

    fn death(&self, directory: u64, index: usize) -> Option<Death> {
        let dead = &self.model.directories[&directory].dead;
        let at = index.checked_rem(dead.len())?;
        dead.iter().nth(at).map(|(&(name, died_at), &(target, owned))| (name, died_at, target, owned))
    }

    fn undelete(&mut self, from: u64, death: Death, to: u64, new: &'static str) {
        let (old, died_at, target, owned) = death;
        if to == target {
            return;
        }
        self.transaction += 1;
        let transaction = self.transaction;
        let is_directory = InodeId(target).is_directory();
        let owns = if owned { Ok(()) } else { Err(ShardError::NotOwned) };
        let alive = self.model.alive(to);
        let free = |model: &Model| model.replaceable(to, new, is_directory, false);
        let (directory, name) = (from, bytes::Bytes::from_static(old.as_bytes()));
        let new_name = bytes::Bytes::from_static(new.as_bytes());
        if is_directory {
            let revive = pb::ReviveDirectory { transaction, directory: target, owner: to };
            let expected = self.model.alive(target).map_or(Ok(()), |()| Err(ShardError::NotOwned));
            let (_, answer) = self.shard.one(Op::ReviveDirectory(revive));
            assert_eq!(answer.map(drop), expected);
            if expected.is_err() {
                return;
            }
            // Nobody puts anything into what has no name.
            assert_eq!(self.shard.refused(put_small(target, "b", b"", choice(true))), ShardError::Locked);
        }
        let expected = if from == to {
            let expected = alive.and(owns).and_then(|()| free(&self.model));
            let op = if is_directory {
                Op::UndeleteEdge(pb::UndeleteEdge { transaction, directory, name, died_at, target, new_name })
            } else {
                Op::Undelete(pb::Undelete { directory, name, died_at, target, new_name })
            };
            let (time, answer) = self.shard.one(op);
            assert_eq!(answer.map(|answer| link(answer).inode), expected.map(|()| target));
            expected.map(|()| time.0)
        } else {
            self.undelete_elsewhere(from, death, to, new)
        };
        if let Ok(time) = expected {
            self.model.directories.get_mut(&from).unwrap().dead.insert((old, died_at), (target, false));
            self.model.link(to, new, target, time);
            self.record(time);
        }
        if is_directory && expected.is_ok() {
            self.model.directories.get_mut(&target).unwrap().removed = false;
            self.shard.ok(Op::UnlockDirectory(pb::UnlockDirectory { transaction, directory: target }));
        } else if is_directory {
            self.shard.ok(Op::RemoveDirectory(pb::RemoveDirectory { transaction, directory: target }));
        }
    }

    /// Lock the dead edge, link, free it. Answers when the new name came.
    fn undelete_elsewhere(
        &mut self,
        directory: u64,
        (name, died_at, target, owned): Death,
        to: u64,
        new: &'static str,
    ) -> Result<u64, ShardError> {
        let (transaction, name) = (self.transaction, bytes::Bytes::from_static(name.as_bytes()));
        let lock = pb::LockDeadEdge { transaction, directory, name: name.clone(), died_at, target };
        let (_, answer) = self.shard.one(Op::LockDeadEdge(lock));
        assert_eq!(answer.is_ok(), owned);
        answer?;
        let purge = pb::Purge { directory, name: name.clone(), died_at, target, owned };
        assert_eq!(self.shard.refused(Op::Purge(purge)), ShardError::Locked);
        let is_directory = InodeId(target).is_directory();
        let expected =
            self.model.alive(to).and_then(|()| self.model.replaceable(to, new, is_directory, false));
        let (time, answer) = self.link_edge(to, new, target, false);
        assert_eq!(answer.map(drop), expected);
        let lives = expected.is_ok();
        self.shard.ok(Op::FreeDeadEdge(pb::FreeDeadEdge { transaction, directory, name, died_at, lives }));
        expected.map(|()| time)
    }

    fn purge(&mut self, directory: u64, death: Death) {
        let (old, died_at, target, owned) = death;
        let name = bytes::Bytes::from_static(old.as_bytes());
        let listed = self.shard.list(pb::List { directory, dead: true, ..Default::default() });
        let is_it = |entry: &&pb::Entry| entry.name == old.as_bytes() && entry.died_at == died_at;
        let created_at = listed.iter().find(is_it).unwrap().created_at;
        let op = Op::Purge(pb::Purge { directory, name: name.clone(), died_at, target, owned: false });
        if owned && InodeId(target).is_directory() {
            assert_eq!(self.shard.refused(op), ShardError::IsDirectory);
            self.transaction += 1;
            let transaction = self.transaction;
            let lock = pb::LockDirectory { transaction, directory: target, owner: 0, removed: true };
            let (_, answer) = self.shard.one(Op::LockDirectory(lock));
            if !self.model.directories[&target].dead.is_empty() {
                assert_eq!(answer.map(drop), Err(ShardError::NotEmpty));
                return;
            }
            answer.unwrap();
            self.shard.ok(Op::PurgeDeadEdge(pb::PurgeDeadEdge {
                transaction,
                directory,
                name,
                died_at,
                target,
            }));
            self.shard.ok(Op::PurgeDirectory(pb::PurgeDirectory { transaction, directory: target }));
            self.model.directories.remove(&target);
            assert_eq!(self.shard.stat(target), None);
        } else {
            self.shard.ok(op);
            if owned {
                self.model.contents.remove(&target);
                assert_eq!(self.shard.stat(target), None);
            }
        }
        self.model.directories.get_mut(&directory).unwrap().dead.remove(&(old, died_at));
        for (_, maps) in self.history.iter_mut().filter(|(time, _)| (created_at..died_at).contains(time)) {
            maps.get_mut(&directory).unwrap().remove(old);
        }
    }

    /// Living and dead maps, times and contents, as they are now.
    fn compare_now(&self) {
        for (&id, directory) in &self.model.directories {
            let dead = self.shard.list(pb::List { directory: id, dead: true, ..Default::default() });
            let dead: Vec<_> = dead.iter().map(|e| (&e.name[..], e.died_at, e.target, e.owned)).collect();
            let expected: Vec<_> = directory
                .dead
                .iter()
                .map(|(&(name, died_at), &(target, owned))| (name.as_bytes(), died_at, target, owned))
                .collect();
            assert_eq!(dead, expected);
            let attributes = self.shard.stat(id).unwrap();
            assert_eq!(attributes.mtime, directory.mtime, "mtime of {id:#x}");
            assert_eq!(attributes.parent == Some(0), directory.removed);
            if !directory.removed {
                assert_eq!(self.living_at(id, 0), directory.living);
            }
        }
        for (&file, bytes) in &self.model.contents {
            let attributes = self.shard.stat(file).unwrap();
            assert_eq!((attributes.size, attributes.crc), (bytes.len() as u64, Some(crc(bytes))));
        }
    }

    fn living_at(&self, directory: u64, at: u64) -> Living {
        let listed = self.shard.list(pb::List { directory, at, ..Default::default() });
        listed
            .iter()
            .map(|entry| {
                (*NAMES.iter().find(|name| name.as_bytes() == &entry.name[..]).unwrap(), entry.target)
            })
            .collect()
    }

    /// SH-12: every instant shows what was there then, by listing and by walking.
    fn compare_history(&self) {
        for (index, (time, maps)) in self.history.iter().enumerate() {
            let until = self.history.get(index + 1).map_or(time + 1, |next| next.0 - 1);
            for at in [*time, until] {
                // What is purged has no past.
                let there = |id: &u64| self.model.directories.contains_key(id);
                for (&directory, living) in maps.iter().filter(|(id, _)| there(id)) {
                    assert_eq!(&self.living_at(directory, at), living, "{directory:#x} at {at}");
                    for name in NAMES {
                        let components = vec![name.into()];
                        let walk = pb::Walk { start: directory, components, at, ..Default::default() };
                        let reply = self.shard.walk(&walk).unwrap();
                        let found = (reply.consumed == 1).then_some(reply.inode);
                        assert_eq!(found.as_ref(), living.get(name), "{directory:#x} {name:?} at {at}");
                    }
                }
            }
        }
    }
}

fn choice(replace: bool) -> pb::Replace {
    if replace { pb::Replace::File } else { pb::Replace::Refuse }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_shard_is_a_map_of_maps_with_a_past(todo in prop::collection::vec(todo(), 1..60)) {
        let mut world = World::new();
        for step in todo {
            world.step(step);
            world.compare_now();
        }
        world.compare_history();
        world.shard.verify();
    }
}
