//! What changes nothing, and attributes: walks, lists, reads, now and in the past.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, ServiceError, ShardError, Time, pb};
use rand::Rng;

use super::calls::{GaveUp, refusal};
use super::files::{FileError, one};
use super::workload::{MODE_BITS, OWN_NAMES, SHARED_NAMES, Workload};
use crate::history::{Claim, Edge, Expect, Outcome, contents};
use crate::kernel::MILLISECOND;

impl Workload {
    /// Walks one name; what it found is a claim of its own.
    pub(super) async fn walk(
        &self,
        edge: &Edge,
        at: Option<Time>,
        attributes: bool,
    ) -> Option<pb::WalkReply> {
        let id = self.begin(format!("walk {edge:?} at {at:?}"), Vec::new());
        let walk = pb::Walk {
            start: edge.directory.0,
            components: vec![edge.name.clone()],
            at: at.map_or(0, |at| at.0),
            want_attributes: attributes,
            ..pb::Walk::default()
        };
        let until = self.calls.patience();
        let Ok(answer) = self.calls.walk(walk, until).await else {
            self.gave_up(id);
            return None;
        };
        let Ok(ShardAnswer::Walk(reply)) = answer else {
            self.fail(id, &format!("answered {answer:?}"));
            return None;
        };
        self.end_walk(id, edge, at, reply)
    }

    /// Takes in what a walk of one name found.
    fn end_walk(
        &self,
        id: u32,
        edge: &Edge,
        at: Option<Time>,
        reply: pb::WalkReply,
    ) -> Option<pb::WalkReply> {
        let saw = |expect| Claim::Saw { edge: edge.clone(), expect, at };
        let stopped = reply.stopped.as_ref().and_then(|error| ShardError::from_code(error.code));
        let claim = match stopped {
            None => saw(Expect::Is(InodeId(reply.inode))),
            Some(ShardError::NotFound) => match at {
                // The past of a removed directory can still be looked at.
                Some(_) => saw(Expect::Absent),
                None => Claim::AnyOf(vec![saw(Expect::Absent), Claim::Gone(edge.directory)]),
            },
            Some(error) => {
                self.fail(id, &format!("stopped by {error:?}"));
                return None;
            }
        };
        self.end(id, Outcome::Acknowledged, vec![claim]);
        (stopped.is_none()).then_some(reply)
    }

    /// Looks at one name at every replica of its shard: who does not lead must not say what it thinks.
    pub(super) async fn look_everywhere(&self, edge: &Edge) {
        let shard = edge.directory.shard();
        for node in self.calls.replicas_of(shard) {
            let id = self.begin(format!("walk {edge:?} at {node}"), Vec::new());
            let walk = pb::shard_request::Op::Walk(pb::Walk {
                start: edge.directory.0,
                components: vec![edge.name.clone()],
                ..pb::Walk::default()
            });
            match self.calls.shard_at(node, shard, walk).await {
                // What it says depends on the coordinator.
                Some(ShardAnswer::Walk(reply)) if reply.locked_by != 0 => {
                    self.end(id, Outcome::Refused, Vec::new());
                }
                Some(ShardAnswer::Walk(reply)) => {
                    self.end_walk(id, edge, None, reply);
                }
                Some(other) => self.fail(id, &format!("answered {other:?}")),
                // It does not lead, or is not there.
                None => self.end(id, Outcome::Refused, Vec::new()),
            }
        }
    }

    pub(super) async fn find(&self, edge: &Edge) -> Option<InodeId> {
        self.walk(edge, None, false).await.map(|reply| InodeId(reply.inode))
    }

    pub(super) async fn read_file(&self) {
        let edge = self.used_edge();
        let Some(reply) = self.walk(&edge, None, true).await else { return };
        let inode = InodeId(reply.inode);
        if !inode.is_file() {
            return;
        }
        let id = self.begin(format!("read {edge:?} {inode}"), Vec::new());
        let until = self.calls.patience();
        let attributes = match reply.attributes {
            Some(attributes) => attributes,
            // Moved here from a shard of another host.
            None => {
                let stat = pb::shard_request::Op::Stat(pb::Stat { inode: inode.0 });
                match self.calls.shard(inode.shard(), stat, None, until).await {
                    Ok(Ok(ShardAnswer::Stat(pb::StatReply { attributes: Some(attributes) }))) => attributes,
                    Err(GaveUp) => return self.gave_up(id),
                    Ok(Err(ShardError::NotFound)) => return self.purged(id, inode),
                    other => return self.fail(id, &format!("stat answered {other:?}")),
                }
            }
        };
        match self.calls.read_file(inode, attributes.size, until).await {
            Ok(bytes) => {
                let history = self.common.history.borrow();
                let size = history.get(attributes.uid).map(|writer| writer.size);
                let right =
                    size.is_some_and(|size| contents(self.common.seed, attributes.uid, size) == bytes);
                drop(history);
                if !right {
                    return self.fail(id, "the bytes are not the ones written");
                }
                self.end(id, Outcome::Acknowledged, Vec::new());
            }
            Err(FileError::GaveUp | FileError::Blocks(_)) => self.gave_up(id),
            Err(FileError::Refused(ShardError::NotFound, _)) => self.purged(id, inode),
            Err(FileError::Refused(error, _)) => self.fail(id, &format!("refused with {error:?}")),
            Err(FileError::Wrong(what)) => self.fail(id, &what),
        }
    }

    /// The inode was not there any more.
    fn purged(&self, id: u32, inode: InodeId) {
        self.end(id, Outcome::Acknowledged, vec![Claim::PurgedInode(inode)]);
    }

    pub(super) async fn list_page(&self, id: u32, op: pb::List) -> Option<Result<pb::ListReply, ShardError>> {
        let (shard, directory, at) = (InodeId(op.directory).shard(), op.directory, op.at);
        let until = self.calls.patience();
        match self.calls.shard(shard, pb::shard_request::Op::List(op), None, until).await {
            Ok(Ok(ShardAnswer::List(mut reply))) => {
                let mut entries = Vec::new();
                for entry in reply.entries {
                    match self.calls.settled(entry, directory, at, until).await {
                        Ok(entry) => entries.extend(entry),
                        Err(GaveUp) => {
                            self.gave_up(id);
                            return None;
                        }
                    }
                }
                reply.entries = entries;
                Some(Ok(reply))
            }
            Ok(Err(error)) => Some(Err(error)),
            Ok(Ok(_)) => {
                self.fail(id, "another reply to List");
                None
            }
            Err(GaveUp) => {
                self.gave_up(id);
                None
            }
        }
    }

    pub(super) async fn list(&self) {
        let directory = self.directory();
        let at = self.port().chance(30).then(|| self.past());
        let id = self.begin(format!("list {directory} at {at:?}"), Vec::new());
        let op = pb::List {
            directory: directory.0,
            limit: 1000,
            at: at.map_or(0, |at| at.0),
            ..pb::List::default()
        };
        let Some(answer) = self.list_page(id, op).await else { return };
        let reply = match answer {
            Ok(reply) => reply,
            Err(ShardError::NotFound) if at.is_none() => {
                return self.end(id, Outcome::Acknowledged, vec![Claim::Gone(directory)]);
            }
            // It was made after that instant, and the replica has not come so far.
            Err(ShardError::NotFound) => pb::ListReply::default(),
            Err(error) => return self.fail(id, &format!("refused with {error:?}")),
        };
        let mut names: BTreeMap<Bytes, Expect> = SHARED_NAMES
            .iter()
            .map(|name| Bytes::from_static(name.as_bytes()))
            .chain((0..OWN_NAMES).map(|n| Bytes::from(format!("{}{n}", self.prefix))))
            .map(|name| (name, Expect::Absent))
            .collect();
        for entry in &reply.entries {
            let target = InodeId(entry.target);
            names.insert(entry.name.clone(), Expect::Is(target));
            if target.is_directory() && at.is_none() {
                self.heard_of(target);
            }
        }
        let claim = |(name, expect)| Claim::Saw { edge: Edge { directory, name }, expect, at };
        self.end(id, Outcome::Acknowledged, names.into_iter().map(claim).collect());
    }

    /// An instant that has been: mostly a recent one.
    pub(super) fn past(&self) -> Time {
        let now = self.port().time();
        let back = match self.port().chance(50) {
            true => self.port().random(|rng| rng.random_range(1..MILLISECOND)),
            false => self.port().random(|rng| rng.random_range(1..2_000 * MILLISECOND)),
        };
        Time(now.0.saturating_sub(back))
    }

    pub(super) async fn look_at_the_past(&self) {
        let edge = self.used_edge();
        self.walk(&edge, Some(self.past()), false).await;
    }

    /// Several components, over as many hosts as it takes; the last edge is what is claimed.
    pub(super) async fn walk_path(&self) {
        let start = if self.port().chance(70) { InodeId::ROOT } else { self.directory() };
        let path: Vec<Bytes> = (0..1 + self.port().below(4)).map(|_| self.name()).collect();
        let at = self.port().chance(30).then(|| self.past());
        let id = self.begin(format!("walk {start} {path:?} at {at:?}"), Vec::new());
        let until = self.calls.patience();
        let (mut here, mut rest) = (start, &path[..]);
        let claim = loop {
            let walk = pb::Walk {
                start: here.0,
                components: rest.to_vec(),
                at: at.map_or(0, |at| at.0),
                ..pb::Walk::default()
            };
            let reply = match self.calls.walk(walk, until).await {
                Ok(Ok(ShardAnswer::Walk(reply))) if reply.consumed as usize <= rest.len() => reply,
                Err(GaveUp) => return self.gave_up(id),
                other => return self.fail(id, &format!("answered {other:?}")),
            };
            let (walked, left) = rest.split_at(reply.consumed as usize);
            let reached = InodeId(reply.inode);
            match (&reply.stopped, left.first()) {
                (Some(error), Some(name)) if error.code == ShardError::NotFound.code() => {
                    let edge = Edge { directory: reached, name: name.clone() };
                    let absent = Claim::Saw { edge, expect: Expect::Absent, at };
                    break if at.is_some() {
                        absent
                    } else {
                        Claim::AnyOf(vec![absent, Claim::Gone(reached)])
                    };
                }
                (Some(error), Some(_)) if error.code == ShardError::NotDirectory.code() => {
                    if reached.is_directory() {
                        return self.fail(id, "a directory is said to be none");
                    }
                    break Claim::AnyOf(vec![]);
                }
                (None, _) => {}
                other => return self.fail(id, &format!("stopped by {other:?}")),
            }
            if let (None, Some(name)) = (left.first(), walked.last()) {
                let edge = Edge { directory: InodeId(reply.directory), name: name.clone() };
                break Claim::Saw { edge, expect: Expect::Is(reached), at };
            }
            if walked.is_empty() {
                return self.fail(id, "a walk does not get on");
            }
            (here, rest) = (reached, left);
        };
        let claims =
            if matches!(&claim, Claim::AnyOf(all) if all.is_empty()) { Vec::new() } else { vec![claim] };
        self.end(id, Outcome::Acknowledged, claims);
    }

    // ---- attributes ----

    /// Sets the mode to the operation's number, or looks what it is.
    pub(super) async fn attributes_of(&self) {
        let edge = self.used_edge();
        let Some(inode) = self.find(&edge).await else { return };
        let until = self.calls.patience();
        if self.port().chance(50) {
            let id = self.begin(format!("set mode of {inode}"), vec![Claim::Set { inode }]);
            let mode = Some(id & MODE_BITS);
            let op = pb::SetAttributes { inode: inode.0, mode, ..pb::SetAttributes::default() };
            let written = self.calls.write(inode.shard(), vec![Op::SetAttributes(op)], until).await;
            let Ok(Ok(result)) = written.map(one) else { return self.gave_up(id) };
            return match refusal(&result) {
                None => self.end(id, Outcome::Acknowledged, vec![Claim::Set { inode }]),
                Some(ShardError::NotFound) => {
                    let claims = vec![Claim::Gone(inode), Claim::PurgedInode(inode)];
                    self.end(id, Outcome::Refused, vec![Claim::AnyOf(claims)]);
                }
                Some(error) => self.fail(id, &format!("refused with {error:?}")),
            };
        }
        let id = self.begin(format!("stat {inode}"), Vec::new());
        let stat = pb::shard_request::Op::Stat(pb::Stat { inode: inode.0 });
        match self.calls.shard(inode.shard(), stat, None, until).await {
            Ok(Ok(ShardAnswer::Stat(pb::StatReply { attributes: Some(attributes) }))) => {
                let claim = Claim::Mode { inode, mode: attributes.mode };
                self.end(id, Outcome::Acknowledged, vec![claim]);
            }
            Err(GaveUp) => self.gave_up(id),
            Ok(Err(ShardError::NotFound)) => self.purged(id, inode),
            other => self.fail(id, &format!("answered {other:?}")),
        }
    }
}
