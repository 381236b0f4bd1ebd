//! What the transactions mean: the namespace as one thing that does one operation at a time.

use std::collections::{BTreeMap, BTreeSet};

use eggs_proto::{CrossdirError, InodeId, pb};
use pb::crossdir_request::Op;

use super::tables::{self, Shards};

const ROOT: u64 = InodeId::ROOT.0;

/// The namespace as one thing that does one operation at a time.
#[derive(Debug, Clone)]
pub struct Model {
    /// Living directories → owner.
    pub owners: BTreeMap<u64, u64>,
    pub removed: BTreeSet<u64>,
    pub edges: BTreeMap<(u64, Vec<u8>), u64>,
    pub dead: Vec<Dead>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dead {
    pub directory: u64,
    pub name: Vec<u8>,
    pub target: u64,
    pub owned: bool,
    /// `None`: the caller was not told when.
    pub died_at: Option<u64>,
}

/// When something died is not compared: the model does not always know.
impl PartialEq for Model {
    fn eq(&self, other: &Model) -> bool {
        let dead = |model: &Model| {
            let mut dead = model.dead.clone();
            dead.iter_mut().for_each(|dead| dead.died_at = None);
            dead.sort();
            dead
        };
        (&self.owners, &self.removed, &self.edges) == (&other.owners, &other.removed, &other.edges)
            && dead(self) == dead(other)
    }
}

impl Model {
    pub fn of(shards: &Shards) -> Model {
        let edges = tables::edges(shards);
        let edges = edges.iter().map(|((dir, name), edge)| ((*dir, name.to_vec()), edge.target)).collect();
        let owners = tables::owners(shards).into_iter();
        let (owners, removed): (BTreeMap<u64, u64>, _) = owners.partition(|&(_, owner)| owner != 0);
        let removed = removed.into_keys().collect();
        let dead = tables::dead(shards).into_iter().map(|((directory, name, died_at), row)| Dead {
            directory,
            name: name.to_vec(),
            target: row.target,
            owned: row.owned,
            died_at: Some(died_at),
        });
        Model { owners, removed, edges, dead: dead.collect() }
    }

    fn bury(&mut self, directory: u64, name: &[u8], target: u64, owned: bool, died_at: Option<u64>) {
        self.dead.push(Dead { directory, name: name.to_vec(), target, owned, died_at });
    }

    /// Where the dead edge is that owns its target.
    fn death(&self, directory: u64, name: &[u8], died_at: u64) -> Result<usize, CrossdirError> {
        let is_it =
            |dead: &Dead| (dead.directory, &dead.name[..], dead.died_at) == (directory, name, Some(died_at));
        let at = self.dead.iter().position(is_it).ok_or(CrossdirError::NotFound)?;
        if self.dead[at].owned { Ok(at) } else { Err(CrossdirError::NotOwned) }
    }

    fn undelete(&mut self, op: &pb::UndeleteInode) -> Result<(), CrossdirError> {
        let is_directory = InodeId(op.target).is_directory();
        if is_directory {
            self.dead_directory(op.target)?;
        }
        let at = if op.directory == op.new_directory {
            self.alive(op.new_directory)?;
            self.death(op.directory, &op.name, op.died_at)?
        } else {
            let at = self.death(op.directory, &op.name, op.died_at)?;
            self.alive(op.new_directory)?;
            at
        };
        if self.edge(op.new_directory, &op.new_name).is_some() {
            return Err(CrossdirError::Exists);
        }
        self.dead[at].owned = false;
        self.edges.insert((op.new_directory, op.new_name.to_vec()), op.target);
        if is_directory {
            self.removed.remove(&op.target);
            self.owners.insert(op.target, op.new_directory);
        }
        Ok(())
    }

    fn purge(&mut self, op: &pb::PurgeInode) -> Result<(), CrossdirError> {
        if InodeId(op.target).is_directory() {
            self.dead_directory(op.target)?;
            if self.dead.iter().any(|dead| dead.directory == op.target) {
                return Err(CrossdirError::NotEmpty);
            }
        }
        let at = self.death(op.directory, &op.name, op.died_at)?;
        self.dead.remove(at);
        self.removed.remove(&op.target);
        Ok(())
    }

    fn dead_directory(&self, directory: u64) -> Result<(), CrossdirError> {
        if self.owners.contains_key(&directory) {
            return Err(CrossdirError::NotOwned);
        }
        self.removed.contains(&directory).then_some(()).ok_or(CrossdirError::NotFound)
    }

    fn alive(&self, directory: u64) -> Result<(), CrossdirError> {
        self.owners.contains_key(&directory).then_some(()).ok_or(CrossdirError::NotFound)
    }

    fn edge(&self, directory: u64, name: &[u8]) -> Option<u64> {
        self.edges.get(&(directory, name.to_vec())).copied()
    }

    fn expect(&self, directory: u64, name: &[u8], target: u64) -> Result<(), CrossdirError> {
        match self.edge(directory, name) {
            Some(found) if found == target => Ok(()),
            Some(_) => Err(CrossdirError::Changed),
            None => Err(CrossdirError::NotFound),
        }
    }

    /// `made`: the id the real one gave a new directory, the first if there are several; the instant at which one was
    /// removed.
    pub fn apply(&mut self, op: &Op, made: u64) -> Result<(), CrossdirError> {
        match op {
            Op::Mkdir(op) => {
                self.alive(op.parent)?;
                if self.edge(op.parent, &op.name).is_some() {
                    return Err(CrossdirError::Exists);
                }
                self.owners.insert(made, op.parent);
                self.edges.insert((op.parent, op.name.to_vec()), made);
            }
            Op::Rmdir(op) => {
                self.alive(op.target)?;
                if self.owners[&op.target] != op.parent {
                    return Err(CrossdirError::Changed);
                }
                if self.edges.keys().any(|(directory, _)| *directory == op.target) {
                    return Err(CrossdirError::NotEmpty);
                }
                self.expect(op.parent, &op.name, op.target)?;
                self.owners.remove(&op.target);
                self.removed.insert(op.target);
                self.edges.remove(&(op.parent, op.name.to_vec()));
                self.bury(op.parent, &op.name, op.target, true, Some(made));
            }
            Op::Move(op) => self.rename(op)?,
            Op::MkdirPath(op) => {
                self.alive(op.parent)?;
                if self.edge(op.parent, &op.names[0]).is_some() {
                    return Err(CrossdirError::Exists);
                }
                let mut parent = op.parent;
                for (made, name) in (made..).zip(&op.names) {
                    self.owners.insert(made, parent);
                    self.edges.insert((parent, name.to_vec()), made);
                    parent = made;
                }
            }
            Op::Exchange(op) => self.exchange(op)?,
            Op::UndeleteInode(op) => self.undelete(op)?,
            Op::PurgeInode(op) => self.purge(op)?,
            Op::ListTransactions(_) | Op::ResolveMove(_) => unreachable!("not begun"),
        }
        Ok(())
    }

    fn exchange(&mut self, op: &pb::ExchangeAcross) -> Result<(), CrossdirError> {
        let goes = [(op.target, op.other_directory), (op.other_target, op.directory)];
        let directories = goes.into_iter().filter(|(target, _)| InodeId(*target).is_directory());
        let directories: Vec<(u64, u64)> = directories.collect();
        for &(_, parent) in &directories {
            let mut at = parent;
            loop {
                self.alive(at)?;
                if directories.iter().any(|(target, _)| at == *target) {
                    return Err(CrossdirError::Loop);
                }
                if at == ROOT {
                    break;
                }
                at = self.owners[&at];
            }
        }
        self.alive(op.directory)?;
        self.expect(op.directory, &op.name, op.target)?;
        self.alive(op.other_directory)?;
        self.expect(op.other_directory, &op.other_name, op.other_target)?;
        self.edges.insert((op.directory, op.name.to_vec()), op.other_target);
        self.bury(op.directory, &op.name, op.target, false, None);
        self.edges.insert((op.other_directory, op.other_name.to_vec()), op.target);
        self.bury(op.other_directory, &op.other_name, op.other_target, false, None);
        self.owners.extend(directories);
        Ok(())
    }

    fn rename(&mut self, op: &pb::Move) -> Result<(), CrossdirError> {
        // Within a directory it is asked for by name alone.
        let target = match op.old_directory == op.new_directory {
            true => {
                self.alive(op.old_directory)?;
                self.edge(op.old_directory, &op.old_name).ok_or(CrossdirError::NotFound)?
            }
            false => op.target,
        };
        let is_directory = InodeId(target).is_directory();
        if is_directory {
            let mut at = op.new_directory;
            loop {
                self.alive(at)?;
                if at == target {
                    return Err(CrossdirError::Loop);
                }
                if at == ROOT {
                    break;
                }
                at = self.owners[&at];
            }
        }
        self.alive(op.old_directory)?;
        self.expect(op.old_directory, &op.old_name, target)?;
        self.alive(op.new_directory)?;
        match self.edge(op.new_directory, &op.new_name) {
            Some(_) if is_directory || op.replace() == pb::Replace::Refuse => {
                return Err(CrossdirError::Exists);
            }
            Some(old) if InodeId(old).is_directory() => return Err(CrossdirError::IsDirectory),
            _ => {}
        }
        self.edges.remove(&(op.old_directory, op.old_name.to_vec()));
        self.bury(op.old_directory, &op.old_name, target, false, None);
        if let Some(old) = self.edges.insert((op.new_directory, op.new_name.to_vec()), target) {
            self.bury(op.new_directory, &op.new_name, old, true, None);
        }
        if is_directory {
            self.owners.insert(target, op.new_directory);
        }
        Ok(())
    }
}
