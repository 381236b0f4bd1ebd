//! fsck: every invariant the cluster can check of itself, while it serves.
//!
//! The shards check their rows, each on one view of its state. Then the tree is walked from the root and held against what
//! the shards have: directories no name leads to, or two, or whose owner is not where they are; locks of transactions that
//! are over. A tree that changes while it is walked looks wrong in places; so what is suspected is looked at again
//! until it is right, or has been wrong for longer than any operation leaves it so.
//!
//! Wrong at each look is not enough: two directories that are exchanged all the time are between their parents at many
//! looks. A suspicion stays only if it was wrong from the first look to the last without a break, and the past says so:
//! names must be the ones of the first look, which an instant of creation tells from others at the same place, and a
//! directory has no name only if its owner had none for it at any instant since fsck began.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use eggs_proto::pb::{shard_reply, shard_request};
use eggs_proto::{InodeId, ShardId, Time, TransactionId, pb};
use futures_util::{StreamExt, stream};

use crate::Client;
use crate::error::{ClientError, Result, shortened};
use crate::moves::Moves;
use crate::path::Path;
use crate::types::{Entry, FsckFinding, FsckProgress, FsckReport, ListOptions};
use crate::walk::{Start, Want};

const SHARDS_IN_FLIGHT: usize = 8;
const DIRECTORIES_IN_FLIGHT: usize = 16;
const CHECK_ROWS: u32 = 10_000;
/// Findings kept; a cluster with more has one problem, not many.
const FINDINGS_MAX: usize = 10_000;
/// The pauses between looks at a suspicion, in milliseconds; it has to hold each time. A step of a transaction is
/// repeated after 5 seconds without an answer: together they are longer than any operation takes while all shards are led.
const PAUSES_MS: [u64; 6] = [0, 300, 700, 2000, 4000, 6000];

/// A name of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Edge {
    directory: InodeId,
    name: Bytes,
    created_at: Time,
    path: String,
}

/// Where each directory was found: its parent, its name there, and since when that leads to it.
type Reached = BTreeMap<InodeId, (InodeId, Box<[u8]>, Time)>;

/// Whether a directory's owner has a name for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    /// One that leads to it since then.
    Since(Time),
    /// One that died since fsck began: it is being moved, or removed.
    Before,
    Never,
}

/// The way from a directory up into a loop: each owner, and since when its name leads to the one below.
type Chain = Vec<(InodeId, Time)>;

/// What looks wrong.
#[derive(Debug)]
enum Suspicion {
    Orphan(InodeId),
    Loop(InodeId, Chain),
    TwoNames(InodeId, Edge, Edge),
    WrongOwner(InodeId, Edge),
    NotListed(InodeId, Edge, String),
    StuckLock(ShardId, pb::HeldLock),
}

/// What the shards said of themselves, and the tree as it was walked.
#[derive(Default)]
struct Survey {
    living: BTreeSet<InodeId>,
    locks: Vec<(ShardId, pb::HeldLock)>,
    reached: Reached,
    suspicions: Vec<Suspicion>,
}

impl Client {
    /// Checks every shard's invariants, then walks the tree: each directory's parent against the edge that leads to it,
    /// directories no edge leads to, locks of nobody. The cluster may be in use.
    pub async fn fsck(&self, mut progress: impl FnMut(FsckProgress) + Send) -> Result<FsckReport> {
        let began = self.now();
        let mut report = FsckReport::default();
        let mut survey = Survey::default();
        let mut checks = stream::iter(ShardId::all())
            .map(|shard| async move { (shard, self.check_shard(shard).await) })
            .buffer_unordered(SHARDS_IN_FLIGHT);
        while let Some((shard, checked)) = checks.next().await {
            let checked = checked?;
            report.shards_checked += 1;
            report.rows += checked.rows;
            report.directories += checked.directories;
            report.files += checked.files;
            survey.living.extend(checked.living_directories.into_iter().map(InodeId));
            survey.locks.extend(checked.locks.into_iter().map(|lock| (shard, lock)));
            for finding in checked.findings {
                let (invariant, message) = (shortened(&finding.invariant), shortened(&finding.message));
                report.add(invariant, format!("shard {shard}"), message);
            }
            progress(report.progress());
        }
        drop(checks);
        self.walk_tree(&mut report, &mut survey, &mut progress).await?;
        let Survey { living, locks, reached, mut suspicions } = survey;
        suspicions.extend(living.into_iter().filter(|id| !reached.contains_key(id)).map(Suspicion::Orphan));
        suspicions.extend(locks.into_iter().map(|(shard, lock)| Suspicion::StuckLock(shard, lock)));
        let (stays, left_out) = self.what_stays(suspicions, began).await?;
        if left_out > 0 {
            let message = format!("{left_out} more look wrong, and were not looked at again");
            report.add("too many".to_owned(), "/".to_owned(), message);
        }
        for suspicion in stays {
            report.orphans += u64::from(matches!(suspicion, Suspicion::Orphan(_) | Suspicion::Loop(..)));
            let (invariant, place, message) = self.words(&suspicion).await;
            report.add(invariant.to_owned(), place, message);
        }
        Ok(report)
    }

    async fn check_shard(&self, shard: ShardId) -> Result<pb::CheckReply> {
        let mut sum = pb::CheckReply::default();
        loop {
            let check = pb::Check { cursor: sum.cursor.clone(), limit_rows: CHECK_ROWS };
            let page = match self.shared.shard_read(shard, shard_request::Op::Check(check)).await? {
                Ok(shard_reply::Result::Check(page)) => page,
                Ok(_) => return Err(ClientError::other_reply("check")),
                Err(error) => return Err(ClientError::from_shard(&error, format_args!("shard {shard}"))),
            };
            let keep = FINDINGS_MAX.saturating_sub(sum.findings.len());
            sum.findings.extend(page.findings.into_iter().take(keep));
            sum.rows = sum.rows.saturating_add(page.rows);
            sum.directories = sum.directories.saturating_add(page.directories);
            sum.files = sum.files.saturating_add(page.files);
            sum.living_directories.extend(page.living_directories);
            sum.locks.extend(page.locks);
            if page.cursor.is_empty() {
                return Ok(sum);
            }
            if page.cursor <= sum.cursor {
                return Err(ClientError::protocol("a page of a check does not follow the one before"));
            }
            sum.cursor = page.cursor;
        }
    }

    // ---- the tree ----

    async fn walk_tree(
        &self,
        report: &mut FsckReport,
        survey: &mut Survey,
        progress: &mut (impl FnMut(FsckProgress) + Send),
    ) -> Result<()> {
        let (directory, created_at) = (InodeId::ROOT, Time::ZERO);
        let root = Edge { directory, name: Bytes::new(), created_at, path: "/".to_owned() };
        survey.reached.insert(directory, (directory, Box::default(), created_at));
        let mut level = vec![(InodeId::ROOT, root)];
        report.directories_reached = 1;
        while !level.is_empty() {
            let mut next = Vec::new();
            let mut lists = stream::iter(std::mem::take(&mut level))
                .map(|(directory, edge)| async move {
                    let children = self.children(directory, &edge.path).await;
                    (directory, edge, children)
                })
                .buffer_unordered(DIRECTORIES_IN_FLIGHT);
            while let Some((directory, edge, children)) = lists.next().await {
                let children = match children {
                    Ok(children) => children,
                    Err(error) if is_of_one(&error) => {
                        survey.suspicions.push(Suspicion::NotListed(directory, edge, error.to_string()));
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                report.entries += children.entries;
                for Child { inode: child, name, created_at, owner } in children.directories {
                    let slash = if edge.path.ends_with('/') { "" } else { "/" };
                    let path = format!("{}{slash}{}", edge.path, String::from_utf8_lossy(&name));
                    let here = Edge { directory, name, created_at, path };
                    if owner != Some(directory) {
                        survey.suspicions.push(Suspicion::WrongOwner(child, here.clone()));
                    }
                    if let Some(other) = edge_of(&survey.reached, child) {
                        survey.suspicions.push(Suspicion::TwoNames(child, other, here));
                    } else {
                        survey.reached.insert(child, (directory, here.name[..].into(), created_at));
                        report.directories_reached += 1;
                        next.push((child, here));
                    }
                }
                progress(report.progress());
            }
            drop(lists);
            level = next;
        }
        Ok(())
    }

    async fn children(&self, directory: InodeId, path: &str) -> Result<Children> {
        // Whoever holds a lock may be gone: nobody is waited for.
        let listing = crate::Listing::new(self, directory, ListOptions::default(), path.into());
        let mut listing = listing.with_what_is_locked();
        let mut children = Children::default();
        while let Some(page) = listing.next_page().await? {
            children.entries += page.len() as u64;
            let directories = page.into_iter().filter(|entry| entry.target.is_directory());
            let stats = stream::iter(directories).map(|entry| async move {
                let owner = self.owner(entry.target).await?;
                let Entry { target: inode, name, created_at, .. } = entry;
                Ok::<_, ClientError>(Child { inode, name, created_at, owner })
            });
            let mut stats = stats.buffered(DIRECTORIES_IN_FLIGHT);
            while let Some(child) = stats.next().await {
                children.directories.push(child?);
            }
        }
        Ok(children)
    }

    /// `None`: it is gone.
    async fn owner(&self, directory: InodeId) -> Result<Option<InodeId>> {
        match self.stat_inode(directory).await {
            Ok(metadata) => Ok(metadata.parent.filter(|parent| !parent.is_null())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a name leads to the directory, and has all the time. One that stays locked is taken to lead where it did.
    async fn leads_to(&self, edge: &Edge, child: InodeId) -> Result<bool> {
        let path = Path { names: vec![edge.name.clone()] };
        match self.walk(&Start::at(edge.directory), path, Want::default(), &edge.path).await {
            Ok(walked) => Ok(walked.inode == child && walked.created_at == edge.created_at),
            Err(ClientError::Protocol(_)) => Ok(true),
            Err(ClientError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    // ---- certainty ----

    /// Those that hold each time they are looked at, and how many were looked at only once.
    async fn what_stays(
        &self,
        mut suspicions: Vec<Suspicion>,
        began: Time,
    ) -> Result<(Vec<Suspicion>, usize)> {
        let mut left_out = 0;
        for pause in PAUSES_MS {
            if suspicions.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let looks = stream::iter(suspicions)
                .map(|suspicion| async move { self.look_again(suspicion, began).await });
            let looked: Vec<_> = looks.buffered(DIRECTORIES_IN_FLIGHT).collect().await;
            suspicions = looked.into_iter().filter_map(Result::transpose).collect::<Result<_>>()?;
            left_out += suspicions.len().saturating_sub(FINDINGS_MAX);
            suspicions.truncate(FINDINGS_MAX);
        }
        Ok((suspicions, left_out))
    }

    /// What it is by now; `None`: it is right, or another one than it was.
    async fn look_again(&self, suspicion: Suspicion, began: Time) -> Result<Option<Suspicion>> {
        let (Suspicion::Orphan(id) | Suspicion::Loop(id, _)) = suspicion else {
            return Ok(self.holds(&suspicion).await?.then_some(suspicion));
        };
        let now = self.lead_to(id, began).await?;
        Ok(now.filter(|now| match (&suspicion, now) {
            // All names of the loop were there at one instant if each is there at two looks.
            (Suspicion::Loop(_, before), Suspicion::Loop(_, now)) => before == now,
            _ => true,
        }))
    }

    /// Climbs from a directory that was not reached: the root, nowhere, or round.
    async fn lead_to(&self, id: InodeId, began: Time) -> Result<Option<Suspicion>> {
        let (mut at, mut seen, mut chain) = (id, BTreeSet::new(), Chain::new());
        while at != InodeId::ROOT {
            if !seen.insert(at) {
                return Ok(Some(Suspicion::Loop(id, chain)));
            }
            // Removed by now; what is below a removed one is said of that itself.
            let Some(owner) = self.owner(at).await? else { return Ok(None) };
            match self.named(at, owner, began).await {
                Ok(Named::Since(created_at)) => chain.push((owner, created_at)),
                Ok(Named::Before) => return Ok(None),
                // Of a lost tree only its top is said.
                Ok(Named::Never) => return Ok((at == id).then_some(Suspicion::Orphan(id))),
                // It may be named there: that the owner cannot be listed is said of the owner.
                Err(error) if is_of_one(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
            at = owner;
        }
        Ok(None)
    }

    /// Whether a name in `owner` leads to the directory, or did since fsck began.
    ///
    /// A directory has its new owner after its new name, and an exchange takes its old one at the instant of that: for as
    /// long as that takes, what it is owned by has no name for it any more.
    async fn named(&self, id: InodeId, owner: InodeId, began: Time) -> Result<Named> {
        let living = ListOptions::default();
        let dead = ListOptions { dead: true, since: began, ..ListOptions::default() };
        for options in [living, dead] {
            let listing = crate::Listing::new(self, owner, options, owner.to_string().into());
            let mut listing = listing.with_what_is_locked();
            loop {
                let page = match listing.next_page().await {
                    Ok(Some(page)) => page,
                    Ok(None) => break,
                    // Removed: who it died under is still known.
                    Err(error) if error.is_not_found() => break,
                    Err(error) => return Err(error),
                };
                if let Some(entry) = page.into_iter().find(|entry| entry.target == id) {
                    return Ok(entry.died_at.map_or(Named::Since(entry.created_at), |_| Named::Before));
                }
            }
        }
        Ok(Named::Never)
    }

    async fn holds(&self, suspicion: &Suspicion) -> Result<bool> {
        match suspicion {
            Suspicion::Orphan(_) | Suspicion::Loop(..) => Ok(true),
            Suspicion::TwoNames(id, one, other) => {
                Ok(self.leads_to(one, *id).await? && self.leads_to(other, *id).await?)
            }
            Suspicion::WrongOwner(id, edge) => {
                Ok(self.owner(*id).await? != Some(edge.directory) && self.leads_to(edge, *id).await?)
            }
            Suspicion::NotListed(id, edge, _) => {
                if *id != InodeId::ROOT && !self.leads_to(edge, *id).await? {
                    return Ok(false);
                }
                match self.children(*id, &edge.path).await {
                    Ok(_) => Ok(false),
                    Err(error) if is_of_one(&error) => Ok(true),
                    Err(error) => Err(error),
                }
            }
            Suspicion::StuckLock(shard, lock) => {
                let reply = self.resolve_move(TransactionId(lock.transaction)).await?;
                Ok(reply.outcome() == pb::MoveOutcome::MoveOver && self.is_locked(*shard, lock).await?)
            }
        }
    }

    async fn is_locked(&self, shard: ShardId, lock: &pb::HeldLock) -> Result<bool> {
        if lock.name.is_empty() || lock.died_at != 0 {
            // Of a directory, or a dead name, only its shard's check tells.
            return Ok(self.check_shard(shard).await?.locks.contains(lock));
        }
        let (directory, nothing) = (InodeId(lock.directory), Moves::new(self, Time::ZERO));
        let names = std::slice::from_ref(&lock.name);
        let walked = self.walk_once(directory, names, Want::default(), &nothing).await?;
        Ok(walked.is_ok_and(|reply| reply.locked_by == lock.transaction))
    }

    /// Invariant, place and message.
    async fn words(&self, suspicion: &Suspicion) -> (&'static str, String, String) {
        match suspicion {
            Suspicion::Orphan(id) => {
                let owner = self.owner(*id).await.ok().flatten().unwrap_or(InodeId::NULL);
                let message = format!("directory {id} is owned by {owner}, but no name leads to it");
                ("orphan", format!("shard {}", id.shard()), message)
            }
            Suspicion::Loop(id, _) => {
                let owner = self.owner(*id).await.ok().flatten().unwrap_or(InodeId::NULL);
                let message =
                    format!("directory {id} is below {owner}, and that leads back to it, not to the root");
                ("loop", format!("shard {}", id.shard()), message)
            }
            Suspicion::TwoNames(id, one, other) => {
                ("two names", other.path.clone(), format!("directory {id} is {} as well", one.path))
            }
            Suspicion::WrongOwner(id, edge) => {
                let owner = self.owner(*id).await.ok().flatten();
                let says = owner.map_or("it is gone".to_owned(), |owner| format!("its owner is {owner}"));
                let message = format!("directory {id} is found in {}, but {says}", edge.directory);
                ("wrong owner", edge.path.clone(), message)
            }
            Suspicion::NotListed(_, edge, why) => {
                ("not listed", edge.path.clone(), format!("cannot be listed: {}", shortened(why)))
            }
            Suspicion::StuckLock(shard, lock) => {
                let what = match lock.name.is_empty() {
                    true => format!("directory {}", InodeId(lock.directory)),
                    false => format!("'{}' in {}", lock.name.escape_ascii(), InodeId(lock.directory)),
                };
                let by = TransactionId(lock.transaction);
                let message = format!("{what} is locked by transaction {by}, which is over");
                ("stuck lock", format!("shard {shard}"), message)
            }
        }
    }
}

/// Where a directory was found.
fn edge_of(reached: &Reached, id: InodeId) -> Option<Edge> {
    let (directory, name, created_at) = reached.get(&id)?;
    let (mut names, mut at) = (Vec::new(), id);
    while let Some((parent, name, _)) = reached.get(&at).filter(|_| at != InodeId::ROOT) {
        names.push(String::from_utf8_lossy(name));
        at = *parent;
    }
    let path = names.iter().rev().fold(String::new(), |path, name| format!("{path}/{name}"));
    Some(Edge { directory: *directory, name: Bytes::copy_from_slice(name), created_at: *created_at, path })
}

/// The cluster answers, but not about this one.
fn is_of_one(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { .. } | ClientError::Protocol(_))
}

#[derive(Default)]
struct Children {
    entries: u64,
    directories: Vec<Child>,
}

/// A directory as it was found in another: its name, and the owner it has.
struct Child {
    inode: InodeId,
    name: Bytes,
    created_at: Time,
    owner: Option<InodeId>,
}

impl FsckReport {
    fn add(&mut self, invariant: String, place: String, message: String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(FsckFinding { invariant, place, message });
        }
    }

    fn progress(&self) -> FsckProgress {
        FsckProgress {
            shards_checked: self.shards_checked,
            rows: self.rows,
            directories_reached: self.directories_reached,
            findings: self.findings.len(),
        }
    }
}
