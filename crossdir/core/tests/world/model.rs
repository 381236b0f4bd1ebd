//! What the transactions mean: the namespace as one thing that does one operation at a time.

use std::collections::BTreeMap;

use eggs_proto::{CrossdirError, InodeId, pb};
use pb::crossdir_request::Op;

use super::tables::{self, Shards};

const ROOT: u64 = InodeId::ROOT.0;

/// The namespace as one thing that does one operation at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Living directories → owner.
    pub owners: BTreeMap<u64, u64>,
    pub edges: BTreeMap<(u64, Vec<u8>), u64>,
}

impl Model {
    pub fn of(shards: &Shards) -> Model {
        let edges = tables::edges(shards);
        let edges = edges.iter().map(|((dir, name), edge)| ((*dir, name.to_vec()), edge.target)).collect();
        Model { owners: tables::owners(shards).into_iter().filter(|&(_, owner)| owner != 0).collect(), edges }
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

    /// `made`: the id the real one gave a new directory, the first if there are several.
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
                self.edges.remove(&(op.parent, op.name.to_vec()));
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
        self.edges.insert((op.other_directory, op.other_name.to_vec()), op.target);
        self.owners.extend(directories);
        Ok(())
    }

    fn rename(&mut self, op: &pb::Move) -> Result<(), CrossdirError> {
        let is_directory = InodeId(op.target).is_directory();
        if is_directory {
            let mut at = op.new_directory;
            loop {
                self.alive(at)?;
                if at == op.target {
                    return Err(CrossdirError::Loop);
                }
                if at == ROOT {
                    break;
                }
                at = self.owners[&at];
            }
        }
        self.alive(op.old_directory)?;
        self.expect(op.old_directory, &op.old_name, op.target)?;
        self.alive(op.new_directory)?;
        match self.edge(op.new_directory, &op.new_name) {
            Some(_) if is_directory || op.replace() == pb::Replace::Refuse => {
                return Err(CrossdirError::Exists);
            }
            Some(old) if InodeId(old).is_directory() => return Err(CrossdirError::IsDirectory),
            _ => {}
        }
        self.edges.remove(&(op.old_directory, op.old_name.to_vec()));
        self.edges.insert((op.new_directory, op.new_name.to_vec()), op.target);
        if is_directory {
            self.owners.insert(op.target, op.new_directory);
        }
        Ok(())
    }
}
