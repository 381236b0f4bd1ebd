//! One span: its copies are placed, read or rebuilt, written, and swapped in (JA-3).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use eggs_client::{ClientError, Placement, Refusal, Span};
use eggs_janitor_core::spread::{is_under_spread, step};
use eggs_janitor_core::{Need, SpanKey};
use eggs_proto::limits::BLOCKS_PER_SPAN_MAX;
use eggs_proto::{BlockId, BlockServiceId, InodeId, pb};

use crate::context::Context;

/// A block that cannot be written is placed elsewhere so often, before the span waits for the next round.
const TRIES: usize = 3;
/// How long blocks are read that a repair needs: hosts may restart meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);
/// Of a span that has lost too much: its blocks are asked for once, and no longer than this. Most cannot be had, and there
/// may be many such spans.
const PATIENCE_LOST: Duration = Duration::from_secs(5);

/// Blocks known to be missing or damaged although their disk is here.
pub(crate) type Bad = BTreeSet<(BlockServiceId, BlockId)>;

/// What became of a span.
#[derive(Debug, Default)]
pub(crate) struct Fixed {
    /// Blocks replaced, with the block service each was on.
    pub replaced: Vec<(BlockServiceId, BlockId)>,
    /// Of one block.
    pub block_bytes: u64,
    /// More blocks are gone than the parity makes up for.
    pub lost: bool,
}

impl Fixed {
    pub fn bytes(&self) -> u64 {
        self.block_bytes * self.replaced.len() as u64
    }
}

/// Makes what is lost anew and copies what is to move. The span is asked for now: it may have changed since it was found.
pub(crate) async fn fix(context: &Context, key: SpanKey, bad: &Bad) -> Result<Fixed, ClientError> {
    let disks = context.disks();
    replace(context, key, |span| Wanted { need: Need::of(span, &disks, bad), only: Vec::new() }).await
}

/// Moves the span's blocks off a disk, to some of `only`.
pub(crate) async fn relieve(
    context: &Context,
    key: SpanKey,
    from: BlockServiceId,
    only: &[u64],
) -> Result<Fixed, ClientError> {
    let disks = context.disks();
    let wanted = |span: &Span| Wanted { need: Need::to_leave(span, &disks, from), only: only.to_vec() };
    replace(context, key, wanted).await
}

/// Moves blocks of the span to failure domains that have fewer of them, one after the other, until nothing makes it less
/// under-spread (JA-8); and whether it still is.
pub(crate) async fn spread(context: &Context, key: SpanKey, bad: &Bad) -> Result<(Fixed, bool), ClientError> {
    let (mut all, mut under_spread) = (Fixed::default(), false);
    for _ in 0..=BLOCKS_PER_SPAN_MAX {
        let disks = context.disks();
        let wanted = |span: &Span| {
            under_spread = is_under_spread(span, &disks);
            let step = step(span, &disks, bad);
            step.map(|step| Wanted { need: step.need, only: step.to.iter().map(|id| id.0).collect() })
                .unwrap_or_default()
        };
        let fixed = replace(context, key, wanted).await?;
        if fixed.replaced.is_empty() {
            break;
        }
        all.block_bytes = fixed.block_bytes;
        all.replaced.extend(fixed.replaced);
    }
    Ok((all, under_spread))
}

/// What is to be done about a span.
#[derive(Default)]
struct Wanted {
    need: Need,
    /// Where blocks may go; empty: wherever the shard places them.
    only: Vec<u64>,
}

async fn replace(
    context: &Context,
    key: SpanKey,
    mut wanted: impl FnMut(&Span) -> Wanted,
) -> Result<Fixed, ClientError> {
    // Services that could not be written to: of the others the shard knows.
    let mut avoid: BTreeSet<u64> = BTreeSet::new();
    let (mut cannot_be_read, mut replaced) = (false, Vec::new());
    for attempt in 1.. {
        let Some(span) = context.client.span_of(key.file, key.offset).await? else {
            return Ok(Fixed::default());
        };
        let Wanted { need, only } = wanted(&span);
        let lost = need.lost();
        // Of a span that has lost too much it is tried all the same: a disk that is not to be read may give its blocks.
        // What is there can be moved even when the rest cannot be read.
        let steps = need.steps(cannot_be_read);
        let Some(most) = steps.first().map(Vec::len) else {
            return Ok(Fixed { replaced, block_bytes: need.block_bytes, lost: cannot_be_read });
        };
        context.repair.take(need.block_bytes * most as u64).await;
        let began = Instant::now();
        let placed = place(context, key.file, &span, steps, &avoid, &only).await;
        // What there is no room for costs those nothing that there is room for.
        let moving = placed.as_ref().map_or(0, |(moved, _)| moved.len());
        context.repair.give_back(need.block_bytes * (most - moving) as u64);
        let (moved, placement) = placed?;
        let all = moved.len() == most;
        let swapped = match write_all(context, key.file, &span, &placement, &need).await {
            Ok(proofs) => {
                let swap = pb::SwapBlocks { eden: placement.file, cookie: placement.cookie, proofs };
                let swapped = context.client.swap_blocks(key.file.shard(), vec![swap]).await?;
                swapped.into_iter().next().unwrap_or(Ok(())).map_err(Failed::Span)
            }
            Err(failed) => Err(failed),
        };
        context.repair.rest(began.elapsed()).await;
        match swapped {
            Ok(()) => {
                context.garbage.notify_one();
                replaced.extend(moved);
                // If there was no room for the others and still is none, that is said of the span.
                if all {
                    return Ok(Fixed { replaced, block_bytes: need.block_bytes, lost: cannot_be_read });
                }
            }
            Err(failed) => {
                let ours = [(placement.file, placement.cookie)];
                if let Err(error) = context.client.abandon_placements(key.file.shard(), &ours).await {
                    tracing::debug!(%error, "copies not abandoned; their deadline will");
                }
                match failed {
                    Failed::Block(service, why) if attempt < TRIES => {
                        tracing::warn!(file = %key.file, block_service = %BlockServiceId(service), why, "copy not written; placing it elsewhere");
                        avoid.insert(service);
                    }
                    Failed::Block(service, why) => {
                        let what = format!("{}: {why}", BlockServiceId(service));
                        return Err(ClientError::WriteFailed { path: format!("inode {}", key.file), what });
                    }
                    Failed::Span(error) if !cannot_be_read && is_unreadable(&error, lost) => {
                        cannot_be_read = true;
                    }
                    Failed::Span(error) => return Err(error),
                }
            }
        }
    }
    Ok(Fixed::default())
}

enum Failed {
    /// A block service does not take its copy.
    Block(u64, String),
    Span(ClientError),
}

/// Too few of a span's blocks are to be had. `lost`: so it was known, and that hosts do not answer says no more.
fn is_unreadable(error: &ClientError, lost: bool) -> bool {
    match error {
        // Others than those reported are damaged too.
        ClientError::DataLost { .. } => true,
        ClientError::Unreachable { .. } => lost,
        _ => false,
    }
}

/// Places copies for the first of the steps that there is room for; and which blocks they are of.
async fn place(
    context: &Context,
    file: InodeId,
    span: &Span,
    steps: Vec<Vec<u32>>,
    avoid: &BTreeSet<u64>,
    only: &[u64],
) -> Result<(Vec<(BlockServiceId, BlockId)>, Placement), ClientError> {
    let mut steps = steps.into_iter().peekable();
    while let Some(indexes) = steps.next() {
        let replaced = blocks_of(span, &indexes);
        let placing = pb::PlaceReplacements {
            file: file.0,
            offset: span.offset,
            indexes,
            blocks: replaced.iter().map(|(_, block)| block.0).collect(),
            avoid: avoid.iter().copied().collect(),
            only: only.to_vec(),
        };
        let placed = context.client.place_replacements(file.shard(), vec![placing]).await?;
        match placed.into_iter().next() {
            Some(Err(error)) if error.refusal() == Some(Refusal::NoSpace) && steps.peek().is_some() => {}
            Some(placed) => return Ok((replaced, placed?)),
            None => break,
        }
    }
    Err(ClientError::Invalid("nothing was placed".to_owned()))
}

fn blocks_of(span: &Span, indexes: &[u32]) -> Vec<(BlockServiceId, BlockId)> {
    let blocks = span.blocks.as_ref().map_or(&[][..], |blocks| &blocks.blocks);
    let at = |&index: &u32| blocks.get(index as usize);
    indexes
        .iter()
        .filter_map(at)
        .map(|block| (BlockServiceId(block.block_service), BlockId(block.block)))
        .collect()
}

/// One block after the other: so a span never has more than one in memory, however many it has lost.
async fn write_all(
    context: &Context,
    file: InodeId,
    span: &Span,
    placement: &Placement,
    need: &Need,
) -> Result<Vec<bytes::Bytes>, Failed> {
    let (block_bytes, patience) = (need.block_bytes, if need.lost() { Duration::ZERO } else { PATIENCE });
    let mut proofs = Vec::with_capacity(placement.blocks.len());
    for placed in &placement.blocks {
        let _memory = context.repair.memory(block_bytes).await;
        let began = Instant::now();
        let reading = context.client.read_block(file, span, placed.index as usize, patience);
        let pieces = if need.lost() { within(PATIENCE_LOST, reading).await } else { reading.await };
        let pieces = pieces.map_err(Failed::Span)?;
        let read = began.elapsed();
        let written = context.client.write_placed(placed, pieces).await;
        proofs.push(written.map_err(|why| Failed::Block(placed.block_service, why))?);
        record(block_bytes, read, began.elapsed());
    }
    Ok(proofs)
}

/// Who does not answer in time does not answer.
async fn within<T>(
    time: Duration,
    reading: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let silent = |_| Err(ClientError::Unreachable { tried: "block services".to_owned(), after: time });
    tokio::time::timeout(time, reading).await.unwrap_or_else(silent)
}

fn record(bytes: u64, read: Duration, all: Duration) {
    metrics::counter!("eggs_janitor_repaired_blocks_total").increment(1);
    metrics::counter!("eggs_janitor_repaired_bytes_total").increment(bytes);
    metrics::histogram!("eggs_janitor_read_seconds").record(read.as_secs_f64());
    metrics::histogram!("eggs_janitor_repair_seconds").record(all.as_secs_f64());
}

/// Of many blocks, how many each block service has.
pub(crate) fn by_service(blocks: &[(BlockServiceId, BlockId)]) -> BTreeMap<BlockServiceId, u64> {
    let mut counts = BTreeMap::new();
    for (service, _) in blocks {
        *counts.entry(*service).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_span_that_has_lost_too_much_is_not_waited_for() {
        let moment = Duration::from_millis(1);
        let silent = within(moment, std::future::pending::<Result<(), ClientError>>()).await;
        let lost = ClientError::DataLost {
            file: InodeId(1),
            path: String::new(),
            offset: 0,
            missing: String::new(),
        };
        let silent = silent.unwrap_err();
        assert!(is_unreadable(&silent, true) && !is_unreadable(&silent, false), "its hosts may be back");
        assert!(is_unreadable(&lost, true) && is_unreadable(&lost, false));
        assert!(!is_unreadable(&ClientError::Invalid(String::new()), true));
    }
}
