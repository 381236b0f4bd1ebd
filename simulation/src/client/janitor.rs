//! The janitor: what is to be done `janitor/core` decides, here it is done, over the simulated network.
//!
//! A round: disks that are away for long are given up; every span of every file is looked at, now and then all its blocks
//! too; what needs repair is repaired, the most urgent first; what nobody needs is erased.
//!
//! It notes when a block that is the span's is not there although its disk is: nobody may erase what lives, or take for
//! written what is not, so faults must have damaged it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use eggs_janitor_core::lost::{Limits, Watch};
use eggs_janitor_core::{Need, Presence, Queue, SpanKey};
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{BlockError, BlockId, BlockServiceId, InodeId, ServiceError, ShardId, flags, pb};

use super::calls::{Calls, GaveUp};
use super::files::FileError;
use super::port::Port;
use super::workload::Common;
use crate::kernel::{MILLISECOND, NodeId, Rpc, SECOND};
use crate::nodes::{decode, encode, request_header};

/// A disk is given up when it was away for so long: longer than a host is down by itself.
const GIVE_UP_AFTER: Duration = Duration::from_secs(12);
/// Spans one round repairs: so that the next look at the disks is not far.
const REPAIRS_MAX: usize = 12;
/// A call of a block service that is not answered by then is not waited for.
const BLOCKS_TIMEOUT: u64 = 2 * SECOND;
/// A shard that does not answer by then is left for the next round.
const PATIENCE: u64 = 10 * SECOND;

/// Every so many rounds look at all blocks.
const SCRUB_EVERY: u64 = 5;

type Place = (BlockServiceId, BlockId);

pub(crate) struct Janitor {
    calls: Calls,
    common: Rc<Common>,
    watch: Watch,
    /// Blocks that were found not to be right; true: not to be there.
    bad: BTreeMap<Place, bool>,
    rounds: u64,
    /// Every round looks at all blocks, …
    thorough: bool,
    /// … and disks that are away are gone.
    give_up_after: Duration,
}

/// What a round has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Spans that needed something, and how many of those were beyond help.
    pub needy: usize,
    pub lost: usize,
    /// Blocks to be erased.
    pub garbage: usize,
    /// Shards that did not answer, and blocks that were to be looked at and nobody looked at.
    pub silent: usize,
}

/// The task of one life of the janitor.
pub(crate) async fn run(port: Port, common: Rc<Common>) {
    let mut janitor = Janitor::new(port, common).await;
    while !janitor.common.janitor_rests.get() {
        janitor.round().await;
        let pause = janitor.calls.port.below(2000) as u64 * MILLISECOND;
        janitor.calls.port.sleep(300 * MILLISECOND + pause).await;
    }
}

/// Works until nothing is left to do; `Err`: what is left after so many rounds.
pub(crate) async fn finish(port: Port, common: Rc<Common>, rounds: usize) -> Result<(), Found> {
    let mut janitor = Janitor::new(port, common).await;
    janitor.thorough = true;
    janitor.give_up_after = Duration::from_secs(3);
    let mut last = Found::default();
    for _ in 0..rounds {
        last = janitor.round().await;
        // Of a disk that is away nothing was looked at; it is given up soon.
        let away = {
            let places = janitor.calls.places.borrow();
            places.disks.iter().any(|(_, disk)| disk.presence() == Presence::Away)
        };
        if last == Found::default() && !away {
            return Ok(());
        }
        janitor.calls.port.sleep(SECOND).await;
    }
    Err(last)
}

impl Janitor {
    async fn new(port: Port, common: Rc<Common>) -> Janitor {
        let calls = Calls::new(port).with_secret();
        calls.join(common.shards).await;
        Janitor {
            calls,
            common,
            watch: Watch::default(),
            bad: BTreeMap::new(),
            rounds: 0,
            thorough: false,
            give_up_after: GIVE_UP_AFTER,
        }
    }

    fn until(&self) -> u64 {
        self.calls.port.now() + PATIENCE
    }

    async fn round(&mut self) -> Found {
        let mut found = Found::default();
        self.calls.refresh().await;
        self.give_up().await;
        self.rounds += 1;
        let mut queue = Queue::default();
        let mut living = BTreeSet::new();
        for shard in (0..self.common.shards).map(|shard| ShardId(shard as u8)) {
            match self.look_at(shard, &mut queue, &mut living).await {
                Ok(silent) => found.silent += silent,
                Err(FileError::Wrong(what)) => self.common.history.borrow_mut().fail(what),
                Err(_) => found.silent += 1,
            }
        }
        self.bad.retain(|place, _| living.contains(place));
        found.needy = queue.len();
        for _ in 0..REPAIRS_MAX {
            let Some((span, urgency)) = queue.pop() else { break };
            found.lost += usize::from(urgency.redundancy < 0);
            if let Err(FileError::Wrong(what)) = self.repair(span).await {
                self.common.history.borrow_mut().fail(what);
            }
        }
        for shard in (0..self.common.shards).map(|shard| ShardId(shard as u8)) {
            match self.sweep(shard).await {
                Ok(garbage) => found.garbage += garbage,
                Err(GaveUp) => found.silent += 1,
            }
        }
        found
    }

    async fn give_up(&mut self) {
        // Its rounds take long: the places it looks at are fresh each time.
        let apart = Duration::MAX;
        let limits = Limits { after: Some(self.give_up_after), disks: u32::MAX, share_percent: 100, apart };
        let now = self.calls.port.time();
        let verdict = self.watch.look(&self.calls.places.borrow().disks, 0, &limits, now);
        if !verdict.give_up.is_empty() {
            let disks = verdict.give_up.iter().map(|disk| disk.0).collect();
            self.calls.set_flags(disks, flags::DECOMMISSIONED).await;
            self.calls.refresh().await;
        }
    }

    /// Every span of a shard: what needs repair goes to the queue. How many blocks were to be looked at and were not: a
    /// registry whose leader is new believes that a disk is there which it has not heard of yet, and the disk knows better.
    async fn look_at(
        &mut self,
        shard: ShardId,
        queue: &mut Queue,
        living: &mut BTreeSet<Place>,
    ) -> Result<usize, FileError> {
        let (mut after, mut silent) = (0, 0);
        loop {
            let page = self.calls.files_after(shard, after, 50, self.until()).await?;
            let Some(last) = page.files.last() else { return Ok(silent) };
            after = last.file;
            let ids: Vec<u64> = page.files.iter().map(|file| file.file).collect();
            let opened = self.open_all(shard, ids).await?;
            if self.thorough || self.rounds.is_multiple_of(SCRUB_EVERY) {
                let (right, unseen) = self.check(&opened).await;
                silent += unseen;
                let scrubbed = pb::RecordScrub { files: right };
                if !scrubbed.files.is_empty() {
                    self.calls.write(shard, vec![Op::RecordScrub(scrubbed)], self.until()).await?;
                }
            }
            let bad: BTreeSet<Place> = self.bad.keys().copied().collect();
            let places = self.calls.places.borrow();
            for (file, span) in
                opened.iter().flat_map(|(file, spans)| spans.iter().map(move |span| (*file, span)))
            {
                living.extend(blocks_of(span).map(place));
                let need = Need::of(span, &places.disks, &bad);
                if need.any() {
                    let key = SpanKey { file: InodeId(file), offset: span.offset };
                    queue.offer(key, need.urgency(false));
                }
            }
            if !page.more {
                return Ok(silent);
            }
        }
    }

    /// All spans of files; those that were purged meanwhile are left out.
    async fn open_all(
        &self,
        shard: ShardId,
        mut files: Vec<u64>,
    ) -> Result<Vec<(u64, Vec<pb::Span>)>, FileError> {
        let mut all = Vec::new();
        while !files.is_empty() {
            let op = Read::OpenMany(pb::OpenMany { inodes: files.clone() });
            let opened = match self.calls.shard(shard, op, None, self.until()).await? {
                Ok(ShardAnswer::OpenMany(reply)) => reply.inodes,
                other => return Err(FileError::Wrong(format!("OpenMany answered {other:?}"))),
            };
            if opened.is_empty() {
                return Err(FileError::Wrong("OpenMany answered nothing".to_owned()));
            }
            for (file, opened) in files.drain(..opened.len()).zip(opened) {
                if opened.error.is_none() && !opened.all_spans {
                    return Err(FileError::Wrong(format!("{file:#x} has more spans than were sent")));
                }
                all.push((file, opened.spans));
            }
        }
        Ok(all)
    }

    /// Has every block looked at where it is; the files all of whose blocks are right, and how many blocks nobody can say
    /// anything of.
    async fn check(&mut self, opened: &[(u64, Vec<pb::Span>)]) -> (Vec<u64>, usize) {
        let mut by_host: BTreeMap<NodeId, Vec<pb::ExpectedBlock>> = BTreeMap::new();
        let mut unseen: BTreeSet<Place> = BTreeSet::new();
        for span in opened.iter().flat_map(|(_, spans)| spans) {
            let Some(blocks) = &span.blocks else { continue };
            for block in &blocks.blocks {
                let expected = pb::ExpectedBlock {
                    block_service: block.block_service,
                    block: block.block,
                    size: blocks.stripes * blocks.cell_size,
                    crc: block.crc,
                };
                unseen.insert(place(block));
                if let Some(host) = self.host_of(block.block_service) {
                    by_host.entry(host).or_default().push(expected);
                }
            }
        }
        for (host, blocks) in by_host {
            let header = Some(request_header(&self.calls.port.cluster, self.calls.port.time(), true));
            let request = pb::CheckBlocksRequest { header, blocks: blocks.clone() };
            let parts = vec![encode(&request)];
            let reply = self.calls.port.call(host, Rpc::CheckBlocks, parts, BLOCKS_TIMEOUT).await;
            let Some(reply) = reply.and_then(|parts| decode::<pb::CheckBlocksReply>(&parts)) else {
                continue;
            };
            for (block, checked) in blocks.iter().zip(reply.results) {
                let place = (BlockServiceId(block.block_service), BlockId(block.block));
                match checked.error.and_then(|error| BlockError::from_code(error.code)) {
                    None => {
                        unseen.remove(&place);
                        self.bad.remove(&place);
                    }
                    Some(BlockError::UnknownBlock) => {
                        self.bad.insert(place, true);
                    }
                    Some(BlockError::Corrupt) => {
                        self.bad.insert(place, false);
                    }
                    Some(_) => {}
                }
            }
        }
        let is_right =
            |spans: &[pb::Span]| !spans.iter().flat_map(blocks_of).any(|b| unseen.contains(&place(b)));
        let right = opened.iter().filter(|(_, spans)| is_right(spans)).map(|(file, _)| *file).collect();
        (right, unseen.iter().filter(|place| !self.bad.contains_key(place)).count())
    }

    fn host_of(&self, service: u64) -> Option<NodeId> {
        self.calls.places.borrow().services.get(&BlockServiceId(service)).map(|(host, _)| *host)
    }

    /// Looks at the span again, and replaces what it must not keep.
    async fn repair(&mut self, key: SpanKey) -> Result<(), FileError> {
        let SpanKey { file, offset } = key;
        let op = Read::GetSpans(pb::GetSpans { file: file.0, offset, limit: 1 });
        let Ok(ShardAnswer::GetSpans(reply)) = self.calls.shard(file.shard(), op, None, self.until()).await?
        else {
            return Ok(());
        };
        let Some(span) = reply.spans.into_iter().find(|span| span.offset == offset) else { return Ok(()) };
        let bad: BTreeSet<Place> = self.bad.keys().copied().collect();
        let need = Need::of(&span, &self.calls.places.borrow().disks, &bad);
        if !need.any() || need.lost() {
            return Ok(());
        }
        let indexes: Vec<u32> = need.replace().collect();
        let missing: Vec<Place> = blocks_of(&span)
            .map(place)
            .filter(|place| self.bad.get(place).is_some_and(|missing| *missing))
            .collect();
        let common = Rc::clone(&self.common);
        let placed = move || {
            // They were looked for after the shard had named them, and the shard names them still.
            let missing = missing.into_iter().map(|(service, block)| (file, service, block));
            common.missing.borrow_mut().extend(missing);
        };
        let until = self.until();
        self.calls.replace_blocks(file, &span, &indexes, until, placed, None).await?;
        if !self.common.janitor_rests.get() {
            self.common.repaired.set(self.common.repaired.get() + 1);
        }
        Ok(())
    }

    /// Erases what nobody needs; how much there was.
    async fn sweep(&self, shard: ShardId) -> Result<usize, GaveUp> {
        let (mut after_file, mut count) = (0, 0);
        loop {
            let op = Read::ListGarbage(pb::ListGarbage { after_file, limit: 100 });
            let Ok(ShardAnswer::ListGarbage(page)) = self.calls.shard(shard, op, None, self.until()).await?
            else {
                return Ok(count);
            };
            let Some(last) = page.blocks.last() else { return Ok(count) };
            after_file = last.file;
            count += page.blocks.len();
            let erased = self.erase(page.blocks).await;
            if !erased.is_empty() {
                let op = Op::ForgetGarbage(pb::ForgetGarbage { blocks: erased });
                self.calls.write(shard, vec![op], self.until()).await?;
            }
            if !page.more {
                return Ok(count);
            }
        }
    }

    async fn erase(&self, garbage: Vec<pb::GarbageBlock>) -> Vec<pb::ErasedBlock> {
        let mut erased = Vec::new();
        let is_known = |block: &pb::GarbageBlock| {
            self.calls.places.borrow().disks.knows(BlockServiceId(block.block_service))
        };
        // A disk that is not known may be gone, or new.
        if !garbage.iter().all(is_known) && !self.calls.refresh().await {
            return erased;
        }
        let mut by_host: BTreeMap<NodeId, Vec<pb::GarbageBlock>> = BTreeMap::new();
        for block in garbage {
            let presence = self.calls.places.borrow().disks.presence(BlockServiceId(block.block_service));
            match (presence, self.host_of(block.block_service)) {
                (Presence::Gone, _) => erased.push(forgotten(&block, Bytes::new())),
                (_, Some(host)) => by_host.entry(host).or_default().push(block),
                (_, None) => {}
            }
        }
        for (host, blocks) in by_host {
            let erase = |block: &pb::GarbageBlock| pb::EraseBlock {
                block_service: block.block_service,
                block: block.block,
                certificate: block.certificate.clone(),
            };
            let header = Some(request_header(&self.calls.port.cluster, self.calls.port.time(), true));
            let request = pb::EraseBlocksRequest { header, blocks: blocks.iter().map(erase).collect() };
            let parts = vec![encode(&request)];
            let reply = self.calls.port.call(host, Rpc::EraseBlocks, parts, BLOCKS_TIMEOUT).await;
            let Some(reply) = reply.and_then(|parts| decode::<pb::EraseBlocksReply>(&parts)) else {
                continue;
            };
            for (block, result) in blocks.iter().zip(reply.results) {
                if let Some(pb::proven_block::Result::Proof(proof)) = result.result {
                    erased.push(forgotten(block, proof));
                }
            }
        }
        erased
    }
}

fn blocks_of(span: &pb::Span) -> impl Iterator<Item = &pb::Block> {
    span.blocks.iter().flat_map(|blocks| &blocks.blocks)
}

fn place(block: &pb::Block) -> Place {
    (BlockServiceId(block.block_service), BlockId(block.block))
}

fn forgotten(block: &pb::GarbageBlock, proof: Bytes) -> pb::ErasedBlock {
    pb::ErasedBlock { file: block.file, block_service: block.block_service, block: block.block, proof }
}
