//! Many blocks in one request: written, fetched, checked, erased, each request at one host.
//!
//! What a host refuses or does not answer comes back as such, block by block: who asked has another way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_client_core::read::FetchFailure;
use eggs_client_core::retry::Backoff;
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb::{self, fetched_range, proven_block};
use eggs_proto::{BlockError, BlockServiceId, ServiceError};
use futures_util::{StreamExt, stream};
use tonic::{Code, Response, Status};

use crate::ask::status_words;
use crate::blocks::{client, fetch_failure, silent};
use crate::connection::{Peer, Shared, entropy};
use crate::error::block_error_words;

/// Bytes of blocks in one request or answer: with what is said of each, well below the limit of a message.
pub(crate) const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Blocks in one request.
const REQUEST_BLOCKS_MAX: usize = 1024;
/// Requests under way for one call.
const REQUESTS_IN_FLIGHT: usize = 4;
/// A host reads or erases blocks for this long before it must have answered.
const WORK_TIMEOUT: Duration = Duration::from_secs(30);
/// Blocks in one request that has them read where they are: they may be large, and all is to be done in that time.
const CHECKS_MAX: usize = 64;

const _: () = assert!(REQUEST_BYTES_MAX + REQUEST_BLOCKS_MAX * 128 <= MESSAGE_BYTES_MAX);

/// What a request is cut by.
struct Cut {
    bytes_max: usize,
    blocks_max: usize,
}

/// Why a block was not written with others.
pub enum NotWritten {
    /// There was too much to do, for as long as that is waited for.
    Busy(String),
    /// It may be written alone.
    Failed(String),
}

/// What a host did with a request to write.
enum Written {
    /// An answer for each block.
    Some(Vec<pb::ProvenBlock>),
    /// It has too much to do.
    None(pb::Error),
}

const BY_BYTES: Cut = Cut { bytes_max: REQUEST_BYTES_MAX, blocks_max: REQUEST_BLOCKS_MAX };

impl Shared {
    /// Writes whole blocks; the proof of each.
    pub async fn write_many(self: &Arc<Self>, blocks: Vec<pb::WholeBlock>) -> Vec<Result<Bytes, NotWritten>> {
        let about = |block: &pb::WholeBlock| (block.block_service, block.data.len());
        let write = |peer: Peer, blocks: Vec<pb::WholeBlock>| self.write_to(peer, blocks);
        let results = self.spread(blocks, about, &BY_BYTES, write).await;
        let proof = |result: pb::ProvenBlock| match &result.result {
            Some(proven_block::Result::Error(error)) if is_busy(error) => {
                Err(NotWritten::Busy(block_error_words(error)))
            }
            _ => proof_of(result).map_err(NotWritten::Failed),
        };
        results.into_iter().map(|result| result.map_err(NotWritten::Failed).and_then(proof)).collect()
    }

    /// Writes blocks of one host. Those it has too much to do for are sent again, many to a request as before: one by one
    /// they would be more to do.
    async fn write_to(
        self: &Arc<Self>,
        peer: Peer,
        blocks: Vec<pb::WholeBlock>,
    ) -> Result<Vec<pb::ProvenBlock>, String> {
        let (started, mut backoff) = (Instant::now(), Backoff::default());
        let mut results: Vec<pb::ProvenBlock> = blocks.iter().map(|_| pb::ProvenBlock::default()).collect();
        let mut left: Vec<usize> = (0..blocks.len()).collect();
        loop {
            let asked = left.iter().map(|&n| blocks[n].clone()).collect();
            match self.write_to_once(&peer, asked).await {
                Err(why) if left.len() == blocks.len() => return Err(why),
                // The others are written.
                Err(why) => {
                    tracing::debug!(blocks = left.len(), %why, "no answer to what is left of a request of many blocks");
                    let failed = |&n: &usize| results[n] = pb::ProvenBlock::default();
                    left.iter().for_each(failed);
                    return Ok(results);
                }
                Ok(Written::Some(answers)) => {
                    for (&n, answer) in left.iter().zip(answers) {
                        results[n] = answer;
                    }
                    left.retain(|&n| matches!(&results[n].result, Some(proven_block::Result::Error(error)) if is_busy(error)));
                }
                Ok(Written::None(busy)) => {
                    let refused = Some(proven_block::Result::Error(busy));
                    left.iter().for_each(|&n| results[n].result.clone_from(&refused));
                }
            }
            let pause = backoff.pause(entropy());
            let elapsed = started.elapsed() + pause;
            left.retain(|&n| elapsed <= self.busy_patience(BlockServiceId(blocks[n].block_service)));
            if left.is_empty() {
                return Ok(results);
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn write_to_once(&self, peer: &Peer, blocks: Vec<pb::WholeBlock>) -> Result<Written, String> {
        let (patience, asked) = (self.options.block_timeout, blocks.len());
        let request = pb::WriteBlocksRequest { header: Some(self.header()), blocks };
        let mut client = client(peer.bulk.clone());
        let reply = match tokio::time::timeout(patience, client.write_many(request)).await {
            Err(_) => return Err(silent(patience)),
            Ok(Err(status)) if status.code() == Code::ResourceExhausted => {
                let (code, message) = (BlockError::Busy.code(), status_words(&status));
                return Ok(Written::None(pb::Error { code, message, ..pb::Error::default() }));
            }
            Ok(Err(status)) => return Err(status_words(&status)),
            Ok(Ok(reply)) => reply.into_inner(),
        };
        self.observe(reply.header.as_ref());
        match reply.error {
            Some(error) if is_busy(&error) => Ok(Written::None(error)),
            Some(error) => Err(block_error_words(&error)),
            None if reply.results.len() != asked => Err("another number of answers".to_owned()),
            None => Ok(Written::Some(reply.results)),
        }
    }

    /// Fetches ranges of blocks.
    pub async fn fetch_many(
        self: &Arc<Self>,
        ranges: Vec<pb::BlockRange>,
    ) -> Vec<Result<Bytes, FetchFailure>> {
        let lengths: Vec<usize> = ranges.iter().map(|range| range.length as usize).collect();
        let about = |range: &pb::BlockRange| (range.block_service, range.length as usize);
        let fetch = |peer: Peer, ranges: Vec<pb::BlockRange>| async move {
            let request = pb::FetchBlocksRequest { header: Some(self.header()), ranges };
            let mut client = client(peer.bulk.clone());
            let reply = within(self.options.block_timeout, client.fetch_many(request)).await?;
            self.observe(reply.header.as_ref());
            refused(reply.error)?;
            Ok(reply.results)
        };
        let results = self.spread(ranges, about, &BY_BYTES, fetch).await;
        let data_of = |(result, length): (Result<pb::FetchedRange, String>, usize)| match result
            .map_err(FetchFailure::Unreachable)?
            .result
        {
            Some(fetched_range::Result::Data(data)) if data.len() == length => Ok(data),
            Some(fetched_range::Result::Error(error)) => Err(fetch_failure(&error)),
            _ => Err(FetchFailure::Unreachable("other bytes than asked for".to_owned())),
        };
        results.into_iter().zip(lengths).map(data_of).collect()
    }

    /// Has blocks read where they are.
    pub async fn check_many(
        self: &Arc<Self>,
        blocks: Vec<pb::ExpectedBlock>,
    ) -> Vec<Result<(), FetchFailure>> {
        let about = |block: &pb::ExpectedBlock| (block.block_service, block.size as usize);
        let check = |peer: Peer, blocks: Vec<pb::ExpectedBlock>| async move {
            let mut results: Vec<pb::CheckedBlock> = Vec::new();
            while results.len() < blocks.len() {
                let rest = blocks[results.len()..].to_vec();
                let request = pb::CheckBlocksRequest { header: Some(self.header()), blocks: rest };
                let mut client = client(peer.bulk.clone());
                let reply = within(WORK_TIMEOUT, client.check(request)).await?;
                self.observe(reply.header.as_ref());
                refused(reply.error)?;
                if reply.results.is_empty() || results.len() + reply.results.len() > blocks.len() {
                    return Err("an answer that says nothing".to_owned());
                }
                results.extend(reply.results);
            }
            Ok(results)
        };
        let cut = Cut { bytes_max: usize::MAX, blocks_max: CHECKS_MAX };
        let results = self.spread(blocks, about, &cut, check).await;
        let verdict =
            |result: Result<pb::CheckedBlock, String>| match result.map_err(FetchFailure::Unreachable)?.error
            {
                None => Ok(()),
                Some(error) => Err(fetch_failure(&error)),
            };
        results.into_iter().map(verdict).collect()
    }

    /// Erases blocks; the proof of each.
    pub async fn erase_many(self: &Arc<Self>, blocks: Vec<pb::EraseBlock>) -> Vec<Result<Bytes, String>> {
        let about = |block: &pb::EraseBlock| (block.block_service, 0);
        let erase = |peer: Peer, blocks: Vec<pb::EraseBlock>| async move {
            let request = pb::EraseBlocksRequest { header: Some(self.header()), blocks };
            let mut client = client(peer.bulk.clone());
            let reply = within(WORK_TIMEOUT, client.erase(request)).await?;
            self.observe(reply.header.as_ref());
            refused(reply.error)?;
            Ok(reply.results)
        };
        let results = self.spread(blocks, about, &BY_BYTES, erase).await;
        results.into_iter().map(|result| result.and_then(proof_of)).collect()
    }

    /// Sends each item to the host of its block service, many to a request; answers in the order of the items.
    async fn spread<I, R, F>(
        self: &Arc<Self>,
        items: Vec<I>,
        about: impl Fn(&I) -> (u64, usize),
        cut: &Cut,
        call: impl Fn(Peer, Vec<I>) -> F,
    ) -> Vec<Result<R, String>>
    where
        F: Future<Output = Result<Vec<R>, String>>,
    {
        let map = self.map();
        let mut answers: Vec<Option<Result<R, String>>> = items.iter().map(|_| None).collect();
        let mut hosts = BTreeMap::<Arc<str>, (Peer, Vec<(usize, I)>)>::new();
        for (n, item) in items.into_iter().enumerate() {
            match map.service(BlockServiceId(about(&item).0)) {
                None => answers[n] = Some(Err("not in the cluster map".to_owned())),
                Some(peer) => {
                    let host = hosts.entry(peer.address.clone());
                    host.or_insert_with(|| (peer.clone(), Vec::new())).1.push((n, item));
                }
            }
        }
        let requests = hosts.into_values().flat_map(|(peer, mut items)| {
            // A request that touches few disks costs few syncs.
            items.sort_by_key(|(_, item)| about(item).0);
            let requests = cut_up(items, cut, |item| about(item).1);
            requests.into_iter().map(move |items| (peer.clone(), items))
        });
        let asks: Vec<_> = requests
            .map(|(peer, items)| {
                let (places, items): (Vec<usize>, Vec<I>) = items.into_iter().unzip();
                let asking = call(peer, items);
                async move { (places, asking.await) }
            })
            .collect();
        let mut asks = stream::iter(asks).buffer_unordered(REQUESTS_IN_FLIGHT);
        let seen = map.fetched;
        while let Some((places, answer)) = asks.next().await {
            match answer {
                Ok(results) if results.len() == places.len() => {
                    for (n, result) in places.into_iter().zip(results) {
                        answers[n] = Some(Ok(result));
                    }
                }
                Ok(_) => {
                    places.iter().for_each(|&n| answers[n] = Some(Err("another number of answers".into())));
                }
                Err(why) => {
                    self.renew_soon(seen);
                    tracing::debug!(blocks = places.len(), %why, "no answer to a request of many blocks");
                    places.iter().for_each(|&n| answers[n] = Some(Err(why.clone())));
                }
            }
        }
        let missing = || Err("not asked".to_owned());
        answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }
}

fn cut_up<I>(items: Vec<(usize, I)>, cut: &Cut, bytes_of: impl Fn(&I) -> usize) -> Vec<Vec<(usize, I)>> {
    let mut requests: Vec<Vec<(usize, I)>> = Vec::new();
    let mut bytes = 0_usize;
    for item in items {
        let size = bytes_of(&item.1);
        match requests.last_mut() {
            Some(last) if last.len() < cut.blocks_max && bytes.saturating_add(size) <= cut.bytes_max => {
                bytes = bytes.saturating_add(size);
                last.push(item);
            }
            _ => {
                bytes = size;
                requests.push(vec![item]);
            }
        }
    }
    requests
}

async fn within<R>(
    patience: Duration,
    call: impl Future<Output = Result<Response<R>, Status>>,
) -> Result<R, String> {
    match tokio::time::timeout(patience, call).await {
        Err(_) => Err(silent(patience)),
        Ok(Err(status)) => Err(status_words(&status)),
        Ok(Ok(reply)) => Ok(reply.into_inner()),
    }
}

fn is_busy(error: &pb::Error) -> bool {
    BlockError::from_code(error.code) == Some(BlockError::Busy)
}

/// The whole request was.
fn refused(error: Option<pb::Error>) -> Result<(), String> {
    error.map_or(Ok(()), |error| Err(block_error_words(&error)))
}

fn proof_of(result: pb::ProvenBlock) -> Result<Bytes, String> {
    match result.result {
        Some(proven_block::Result::Proof(proof)) => Ok(proof),
        Some(proven_block::Result::Error(error)) => Err(block_error_words(&error)),
        None => Err("an answer that says nothing".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_cut_by_bytes_and_by_number() {
        let cut = Cut { bytes_max: 10, blocks_max: 3 };
        let sizes = |sizes: &[usize]| {
            let items = sizes.iter().copied().enumerate().collect();
            cut_up(items, &cut, |&size| size).iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[4, 4, 4, 1, 1, 1, 1]), [2, 3, 2]);
        assert_eq!(sizes(&[11, 11]), [1, 1], "what is too long alone goes alone");
        assert!(sizes(&[]).is_empty());
    }
}
