//! Operations of the coordinator: directories made, removed, and entries moved.

use eggs_proto::pb::crossdir_reply::Result as CrossdirAnswer;
use eggs_proto::{CrossdirError, InodeId, Time, pb};

use super::workload::{DIRECTORIES_MAX, Workload};
use crate::history::{Claim, Edge, Expect, Outcome};

impl Workload {
    pub(super) fn heard_of(&self, directory: InodeId) {
        let mut directories = self.common.directories.borrow_mut();
        if !directories.contains(&directory) && directory != InodeId::ROOT {
            directories.push(directory);
        }
    }

    pub(super) async fn mkdir(&self) {
        if self.common.directories.borrow().len() >= DIRECTORIES_MAX {
            return self.rmdir().await;
        }
        let edge = self.edge();
        let id = self.begin(format!("mkdir {edge:?}"), Self::born_unknown(&edge));
        let op = pb::crossdir_request::Op::Mkdir(pb::Mkdir {
            parent: edge.directory.0,
            name: edge.name.clone(),
            attributes: Some(pb::NewAttributes { mode: 0o755, uid: id, gid: 0, mtime: None }),
        });
        let Ok(answer) = self.calls.crossdir(op, self.calls.patience()).await else {
            return self.gave_up(id);
        };
        let saw = |expect| Claim::Saw { edge: edge.clone(), expect, at: None };
        match answer {
            Ok(CrossdirAnswer::Mkdir(made)) => {
                let (target, at) = (InodeId(made.inode), Some(Time(made.created_at)));
                self.heard_of(target);
                let born = Claim::Born { edge: edge.clone(), target: Some(target), at };
                self.end(id, Outcome::Acknowledged, vec![born]);
            }
            Err(CrossdirError::Exists) => self.end(id, Outcome::Refused, vec![saw(Expect::Present)]),
            Err(CrossdirError::NotFound) => {
                self.end(id, Outcome::Refused, vec![Claim::Gone(edge.directory)]);
            }
            other => self.fail(id, &format!("answered {other:?}")),
        }
    }

    pub(super) async fn rmdir(&self) {
        let edge = if self.port().chance(80) { self.used_directory() } else { self.used_edge() };
        let Some(target) = self.find(&edge).await.filter(|target| target.is_directory()) else { return };
        let died = |at| Claim::Died { edge: edge.clone(), target: Some(target), at, owned: true };
        let id = self.begin(format!("rmdir {edge:?} {target}"), vec![died(None)]);
        if let Some(operation) = self.common.history.borrow_mut().get_mut(id) {
            operation.removes = Some(target);
        }
        let op = pb::crossdir_request::Op::Rmdir(pb::Rmdir {
            parent: edge.directory.0,
            name: edge.name.clone(),
            target: target.0,
        });
        let Ok(answer) = self.calls.crossdir(op, self.calls.patience()).await else {
            return self.gave_up(id);
        };
        let saw = |expect| Claim::Saw { edge: edge.clone(), expect, at: None };
        let claim = match answer {
            Ok(CrossdirAnswer::Rmdir(removed)) => {
                if self.port().chance(80) {
                    self.common.directories.borrow_mut().retain(|&other| other != target);
                }
                return self.end(id, Outcome::Acknowledged, vec![died(Some(Time(removed.died_at)))]);
            }
            Err(CrossdirError::NotEmpty) => Claim::NotEmpty(target),
            Err(CrossdirError::NotFound) => {
                Claim::AnyOf(vec![Claim::Gone(target), Claim::Gone(edge.directory), saw(Expect::Absent)])
            }
            // Another name, or another parent, by the time of one of the two steps.
            Err(CrossdirError::Changed) => saw(Expect::IsNot(target)),
            other => return self.fail(id, &format!("answered {other:?}")),
        };
        self.end(id, Outcome::Refused, vec![claim]);
    }

    pub(super) async fn move_entry(&self) {
        let old = if self.port().chance(40) { self.used_directory() } else { self.used_edge() };
        let new = self.edge();
        if old.directory == new.directory {
            return self.rename().await;
        }
        let Some(target) = self.find(&old).await else { return };
        if target == new.directory || target == old.directory {
            return;
        }
        let replace = self.replace();
        let died = Claim::Died { edge: old.clone(), target: Some(target), at: None, owned: false };
        let born = Claim::Born { edge: new.clone(), target: Some(target), at: None };
        let both = vec![died.clone(), born.clone()];
        let id = self.begin(format!("move {old:?} {target} to {new:?} {replace:?}"), both);
        let op = pb::crossdir_request::Op::Move(pb::Move {
            old_directory: old.directory.0,
            old_name: old.name.clone(),
            target: target.0,
            new_directory: new.directory.0,
            new_name: new.name.clone(),
            replace: replace.into(),
        });
        let Ok(answer) = self.calls.crossdir(op, self.calls.patience()).await else {
            return self.gave_up(id);
        };
        let saw = |edge: &Edge, expect| Claim::Saw { edge: edge.clone(), expect, at: None };
        let gone = |directory| Claim::Gone(directory);
        let claim = match answer {
            Ok(CrossdirAnswer::Move(_)) => {
                return self.end(id, Outcome::Acknowledged, vec![died, born]);
            }
            Err(CrossdirError::NotFound) => Claim::AnyOf(vec![
                saw(&old, Expect::Absent),
                gone(old.directory),
                gone(new.directory),
                gone(target),
            ]),
            Err(CrossdirError::Changed) => saw(&old, Expect::IsNot(target)),
            Err(CrossdirError::Exists) => saw(&new, Expect::Present),
            Err(CrossdirError::IsDirectory) => saw(&new, Expect::Directory),
            Err(CrossdirError::NotDirectory) => saw(&new, Expect::File),
            Err(CrossdirError::Loop) if target.is_directory() => {
                return self.end(id, Outcome::Refused, Vec::new());
            }
            other => return self.fail(id, &format!("answered {other:?}")),
        };
        self.end(id, Outcome::Refused, vec![claim]);
    }
}
