//! What a client does: random operations on names it shares with the others and on names of its own.
//!
//! Of its own names each client keeps a plain model (what the name leads to now, and since when), and
//! compares at once. What it cannot know at once it claims in the history, to be checked at the end.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use eggs_proto::{BlockId, BlockServiceId, InodeId, Retry, ServiceError, ShardError, Time, pb};

use super::calls::Calls;
use super::port::Port;
use crate::history::{Claim, Edge, Expect, History, Outcome};
use crate::kernel::MILLISECOND;

/// Names everybody uses.
pub(crate) const SHARED_NAMES: &[&str] = &["a", "b", "c", "d", "e"];
/// Names of its own a client uses in every directory.
pub(super) const OWN_NAMES: usize = 4;
/// Shared names remembered as used lately.
const RECENT_MAX: usize = 24;
/// In percent: changes that their client looks at right after.
const LOOKS_AGAIN: u32 = 35;
/// Directories known to all; beyond them no new one is made.
pub(super) const DIRECTORIES_MAX: usize = 24;
pub(super) const FILE_BYTES_MAX: usize = 100_000;
pub(super) const SMALL_BYTES_MAX: usize = 256;

/// Bits of a mode.
pub(crate) const MODE_BITS: u32 = 0o7777;

/// What all clients of a run share.
pub(crate) struct Common {
    pub seed: u64,
    pub shards: usize,
    pub history: RefCell<History>,
    /// Directories somebody has heard of, removed ones for a while too.
    pub directories: RefCell<Vec<InodeId>>,
    /// Shared names that were given lately, and to what.
    pub recent: RefCell<VecDeque<(Edge, InodeId)>>,
    /// Operations still to be begun by all together.
    pub left: RefCell<usize>,
    /// The janitor is to come to an end: what is left to do is done when all is quiet.
    pub janitor_rests: Cell<bool>,
    /// Files that somebody is moving blocks of: what others do to them meets it.
    pub moving: RefCell<Vec<InodeId>>,
    /// Blocks of spans that were not there, although their disks were.
    pub missing: RefCell<Vec<(InodeId, BlockServiceId, BlockId)>>,
    /// Spans it has repaired while faults went on.
    pub repaired: Cell<u64>,
}

/// What a name of one's own leads to since when. After a lost answer nothing is known of it any more: what
/// was asked for may still come about.
#[derive(Debug, Clone, Copy)]
enum Own {
    Known { target: Option<InodeId>, since: Time },
    Unknown,
}

#[derive(Clone)]
pub(super) struct Workload {
    pub(super) client: usize,
    /// Names of its own begin so: a new life has new ones.
    pub(super) prefix: String,
    pub(super) calls: Calls,
    pub(super) common: Rc<Common>,
    own: Rc<RefCell<BTreeMap<Edge, Own>>>,
    /// What it changed last.
    last: Rc<RefCell<Option<Edge>>>,
}

/// The task of one life of a client.
pub(crate) async fn run(client: usize, life: u64, port: Port, common: Rc<Common>) {
    let calls = Calls::new(port);
    calls.join(common.shards).await;
    let workload = Workload {
        client,
        prefix: format!("c{client}.{life}-"),
        calls,
        common,
        own: Rc::default(),
        last: Rc::default(),
    };
    loop {
        {
            let mut left = workload.common.left.borrow_mut();
            if *left == 0 {
                return;
            }
            *left -= 1;
        }
        workload.one().await;
        // Who has changed something looks at it.
        let last = workload.last.take();
        if let Some(edge) = last.filter(|_| workload.port().chance(LOOKS_AGAIN)) {
            workload.look_everywhere(&edge).await;
        }
        for complaint in workload.calls.complaints.take() {
            workload.common.history.borrow_mut().fail(complaint);
        }
        let pause = workload.port().below(30) as u64 * MILLISECOND;
        workload.port().sleep(pause).await;
    }
}

impl Workload {
    pub(super) fn port(&self) -> &Port {
        &self.calls.port
    }

    pub(super) async fn one(&self) {
        match self.port().below(121) {
            0..9 => self.mkdir().await,
            9..12 => self.mkdir_path().await,
            12..23 => self.rmdir().await,
            23..32 => self.put_small().await,
            32..43 => self.put_file().await,
            43..49 => self.unlink().await,
            49..55 => self.rename().await,
            55..65 => self.move_entry().await,
            65..70 => self.exchange().await,
            70..78 => self.read_file().await,
            78..83 => self.list().await,
            83..86 => drop(self.deaths(self.directory()).await),
            86..91 => self.look_at_the_past().await,
            91..94 => self.walk_path().await,
            94..97 => self.attributes_of().await,
            97..100 => self.batch().await,
            100..107 => self.undelete().await,
            107..111 => self.purge().await,
            111..116 => self.move_blocks().await,
            _ => self.restripe().await,
        }
    }

    // ---- choices ----

    pub(super) fn directory(&self) -> InodeId {
        let directories = self.common.directories.borrow();
        match directories.len() {
            0 => InodeId::ROOT,
            len => match self.port().below(len + 2) {
                0 => InodeId::ROOT,
                n => directories[n.min(len) - 1],
            },
        }
    }

    pub(super) fn name(&self) -> Bytes {
        if self.port().chance(55) {
            return Bytes::from_static(SHARED_NAMES[self.port().below(SHARED_NAMES.len())].as_bytes());
        }
        format!("{}{}", self.prefix, self.port().below(OWN_NAMES)).into()
    }

    pub(super) fn edge(&self) -> Edge {
        Edge { directory: self.directory(), name: self.name() }
    }

    /// An edge that may well lead to a directory.
    pub(super) fn used_directory(&self) -> Edge {
        let recent = self.common.recent.borrow();
        let directories: Vec<&Edge> =
            recent.iter().filter(|(_, target)| target.is_directory()).map(|(edge, _)| edge).collect();
        match directories.len() {
            0 => self.edge(),
            len => directories[self.port().below(len)].clone(),
        }
    }

    /// An edge that may well exist.
    pub(super) fn used_edge(&self) -> Edge {
        let own = self.own.borrow();
        if !own.is_empty() && self.port().chance(40) {
            let at = self.port().below(own.len());
            if let Some((edge, _)) = own.iter().nth(at) {
                return edge.clone();
            }
        }
        drop(own);
        let recent = self.common.recent.borrow();
        if !recent.is_empty() && self.port().chance(75) {
            let at = self.port().below(recent.len());
            return recent[at].0.clone();
        }
        drop(recent);
        self.edge()
    }

    pub(super) fn replace(&self) -> pb::Replace {
        if self.port().chance(50) { pb::Replace::File } else { pb::Replace::Refuse }
    }

    pub(super) fn is_own(&self, edge: &Edge) -> bool {
        edge.name.starts_with(self.prefix.as_bytes())
    }

    // ---- the record ----

    /// `claims`: what it may bring about, should its answer never come.
    pub(super) fn begin(&self, what: String, claims: Vec<Claim>) -> u32 {
        let (now, seen) = (self.port().now(), self.port().time());
        let mut history = self.common.history.borrow_mut();
        let id = history.begin(self.client, what, now, seen);
        if let Some(operation) = history.get_mut(id) {
            operation.claims = claims;
        }
        id
    }

    /// The answer is not waited for any longer: all that it may bring about may still come.
    pub(super) fn gave_up(&self, id: u32) {
        let claims = self.common.history.borrow().get(id).map(|operation| operation.claims.clone());
        self.end(id, Outcome::Unknown, claims.unwrap_or_default());
    }

    pub(super) fn end(&self, id: u32, outcome: Outcome, claims: Vec<Claim>) {
        let (now, heard) = (self.port().now(), self.port().time());
        for claim in &claims {
            self.compare(id, outcome, claim);
            if let (Outcome::Acknowledged, Claim::Born { edge, .. } | Claim::Died { edge, .. }) =
                (outcome, claim)
            {
                *self.last.borrow_mut() = Some(edge.clone());
            }
            if let (Outcome::Acknowledged, Claim::Born { edge, target: Some(target), .. }) = (outcome, claim)
                && SHARED_NAMES.iter().any(|name| edge.name == name.as_bytes())
            {
                let mut recent = self.common.recent.borrow_mut();
                recent.push_back((edge.clone(), *target));
                if recent.len() > RECENT_MAX {
                    recent.pop_front();
                }
            }
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

    pub(super) fn fail(&self, id: u32, what: &str) {
        let mut history = self.common.history.borrow_mut();
        let operation = history.get(id).map(|operation| operation.what.clone()).unwrap_or_default();
        history.fail(format!("operation {id} ({operation}): {what}"));
    }

    /// Own names are changed by nobody else: what is claimed of them must fit the model here and now.
    pub(super) fn compare(&self, id: u32, outcome: Outcome, claim: &Claim) {
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
    pub(super) fn end_refused(&self, id: u32, edge: &Edge, error: ShardError, at: Time) {
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
}
