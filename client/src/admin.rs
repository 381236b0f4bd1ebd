//! The cluster as a whole: who serves what, transactions, checks.

use std::collections::BTreeSet;

use bytes::Bytes;
use eggs_proto::pb::block_service_client::BlockServiceClient;
use eggs_proto::pb::{crossdir_reply, crossdir_request, registry_request, shard_reply, shard_request};
use eggs_proto::{InodeId, ShardId, pb};
use futures_util::{StreamExt, stream};

use crate::Client;
use crate::ask::status_words;
use crate::error::{ClientError, Result, block_error_words, shortened};
use crate::types::{FsckFinding, FsckProgress, FsckReport, ListOptions, ShardState};

const SHARDS_IN_FLIGHT: usize = 8;
const DIRECTORIES_IN_FLIGHT: usize = 16;
const CHECK_ROWS: u32 = 10_000;
const EDEN_PAGE: u32 = 1000;
/// Findings kept; a cluster with more has one problem, not many.
const FINDINGS_MAX: usize = 10_000;

impl Client {
    /// Who serves what, and how the disks feel, fresh from shuckle.
    pub async fn cluster_map(&self) -> Result<pb::ClusterMapReply> {
        let map = self.shared.fetch_map(self.shared.options.timeout).await?;
        self.shared.learn(&map);
        Ok(map)
    }

    /// Every shard asked itself, in order of shards; those that do not answer carry the error.
    pub async fn shard_states(&self) -> Result<Vec<ShardState>> {
        self.cluster_map().await?;
        let asks = stream::iter(ShardId::all()).map(|shard| async move {
            let op = shard_request::Op::Status(pb::ShardStatus {});
            let status = match self.shared.shard_read(shard, op).await {
                Ok(Ok(shard_reply::Result::Status(status))) => Ok(status),
                Ok(Ok(_)) => Err(ClientError::other_reply("status")),
                Ok(Err(error)) => Err(ClientError::from_shard(&error, format_args!("shard {shard}"))),
                Err(error) => Err(error),
            };
            ShardState { shard: shard.0.into(), status }
        });
        Ok(asks.buffered(SHARDS_IN_FLIGHT).collect().await)
    }

    /// Block services asked themselves, by address.
    pub async fn block_stats(&self) -> Result<Vec<(String, Result<Vec<pb::BlockServiceStats>>)>> {
        self.cluster_map().await?;
        let asks = stream::iter(self.shared.map().block_peers()).map(|peer| async move {
            let address = peer.address.to_string();
            let mut client = BlockServiceClient::new(peer.meta);
            let request = pb::BlockStatsRequest { header: Some(self.shared.header()) };
            let patience = self.shared.options.block_timeout;
            let unreachable = |words: String| ClientError::Unreachable {
                tried: format!("block services at {address}: {words}"),
                after: patience,
            };
            let stats = match tokio::time::timeout(patience, client.stats(request)).await {
                Err(_) => Err(unreachable("no answer".to_owned())),
                Ok(Err(status)) => Err(unreachable(status_words(&status))),
                Ok(Ok(reply)) => match reply.into_inner() {
                    pb::BlockStatsReply { error: Some(error), .. } => {
                        Err(unreachable(block_error_words(&error)))
                    }
                    reply => Ok(reply.block_services),
                },
            };
            (address, stats)
        });
        Ok(asks.buffered(SHARDS_IN_FLIGHT).collect().await)
    }

    /// Transactions the coordinator has in flight.
    pub async fn transactions(&self) -> Result<Vec<pb::TransactionInfo>> {
        let op = crossdir_request::Op::ListTransactions(pb::ListTransactions {});
        match self.shared.crossdir_read(op).await? {
            Ok(crossdir_reply::Result::ListTransactions(reply)) => Ok(reply.transactions),
            Ok(_) => Err(ClientError::other_reply("transactions")),
            Err(error) => Err(ClientError::from_crossdir(&error, "the coordinator")),
        }
    }

    /// Sets and clears flags (`eggs_proto::flags`) of block services.
    pub async fn set_flags(&self, services: &[u64], set: u32, clear: u32) -> Result<()> {
        let flags = pb::SetFlags { block_services: services.to_vec(), set, clear };
        self.shared.registry(registry_request::Op::SetFlags(flags), self.shared.options.timeout).await?;
        Ok(())
    }

    /// Files being written, of one shard.
    pub async fn eden_files(&self, shard: u8) -> Result<Vec<pb::EdenFile>> {
        let shard = ShardId(shard);
        let mut files: Vec<pb::EdenFile> = Vec::new();
        loop {
            let after_file = files.last().map_or(0, |file| file.file);
            let op = shard_request::Op::ListEden(pb::ListEden { after_file, limit: EDEN_PAGE });
            let page = match self.shared.shard_read(shard, op).await? {
                Ok(shard_reply::Result::ListEden(page)) => page,
                Ok(_) => return Err(ClientError::other_reply("files in writing")),
                Err(error) => return Err(ClientError::from_shard(&error, format_args!("shard {shard}"))),
            };
            let forward = page.files.last().is_some_and(|last| last.file > after_file);
            if page.more && !forward {
                return Err(ClientError::protocol(
                    "a page of files in writing does not follow the one before",
                ));
            }
            files.extend(page.files);
            if !page.more {
                return Ok(files);
            }
        }
    }

    /// Checks every shard's invariants, then walks the tree: each directory's parent against the edge
    /// that leads to it, and directories no edge leads to. Of a cluster at rest: what changes meanwhile
    /// may be reported.
    pub async fn fsck(&self, mut progress: impl FnMut(FsckProgress) + Send) -> Result<FsckReport> {
        let mut report = FsckReport::default();
        let mut living: u64 = 0;
        let mut checks = stream::iter(ShardId::all())
            .map(|shard| async move { (shard, self.check_shard(shard).await) })
            .buffer_unordered(SHARDS_IN_FLIGHT);
        while let Some((shard, checked)) = checks.next().await {
            let checked = checked?;
            report.shards_checked += 1;
            report.rows += checked.rows;
            report.directories += checked.directories;
            living += checked.directories.saturating_sub(checked.removed_directories);
            report.files += checked.files;
            for finding in checked.findings {
                let (invariant, message) = (shortened(&finding.invariant), shortened(&finding.message));
                report.add(invariant, format!("shard {shard}"), message);
            }
            progress(report.progress());
        }
        drop(checks);
        self.check_tree(&mut report, &mut progress).await?;
        report.orphans = living.saturating_sub(report.directories_reached);
        if report.orphans > 0 {
            let message = format!("{} directories have an owner, but no edge leads to them", report.orphans);
            report.add("tree".to_owned(), "/".to_owned(), message);
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
            sum.removed_directories = sum.removed_directories.saturating_add(page.removed_directories);
            sum.files = sum.files.saturating_add(page.files);
            if page.cursor.is_empty() {
                return Ok(sum);
            }
            if page.cursor <= sum.cursor {
                return Err(ClientError::protocol("a page of a check does not follow the one before"));
            }
            sum.cursor = page.cursor;
        }
    }

    async fn check_tree(
        &self,
        report: &mut FsckReport,
        progress: &mut (impl FnMut(FsckProgress) + Send),
    ) -> Result<()> {
        let mut reached = BTreeSet::from([InodeId::ROOT]);
        let mut level = vec![(InodeId::ROOT, "/".to_owned())];
        report.directories_reached = 1;
        while !level.is_empty() {
            let mut next = Vec::new();
            let mut lists = stream::iter(std::mem::take(&mut level))
                .map(|(directory, path)| async move {
                    let children = self.children(directory, &path).await;
                    (directory, path, children)
                })
                .buffer_unordered(DIRECTORIES_IN_FLIGHT);
            while let Some((directory, path, children)) = lists.next().await {
                let children = match children {
                    Ok(children) => children,
                    Err(error @ ClientError::Refused { .. }) => {
                        report.add("tree".to_owned(), path, format!("cannot be listed: {error}"));
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                report.entries += children.entries;
                for (child, name, parent) in children.directories {
                    let slash = if path.ends_with('/') { "" } else { "/" };
                    let child_path = format!("{path}{slash}{}", String::from_utf8_lossy(&name));
                    if parent != Some(directory) {
                        let says = parent
                            .map_or("it is gone".to_owned(), |parent| format!("its parent is {parent}"));
                        let message = format!("{child} is found in {directory}, but {says}");
                        report.add("tree".to_owned(), child_path.clone(), message);
                    }
                    if reached.insert(child) {
                        report.directories_reached += 1;
                        next.push((child, child_path));
                    } else {
                        report.add("tree".to_owned(), child_path, format!("{child} has two names"));
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
        let mut listing = crate::Listing::new(self, directory, ListOptions::default(), path.into());
        let mut children = Children::default();
        while let Some(page) = listing.next_page().await? {
            children.entries += page.len() as u64;
            let directories = page.into_iter().filter(|entry| entry.target.is_directory());
            let stats = stream::iter(directories).map(|entry| async move {
                match self.stat_inode(entry.target).await {
                    Ok(metadata) => Ok((entry.target, entry.name, metadata.parent)),
                    Err(error) if error.is_not_found() => Ok((entry.target, entry.name, None)),
                    Err(error) => Err(error),
                }
            });
            let mut stats = stats.buffered(DIRECTORIES_IN_FLIGHT);
            while let Some(child) = stats.next().await {
                children.directories.push(child?);
            }
        }
        Ok(children)
    }
}

#[derive(Default)]
struct Children {
    entries: u64,
    /// Inode, name, and the parent it says it has.
    directories: Vec<(InodeId, Bytes, Option<InodeId>)>,
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
