//! What is dead: brought back, or purged.

use eggs_proto::pb::crossdir_reply::Result as CrossdirAnswer;
use eggs_proto::pb::crossdir_request::Op as CrossdirOp;
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as WriteAnswer;
use eggs_proto::{CrossdirError, InodeId, ShardError, Time, pb};

use super::calls::{GaveUp, refusal};
use super::files::one;
use super::workload::{SHARED_NAMES, Workload};
use crate::history::{Claim, Death, Edge, Expect, Outcome};

/// Why it was not done, whoever said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    NotFound,
    Exists,
    NotEmpty,
    NotOwned,
}

impl Refused {
    fn by_shard(error: ShardError) -> Option<Refused> {
        match error {
            ShardError::NotFound => Some(Refused::NotFound),
            ShardError::Exists => Some(Refused::Exists),
            ShardError::NotOwned => Some(Refused::NotOwned),
            _ => None,
        }
    }

    fn by_coordinator(error: CrossdirError) -> Option<Refused> {
        match error {
            CrossdirError::NotFound => Some(Refused::NotFound),
            CrossdirError::Exists => Some(Refused::Exists),
            CrossdirError::NotEmpty => Some(Refused::NotEmpty),
            CrossdirError::NotOwned => Some(Refused::NotOwned),
            _ => None,
        }
    }
}

impl Workload {
    /// Some death in some directory, mostly one that owns what died.
    async fn death(&self) -> Option<Death> {
        let directory = self.directory();
        let deaths = self.deaths(directory).await?;
        let owned: Vec<&Death> = deaths.iter().filter(|death| death.owned).collect();
        if !owned.is_empty() && self.port().chance(85) {
            return Some(owned[self.port().below(owned.len())].clone());
        }
        (!deaths.is_empty()).then(|| deaths[self.port().below(deaths.len())].clone())
    }

    /// Own names are changed by nobody else.
    fn may_have(&self, edge: &Edge) -> bool {
        self.is_own(edge) || SHARED_NAMES.iter().any(|name| edge.name == name.as_bytes())
    }

    pub(super) async fn undelete(&self) {
        let Some(death) = self.death().await else { return };
        let same = self.port().chance(60) && self.may_have(&death.edge);
        let new = if same { death.edge.clone() } else { self.edge() };
        let target = death.target;
        if new.directory == target {
            return;
        }
        let born = |at| Claim::Born { edge: new.clone(), target: Some(target), at };
        let id = self.begin(format!("undelete {death:?} as {new:?}"), vec![born(None)]);
        let (directory, name) = (death.edge.directory, death.edge.name.clone());
        let (died_at, until) = (death.died_at.0, self.calls.patience());
        let (answer, at) = if new.directory == directory && !target.is_directory() {
            let op = Op::Undelete(pb::Undelete {
                directory: directory.0,
                name,
                died_at,
                target: target.0,
                new_name: new.name.clone(),
            });
            let Ok(result) = self.calls.write(directory.shard(), vec![op], until).await.map(one) else {
                return self.gave_up(id);
            };
            let Ok(result) = result else { return self.fail(id, "not one answer") };
            let time = Time(result.time);
            match (refusal(&result), result.result) {
                (None, Some(WriteAnswer::Link(link))) => (Ok(Time(link.created_at)), Some(time)),
                // Answered "later" until the patience was over: it did not happen.
                (Some(ShardError::Locked), _) => return self.end(id, Outcome::Refused, Vec::new()),
                (Some(error), _) => (Err((Refused::by_shard(error), format!("{error:?}"))), Some(time)),
                (None, other) => return self.fail(id, &format!("answered {other:?}")),
            }
        } else {
            let op = CrossdirOp::UndeleteInode(pb::UndeleteInode {
                directory: directory.0,
                name,
                died_at,
                target: target.0,
                new_directory: new.directory.0,
                new_name: new.name.clone(),
            });
            match self.calls.crossdir(op, until).await {
                Ok(Ok(CrossdirAnswer::UndeleteInode(reply))) => (Ok(Time(reply.created_at)), None),
                Ok(Err(error)) => (Err((Refused::by_coordinator(error), format!("{error:?}"))), None),
                Err(GaveUp) => return self.gave_up(id),
                other => return self.fail(id, &format!("answered {other:?}")),
            }
        };
        match answer {
            Ok(at) => {
                if target.is_directory() {
                    self.heard_of(target);
                }
                self.end(id, Outcome::Acknowledged, vec![born(Some(at))]);
            }
            Err((Some(Refused::Exists), _)) => {
                let claim = Claim::Saw { edge: new, expect: Expect::Present, at };
                self.end(id, Outcome::Refused, vec![claim]);
            }
            Err((Some(Refused::NotFound), _)) => {
                // A directory that was moved away may have died, and been purged, elsewhere.
                let purged = Claim::PurgedInode(target);
                let claims = vec![Claim::Gone(new.directory), Claim::NoDeath(death), purged];
                self.end(id, Outcome::Refused, vec![Claim::AnyOf(claims)]);
            }
            Err((Some(Refused::NotOwned), _)) => {
                self.end(id, Outcome::Refused, vec![Claim::NotOwned(death)]);
            }
            Err((_, error)) => self.fail(id, &format!("refused with {error}")),
        }
    }

    pub(super) async fn purge(&self) {
        let Some(death) = self.death().await else { return };
        let target = death.target;
        // Who made it is not to be learned afterwards.
        let stat = pb::shard_request::Op::Stat(pb::Stat { inode: target.0 });
        let until = self.calls.patience();
        let maker = match self.calls.shard(target.shard(), stat, None, until).await {
            Ok(Ok(ShardAnswer::Stat(pb::StatReply { attributes: Some(attributes) }))) => Some(attributes.uid),
            Ok(Err(ShardError::NotFound)) => None,
            _ => return,
        };
        let purged = Claim::Purged { death: death.clone(), maker };
        let id = self.begin(format!("purge {death:?}"), vec![purged.clone()]);
        let (directory, name, died_at) = (death.edge.directory, death.edge.name.clone(), death.died_at.0);
        let local = !death.owned || (!target.is_directory() && target.shard() == directory.shard());
        let answer = if local {
            let (directory_id, target, owned) = (directory.0, target.0, death.owned);
            let op = Op::Purge(pb::Purge { directory: directory_id, name, died_at, target, owned });
            let Ok(result) = self.calls.write(directory.shard(), vec![op], until).await.map(one) else {
                return self.gave_up(id);
            };
            let Ok(result) = result else { return self.fail(id, "not one answer") };
            match (refusal(&result), result.result) {
                (None, Some(WriteAnswer::Done(_))) => Ok(()),
                (Some(ShardError::Locked), _) => return self.end(id, Outcome::Refused, Vec::new()),
                (Some(error), _) => Err((Refused::by_shard(error), format!("{error:?}"))),
                (None, other) => return self.fail(id, &format!("answered {other:?}")),
            }
        } else {
            let op = pb::PurgeInode { directory: directory.0, name, died_at, target: target.0 };
            match self.calls.crossdir(CrossdirOp::PurgeInode(op), until).await {
                Ok(Ok(CrossdirAnswer::PurgeInode(_))) => Ok(()),
                Ok(Err(error)) => Err((Refused::by_coordinator(error), format!("{error:?}"))),
                Err(GaveUp) => return self.gave_up(id),
                other => return self.fail(id, &format!("answered {other:?}")),
            }
        };
        let claim = match answer {
            Ok(()) => return self.end(id, Outcome::Acknowledged, vec![purged]),
            Err((Some(Refused::NotFound), _)) => Claim::NoDeath(death),
            Err((Some(Refused::NotOwned), _)) => Claim::NotOwned(death),
            Err((Some(Refused::NotEmpty), _)) => Claim::HadDead(target),
            Err((_, error)) => return self.fail(id, &format!("refused with {error}")),
        };
        self.end(id, Outcome::Refused, vec![claim]);
    }

    /// The dead map of a directory; that it is so is claimed.
    pub(super) async fn deaths(&self, directory: InodeId) -> Option<Vec<Death>> {
        let id = self.begin(format!("list dead {directory}"), Vec::new());
        let op = pb::List { directory: directory.0, limit: 1000, dead: true, ..pb::List::default() };
        let reply = match self.list_page(id, op).await? {
            Ok(reply) => reply,
            Err(ShardError::NotFound) => {
                self.end(id, Outcome::Acknowledged, vec![Claim::PurgedInode(directory)]);
                return None;
            }
            Err(_) => {
                self.fail(id, "refused");
                return None;
            }
        };
        let death = |entry: pb::Entry| Death {
            edge: Edge { directory, name: entry.name },
            target: InodeId(entry.target),
            created_at: Time(entry.created_at),
            died_at: Time(entry.died_at),
            owned: entry.owned,
        };
        let deaths: Vec<Death> = reply.entries.into_iter().map(death).collect();
        self.end(id, Outcome::Acknowledged, deaths.iter().cloned().map(Claim::Version).collect());
        Some(deaths)
    }
}
