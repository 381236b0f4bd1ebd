//! Scrub: every block of every file is looked at where it is, once in a period.
//!
//! It goes round the shards. A file whose blocks were all right gets the time of it; a block that was not is reported as
//! a reader would, and repaired as those are. What lies on a disk that is away is looked at when it is back.

use std::time::{Duration, Instant};

use eggs_client::{BlockVerdict, ClientError, Span};
use eggs_janitor_core::scrub::{self, Round};
use eggs_janitor_core::{Disks, Presence};
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{BlockServiceId, InodeId, ShardId, Time, pb};
use futures_util::stream::{self, StreamExt};
use pb::JanitorTaskKind::JanitorTaskScrub as Scrub;

use crate::context::{Context, PAGE};
use crate::find::expected;

/// Blocks and bytes in one look: a host answers it in good time.
const BATCH_BLOCKS: usize = 64;
const BATCH_BYTES: u64 = 64 << 20;
const FILES_IN_FLIGHT: usize = 16;
/// Between rounds, at least and at most.
const ROUND_MIN: Duration = Duration::from_secs(1);
const ROUND_MAX: Duration = Duration::from_secs(3600);
/// Before the first one: a cluster that starts has other things to do.
const FIRST_MAX: Duration = Duration::from_secs(60);

/// A file that is being looked at.
struct File {
    id: u64,
    /// Blocks that are not known to be right.
    open: usize,
}

/// Blocks that are looked at together.
#[derive(Default)]
struct Batch {
    files: Vec<File>,
    /// With the index of its file.
    blocks: Vec<(usize, pb::ExpectedBlock)>,
    bytes: u64,
}

pub(crate) async fn run(context: &Context) {
    let period = context.settings.scrub_period;
    if period.is_zero() {
        std::future::pending::<()>().await;
    }
    let between = (period / 64).clamp(ROUND_MIN, ROUND_MAX);
    let mut wait = between.min(FIRST_MAX);
    let mut last = None;
    loop {
        tokio::time::sleep(wait).await;
        wait = between;
        context.until_it_works().await;
        let began = context.now();
        let mut round = Round::default();
        for shard in ShardId::all() {
            pace(context, period);
            if let Err(error) = shard_round(context, shard, period, &mut round).await {
                tracing::debug!(%shard, %error, "shard not scrubbed yet");
                wait = ROUND_MIN;
            }
            tell(context, &round, u64::from(shard.0) + 1, last);
        }
        if wait == between {
            last = Some(began);
        }
        tell(context, &round, 256, last);
        metrics::gauge!("eggs_janitor_scrub_oldest_seconds")
            .set(context.now().since(round.oldest).as_secs_f64());
    }
}

fn pace(context: &Context, period: Duration) {
    let stored =
        context.map.get().block_services.iter().fold(0u64, |sum, info| sum.saturating_add(info.used_bytes));
    let needed = scrub::pace(stored, period);
    let most = context.settings.scrub_rate.saturating_mul(1_000_000);
    context.scrub.set_rate(if most == 0 { needed } else { needed.min(most) });
}

/// The round in numbers: shards as spans, bytes looked at.
fn tell(context: &Context, round: &Round, shards: u64, last: Option<Time>) {
    let now = context.now();
    context.board.update(Scrub, 0, now, |task| {
        task.spans_done = shards;
        task.spans_total = 256;
        task.bytes_done = round.bytes_checked;
        task.bytes_total = 0;
        let ago = |at: Time| humantime::format_duration(Duration::from_secs(now.since(at).as_secs()));
        let oldest = match round.oldest.is_unset() {
            true => "no file is stored".to_owned(),
            false => format!("every file was looked at within {}", ago(round.oldest)),
        };
        task.state = match (shards, last) {
            (256, Some(_)) => format!("{} of {} files were due; {oldest}", round.files_checked, round.files),
            (256, None) => "a round that was not whole".to_owned(),
            _ => format!("shard {shards} of 256, {} files due so far", round.files_checked),
        };
        if round.blocks_bad > 0 {
            task.state.push_str(&format!("; {} bad blocks found", round.blocks_bad));
        }
    });
}

async fn shard_round(
    context: &Context,
    shard: ShardId,
    period: Duration,
    round: &mut Round,
) -> Result<(), ClientError> {
    let mut after = InodeId::NULL;
    loop {
        let page = context.client.files_of_shard(shard, after, PAGE).await?;
        let Some(last) = page.files.last() else { return Ok(()) };
        after = InodeId(last.file);
        let now = context.now();
        let mut due = Vec::new();
        for file in &page.files {
            let (scrubbed, created) = (Time(file.scrubbed_at), Time(file.created_at));
            if scrub::due(scrubbed, created, period, now) {
                due.push(InodeId(file.file));
            } else {
                round.pass(scrubbed.max(created));
            }
        }
        look(context, shard, due, round).await?;
        if !page.more {
            return Ok(());
        }
    }
}

/// Looks at files, some at a time.
async fn look(
    context: &Context,
    shard: ShardId,
    files: Vec<InodeId>,
    round: &mut Round,
) -> Result<(), ClientError> {
    let disks = context.disks();
    let spans = stream::iter(files).map(|file| async move { (file, context.client.spans(file).await) });
    let mut spans = spans.buffered(FILES_IN_FLIGHT);
    let mut batch = Batch::default();
    while let Some((file, spans)) = spans.next().await {
        match spans {
            Ok(spans) => batch.add(file, &spans, &disks),
            // Purged meanwhile, or cannot be read now: the next round sees it again.
            Err(error) => tracing::debug!(%file, %error, "file not scrubbed yet"),
        }
        if batch.blocks.len() >= BATCH_BLOCKS || batch.bytes >= BATCH_BYTES {
            batch.look(context, shard, round).await?;
        }
    }
    batch.look(context, shard, round).await
}

impl Batch {
    fn add(&mut self, file: InodeId, spans: &[Span], disks: &Disks) {
        let mut open = 0;
        for span in spans {
            for block in span.blocks.iter().flat_map(|blocks| &blocks.blocks) {
                open += 1;
                if disks.presence(BlockServiceId(block.block_service)) == Presence::Here {
                    let expected = expected(span, block);
                    self.bytes += u64::from(expected.size);
                    self.blocks.push((self.files.len(), expected));
                }
            }
        }
        self.files.push(File { id: file.0, open });
    }

    async fn look(
        &mut self,
        context: &Context,
        shard: ShardId,
        round: &mut Round,
    ) -> Result<(), ClientError> {
        let Batch { mut files, blocks, bytes } = std::mem::take(self);
        let mut bad = Vec::new();
        let (mut blocks, began) = (blocks.into_iter().peekable(), Instant::now());
        // A long file alone may be more than one look.
        while blocks.peek().is_some() {
            let part: Vec<(usize, pb::ExpectedBlock)> = blocks.by_ref().take(BATCH_BLOCKS).collect();
            let size = part.iter().map(|(_, block)| u64::from(block.size)).sum();
            context.scrub.take(size).await;
            let verdicts = context.client.check_blocks(part.iter().map(|(_, block)| *block).collect()).await;
            for ((file, block), verdict) in part.into_iter().zip(verdicts) {
                let kind = match verdict {
                    BlockVerdict::Right => {
                        files[file].open -= 1;
                        continue;
                    }
                    BlockVerdict::Missing => pb::BadBlockKind::BadBlockMissing,
                    BlockVerdict::Corrupt => pb::BadBlockKind::BadBlockCorrupt,
                    BlockVerdict::Refused(_) | BlockVerdict::Unknown(_) => continue,
                };
                bad.push(pb::BadBlock {
                    block_service: block.block_service,
                    block: block.block,
                    file: files[file].id,
                    kind: kind.into(),
                });
            }
        }
        context.scrub.rest(began.elapsed()).await;
        round.files_checked += files.len() as u64;
        round.bytes_checked += bytes;
        round.blocks_bad += bad.len() as u64;
        metrics::counter!("eggs_janitor_scrubbed_bytes_total").increment(bytes);
        if !bad.is_empty() {
            report(context, bad).await;
        }
        let right: Vec<u64> = files.iter().filter(|file| file.open == 0).map(|file| file.id).collect();
        let now = context.now();
        right.iter().for_each(|_| round.pass(now));
        context.client.record_scrub(shard, right).await
    }
}

async fn report(context: &Context, blocks: Vec<pb::BadBlock>) {
    for block in &blocks {
        let (id, service) = (eggs_proto::BlockId(block.block), BlockServiceId(block.block_service));
        tracing::warn!(block = %id, block_service = %service, file = %InodeId(block.file), "scrub found a bad block");
    }
    metrics::counter!("eggs_janitor_bad_blocks_total").increment(blocks.len() as u64);
    match context.registry.call(Op::ReportBlocks(pb::ReportBlocks { blocks })).await {
        Ok(_) => context.damage.notify_one(),
        // It has no time of a scrub: the next round finds it again.
        Err(error) => tracing::warn!(%error, "bad blocks that scrub found could not be reported yet"),
    }
}
