//! Single blocks, for who repairs: one read whole or computed from the others, one written elsewhere, many
//! checked, many erased.
//!
//! Memory: a block (at most 128 MiB; with the default policies 16 MiB) and two rounds of [`ROUND_BYTES`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use eggs_client_core::crc::{Crc, join};
use eggs_client_core::read::FetchFailure;
use eggs_client_core::span::{Body, StoredSpan};
use eggs_client_core::write::WriteBlock;
use eggs_proto::{InodeId, ShardError, pb};
use futures_util::stream::{self, StreamExt};

use crate::Client;
use crate::error::{ClientError, Refusal, Result};
use crate::reading::{Reading, Wanted};
use crate::types::Span;

/// Bytes fetched at once to compute a part of a block, from all blocks together.
const ROUND_BYTES: usize = 8 << 20;
const ROUNDS_IN_FLIGHT: usize = 2;

/// What is known of a block after it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockVerdict {
    /// It is there, and right.
    Right,
    /// Its block service has it no more.
    Missing,
    /// What is there is not what was written.
    Corrupt,
    /// Its block service cannot give it: the disk is lost, say.
    Refused(String),
    /// Nobody answered.
    Unknown(String),
}

impl From<Result<(), FetchFailure>> for BlockVerdict {
    fn from(checked: Result<(), FetchFailure>) -> BlockVerdict {
        use eggs_client_core::read::Damage;
        match checked {
            Ok(()) => BlockVerdict::Right,
            Err(FetchFailure::Damaged(Damage::Missing)) => BlockVerdict::Missing,
            Err(FetchFailure::Damaged(Damage::Corrupt)) => BlockVerdict::Corrupt,
            Err(FetchFailure::Refused(why)) => BlockVerdict::Refused(why),
            Err(FetchFailure::Unreachable(why)) => BlockVerdict::Unknown(why),
        }
    }
}

impl Client {
    /// One whole block of a span, in pieces: from where it is, or computed from the others. Every cell is checked
    /// against the span's CRCs. Block services that do not answer are tried again for `patience`.
    ///
    /// # Errors
    /// [`ClientError::DataLost`] when too few of the other blocks are there, [`ClientError::Unreachable`] when more may be
    /// on block services that do not answer.
    pub async fn read_block(
        &self,
        file: InodeId,
        span: &Span,
        index: usize,
        patience: Duration,
    ) -> Result<Vec<Bytes>> {
        let corrupt = |what: String| ClientError::Corrupt { file, path: format!("inode {file}"), what };
        let span = Arc::new(StoredSpan::from_wire(span.clone()).map_err(|error| corrupt(error.to_string()))?);
        let Body::Blocks { layout, blocks } = &span.body else {
            return Err(ClientError::Invalid("the span has no blocks".to_owned()));
        };
        let block = blocks.get(index).ok_or_else(|| ClientError::Invalid(format!("no block {index}")))?;
        let cell = layout.cell_size() as u64;
        if join(block.cell_crcs.iter().map(|&crc| Crc::new(crc, cell))).value != block.crc {
            return Err(corrupt(format!("block {index}: its CRC is not that of its cells")));
        }
        let stripes = layout.stripes();
        let step = (ROUND_BYTES / layout.stripe_size()).max(1);
        let rounds =
            (0..stripes).step_by(step).map(|from| Wanted::Block(index, from..stripes.min(from + step)));
        let reading = Reading { patience, ..Reading::new(self, file, &format!("inode {file}")) };
        let mut rounds = stream::iter(rounds.collect::<Vec<_>>())
            .map(|wanted| reading.read(&span, wanted))
            .buffered(ROUNDS_IN_FLIGHT);
        let mut pieces = Vec::new();
        while let Some(round) = rounds.next().await {
            let changed =
                || ClientError::refused(Refusal::Changed, ShardError::Changed, format!("inode {file}"));
            pieces.extend(round?.ok_or_else(changed)?);
        }
        Ok(pieces)
    }

    /// Writes a block where the shard has placed it; the proof, once it is durable.
    pub async fn write_placed(&self, placed: &pb::PlacedBlock, pieces: Vec<Bytes>) -> Result<Bytes, String> {
        let block = WriteBlock::placed(placed, 1);
        self.shared.write_block(&block, &pieces).await
    }

    /// Has blocks looked at where they are; in the order of the blocks.
    pub async fn check_blocks(&self, blocks: Vec<pb::ExpectedBlock>) -> Vec<BlockVerdict> {
        self.shared.check_many(blocks).await.into_iter().map(BlockVerdict::from).collect()
    }

    /// Erases blocks; the proof of each in their order, or why not.
    pub async fn erase_blocks(&self, blocks: Vec<pb::EraseBlock>) -> Vec<Result<Bytes, String>> {
        self.shared.erase_many(blocks).await
    }
}
