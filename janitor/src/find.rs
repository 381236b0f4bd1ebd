//! What needs repair: spans with blocks on some disks, and spans with blocks that somebody has found bad.

use std::collections::{BTreeMap, BTreeSet};

use eggs_client::{BlockVerdict, ClientError, Refusal, Span};
use eggs_janitor_core::{Disk, Disks, Presence, SpanKey};
use eggs_proto::{BlockId, BlockServiceId, InodeId, ShardId, pb};
use futures_util::stream::{self, StreamExt};

use crate::context::{Context, PAGE};
use crate::fix::Bad;

/// Files whose spans are asked for at the same time.
pub(crate) const FILES_IN_FLIGHT: usize = 16;

/// What did not answer in a round. It does not keep the rest from being asked; that there was such a thing is said at the end.
#[derive(Debug, Default)]
pub(crate) struct Unanswered {
    /// Not asked again in this round: each question costs all of a deadline.
    silent: BTreeSet<ShardId>,
    first: Option<ClientError>,
}

impl Unanswered {
    fn is_silent(&self, shard: ShardId) -> bool {
        self.silent.contains(&shard)
    }

    /// The answer, if it is one.
    pub fn note<T>(&mut self, shard: ShardId, answer: Result<T, ClientError>) -> Option<T> {
        answer.map_err(|error| self.failed(shard, error)).ok()
    }

    fn failed(&mut self, shard: ShardId, error: ClientError) {
        // One that refuses something is there for the rest.
        if error.refusal().is_none() {
            self.silent.insert(shard);
        }
        self.first.get_or_insert(error);
    }

    pub fn first(&self) -> Option<&ClientError> {
        self.first.as_ref()
    }

    pub fn result(self) -> Result<(), ClientError> {
        self.first.map_or(Ok(()), Err)
    }
}

/// Goes through the files that have blocks on a disk; `found` is told each span. Returns the files in writing, or left by
/// their writers, that have blocks there (they go by their deadlines); `None`: not every shard has told all of its files.
pub(crate) async fn on_disk(
    context: &Context,
    service: BlockServiceId,
    unanswered: &mut Unanswered,
    mut found: impl FnMut(SpanKey, &Span),
) -> Option<u64> {
    let mut unpublished = Some(0);
    for shard in ShardId::all() {
        let of_shard = match unanswered.is_silent(shard) {
            true => None,
            false => {
                let told = on_disk_of_shard(context, shard, service, &mut found).await;
                unanswered.note(shard, told)
            }
        };
        unpublished = unpublished.zip(of_shard).map(|(all, more)| all + more);
    }
    unpublished
}

async fn on_disk_of_shard(
    context: &Context,
    shard: ShardId,
    service: BlockServiceId,
    found: &mut impl FnMut(SpanKey, &Span),
) -> Result<u64, ClientError> {
    let (mut after, mut unpublished) = (InodeId::NULL, 0);
    loop {
        let page = context.client.files_of_service(shard, service.0, after, PAGE).await?;
        let Some(last) = page.files.last() else { return Ok(unpublished) };
        after = InodeId(last.file);
        unpublished += page.files.iter().filter(|file| !file.published).count() as u64;
        let files = page.files.iter().filter(|file| file.published).map(|file| InodeId(file.file));
        let spans = stream::iter(files.collect::<Vec<_>>())
            .map(|file| async move { (file, context.client.spans(file).await) });
        let mut spans = spans.buffer_unordered(FILES_IN_FLIGHT);
        while let Some((file, spans)) = spans.next().await {
            for span in present(spans)? {
                if has_block_on(&span, service) {
                    found(SpanKey { file, offset: span.offset }, &span);
                }
            }
        }
        if !page.more {
            return Ok(unpublished);
        }
    }
}

/// A file that was purged meanwhile has no spans.
pub(crate) fn present(spans: Result<Vec<Span>, ClientError>) -> Result<Vec<Span>, ClientError> {
    match spans {
        Err(error) if error.refusal() == Some(Refusal::NotFound) => Ok(Vec::new()),
        spans => spans,
    }
}

pub(crate) fn has_block_on(span: &Span, service: BlockServiceId) -> bool {
    span.blocks.iter().flat_map(|blocks| &blocks.blocks).any(|block| block.block_service == service.0)
}

/// What was reported, looked at.
#[derive(Debug, Default)]
pub(crate) struct Reported {
    /// Really bad, …
    pub bad: Bad,
    /// … in these spans.
    pub spans: BTreeMap<SpanKey, (Span, Vec<pb::BadBlock>)>,
    /// Right after all, or nobody's any more.
    pub forget: Vec<pb::BadBlock>,
}

/// Looks at blocks that were reported, as far as they can be looked at now.
pub(crate) async fn reported(
    context: &Context,
    disks: &Disks,
    reports: Vec<pb::BadBlock>,
    unanswered: &mut Unanswered,
) -> Reported {
    let mut result = Reported::default();
    let (mut suspects, mut expect) = (Vec::new(), Vec::new());
    for (file, reports) in to_look_at(disks, reports, &mut result.forget) {
        if unanswered.is_silent(file.shard()) {
            continue;
        }
        // Without a file nobody can say which span it is of; the next scrub finds it again.
        let spans = if file.is_file() { present(context.client.spans(file).await) } else { Ok(Vec::new()) };
        let Some(spans) = unanswered.note(file.shard(), spans) else { continue };
        for report in reports {
            match spans.iter().find_map(|span| block_of(span, &report).map(|block| (span, block))) {
                None => result.forget.push(report),
                Some((span, block)) => {
                    expect.push(expected(span, block));
                    suspects.push((file, span.clone(), report));
                }
            }
        }
    }
    // Together: the disks look at the same time, and one that is silent costs one wait.
    let verdicts = context.client.check_blocks(expect).await;
    for ((file, span, report), verdict) in suspects.into_iter().zip(verdicts) {
        match verdict {
            BlockVerdict::Right => result.forget.push(report),
            BlockVerdict::Missing | BlockVerdict::Corrupt => {
                result.bad.insert((BlockServiceId(report.block_service), BlockId(report.block)));
                let key = SpanKey { file, offset: span.offset };
                result.spans.entry(key).or_insert_with(|| (span, Vec::new())).1.push(report);
            }
            // It is asked again later.
            BlockVerdict::Refused(_) | BlockVerdict::Unknown(_) => {}
        }
    }
    result
}

/// Reports of blocks on disks that are here, by file. Of a disk that is gone all blocks are repaired: forget them; one that
/// is away is waited for, or not known here yet. Those of a disk that was forgotten went with it.
fn to_look_at(
    disks: &Disks,
    reports: Vec<pb::BadBlock>,
    forget: &mut Vec<pb::BadBlock>,
) -> BTreeMap<InodeId, Vec<pb::BadBlock>> {
    let mut files: BTreeMap<InodeId, Vec<pb::BadBlock>> = BTreeMap::new();
    for report in reports {
        match disks.get(BlockServiceId(report.block_service)).map(Disk::presence) {
            Some(Presence::Gone) => forget.push(report),
            Some(Presence::Away) | None => {}
            Some(Presence::Here) => files.entry(InodeId(report.file)).or_default().push(report),
        }
    }
    files
}

fn block_of<'a>(span: &'a Span, report: &pb::BadBlock) -> Option<&'a pb::Block> {
    let mut blocks = span.blocks.iter().flat_map(|blocks| &blocks.blocks);
    blocks.find(|block| block.block_service == report.block_service && block.block == report.block)
}

/// What is to be found where a block is.
pub(crate) fn expected(span: &Span, block: &pb::Block) -> pb::ExpectedBlock {
    let size = block_bytes(span);
    pb::ExpectedBlock { block_service: block.block_service, block: block.block, size, crc: block.crc }
}

/// Of each of its blocks.
pub(crate) fn block_bytes(span: &Span) -> u32 {
    span.blocks.as_ref().map_or(0, |blocks| blocks.stripes.saturating_mul(blocks.cell_size))
}

/// The disks that are to be emptied and are not, those that cannot be read first.
pub(crate) fn to_empty(disks: &Disks, empty: &BTreeSet<BlockServiceId>) -> Vec<BlockServiceId> {
    let mut all: Vec<BlockServiceId> = disks.to_be_emptied().filter(|id| !empty.contains(id)).collect();
    all.sort_by_key(|&id| (disks.presence(id) != Presence::Gone, id));
    all
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use eggs_proto::flags::{DECOMMISSIONED, STALE};

    use super::*;

    #[test]
    fn a_shard_that_is_silent_is_asked_once_and_the_others_all_the_same() {
        let mut unanswered = Unanswered::default();
        let silent = || ClientError::Unreachable { tried: "s:1".to_owned(), after: Duration::ZERO };
        let mut asked = Vec::new();
        for _disk in 0..2 {
            for shard in [ShardId(1), ShardId(2)] {
                if !unanswered.is_silent(shard) {
                    asked.push(shard.0);
                    unanswered.note(shard, if shard.0 == 1 { Err(silent()) } else { Ok(()) });
                }
            }
        }
        assert_eq!(asked, [1, 2, 2]);
        assert!(matches!(unanswered.result(), Err(ClientError::Unreachable { .. })), "and it is said");
    }

    #[test]
    fn reports_of_disks_that_are_away_wait_for_them() {
        let disk = |flags| Disk {
            storage_class: 2,
            failure_domain: "a".to_owned(),
            flags,
            capacity_bytes: 0,
            available_bytes: 0,
            read_only: false,
        };
        let disks: Disks = [(1, 0), (2, STALE), (3, STALE | DECOMMISSIONED)]
            .map(|(id, flags)| (BlockServiceId(id), disk(flags)))
            .into_iter()
            .collect();
        let report = |service| pb::BadBlock { block_service: service, block: 7, file: 9, kind: 1 };
        let mut forget = Vec::new();
        let files = to_look_at(&disks, [1, 2, 3, 4].map(report).to_vec(), &mut forget);
        assert_eq!(files, BTreeMap::from([(InodeId(9), vec![report(1)])]));
        assert_eq!(forget, [report(3)]);
    }
}
