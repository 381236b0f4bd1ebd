//! Reads everything a file has, every block and all parity, and checks it against everything known of it.
//!
//! Memory: two rounds of [`ROUND_BYTES`] of one span.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use eggs_client_core::crc::Crc;
use eggs_client_core::read::{BadBlock, Damage, Fetch, FetchFailure, take_bytes};
use eggs_client_core::span::{Body, StoredBlock, StoredSpan, check_page};
use eggs_client_core::verify::{VerifySpan, Wrong};
use eggs_proto::{BlockId, BlockServiceId, InodeId};
use futures_util::future::join_all;
use tokio::time::sleep;

use crate::Client;
use crate::error::{ClientError, Result};

/// Bytes fetched at once of all blocks of a span together.
const ROUND_BYTES: usize = 16 << 20;
/// A block service that does not answer is asked so often, with pauses between.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);

/// Something wrong with a file.
#[derive(Debug, Clone)]
pub struct Finding {
    /// Where its span begins; none: it is about the whole file.
    pub span: Option<u64>,
    /// Which block of the span, where it is, and its id; none: it is about the whole span.
    pub block: Option<(usize, BlockServiceId, BlockId)>,
    /// "missing", "corrupt", "unreachable", "parity", "crc", "lost".
    pub kind: &'static str,
    /// For people.
    pub message: String,
}

/// What a verification came to.
#[derive(Debug, Clone, Default)]
pub struct Verified {
    pub findings: Vec<Finding>,
    /// Of the file.
    pub bytes: u64,
    pub spans: u64,
    pub blocks: u64,
    /// Read from block services, parity too.
    pub block_bytes: u64,
    /// Some of its bytes cannot be had any more.
    pub lost: bool,
}

impl Client {
    /// Verifies a file. `report`: the registry is told of blocks that are missing or damaged, so that they are
    /// repaired. `progress` hears the bytes of the file verified so far.
    ///
    /// # Errors
    /// Only when the metadata cannot be had: what is wrong with the file is in the findings.
    pub async fn verify(
        &self,
        file: InodeId,
        report: bool,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Verified> {
        let metadata = self.stat_inode(file).await?;
        if !metadata.is_file() {
            return Err(ClientError::Invalid(format!("inode {file} is not a file")));
        }
        let mut verified = Verified::default();
        let spans = check_page(self.spans(file).await?, 0, false, metadata.size, true);
        let spans = match spans {
            Ok(spans) => spans,
            Err(error) => {
                verified.lost = true;
                verified.note(None, None, "crc", error.to_string());
                return Ok(verified);
            }
        };
        let mut sum = Crc::default();
        for span in spans {
            sum = sum.then(Crc::new(span.crc, span.size.into()));
            let span = Arc::new(span);
            verified.spans += 1;
            match &span.body {
                Body::Zeros if span.crc != Crc::of_zeros(span.size.into()).value => {
                    verified.note(Some(&span), None, "crc", "its CRC is not that of zeros".to_owned());
                }
                Body::Inline(bytes) if crc32fast::hash(bytes) != span.crc => {
                    verified.lost = true;
                    verified.note(Some(&span), None, "crc", "its inline bytes are corrupt".to_owned());
                }
                Body::Zeros | Body::Inline(_) => {}
                Body::Blocks { .. } => self.verify_span(file, &span, report, &mut verified).await,
            }
            verified.bytes = span.end();
            progress(verified.bytes);
        }
        if Some(sum.value) != metadata.crc {
            let expected = metadata.crc.unwrap_or_default();
            let words = format!("the file's CRC is {expected:#010x}, that of its spans {:#010x}", sum.value);
            verified.note(None, None, "crc", words);
        }
        Ok(verified)
    }

    async fn verify_span(
        &self,
        file: InodeId,
        span: &Arc<StoredSpan>,
        report: bool,
        verified: &mut Verified,
    ) {
        let (Some(mut machine), Body::Blocks { blocks, .. }) = (VerifySpan::new(span.clone()), &span.body)
        else {
            return;
        };
        let layout = machine.layout();
        let cell = layout.cell_size();
        let step = (ROUND_BYTES / (layout.blocks() * cell)).max(1);
        let mut given_up = vec![false; blocks.len()];
        let mut damaged: Vec<Option<Damage>> = vec![None; blocks.len()];
        verified.blocks += blocks.len() as u64;
        for first in (0..layout.stripes()).step_by(step) {
            let stripes = first..layout.stripes().min(first + step);
            let fetches = blocks.iter().enumerate().map(|(n, block)| {
                let skip = given_up[n];
                let stripes = stripes.clone();
                async move {
                    if skip { None } else { Some(self.verify_fetch(n, block, cell, stripes).await) }
                }
            });
            let mut pieces: Vec<Option<VecDeque<Bytes>>> = Vec::with_capacity(blocks.len());
            for (n, fetched) in join_all(fetches).await.into_iter().enumerate() {
                let found = match fetched {
                    None => None,
                    Some(Ok(found)) => {
                        verified.block_bytes += (stripes.len() * cell) as u64;
                        Some(VecDeque::from(found))
                    }
                    Some(Err(failure)) => {
                        given_up[n] = !matches!(failure, FetchFailure::Damaged(Damage::Corrupt));
                        if let FetchFailure::Damaged(damage) = failure {
                            verified.damaged(span, n, &blocks[n], damage, &mut damaged);
                        } else {
                            verified.note(
                                Some(span),
                                Some((n, &blocks[n])),
                                "unreachable",
                                words_of(&failure),
                            );
                        }
                        None
                    }
                };
                pieces.push(found);
            }
            for _ in stripes {
                let cells =
                    pieces.iter_mut().map(|block| block.as_mut().map(|block| take_bytes(block, cell)));
                machine.stripe(&cells.collect::<Vec<_>>());
            }
        }
        for wrong in machine.end() {
            verified.wrong(span, blocks, wrong, &mut damaged);
        }
        for (index, damage) in damaged.into_iter().enumerate() {
            if let (true, Some(damage)) = (report, damage) {
                let StoredBlock { service, block, .. } = blocks[index];
                self.shared.report(file, &BadBlock { index, service, block, damage });
            }
        }
    }

    async fn verify_fetch(
        &self,
        index: usize,
        block: &StoredBlock,
        cell: usize,
        stripes: Range<usize>,
    ) -> Result<Vec<Bytes>, FetchFailure> {
        let fetch = Fetch {
            id: 0,
            index,
            service: block.service,
            block: block.block,
            offset: (stripes.start * cell) as u32,
            length: (stripes.len() * cell) as u32,
        };
        for _ in 1..TRIES {
            match self.shared.fetch_block(fetch).await {
                Err(FetchFailure::Unreachable(_)) => sleep(PAUSE).await,
                answer => return answer,
            }
        }
        self.shared.fetch_block(fetch).await
    }
}

fn words_of(failure: &FetchFailure) -> String {
    match failure {
        FetchFailure::Damaged(Damage::Missing) => "missing".to_owned(),
        FetchFailure::Damaged(Damage::Corrupt) => "corrupt".to_owned(),
        FetchFailure::Refused(why) | FetchFailure::Unreachable(why) => why.clone(),
    }
}

impl Verified {
    fn note(
        &mut self,
        span: Option<&StoredSpan>,
        block: Option<(usize, &StoredBlock)>,
        kind: &'static str,
        message: String,
    ) {
        let block = block.map(|(n, block)| (n, block.service, block.block));
        self.findings.push(Finding { span: span.map(|span| span.offset), block, kind, message });
    }

    /// Tells of a bad block once.
    fn damaged(
        &mut self,
        span: &StoredSpan,
        n: usize,
        block: &StoredBlock,
        damage: Damage,
        damaged: &mut [Option<Damage>],
    ) {
        if damaged[n].replace(damage).is_none() {
            let (kind, words) = match damage {
                Damage::Missing => ("missing", "the block service does not have it"),
                Damage::Corrupt => ("corrupt", "it is not what was written"),
            };
            self.note(Some(span), Some((n, block)), kind, words.to_owned());
        }
    }

    fn wrong(
        &mut self,
        span: &StoredSpan,
        blocks: &[StoredBlock],
        wrong: Wrong,
        damaged: &mut [Option<Damage>],
    ) {
        match wrong {
            Wrong::Cell { block, .. } => {
                self.damaged(span, block, &blocks[block], Damage::Corrupt, damaged);
            }
            Wrong::Block { block } => {
                let words = "the CRC kept of it is not that of its cells".to_owned();
                self.note(Some(span), Some((block, &blocks[block])), "crc", words);
            }
            Wrong::Parity { stripe, block } => {
                let words = format!("stripe {stripe}: it is not the parity (or copy) of the data");
                self.note(Some(span), Some((block, &blocks[block])), "parity", words);
            }
            Wrong::Lost { stripe } => {
                self.lost = true;
                self.note(Some(span), None, "lost", format!("stripe {stripe}: too few blocks are right"));
            }
            Wrong::Span { found } => {
                let words = format!("its bytes have the CRC {found:#010x}, not {:#010x}", span.crc);
                self.note(Some(span), None, "crc", words);
            }
        }
    }
}
