//! Blocks and contents of published files are replaced, as the janitor does; and by clients, to see what comes of several who
//! do it at once.

use std::sync::Arc;

use bytes::Bytes;
use eggs_client_core::read::ReadSpan;
use eggs_client_core::span::StoredSpan;
use eggs_client_core::write::WriteBlock;
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, ServiceError, ShardError, pb};
use rand::RngCore;

use super::calls::{Calls, refusal};
use super::files::{FileError, one, other_policies, policies};
use super::workload::Workload;
use crate::bug::Bug;
use crate::history::Outcome;
use crate::kernel::{MILLISECOND, SECOND};
use crate::nodes::decode;

impl Calls {
    /// Replaces blocks of a published span by copies elsewhere. The answer of PlaceReplacements comes first, so whoever
    /// gets that far knows that the blocks were the span's then: `placed` is called. `outrun`: the file's contents may be swapped
    /// between the copying and its end.
    pub async fn replace_blocks(
        &self,
        file: InodeId,
        span: &pb::Span,
        indexes: &[u32],
        until: u64,
        placed: impl FnOnce(),
        outrun: Option<&pb::StoredFile>,
    ) -> Result<(), FileError> {
        let wrong = |error: &dyn std::fmt::Display| FileError::Wrong(format!("span of {file}: {error}"));
        let stored = Arc::new(StoredSpan::from_wire(span.clone()).map_err(|error| wrong(&error))?);
        let there = span.blocks.as_ref().ok_or_else(|| wrong(&"no blocks"))?;
        let block = |index: &u32| there.blocks.get(*index as usize).map_or(0, |block| block.block);
        let op = Op::PlaceReplacements(pb::PlaceReplacements {
            file: file.0,
            offset: span.offset,
            indexes: indexes.to_vec(),
            blocks: indexes.iter().map(block).collect(),
            avoid: self.unwritable(),
            only: Vec::new(),
        });
        let eden = self.eden(file, op, until).await?;
        placed();
        match self.write_copies(&stored, there, &eden).await {
            Ok(proofs) => {
                // Who repairs may stand still, and come back as if nothing had been.
                if self.port.chance(25) {
                    self.port.sleep(self.port.below(2000) as u64 * MILLISECOND).await;
                }
                if let Some(stored) = outrun
                    && self.port.chance(40)
                    && let Err(error @ FileError::Wrong(_)) = self.replace_contents(stored, until).await
                {
                    return Err(error);
                }
                let swap = pb::SwapBlocks { eden: eden.file, cookie: eden.cookie, proofs };
                let result = one(self.write(file.shard(), vec![Op::SwapBlocks(swap)], until).await?)?;
                match refusal(&result) {
                    None => Ok(()),
                    Some(error) => {
                        self.abandon(&eden, until).await?;
                        Err(FileError::Refused(error, result.time))
                    }
                }
            }
            Err(why) => {
                self.abandon(&eden, until).await?;
                Err(FileError::Blocks(why))
            }
        }
    }

    fn unwritable(&self) -> Vec<u64> {
        let places = self.places.borrow();
        places.disks.iter().filter(|(_, disk)| !disk.takes_blocks()).map(|(id, _)| id.0).collect()
    }

    async fn write_copies(
        &self,
        span: &Arc<StoredSpan>,
        blocks: &pb::Blocks,
        eden: &pb::EdenReply,
    ) -> Result<Vec<Bytes>, String> {
        let mut proofs = Vec::new();
        for placed in &eden.blocks {
            if self.port.cluster.bug == Some(Bug::SwapUnproven) && self.port.chance(30) {
                proofs.push(Bytes::new());
                continue;
            }
            let (index, stripes) = (placed.index as usize, 0..blocks.stripes as usize);
            let turn = self.port.below(16);
            let mut read = ReadSpan::block(Arc::clone(span), index, stripes, |id| self.readable(id), turn);
            let bytes = Bytes::from(self.drive(&mut read).await?);
            if (bytes.len(), crc32fast::hash(&bytes)) != (placed.size as usize, placed.crc) {
                return Err(format!("block {index} is not what it was"));
            }
            proofs.push(self.write_placed(placed, bytes).await?);
        }
        Ok(proofs)
    }

    async fn write_placed(&self, placed: &pb::PlacedBlock, bytes: Bytes) -> Result<Bytes, String> {
        let block = WriteBlock::placed(placed, 1);
        let tag = self.send_pieces(&block, vec![bytes]).ok_or("nowhere")?;
        let (_, parts) = self.port.any(&[tag]).await;
        match parts.and_then(|parts| decode::<pb::WriteBlockReply>(&parts)).and_then(|reply| reply.result) {
            Some(pb::write_block_reply::Result::Proof(proof)) => Ok(proof),
            Some(pb::write_block_reply::Result::Error(error)) => Err(error.message),
            None => Err("no answer".to_owned()),
        }
    }

    /// Writes what the file holds once more, cut in another way, and swaps it in.
    async fn replace_contents(&self, file: &pb::StoredFile, until: u64) -> Result<(), FileError> {
        let inode = InodeId(file.file);
        let contents = self.read_file(inode, file.size, until).await?;
        if crc32fast::hash(&contents) != file.crc {
            return Err(FileError::Wrong(format!("{inode} was read and has another CRC")));
        }
        let policies = if self.port.chance(50) { policies() } else { other_policies() };
        let abandon = self.port.chance(10).then_some(1);
        let attributes = pb::NewAttributes::default();
        let written = self.write_spans(inode, attributes, &contents, &policies, abandon, until).await?;
        let Some(written) = written else { return Ok(()) };
        let (eden, cookie) = (written.eden.file, written.eden.cookie);
        let swap = pb::SwapContents { file: file.file, eden, cookie, certify: written.certify };
        let result = one(self.write(inode.shard(), vec![Op::SwapContents(swap)], until).await?)?;
        refusal(&result).map_or(Ok(()), |error| Err(FileError::Refused(error, result.time)))
    }

    /// Published files of a shard after one, in order.
    pub async fn files_after(
        &self,
        shard: eggs_proto::ShardId,
        after_file: u64,
        limit: u32,
        until: u64,
    ) -> Result<pb::ListFilesReply, FileError> {
        let op = Read::ListFiles(pb::ListFiles { after_file, limit });
        match self.shard(shard, op, None, until).await? {
            Ok(ShardAnswer::ListFiles(reply)) => Ok(reply),
            Ok(other) => Err(FileError::Wrong(format!("ListFiles answered {other:?}"))),
            Err(error) => Err(FileError::Refused(error, 0)),
        }
    }
}

impl Workload {
    /// A file of a random shard, whoever made it, living or dead.
    async fn any_file(&self, calls: &Calls, until: u64) -> Result<Option<pb::StoredFile>, FileError> {
        let moving = self.common.moving.borrow().last().copied().filter(|_| self.port().chance(60));
        if let Some(file) = moving {
            let files = calls.files_after(file.shard(), file.0 - 1, 1, until).await?.files;
            return Ok(files.into_iter().find(|found| found.file == file.0));
        }
        let shard = eggs_proto::ShardId(self.port().below(self.common.shards) as u8);
        let files = calls.files_after(shard, 0, 0, until).await?.files;
        let chosen = files.len().checked_sub(1).map(|last| self.port().below(last + 1));
        Ok(chosen.and_then(|at| files.into_iter().nth(at)))
    }

    /// Moves a block or two of a random span elsewhere.
    pub(super) async fn move_blocks(&self) {
        let calls = self.calls.with_secret();
        let id = self.begin("move blocks".to_owned(), Vec::new());
        let until = self.port().now() + 20 * SECOND;
        let outcome = self.try_move(&calls, until).await;
        self.end_moved(id, outcome);
    }

    async fn try_move(&self, calls: &Calls, until: u64) -> Result<(), FileError> {
        let Some(file) = self.any_file(calls, until).await? else { return Ok(()) };
        let inode = InodeId(file.file);
        let op = Read::GetSpans(pb::GetSpans { file: file.file, offset: 0, limit: 0 });
        let spans = match calls.shard(inode.shard(), op, None, until).await? {
            Ok(ShardAnswer::GetSpans(reply)) => reply.spans,
            Ok(other) => return Err(FileError::Wrong(format!("GetSpans answered {other:?}"))),
            Err(error) => return Err(FileError::Refused(error, 0)),
        };
        let in_blocks: Vec<&pb::Span> = spans.iter().filter(|span| span.blocks.is_some()).collect();
        if in_blocks.is_empty() {
            return Ok(());
        }
        let span = in_blocks[self.port().below(in_blocks.len())];
        let blocks = span.blocks.as_ref().map_or(0, |blocks| blocks.blocks.len()) as u32;
        let first = self.port().random(RngCore::next_u32) % blocks.max(1);
        let mut indexes = vec![first];
        if self.port().chance(30) && blocks > 1 {
            indexes.push((first + 1) % blocks);
        }
        self.common.moving.borrow_mut().push(inode);
        let moved = calls.replace_blocks(inode, span, &indexes, until, || {}, Some(&file)).await;
        self.common.moving.borrow_mut().retain(|other| *other != inode);
        moved
    }

    /// Another cut for a random file.
    pub(super) async fn restripe(&self) {
        let calls = self.calls.with_secret();
        let id = self.begin("restripe".to_owned(), Vec::new());
        let until = self.port().now() + 20 * SECOND;
        let outcome = match self.any_file(&calls, until).await {
            Ok(Some(file)) if file.size > 0 => calls.replace_contents(&file, until).await,
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        self.end_moved(id, outcome);
    }

    fn end_moved(&self, id: u32, outcome: Result<(), FileError>) {
        match outcome {
            Ok(()) => self.end(id, Outcome::Acknowledged, Vec::new()),
            Err(FileError::GaveUp | FileError::Blocks(_)) => self.gave_up(id),
            // Purged, changed by another swap, or nowhere to go.
            Err(FileError::Refused(
                ShardError::NotFound
                | ShardError::Changed
                | ShardError::NoBlockServices
                | ShardError::Expired,
                _,
            )) => self.end(id, Outcome::Refused, Vec::new()),
            Err(FileError::Refused(error, _)) if error.retry() != eggs_proto::Retry::Never => {
                self.end(id, Outcome::Refused, Vec::new());
            }
            Err(FileError::Refused(error, _)) => self.fail(id, &format!("refused with {error:?}")),
            Err(FileError::Wrong(what)) => self.fail(id, &what),
        }
    }
}
