//! What a client does: random operations on names it shares with the others and on names of its own.
//!
//! Of its own names each client keeps a plain model (what the name leads to now, and since when), and
//! compares at once. What it cannot know at once it claims in the history, to be checked at the end.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use eggs_proto::pb::crossdir_reply::Result as CrossdirAnswer;
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as WriteAnswer;
use eggs_proto::{CrossdirError, InodeId, Retry, ServiceError, ShardError, Time, pb};
use rand::Rng;

use super::calls::{Calls, GaveUp, refusal};
use super::files::{FileError, NewFile, one};
use super::port::Port;
use crate::history::{Claim, Edge, Expect, History, Outcome, contents};
use crate::kernel::MILLISECOND;

/// Names everybody uses.
pub(crate) const SHARED_NAMES: &[&str] = &["a", "b", "c", "d", "e"];
/// Names of its own a client uses in every directory.
const OWN_NAMES: usize = 4;
/// Directories known to all; beyond them no new one is made.
const DIRECTORIES_MAX: usize = 24;
const FILE_BYTES_MAX: usize = 100_000;
const SMALL_BYTES_MAX: usize = 256;

/// Bits of a mode.
pub(crate) const MODE_BITS: u32 = 0o7777;

/// What all clients of a run share.
pub(crate) struct Common {
    pub seed: u64,
    pub shards: usize,
    pub history: RefCell<History>,
    /// Directories somebody has heard of, removed ones for a while too.
    pub directories: RefCell<Vec<InodeId>>,
    /// Operations still to be begun by all together.
    pub left: RefCell<usize>,
}

/// What a name of one's own leads to since when. After a lost answer nothing is known of it any more: what
/// was asked for may still come about.
#[derive(Debug, Clone, Copy)]
enum Own {
    Known { target: Option<InodeId>, since: Time },
    Unknown,
}

#[derive(Clone)]
struct Workload {
    client: usize,
    /// Names of its own begin so: a new life has new ones.
    prefix: String,
    calls: Calls,
    common: Rc<Common>,
    own: Rc<RefCell<BTreeMap<Edge, Own>>>,
}

/// The task of one life of a client.
pub(crate) async fn run(client: usize, life: u64, port: Port, common: Rc<Common>) {
    let calls = Calls::new(port);
    calls.join(common.shards).await;
    let workload =
        Workload { client, prefix: format!("c{client}.{life}-"), calls, common, own: Rc::default() };
    loop {
        {
            let mut left = workload.common.left.borrow_mut();
            if *left == 0 {
                return;
            }
            *left -= 1;
        }
        workload.one().await;
        let pause = workload.port().below(30) as u64 * MILLISECOND;
        workload.port().sleep(pause).await;
    }
}

impl Workload {
    fn port(&self) -> &Port {
        &self.calls.port
    }

    async fn one(&self) {
        match self.port().below(100) {
            0..13 => self.mkdir().await,
            13..21 => self.rmdir().await,
            21..34 => self.put_small().await,
            34..47 => self.put_file().await,
            47..54 => self.unlink().await,
            54..61 => self.rename().await,
            61..70 => self.move_entry().await,
            70..78 => self.read_file().await,
            78..83 => self.list().await,
            83..86 => self.list_dead().await,
            86..91 => self.look_at_the_past().await,
            91..94 => self.walk_path().await,
            94..97 => self.attributes_of().await,
            _ => self.batch().await,
        }
    }

    // ---- choices ----

    fn directory(&self) -> InodeId {
        let directories = self.common.directories.borrow();
        match directories.len() {
            0 => InodeId::ROOT,
            len => match self.port().below(len + 2) {
                0 => InodeId::ROOT,
                n => directories[n.min(len) - 1],
            },
        }
    }

    fn name(&self) -> Bytes {
        if self.port().chance(55) {
            return Bytes::from_static(SHARED_NAMES[self.port().below(SHARED_NAMES.len())].as_bytes());
        }
        format!("{}{}", self.prefix, self.port().below(OWN_NAMES)).into()
    }

    fn edge(&self) -> Edge {
        Edge { directory: self.directory(), name: self.name() }
    }

    /// An edge that may well exist.
    fn used_edge(&self) -> Edge {
        let own = self.own.borrow();
        if !own.is_empty() && self.port().chance(40) {
            let at = self.port().below(own.len());
            if let Some((edge, _)) = own.iter().nth(at) {
                return edge.clone();
            }
        }
        drop(own);
        self.edge()
    }

    fn replace(&self) -> pb::Replace {
        if self.port().chance(50) { pb::Replace::File } else { pb::Replace::Refuse }
    }

    fn is_own(&self, edge: &Edge) -> bool {
        edge.name.starts_with(self.prefix.as_bytes())
    }

    // ---- the record ----

    /// `claims`: what it may bring about, should its answer never come.
    fn begin(&self, what: String, claims: Vec<Claim>) -> u32 {
        let (now, seen) = (self.port().now(), self.port().time());
        let mut history = self.common.history.borrow_mut();
        let id = history.begin(self.client, what, now, seen);
        if let Some(operation) = history.get_mut(id) {
            operation.claims = claims;
        }
        id
    }

    /// The answer is not waited for any longer: all that it may bring about may still come.
    fn gave_up(&self, id: u32) {
        let claims = self.common.history.borrow().get(id).map(|operation| operation.claims.clone());
        self.end(id, Outcome::Unknown, claims.unwrap_or_default());
    }

    fn end(&self, id: u32, outcome: Outcome, claims: Vec<Claim>) {
        let (now, heard) = (self.port().now(), self.port().time());
        for claim in &claims {
            self.compare(id, outcome, claim);
        }
        let mut history = self.common.history.borrow_mut();
        if let Some(operation) = history.get_mut(id) {
            operation.claims = claims;
            operation.outcome = outcome;
            if outcome != Outcome::Unknown {
                operation.returned = Some(now);
                operation.heard = heard;
            }
        }
    }

    fn fail(&self, id: u32, what: &str) {
        let mut history = self.common.history.borrow_mut();
        let operation = history.get(id).map(|operation| operation.what.clone()).unwrap_or_default();
        history.fail(format!("operation {id} ({operation}): {what}"));
    }

    /// Own names are changed by nobody else: what is claimed of them must fit the model here and now.
    fn compare(&self, id: u32, outcome: Outcome, claim: &Claim) {
        let now = self.port().time();
        let mut own = self.own.borrow_mut();
        let (edge, after, at) = match claim {
            Claim::Born { edge, target, at } if self.is_own(edge) => (edge, *target, at),
            Claim::Died { edge, at, .. } if self.is_own(edge) => (edge, None, at),
            Claim::Saw { edge, expect, at } if self.is_own(edge) => {
                let Some(Own::Known { target, since }) = own.get(edge) else { return };
                if at.is_none_or(|at| at >= *since) && !expect.holds(*target) {
                    let model = target.map_or("nothing".to_owned(), |target| target.to_string());
                    drop(own);
                    self.fail(id, &format!("saw {expect:?} at {edge:?}, where {model} should be"));
                }
                return;
            }
            _ => return,
        };
        let known = outcome == Outcome::Acknowledged && !matches!(own.get(edge), Some(Own::Unknown));
        let since = at.unwrap_or(now);
        let new = if known { Own::Known { target: after, since } } else { Own::Unknown };
        own.insert(edge.clone(), new);
    }

    /// The result of a shard's write as claims, for what has no reply of its own kind.
    fn end_refused(&self, id: u32, edge: &Edge, error: ShardError, at: Time) {
        let saw = |expect| vec![Claim::Saw { edge: edge.clone(), expect, at: Some(at) }];
        let claims = match error {
            ShardError::Exists => saw(Expect::Present),
            ShardError::IsDirectory => saw(Expect::Directory),
            ShardError::NotFound => vec![Claim::Gone(edge.directory)],
            // Answered "later" until the patience was over: it did not happen.
            error if error.retry() != Retry::Never => Vec::new(),
            error => return self.fail(id, &format!("refused with {error:?}")),
        };
        self.end(id, Outcome::Refused, claims);
    }

    // ---- files ----

    fn set_size(&self, id: u32, size: usize) {
        if let Some(operation) = self.common.history.borrow_mut().get_mut(id) {
            operation.size = size as u32;
        }
    }

    fn attributes(id: u32) -> pb::NewAttributes {
        pb::NewAttributes { mode: 0o644, uid: id, gid: 0, mtime: None }
    }

    fn small(&self, id: u32, edge: &Edge, replace: pb::Replace) -> Op {
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

    fn born_unknown(edge: &Edge) -> Vec<Claim> {
        vec![Claim::Born { edge: edge.clone(), target: None, at: None }]
    }

    fn linked(&self, id: u32, edge: &Edge, link: &pb::LinkReply, time: u64) {
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

    async fn put_small(&self) {
        let (edge, replace) = (self.edge(), self.replace());
        let id = self.begin(format!("put small {edge:?} {replace:?}"), Self::born_unknown(&edge));
        let op = self.small(id, &edge, replace);
        let until = self.calls.patience();
        let Ok(results) = self.calls.write(edge.directory.shard(), vec![op], until).await else {
            return self.gave_up(id);
        };
        self.end_put(id, &edge, results.into_iter().next().unwrap_or_default());
    }

    fn end_put(&self, id: u32, edge: &Edge, result: pb::WriteResult) {
        match (refusal(&result), result.result) {
            (Some(error), _) => self.end_refused(id, edge, error, Time(result.time)),
            (None, Some(WriteAnswer::Link(link))) => self.linked(id, edge, &link, result.time),
            (None, other) => self.fail(id, &format!("answered {other:?}")),
        }
    }

    async fn put_file(&self) {
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
    async fn batch(&self) {
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

    async fn unlink(&self) {
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
        let Ok(result) = self.calls.write(edge.directory.shard(), vec![op], until).await.map(one) else {
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

    async fn rename(&self) {
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
        let Ok(result) = self.calls.write(old.directory.shard(), vec![op], until).await.map(one) else {
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

    // ---- operations of the coordinator ----

    fn heard_of(&self, directory: InodeId) {
        let mut directories = self.common.directories.borrow_mut();
        if !directories.contains(&directory) && directory != InodeId::ROOT {
            directories.push(directory);
        }
    }

    async fn mkdir(&self) {
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

    async fn rmdir(&self) {
        let edge = self.used_edge();
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

    async fn move_entry(&self) {
        let (old, new) = (self.used_edge(), self.edge());
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

    // ---- looking ----

    /// Walks one name; what it found is a claim of its own.
    async fn walk(&self, edge: &Edge, at: Option<Time>, attributes: bool) -> Option<pb::WalkReply> {
        let id = self.begin(format!("walk {edge:?} at {at:?}"), Vec::new());
        let walk = pb::shard_request::Op::Walk(pb::Walk {
            start: edge.directory.0,
            components: vec![edge.name.clone()],
            at: at.map_or(0, |at| at.0),
            want_attributes: attributes,
            want_spans: false,
        });
        let until = self.calls.patience();
        let Ok(answer) = self.calls.shard(edge.directory.shard(), walk, None, until).await else {
            self.gave_up(id);
            return None;
        };
        let Ok(ShardAnswer::Walk(reply)) = answer else {
            self.fail(id, &format!("answered {answer:?}"));
            return None;
        };
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

    async fn find(&self, edge: &Edge) -> Option<InodeId> {
        self.walk(edge, None, false).await.map(|reply| InodeId(reply.inode))
    }

    async fn read_file(&self) {
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
            Err(FileError::Refused(error, _)) => self.fail(id, &format!("refused with {error:?}")),
            Err(FileError::Wrong(what)) => self.fail(id, &what),
        }
    }

    async fn list_page(&self, id: u32, op: pb::List) -> Option<Result<pb::ListReply, ShardError>> {
        let shard = InodeId(op.directory).shard();
        let until = self.calls.patience();
        match self.calls.shard(shard, pb::shard_request::Op::List(op), None, until).await {
            Ok(Ok(ShardAnswer::List(reply))) => Some(Ok(reply)),
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

    async fn list(&self) {
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

    async fn list_dead(&self) {
        let directory = self.directory();
        let id = self.begin(format!("list dead {directory}"), Vec::new());
        let op = pb::List { directory: directory.0, limit: 1000, dead: true, ..pb::List::default() };
        let Some(answer) = self.list_page(id, op).await else { return };
        let Ok(reply) = answer else { return self.fail(id, "refused") };
        let claim = |entry: pb::Entry| Claim::Version {
            edge: Edge { directory, name: entry.name },
            target: InodeId(entry.target),
            created_at: Time(entry.created_at),
            died_at: Time(entry.died_at),
            owned: entry.owned,
        };
        self.end(id, Outcome::Acknowledged, reply.entries.into_iter().map(claim).collect());
    }

    /// An instant that has been: mostly a recent one.
    fn past(&self) -> Time {
        let now = self.port().time();
        let back = match self.port().chance(50) {
            true => self.port().random(|rng| rng.random_range(1..MILLISECOND)),
            false => self.port().random(|rng| rng.random_range(1..2_000 * MILLISECOND)),
        };
        Time(now.0.saturating_sub(back))
    }

    async fn look_at_the_past(&self) {
        let edge = self.used_edge();
        self.walk(&edge, Some(self.past()), false).await;
    }

    /// Several components, over as many hosts as it takes; the last edge is what is claimed.
    async fn walk_path(&self) {
        let start = if self.port().chance(70) { InodeId::ROOT } else { self.directory() };
        let path: Vec<Bytes> = (0..1 + self.port().below(4)).map(|_| self.name()).collect();
        let at = self.port().chance(30).then(|| self.past());
        let id = self.begin(format!("walk {start} {path:?} at {at:?}"), Vec::new());
        let until = self.calls.patience();
        let (mut here, mut rest) = (start, &path[..]);
        let claim = loop {
            let walk = pb::shard_request::Op::Walk(pb::Walk {
                start: here.0,
                components: rest.to_vec(),
                at: at.map_or(0, |at| at.0),
                ..pb::Walk::default()
            });
            let reply = match self.calls.shard(here.shard(), walk, None, until).await {
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
    async fn attributes_of(&self) {
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
                Some(ShardError::NotFound) => self.end(id, Outcome::Refused, vec![Claim::Gone(inode)]),
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
            other => self.fail(id, &format!("answered {other:?}")),
        }
    }
}
