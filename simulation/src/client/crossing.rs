//! Operations of the coordinator: directories made, removed, and entries moved.

use bytes::Bytes;
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

    /// Two or three directories, each in the one before, in one request.
    pub(super) async fn mkdir_path(&self) {
        if self.common.directories.borrow().len() + 2 >= DIRECTORIES_MAX {
            return self.rmdir().await;
        }
        let edge = self.edge();
        let below = 1 + self.port().below(2);
        let names: Vec<Bytes> =
            std::iter::once(edge.name.clone()).chain((0..below).map(|_| self.name())).collect();
        let id = self.begin(format!("mkdir {edge:?} and below {names:?}"), Self::born_unknown(&edge));
        if let Some(operation) = self.common.history.borrow_mut().get_mut(id) {
            operation.below = below;
        }
        let attributes = Some(pb::NewAttributes { mode: 0o755, uid: id, gid: 0, mtime: None });
        let op = pb::crossdir_request::Op::MkdirPath(pb::MkdirPath {
            parent: edge.directory.0,
            names: names.clone(),
            on_the_way: attributes,
            attributes,
        });
        let Ok(answer) = self.calls.crossdir(op, self.calls.patience()).await else {
            return self.gave_up(id);
        };
        let saw = |expect| Claim::Saw { edge: edge.clone(), expect, at: None };
        match answer {
            Ok(CrossdirAnswer::MkdirPath(made)) if made.inodes.len() == names.len() => {
                let at = Some(Time(made.created_at));
                let mut claims = Vec::new();
                let mut parent = edge.directory;
                for (name, &inode) in names.iter().zip(&made.inodes) {
                    let (edge, target) = (Edge { directory: parent, name: name.clone() }, InodeId(inode));
                    self.heard_of(target);
                    // The lower ones came into those above before, which nobody could see.
                    claims.push(match claims.is_empty() {
                        true => Claim::Born { edge, target: Some(target), at },
                        false => Claim::Saw { edge, expect: Expect::Is(target), at },
                    });
                    parent = target;
                }
                self.end(id, Outcome::Acknowledged, claims);
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

    /// Both names lead to each other's inode from `at` on.
    pub(super) fn exchanged(one: &(Edge, InodeId), other: &(Edge, InodeId), at: Option<Time>) -> Vec<Claim> {
        let of = |(edge, target): &(Edge, InodeId), new: InodeId| {
            let died = Claim::Died { edge: edge.clone(), target: Some(*target), at, owned: false };
            [died, Claim::Born { edge: edge.clone(), target: Some(new), at }]
        };
        of(one, other.1).into_iter().chain(of(other, one.1)).collect()
    }

    pub(super) async fn exchange(&self) {
        let pick = || if self.port().chance(40) { self.used_directory() } else { self.used_edge() };
        let (one, other) = (pick(), pick());
        if one == other {
            return;
        }
        let Some(target) = self.find(&one).await else { return };
        let Some(other_target) = self.find(&other).await else { return };
        if target == other_target {
            return;
        }
        let (one, other) = ((one, target), (other, other_target));
        if one.0.directory == other.0.directory {
            return self.exchange_within(one, other).await;
        }
        let directories = [one.0.directory, other.0.directory];
        if directories.contains(&target) || directories.contains(&other_target) {
            return;
        }
        let id = self.begin(format!("exchange {one:?} and {other:?}"), Self::exchanged(&one, &other, None));
        let op = pb::crossdir_request::Op::Exchange(pb::ExchangeAcross {
            directory: one.0.directory.0,
            name: one.0.name.clone(),
            target: target.0,
            other_directory: other.0.directory.0,
            other_name: other.0.name.clone(),
            other_target: other_target.0,
        });
        let Ok(answer) = self.calls.crossdir(op, self.calls.patience()).await else {
            return self.gave_up(id);
        };
        let saw = |edge: &Edge, expect| Claim::Saw { edge: edge.clone(), expect, at: None };
        let claim = match answer {
            Ok(CrossdirAnswer::Exchange(reply)) => {
                let claims = Self::exchanged(&one, &other, Some(Time(reply.exchanged_at)));
                return self.end(id, Outcome::Acknowledged, claims);
            }
            Err(CrossdirError::NotFound) => Claim::AnyOf(vec![
                saw(&one.0, Expect::Absent),
                saw(&other.0, Expect::Absent),
                Claim::Gone(one.0.directory),
                Claim::Gone(other.0.directory),
                Claim::Gone(target),
                Claim::Gone(other_target),
            ]),
            Err(CrossdirError::Changed) => Claim::AnyOf(vec![
                saw(&one.0, Expect::IsNot(target)),
                saw(&other.0, Expect::IsNot(other_target)),
            ]),
            Err(CrossdirError::Loop) if target.is_directory() || other_target.is_directory() => {
                return self.end(id, Outcome::Refused, Vec::new());
            }
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
