//! Erasing what nobody needs any more: blocks that were replaced, of files that were purged, left by writers.

use std::time::Duration;

use eggs_client::ClientError;
use eggs_daemon::registry::RegistryCallError;
use eggs_janitor_core::{Disks, Presence};
use eggs_proto::{BlockServiceId, InodeId, ShardId, pb};
use futures_util::stream::{self, StreamExt};
use pb::JanitorTaskKind::JanitorTaskGarbage as Garbage;

use crate::context::Context;

/// Blocks in one page.
const PAGE: u32 = 2048;
/// Shards that are looked at at the same time.
const SHARDS_IN_FLIGHT: usize = 4;
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Where nothing is to be erased it is looked less often, in steps up to this many intervals: a cluster at rest is to rest.
const AT_REST: u32 = 16;
/// After something was replaced: what else is replaced meanwhile goes together.
const GATHER: Duration = Duration::from_secs(2);

pub(crate) async fn run(context: &Context) {
    let interval = context.settings.garbage_interval.max(INTERVAL_MIN);
    let (mut wait, mut waited) = (interval, 0);
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = context.garbage.notified() => tokio::time::sleep(GATHER.min(interval)).await,
        }
        context.until_it_works().await;
        let shards =
            stream::iter(ShardId::all()).map(|shard| async move { (shard, collect(context, shard).await) });
        let mut shards = shards.buffer_unordered(SHARDS_IN_FLIGHT);
        let (mut erased, mut waiting) = (0, 0);
        while let Some((shard, result)) = shards.next().await {
            match result {
                Ok((went, wait)) => (erased, waiting) = (erased + went, waiting + wait),
                Err(error) => tracing::debug!(%shard, %error, "garbage not collected yet"),
            }
        }
        if std::mem::replace(&mut waited, waiting) != waiting && waiting > 0 {
            tracing::info!(
                blocks = waiting,
                "what nobody needs on read-only disks is erased when they take writes"
            );
        }
        wait = if erased > 0 { interval } else { (wait * 2).min(interval * AT_REST) };
        if erased > 0 {
            tracing::info!(blocks = erased, "erased what nobody needs");
            metrics::counter!("eggs_janitor_erased_blocks_total").increment(erased);
            context.board.update(Garbage, 0, context.now(), |task| {
                task.spans_done += erased;
                task.state = format!("{} blocks erased since it began", task.spans_done);
            });
        }
    }
}

/// All garbage of a shard; how many blocks went, and how many wait for disks that are read-only.
async fn collect(context: &Context, shard: ShardId) -> Result<(u64, u64), ClientError> {
    let (mut after, mut went, mut waiting) = (InodeId::NULL, 0, 0);
    loop {
        let page = context.client.garbage_of_shard(shard, after, PAGE).await?;
        let Some(last) = page.blocks.last() else { return Ok((went, waiting)) };
        after = InodeId(last.file);
        let more = page.more;
        let disks = match disks_of(context, &page.blocks).await {
            Ok(disks) => disks,
            Err(error) => {
                tracing::debug!(%shard, %error, "garbage not collected yet: which disks there are is not known");
                return Ok((went, waiting));
            }
        };
        let sorted = Sorted::of(page.blocks, &disks);
        waiting += sorted.read_only;
        let erased = erase(context, sorted).await;
        went += erased.len() as u64;
        if !erased.is_empty() {
            context.client.forget_garbage(shard, erased).await?;
        }
        if !more {
            return Ok((went, waiting));
        }
    }
}

/// The disks that these blocks are judged by. One that is not known may be gone for good, or newer than the map here: a map
/// that is asked for after the blocks were listed has every disk they may be on.
async fn disks_of(context: &Context, blocks: &[pb::GarbageBlock]) -> Result<Disks, RegistryCallError> {
    let disks = context.disks();
    let all = blocks.iter().all(|block| disks.knows(BlockServiceId(block.block_service)));
    if all { Ok(disks) } else { Ok(Disks::of(&context.registry.map(false).await?)) }
}

/// Garbage, by what can be done about it now.
#[derive(Debug, Default)]
struct Sorted {
    /// On disks that are gone: there is nothing to erase.
    gone: Vec<pb::ErasedBlock>,
    ask: Vec<(pb::GarbageBlock, pb::ErasedBlock)>,
    /// Blocks on disks that erase nothing now. Those on disks that are away wait too.
    read_only: u64,
}

impl Sorted {
    fn of(blocks: Vec<pb::GarbageBlock>, disks: &Disks) -> Sorted {
        let mut sorted = Sorted::default();
        for block in blocks {
            let done = pb::ErasedBlock {
                file: block.file,
                block_service: block.block_service,
                block: block.block,
                proof: bytes::Bytes::new(),
            };
            let service = BlockServiceId(block.block_service);
            match disks.presence(service) {
                Presence::Gone => sorted.gone.push(done),
                Presence::Away => {}
                Presence::Here if disks.get(service).is_some_and(|disk| disk.read_only) => {
                    sorted.read_only += 1;
                }
                Presence::Here => sorted.ask.push((block, done)),
            }
        }
        sorted
    }
}

/// Erases what can be reached.
async fn erase(context: &Context, sorted: Sorted) -> Vec<pb::ErasedBlock> {
    let Sorted { gone: mut erased, ask: asked, .. } = sorted;
    let requests = asked.iter().map(|(block, _)| pb::EraseBlock {
        block_service: block.block_service,
        block: block.block,
        certificate: block.certificate.clone(),
    });
    let proofs = context.client.erase_blocks(requests.collect()).await;
    for ((_, done), proof) in asked.into_iter().zip(proofs) {
        match proof {
            Ok(proof) => erased.push(pb::ErasedBlock { proof, ..done }),
            Err(why) => {
                tracing::debug!(block_service = %BlockServiceId(done.block_service), why, "block not erased yet");
            }
        }
    }
    erased
}

#[cfg(test)]
mod tests {
    use eggs_janitor_core::Disk;
    use eggs_proto::flags::{DECOMMISSIONED, LOST, STALE};

    use super::*;

    #[test]
    fn a_read_only_disk_is_not_asked_to_erase() {
        let disk = |flags, read_only| Disk {
            storage_class: 2,
            failure_domain: "a".to_owned(),
            flags,
            capacity_bytes: 0,
            available_bytes: 0,
            read_only,
        };
        let disks = [(1, 0, false), (2, 0, true), (3, STALE, false), (4, LOST | DECOMMISSIONED, true)];
        let disks = disks.map(|(id, flags, read_only)| (BlockServiceId(id), disk(flags, read_only)));
        let block = |block_service| pb::GarbageBlock { block_service, ..pb::GarbageBlock::default() };
        let disks: Disks = disks.into_iter().collect();
        let sorted = Sorted::of([0, 1, 2, 2, 3, 4, 5].map(block).to_vec(), &disks);
        let services =
            |blocks: &[pb::ErasedBlock]| blocks.iter().map(|b| b.block_service).collect::<Vec<_>>();
        let asked: Vec<_> = sorted.ask.iter().map(|(_, done)| done.clone()).collect();
        assert_eq!((services(&asked), services(&sorted.gone), sorted.read_only), (vec![1], vec![0, 4, 5], 2));
    }
}
