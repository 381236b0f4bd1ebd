//! Spreading: spans with blocks in one failure domain are counted, and those that can be spread better are (JA-8).
//!
//! A round goes over all spans of all shards, metadata only, and counts. Where something can move it goes round again
//! and moves what it finds, page by page; so it remembers no more than a page. It keeps nothing: a janitor that starts begins a
//! round. Repairs come first: while a disk is to be emptied nothing moves.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use eggs_client::{ClientError, Span};
use eggs_janitor_core::SpanKey;
use eggs_janitor_core::spread::{Tally, domains, step};
use eggs_proto::pb::JanitorTaskKind::JanitorTaskSpread as Spread;
use eggs_proto::{BlockId, BlockServiceId, InodeId, ShardId};
use futures_util::stream::{self, StreamExt};

use crate::context::{Context, PAGE};
use crate::find::{FILES_IN_FLIGHT, Unanswered, present};
use crate::fix::{self, Bad};

/// Between looks whether a round is due.
const LOOK: Duration = Duration::from_secs(1);
/// Disks of new failure domains come one after the other: a round begins when no domain has come or gone for so long.
const SETTLE: Duration = Duration::from_secs(5);
/// After a page, so many times as long as it took: shards are asked a quarter of the time. …
const REST: u32 = 3;
/// … But a shard that was silent need not be spared for long.
const REST_MAX: Duration = Duration::from_secs(5);

/// A set of failure domains, as [`domains`] has them.
type Domains = BTreeSet<(u32, String)>;

pub(crate) async fn run(context: &Context) {
    let interval = context.settings.spread_interval;
    if interval.is_zero() {
        std::future::pending::<()>().await;
    }
    let (mut seen, mut since) = (Domains::new(), Instant::now());
    // Of the last round: the domains it knew, when it ended, whether repairs kept it from moving something.
    let mut last: Option<(Domains, Instant, bool)> = None;
    loop {
        tokio::time::sleep(LOOK).await;
        context.until_it_works().await;
        let now = domains(&context.disks());
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        let is_due = match &last {
            None => !seen.is_empty(),
            Some((known, ended, postponed)) => {
                let settled = *known != seen && since.elapsed() >= SETTLE;
                settled || ended.elapsed() >= interval || (*postponed && !context.is_repairing())
            }
        };
        if is_due {
            let postponed = Round::default().go(context).await;
            last = Some((seen.clone(), Instant::now(), postponed));
        }
    }
}

#[derive(Debug, Default)]
struct Round {
    tally: Tally,
    /// Spans with blocks that could not be moved, and why the first of them.
    failed: u64,
    trouble: Option<ClientError>,
}

impl Round {
    /// Counts and moves; whether something was left for the repairs.
    async fn go(mut self, context: &Context) -> bool {
        let bad = reported(context).await;
        let (mut walk, mut disks) = (Walk::new(), context.disks());
        while walk.page(context, |_, span| self.tally.add(span, &disks, &bad)).await {
            disks = context.disks();
        }
        self.tell(context, &walk);
        metrics::gauge!("eggs_janitor_spans").set(self.tally.spans as f64);
        metrics::gauge!("eggs_janitor_under_spread_spans").set(self.tally.under_spread as f64);
        self.tally.movable > 0 && self.move_all(context, &bad).await
    }

    async fn move_all(&mut self, context: &Context, bad: &Bad) -> bool {
        let mut walk = Walk::new();
        loop {
            if context.is_repairing() || !context.works() {
                context
                    .board
                    .update(Spread, 0, context.now(), |task| task.state.push_str("; repairs come first"));
                return true;
            }
            let (mut keys, disks) = (Vec::new(), context.disks());
            let found = |key: SpanKey, span: &Span| keys.extend(step(span, &disks, bad).map(|_| key));
            if !walk.page(context, found).await {
                return false;
            }
            let moves = keys.into_iter().map(|key| async move {
                // What is left is found by the next round.
                if context.is_repairing() { None } else { Some((key, fix::spread(context, key, bad).await)) }
            });
            let mut moves = stream::iter(moves).buffer_unordered(context.settings.repairs_in_flight as usize);
            while let Some(moved) = moves.next().await {
                let Some((key, moved)) = moved else { continue };
                self.tally.movable = self.tally.movable.saturating_sub(1);
                match moved {
                    Ok((fixed, under_spread)) => {
                        let cured = u64::from(!under_spread);
                        self.tally.under_spread = self.tally.under_spread.saturating_sub(cured);
                        self.tally.movable_bytes = self.tally.movable_bytes.saturating_sub(fixed.block_bytes);
                        metrics::counter!("eggs_janitor_spread_blocks_total")
                            .increment(fixed.replaced.len() as u64);
                        metrics::gauge!("eggs_janitor_under_spread_spans")
                            .set(self.tally.under_spread as f64);
                        context
                            .board
                            .update(Spread, 0, context.now(), |task| task.bytes_done += fixed.bytes());
                    }
                    // It has changed meanwhile, or the disk that was free for it is not any more.
                    Err(error) => {
                        tracing::debug!(file = %key.file, offset = key.offset, %error, "span not spread");
                        self.failed += 1;
                        self.trouble.get_or_insert(error);
                    }
                }
                self.tell(context, &walk);
            }
        }
    }

    fn tell(&self, context: &Context, walk: &Walk) {
        let mut state = self.tally.to_string();
        if let Some(error) = &self.trouble {
            state.push_str(&format!("; {} wait for the next round: {error}", self.failed));
        } else if let Some(error) = walk.unanswered.first() {
            state.push_str(&format!("; not all were looked at: {error}"));
        }
        context.board.update(Spread, 0, context.now(), |task| {
            (task.spans_done, task.spans_total) =
                (self.tally.spans - self.tally.under_spread, self.tally.spans);
            task.bytes_total = task.bytes_done + self.tally.movable_bytes;
            task.state = state;
        });
    }
}

/// What readers and scrub have reported: that is repaired first, if it is so.
async fn reported(context: &Context) -> Bad {
    let reports = context.bad_blocks(Vec::new()).await.unwrap_or_else(|error| {
        tracing::debug!(%error, "what was reported is not known");
        Vec::new()
    });
    reports.iter().map(|report| (BlockServiceId(report.block_service), BlockId(report.block))).collect()
}

/// A walk over the spans of all published files.
#[derive(Debug)]
struct Walk {
    shards: VecDeque<ShardId>,
    /// Of the first of them, what was seen.
    after: InodeId,
    unanswered: Unanswered,
}

impl Walk {
    fn new() -> Walk {
        Walk { shards: ShardId::all().collect(), after: InodeId::NULL, unanswered: Unanswered::default() }
    }

    /// Shows the spans of one page of files; false: there was none any more. A shard that does not answer is left out.
    async fn page(&mut self, context: &Context, found: impl FnMut(SpanKey, &Span)) -> bool {
        let Some(&shard) = self.shards.front() else { return false };
        let began = Instant::now();
        let page = self.page_of_shard(context, shard, found).await;
        match self.unanswered.note(shard, page).flatten() {
            Some(last) => self.after = last,
            None => {
                self.shards.pop_front();
                self.after = InodeId::NULL;
            }
        }
        tokio::time::sleep((began.elapsed() * REST).min(REST_MAX)).await;
        true
    }

    /// The last file of the page, if others follow.
    async fn page_of_shard(
        &self,
        context: &Context,
        shard: ShardId,
        mut found: impl FnMut(SpanKey, &Span),
    ) -> Result<Option<InodeId>, ClientError> {
        let page = context.client.files_of_shard(shard, self.after, PAGE).await?;
        let last = page.files.last().map(|file| InodeId(file.file));
        // What is empty has no spans.
        let files = page.files.into_iter().filter(|file| file.size > 0).map(|file| InodeId(file.file));
        let spans = stream::iter(files).map(|file| async move { (file, context.client.spans(file).await) });
        let mut spans = spans.buffer_unordered(FILES_IN_FLIGHT);
        while let Some((file, spans)) = spans.next().await {
            for span in present(spans)? {
                found(SpanKey { file, offset: span.offset }, &span);
            }
        }
        Ok(last.filter(|_| page.more))
    }
}
