//! Operations of one shard: files put, unlinked, renamed.

use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as WriteAnswer;
use eggs_proto::{InodeId, ShardError, Time, pb};

use super::calls::{GaveUp, refusal};
use super::files::{FileError, NewFile, one as one_of};
use super::workload::{FILE_BYTES_MAX, SMALL_BYTES_MAX, Workload};
use crate::history::{Claim, Edge, Expect, Outcome, contents};

impl Workload {
    pub(super) fn set_size(&self, id: u32, size: usize) {
        if let Some(operation) = self.common.history.borrow_mut().get_mut(id) {
            operation.size = size as u32;
        }
    }

    pub(super) fn attributes(id: u32) -> pb::NewAttributes {
        pb::NewAttributes { mode: 0o644, uid: id, gid: 0, mtime: None }
    }

    pub(super) fn small(&self, id: u32, edge: &Edge, replace: pb::Replace) -> Op {
        let size = self.port().below(SMALL_BYTES_MAX + 1);
        self.set_size(id, size);
        Op::PutSmall(pb::PutSmall {
            directory: edge.directory.0,
            name: edge.name.clone(),
            bytes: contents(self.common.seed, id, size as u32).into(),
            symlink: false,
            attributes: Some(Self::attributes(id)),
            replace: replace.into(),
        })
    }

    pub(super) fn born_unknown(edge: &Edge) -> Vec<Claim> {
        vec![Claim::Born { edge: edge.clone(), target: None, at: None }]
    }

    pub(super) fn linked(&self, id: u32, edge: &Edge, link: &pb::LinkReply, time: u64) {
        let target = InodeId(link.inode);
        if link.created_at != time {
            self.fail(id, "its reply has two instants");
        }
        let at = Some(Time(time));
        let mut claims = vec![Claim::Born { edge: edge.clone(), target: Some(target), at }];
        if link.replaced != 0 {
            let replaced = Some(InodeId(link.replaced));
            claims.insert(0, Claim::Died { edge: edge.clone(), target: replaced, at, owned: true });
        }
        self.end(id, Outcome::Acknowledged, claims);
    }

    pub(super) async fn put_small(&self) {
        let (edge, replace) = (self.edge(), self.replace());
        let id = self.begin(format!("put small {edge:?} {replace:?}"), Self::born_unknown(&edge));
        let op = self.small(id, &edge, replace);
        let until = self.calls.patience();
        let Ok(results) = self.calls.write(edge.directory.shard(), vec![op], until).await else {
            return self.gave_up(id);
        };
        self.end_put(id, &edge, results.into_iter().next().unwrap_or_default());
    }

    pub(super) fn end_put(&self, id: u32, edge: &Edge, result: pb::WriteResult) {
        match (refusal(&result), result.result) {
            (Some(error), _) => self.end_refused(id, edge, error, Time(result.time)),
            (None, Some(WriteAnswer::Link(link))) => self.linked(id, edge, &link, result.time),
            (None, other) => self.fail(id, &format!("answered {other:?}")),
        }
    }

    pub(super) async fn put_file(&self) {
        let (edge, replace) = (self.edge(), self.replace());
        let size = 1 + match self.port().below(3) {
            0 => self.port().below(6000),
            _ => self.port().below(FILE_BYTES_MAX),
        };
        let abandon_after = self.port().chance(10).then(|| 1 + self.port().below(3));
        let id = self.begin(format!("put {edge:?} {replace:?} {size} bytes"), Self::born_unknown(&edge));
        self.set_size(id, size);
        let bytes = contents(self.common.seed, id, size as u32);
        let file = NewFile {
            directory: edge.directory,
            name: edge.name.clone(),
            replace,
            attributes: Self::attributes(id),
            contents: &bytes,
            abandon_after,
        };
        match self.calls.write_file(&file, self.calls.patience()).await {
            Ok(Some((link, time))) => self.linked(id, &edge, &link, time),
            Ok(None) => self.end(id, Outcome::Refused, Vec::new()),
            Err(FileError::GaveUp) => self.gave_up(id),
            Err(FileError::Refused(error, time)) => self.end_refused(id, &edge, error, Time(time)),
            // Too many disks are away; the file stays unpublished.
            Err(FileError::Blocks(_)) => self.end(id, Outcome::Refused, Vec::new()),
            Err(FileError::Wrong(what)) => self.fail(id, &what),
        }
    }

    /// Several operations of one shard in one request.
    pub(super) async fn batch(&self) {
        let directory = self.directory();
        let until = self.calls.patience();
        let mut ids = Vec::new();
        let mut ops = Vec::new();
        for _ in 0..2 + self.port().below(4) {
            let edge = Edge { directory, name: self.name() };
            let replace = self.replace();
            let what = format!("put small {edge:?} {replace:?} in a batch");
            let id = self.begin(what, Self::born_unknown(&edge));
            ops.push(self.small(id, &edge, replace));
            ids.push((id, edge));
        }
        match self.calls.write(directory.shard(), ops, until).await {
            Ok(results) if results.len() == ids.len() => {
                for ((id, edge), result) in ids.iter().zip(results) {
                    self.end_put(*id, edge, result);
                }
            }
            Ok(_) => self.fail(ids[0].0, "a batch has another number of answers"),
            Err(GaveUp) => {
                for (id, _) in &ids {
                    self.gave_up(*id);
                }
            }
        }
    }

    pub(super) async fn unlink(&self) {
        let edge = self.used_edge();
        let expected = match self.port().chance(50) {
            true => self.find(&edge).await.filter(|target| !target.is_directory()),
            false => None,
        };
        let died = |at| Claim::Died { edge: edge.clone(), target: expected, at, owned: true };
        let id = self.begin(format!("unlink {edge:?} expecting {expected:?}"), vec![died(None)]);
        let op = Op::Unlink(pb::Unlink {
            directory: edge.directory.0,
            name: edge.name.clone(),
            expected: expected.map_or(0, |expected| expected.0),
        });
        let until = self.calls.patience();
        let Ok(result) = self.calls.write(edge.directory.shard(), vec![op], until).await.map(one_of) else {
            return self.gave_up(id);
        };
        let Ok(result) = result else { return self.fail(id, "not one answer") };
        let at = Some(Time(result.time));
        let saw = |expect| Claim::Saw { edge: edge.clone(), expect, at };
        match (refusal(&result), result.result) {
            (None, Some(WriteAnswer::Done(_))) => self.end(id, Outcome::Acknowledged, vec![died(at)]),
            (Some(ShardError::NotFound), _) => {
                let gone = Claim::Gone(edge.directory);
                self.end(id, Outcome::Refused, vec![Claim::AnyOf(vec![saw(Expect::Absent), gone])]);
            }
            (Some(ShardError::Changed), _) => {
                let expect = expected.map_or(Expect::Absent, Expect::IsNot);
                self.end(id, Outcome::Refused, vec![saw(expect)]);
            }
            (Some(error), _) => self.end_refused(id, &edge, error, Time(result.time)),
            (None, other) => self.fail(id, &format!("answered {other:?}")),
        }
    }

    pub(super) async fn rename(&self) {
        let old = self.used_edge();
        let new = Edge { directory: old.directory, name: self.name() };
        if old == new {
            return;
        }
        let replace = self.replace();
        let died = Claim::Died { edge: old.clone(), target: None, at: None, owned: false };
        let born = Claim::Born { edge: new.clone(), target: None, at: None };
        let id = self.begin(format!("rename {old:?} to {new:?} {replace:?}"), vec![died, born]);
        let op = Op::Rename(pb::Rename {
            directory: old.directory.0,
            old_name: old.name.clone(),
            new_name: new.name.clone(),
            replace: replace.into(),
        });
        let until = self.calls.patience();
        let Ok(result) = self.calls.write(old.directory.shard(), vec![op], until).await.map(one_of) else {
            return self.gave_up(id);
        };
        let Ok(result) = result else { return self.fail(id, "not one answer") };
        let at = Some(Time(result.time));
        match (refusal(&result), result.result) {
            (None, Some(WriteAnswer::Link(link))) => {
                let target = Some(InodeId(link.inode));
                let mut claims = vec![Claim::Died { edge: old, target, at, owned: false }];
                if link.replaced != 0 {
                    let replaced = Some(InodeId(link.replaced));
                    claims.push(Claim::Died { edge: new.clone(), target: replaced, at, owned: true });
                }
                claims.push(Claim::Born { edge: new, target, at });
                self.end(id, Outcome::Acknowledged, claims);
            }
            (Some(ShardError::NotFound), _) => {
                let absent = Claim::Saw { edge: old.clone(), expect: Expect::Absent, at };
                let claim = Claim::AnyOf(vec![absent, Claim::Gone(old.directory)]);
                self.end(id, Outcome::Refused, vec![claim]);
            }
            (Some(ShardError::NotDirectory), _) => {
                let claim = Claim::Saw { edge: new, expect: Expect::File, at };
                self.end(id, Outcome::Refused, vec![claim]);
            }
            (Some(error), _) => self.end_refused(id, &new, error, Time(result.time)),
            (None, other) => self.fail(id, &format!("answered {other:?}")),
        }
    }

    /// Of two names of one directory.
    pub(super) async fn exchange_within(&self, one: (Edge, InodeId), other: (Edge, InodeId)) {
        let directory = one.0.directory;
        // What they lead to by then.
        let what = format!("exchange {:?} and {:?}", one.0, other.0);
        let unknown = |edge: &Edge| {
            let died = Claim::Died { edge: edge.clone(), target: None, at: None, owned: false };
            [died, Claim::Born { edge: edge.clone(), target: None, at: None }]
        };
        let claims = unknown(&one.0).into_iter().chain(unknown(&other.0)).collect();
        let id = self.begin(what, claims);
        let op = Op::Exchange(pb::Exchange {
            directory: directory.0,
            name: one.0.name.clone(),
            other_name: other.0.name.clone(),
        });
        let until = self.calls.patience();
        let Ok(result) = self.calls.write(directory.shard(), vec![op], until).await.map(one_of) else {
            return self.gave_up(id);
        };
        let Ok(result) = result else { return self.fail(id, "not one answer") };
        let at = Some(Time(result.time));
        let absent = |edge: &Edge| Claim::Saw { edge: edge.clone(), expect: Expect::Absent, at };
        match (refusal(&result), result.result) {
            (None, Some(WriteAnswer::Link(link))) => {
                let now = (InodeId(link.replaced), InodeId(link.inode));
                let claims = Self::exchanged(&(one.0, now.0), &(other.0, now.1), at);
                self.end(id, Outcome::Acknowledged, claims);
            }
            (Some(ShardError::NotFound), _) => {
                let claims = vec![absent(&one.0), absent(&other.0), Claim::Gone(directory)];
                self.end(id, Outcome::Refused, vec![Claim::AnyOf(claims)]);
            }
            (Some(error), _) => self.end_refused(id, &one.0, error, Time(result.time)),
            (None, other) => self.fail(id, &format!("answered {other:?}")),
        }
    }
}
