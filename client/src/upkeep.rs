//! What the janitor asks of the shards: which files and blocks there are, copies placed and swapped in, what was
//! looked at, what was erased. It all needs the cluster secret.

use bytes::Bytes;
use eggs_client_core::layout::Storage;
use eggs_proto::limits::{BATCH_OPS_MAX, CLASS_EMPTY};
use eggs_proto::pb::{shard_reply, shard_request, write_op, write_result};
use eggs_proto::{InodeId, ServiceError, ShardError, ShardId, pb};

use crate::error::{ClientError, Result};
use crate::stream::FileStream;
use crate::types::{CreateOptions, Span};
use crate::writer::FileWriter;
use crate::{Client, Directory};

/// A file of copies that are on their way to becoming a span's blocks.
pub use pb::EdenReply as Placement;

impl Client {
    /// Published files of a shard after `after`, living or dead, in the order of their ids.
    pub async fn files_of_shard(
        &self,
        shard: ShardId,
        after: InodeId,
        limit: u32,
    ) -> Result<pb::ListFilesReply> {
        let op = shard_request::Op::ListFiles(pb::ListFiles { after_file: after.0, limit });
        match self.ask_shard(shard, op).await? {
            shard_reply::Result::ListFiles(page) => {
                let ids = page.files.iter().map(|file| file.file);
                follows(after, ids, page.more)?;
                Ok(page)
            }
            _ => Err(ClientError::other_reply("files")),
        }
    }

    /// Files of a shard that have blocks on a block service.
    pub async fn files_of_service(
        &self,
        shard: ShardId,
        service: u64,
        after: InodeId,
        limit: u32,
    ) -> Result<pb::ListServiceFilesReply> {
        let list = pb::ListServiceFiles { block_service: service, after_file: after.0, limit };
        match self.ask_shard(shard, shard_request::Op::ListServiceFiles(list)).await? {
            shard_reply::Result::ListServiceFiles(page) => {
                follows(after, page.files.iter().map(|file| file.file), page.more)?;
                Ok(page)
            }
            _ => Err(ClientError::other_reply("files of a block service")),
        }
    }

    /// Blocks of a shard that nobody needs any more, of files after `after`.
    pub async fn garbage_of_shard(
        &self,
        shard: ShardId,
        after: InodeId,
        limit: u32,
    ) -> Result<pb::ListGarbageReply> {
        let op = shard_request::Op::ListGarbage(pb::ListGarbage { after_file: after.0, limit });
        match self.ask_shard(shard, op).await? {
            shard_reply::Result::ListGarbage(page) => {
                if page.more && page.blocks.last().is_none_or(|last| last.file <= after.0) {
                    return Err(ClientError::protocol("a page of garbage does not follow the one before"));
                }
                Ok(page)
            }
            _ => Err(ClientError::other_reply("garbage")),
        }
    }

    /// The span that holds a byte of a file; `None`: there is none, or the file is gone.
    pub async fn span_of(&self, file: InodeId, offset: u64) -> Result<Option<Span>> {
        let op = shard_request::Op::GetSpans(pb::GetSpans { file: file.0, offset, limit: 1 });
        match self.shared.shard_read(file.shard(), op).await? {
            Ok(shard_reply::Result::GetSpans(page)) => Ok(page.spans.into_iter().next()),
            Ok(_) => Err(ClientError::other_reply("spans")),
            Err(error) if error.code == ShardError::NotFound.code() => Ok(None),
            Err(error) => Err(ClientError::from_shard(&error, format_args!("inode {file}"))),
        }
    }

    /// Places copies of blocks of spans of files of one shard; each with its answer.
    pub async fn place_replacements(
        &self,
        shard: ShardId,
        places: Vec<pb::PlaceReplacements>,
    ) -> Result<Vec<Result<Placement>>> {
        let files: Vec<u64> = places.iter().map(|place| place.file).collect();
        let ops = places.into_iter().map(write_op::Op::PlaceReplacements).collect();
        let results = self.write_ops(shard, ops).await?;
        let placed = |(result, file): (pb::WriteResult, u64)| match result.result {
            Some(write_result::Result::Eden(placement)) => Ok(placement),
            other => Err(refusal(other, file)),
        };
        Ok(results.into_iter().zip(files).map(placed).collect())
    }

    /// The copies take the place of what they copy.
    pub async fn swap_blocks(&self, shard: ShardId, swaps: Vec<pb::SwapBlocks>) -> Result<Vec<Result<()>>> {
        let edens: Vec<u64> = swaps.iter().map(|swap| swap.eden).collect();
        let ops = swaps.into_iter().map(write_op::Op::SwapBlocks).collect();
        let results = self.write_ops(shard, ops).await?;
        Ok(results.into_iter().zip(edens).map(|(result, eden)| done(result, eden)).collect())
    }

    /// Copies that will not be swapped in.
    pub async fn abandon_placements(&self, shard: ShardId, placements: &[(u64, u64)]) -> Result<()> {
        let abandon =
            |&(file, cookie): &(u64, u64)| write_op::Op::AbandonEden(pb::AbandonEden { file, cookie });
        self.write_ops(shard, placements.iter().map(abandon).collect()).await?;
        Ok(())
    }

    /// Every block of these files was looked at, and was right. Those that are gone meanwhile are no error.
    pub async fn record_scrub(&self, shard: ShardId, files: Vec<u64>) -> Result<()> {
        let ops = files
            .chunks(BATCH_OPS_MAX)
            .map(|files| write_op::Op::RecordScrub(pb::RecordScrub { files: files.to_vec() }));
        for result in self.write_ops(shard, ops.collect()).await? {
            done(result, 0)?;
        }
        Ok(())
    }

    /// These blocks are erased: the proofs of it.
    pub async fn forget_garbage(&self, shard: ShardId, blocks: Vec<pb::ErasedBlock>) -> Result<()> {
        let ops = blocks
            .chunks(BATCH_OPS_MAX)
            .map(|blocks| write_op::Op::ForgetGarbage(pb::ForgetGarbage { blocks: blocks.to_vec() }));
        for result in self.write_ops(shard, ops.collect()).await? {
            done(result, 0)?;
        }
        Ok(())
    }

    /// Begins to store the contents of a file anew, as the policies of the directory have it. The directory must be of the
    /// file's shard.
    pub async fn rewrite(&self, file: InodeId, directory: &Directory) -> Result<Rewrite> {
        let reader = self.open_inode(file).await?;
        let options = CreateOptions { size_hint: Some(reader.size()), ..CreateOptions::default() };
        let writer = FileWriter::nameless(directory, format!("inode {file}, rewritten"), &options);
        Ok(Rewrite { file, stream: reader.stream(0), writer })
    }

    async fn ask_shard(&self, shard: ShardId, op: shard_request::Op) -> Result<shard_reply::Result> {
        let reply = self.shared.shard_read(shard, op).await?;
        reply.map_err(|error| ClientError::from_shard(&error, format_args!("shard {shard}")))
    }

    async fn write_ops(&self, shard: ShardId, ops: Vec<write_op::Op>) -> Result<Vec<pb::WriteResult>> {
        if ops.is_empty() {
            return Ok(Vec::new());
        }
        let ops = ops.into_iter().map(|op| pb::WriteOp { op: Some(op) }).collect();
        self.shared.shard_write(shard, ops).await
    }
}

/// A file that is being stored anew: at the pace of who reads and writes it. Dropped before its end, nothing has changed.
#[derive(Debug)]
pub struct Rewrite {
    file: InodeId,
    stream: FileStream,
    writer: FileWriter,
}

impl Rewrite {
    /// The next bytes of the file; `None`: that was all.
    pub async fn read(&mut self) -> Result<Option<Bytes>> {
        self.stream.next().await
    }

    /// Stores what was read.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write(bytes).await
    }

    /// Puts what was written in the place of what the file has now; its bytes. Readers never notice.
    pub async fn finish(self) -> Result<u64> {
        self.writer.replace(self.file).await
    }
}

pub(crate) fn done(result: pb::WriteResult, file: u64) -> Result<()> {
    match result.result {
        Some(write_result::Result::Error(_)) | None => Err(refusal(result.result, file)),
        Some(_) => Ok(()),
    }
}

impl Directory {
    /// Spans that a new file of `size` bytes here would have.
    pub fn spans_to_store(&self, size: u64) -> u64 {
        size.div_ceil(u64::from(self.rules.span_bytes_max().max(1)))
    }

    /// Whether a new file here would be stored in other spans, with other parity, in another class or in other cells than
    /// one of these spans.
    pub fn would_store_otherwise(&self, spans: &[Span]) -> bool {
        let (last, max) = (spans.len().saturating_sub(1), self.rules.span_bytes_max());
        spans.iter().enumerate().any(|(n, span)| {
            let cut = if n == last { span.size > max } else { span.size != max };
            cut || match (&span.blocks, self.rules.storage(span.size)) {
                // Zeros are stored one way.
                (None, _) if span.storage_class == u32::from(CLASS_EMPTY) => false,
                (None, Ok(Storage::Inline)) => false,
                (Some(is), Ok(Storage::Blocks { layout, storage_class })) => {
                    span.storage_class != u32::from(storage_class)
                        || [is.data, is.parity, is.stripes, is.cell_size].map(|n| n as usize)
                            != [layout.data(), layout.parity(), layout.stripes(), layout.cell_size()]
                }
                _ => true,
            }
        })
    }
}

fn refusal(result: Option<write_result::Result>, file: u64) -> ClientError {
    match result {
        Some(write_result::Result::Error(error)) => {
            ClientError::from_shard(&error, format_args!("inode {}", InodeId(file)))
        }
        _ => ClientError::other_reply("write"),
    }
}

/// A page goes on where the one before ended.
fn follows(after: InodeId, ids: impl Iterator<Item = u64>, more: bool) -> Result<()> {
    let mut last = after.0;
    for id in ids {
        if id <= last {
            return Err(ClientError::protocol("a page of files does not follow the one before"));
        }
        last = id;
    }
    if more && last == after.0 {
        return Err(ClientError::protocol("an empty page of files, and more to come"));
    }
    Ok(())
}

/// Whether a write carries operations that only the janitor makes.
pub(crate) fn needs_secret(op: &shard_request::Op) -> bool {
    use shard_request::Op;
    use write_op::Op as Write;
    match op {
        Op::ListFiles(_) | Op::ListServiceFiles(_) | Op::ListGarbage(_) => true,
        Op::Write(write) => write.ops.iter().any(|op| {
            matches!(
                op.op,
                Some(
                    Write::PlaceReplacements(_)
                        | Write::SwapBlocks(_)
                        | Write::SwapContents(_)
                        | Write::RecordScrub(_)
                        | Write::ForgetGarbage(_)
                )
            )
        }),
        _ => false,
    }
}
